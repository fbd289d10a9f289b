"""Mixed mode: an inner gradient that keeps nothing of second order for the way back.

Its backward is one forward-over-reverse pass. With g = ∇_θ L and a cotangent c, the
products cᵀ∂²L/∂θ² and cᵀ∂²L/∂θ∂η are, by symmetry, the derivatives of ∇_θ L and ∇_η L
along c: value and tangent go together through one forward and one backward of L.

On a CPU the gradient is made again instead, with a graph, and differentiated at once.
That takes as many products and the memory of one step too, but no forward derivatives,
many of which torch composes of small operations, slow there.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from funcopt.derivatives import MATH, SmoothLeaves, Trees, added
from funcopt.errors import ExecutionError
from funcopt.execution import concrete, levels, pullback
from funcopt.execution.outside import outside
from funcopt.inner.custom_vjp import CallContext, CustomVJP, distinct
from funcopt.inner.loss import InnerLoss
from funcopt.inner.rng_state import RngState, check_alike, drawing_again
from funcopt.types import Tensor, Tree

#: what a gradient of the loss gives, by name
_OUTPUTS = ("grads", "loss", "aux", "buffers")


def gradient(loss: InnerLoss, given: dict[str, Tree]) -> dict[str, Tree]:
    """``grads, loss, aux, buffers`` as of `InnerLoss.grad`, by its arguments' names."""
    call = _GradientCall(loss, given)
    values, others = call.inputs.split(given)
    found = _Gradient.apply(call, *values, *others)
    count = call.smooth_outputs
    return call.outputs.filled(found[:count], found[count:])


class _Gradient(CustomVJP):
    """The inner gradient, the loss, aux and buffers; only the inputs are saved."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)


class _GradientCall:
    """One call: the layout of its tensors, and the generators' states if it drew."""

    def __init__(self, loss: InnerLoss, given: dict[str, Tree]) -> None:
        self.loss = loss
        self.context = CallContext()
        self.inputs = SmoothLeaves(given)
        self.names = self.inputs.names()
        self.rng: RngState | None = None
        self.then: Tensor | None = None  #: the loss, to look at

    def forward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        rng = RngState(tensors)
        given = self._given(tensors)
        grads, (loss, aux, buffers) = self.loss.grad(**given)
        self.rng = rng if rng.has_advanced() else None
        seen = loss.detach()
        with outside():  # kept, and so of no level
            self.then = concrete.peek(seen)
        trees: Trees = dict(zip(_OUTPUTS, (grads, loss, aux, buffers)))
        self.outputs = SmoothLeaves(trees)
        values, others = self.outputs.split(trees)
        self.smooth_outputs = len(values)
        self.output_names = self.outputs.names()
        return distinct([*values, *others], tensors)

    def backward(
        self,
        saved: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
        wanted: Sequence[bool],
    ) -> list[Tensor | None]:
        values = list(saved[: len(self.names)])
        chosen = [i for i in range(len(values)) if wanted[i]]
        again: list[Tensor] = []  # the loss, unless nothing is asked of the step
        found = self._pull(values, saved, chosen, cotangents, again)
        with outside():
            now = concrete.peek(again[-1]) if again else None
            if self.then is not None and now is not None:
                check_alike(self.then[None], {0: now})
        spread = dict(zip(chosen, found))
        return [spread.get(i) for i in range(len(saved))]

    def _pull(
        self,
        values: list[Tensor],
        saved: Sequence[Tensor],
        chosen: list[int],
        cotangents: Sequence[Tensor | None],
        again: list[Tensor],
    ) -> list[Tensor | None]:
        if not by_forward(saved):
            with explained():
                return pullback.pull(
                    lambda smooth: self._outputs(smooth, saved, again),
                    values,
                    cotangents,
                    chosen,
                )
        by_name: dict[str, list[Tensor | None]] = {name: [] for name in _OUTPUTS}
        for name, cotangent in zip(self.output_names, cotangents):
            by_name[name].append(cotangent)
        return pull(
            lambda smooth: self._results(smooth, saved, again),
            values,
            [i for i, name in enumerate(self.names) if name == "params"],
            chosen,
            by_name["grads"],
            [*by_name["loss"], *by_name["aux"], *by_name["buffers"]],
        )

    def _given(self, tensors: Sequence[Tensor]) -> dict[str, Tree]:
        count = len(self.names)
        return self.inputs.filled(tensors[:count], tensors[count:])

    def _outputs(
        self, smooth: Sequence[Tensor], saved: Sequence[Tensor], again: list[Tensor]
    ) -> list[Tensor]:
        """∇L, and the smooth leaves of loss, aux and buffers."""
        given = self._given([*smooth, *saved[len(smooth) :]])
        with drawing_again(self.rng):
            grads, rest = self.loss.grad(**given, own=True)
        again.append(rest[0].detach())
        trees: Trees = dict(zip(_OUTPUTS, (grads, *rest)))
        return SmoothLeaves(trees).split(trees)[0]

    def _results(
        self, smooth: Sequence[Tensor], saved: Sequence[Tensor], again: list[Tensor]
    ) -> list[Tensor]:
        """The loss, and the smooth leaves of aux and buffers."""
        given = self._given([*smooth, *saved[len(smooth) :]])
        with drawing_again(self.rng):  # of this look alone: `pull` may take two
            loss, aux, buffers = self.loss(**given)
        again.append(loss.detach())
        trees: Trees = {"loss": loss, "aux": aux, "buffers": buffers}
        return SmoothLeaves(trees).split(trees)[0]


def by_forward(tensors: Iterable[Tensor]) -> bool:
    """Whether the way back is forward over reverse mode."""
    given = list(tensors)
    if any(map(is_traceable_wrapper_subclass, given)):  # a DTensor cannot be dual
        return False
    return any(x.device.type != "cpu" for x in given)


def pull(
    results: Callable[[Sequence[Tensor]], list[Tensor]],
    values: list[Tensor],
    params: list[int],
    wanted: list[int],
    vector: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients by ``wanted`` values, from cotangents of ∇L and of ``results``.

    ``vector`` are the cotangents of ∇L, the gradient by the values numbered ``params``.
    ``results(values)`` gives the loss first, and then what else is differentiated; it is
    called up to twice, and has to draw the same numbers both times.
    """
    directions = {i: v for i, v in zip(params, vector) if v is not None}
    first, *rest = cotangents
    parts: list[Sequence[Tensor | None]] = []
    if directions:
        slopes, second = _forward_over_reverse(
            lambda smooth: results(smooth)[0], values, directions, wanted
        )
        parts.append(second)
        if first is not None and all(c is None for c in rest):
            # ∇L itself came with its derivative
            parts.append([s if s is None else first * s for s in slopes])
            first = None
    if any(c is not None for c in (first, *rest)):
        parts.append(pullback.pull(results, values, [first, *rest], wanted))
    return added(*parts) if parts else [None] * len(wanted)


def _forward_over_reverse(
    loss: Callable[[Sequence[Tensor]], Tensor],
    values: list[Tensor],
    directions: dict[int, Tensor],
    wanted: list[int],
) -> tuple[list[Any], list[Any]]:
    """The gradients of the loss by the values that are wanted, and their derivatives."""
    with explained():
        if not levels.differentiating([*values, *directions.values()]):
            return _by_dual_numbers(loss, values, directions, wanted)
        moving = [*directions]

        def gradients(moved: list[Tensor]) -> list[Tensor]:
            at = dict(zip(moving, moved))

            def of_wanted(chosen: list[Tensor]) -> Tensor:
                now = {**at, **dict(zip(wanted, chosen))}
                return loss([now.get(i, x) for i, x in enumerate(values)])

            return torch.func.grad(of_wanted)([at.get(i, values[i]) for i in wanted])

        made: Any = torch.func.jvp(
            gradients,
            ([values[i] for i in moving],),
            ([directions[i] for i in moving],),
        )
        return made


def _by_dual_numbers(
    loss: Callable[[Sequence[Tensor]], Tensor],
    values: list[Tensor],
    directions: dict[int, Tensor],
    wanted: list[int],
) -> tuple[list[Any], list[Any]]:
    """The same without torch.func, where no transform is open and no graph is wanted."""
    with torch.enable_grad(), forward_ad.dual_level():
        at = list(values)
        for i in wanted:
            at[i] = values[i].detach().requires_grad_()
        variables = [at[i] for i in wanted]
        for i, direction in directions.items():
            at[i] = forward_ad.make_dual(at[i], direction)
        found = loss(at)
        slopes: Sequence[Tensor | None] = [None] * len(wanted)
        if found.requires_grad:
            slopes = torch.autograd.grad(found, variables, allow_unused=True)
        pairs = [(s, s) if s is None else forward_ad.unpack_dual(s) for s in slopes]
        primals, tangents = zip(*pairs) if pairs else ((), ())
    return [*primals], [*tangents]


@contextmanager
def explained() -> Iterator[None]:
    """Say what to do where an operation of the loss has no such derivative."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        words = str(error)
        if "forward AD" not in words and "derivative for" not in words:
            raise
        raise ExecutionError(
            "grad_mode='mixed' differentiates the inner loss's gradient (on accelerators "
            "by forward derivatives, which grad_mode='reverse' does not need), and an "
            f"operation of it has none ({words.splitlines()[0][:200]}). {MATH}"
        ) from error
