"""Under vmap: take the tasks' axis off every tensor, so that one launch does them all.

torch's foreach and fused operations have no batching rule, and a batched rule is a loop
over leaves. An elementwise rule needs neither: a task's axis is one more axis of the
leaf, and a hyperparameter that differs between tasks is a vector of scalars.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch._C._functorch as _functorch  # pyright: ignore[reportMissingImports]
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

from funcopt.execution import levels
from funcopt.execution.rule_call import RuleCall
from funcopt.types import Tensor

Run = Callable[[RuleCall, Sequence[Tensor]], Sequence[Tensor]]


def is_vmapped() -> bool:
    """Whether the innermost transform is vmap."""
    top = _functorch.peek_interpreter_stack()
    return top is not None and top.key() == _functorch.TransformType.Vmap


class TaskAxis:
    """The axis of the innermost vmap: taken off tensors, and put on again."""

    def __init__(self) -> None:
        interpreter: Any = retrieve_current_functorch_interpreter()
        self._level = interpreter.level()
        self.size: int = interpreter.batch_size()
        #: a context in which this vmap is not there
        self.together = interpreter.lower

    def off(self, x: Tensor) -> tuple[Tensor, int | None]:
        """The tensor of all tasks, and which axis is theirs; None if they share it."""
        return _functorch._unwrap_batched(levels.alive(x), self._level)

    def on(self, x: Tensor) -> Tensor:
        """Each task's own of a tensor that has the tasks in front."""
        return _functorch._add_batch_dim(x, 0, self._level)


def unbatched(run: Run, call: RuleCall, tensors: Sequence[Tensor]) -> list[Tensor]:
    """``run(call, tensors)`` inside vmap, by a call on stacked tensors outside of it."""
    tasks = TaskAxis()
    values, axes = zip(*map(tasks.off, tensors))
    with tasks.together():
        outputs, batched = stacked(run, call, values, axes, tasks.size)
    return [tasks.on(x) if b else x for x, b in zip(outputs, batched)]


def stacked(
    run: Run,
    call: RuleCall,
    tensors: Sequence[Tensor],
    axes: Sequence[int | None],
    size: int,
) -> tuple[list[Tensor], list[bool]]:
    """``run`` on tensors that have their tasks in front, and which outputs have them.

    ``axes`` tells where each tensor has its ``size`` tasks, None where it has none.
    Scalars become vectors as soon as one differs between tasks, or a gradient is made
    of them, which is each task's own.
    """
    streams = call.signature.input_streams
    parts = list(zip(tensors, streams, axes))
    own = (
        call.signature.tasks > 0
        or any(axis is not None for _, stream, axis in parts if not stream)
        or (call.signature.sums and not all(streams))
    )
    inner = max(call.signature.tasks, 1)

    def forward(x: Tensor, stream: bool, axis: int | None) -> Tensor:
        if not stream and not own:
            return x
        x = x.expand(size, *x.shape) if axis is None else x.movedim(axis, 0)
        if stream:
            x = x.flatten(0, 1) if call.signature.tasks else x
            return x.contiguous() if own else x  # a task is one piece of memory
        return x.reshape(size, -1).expand(size, inner).reshape(-1)

    def back(x: Tensor) -> Tensor:
        return x.unflatten(0, (size, call.signature.tasks)) if call.signature.tasks else x

    given = [forward(*part) for part in parts]
    outputs = run(call.with_tasks(size * inner if own else 0), given)
    batched = [stream or own for stream in call.signature.output_streams]
    return [back(x) if b else x for x, b in zip(outputs, batched)], batched
