"""autograd.Functions with a backward of their own, run apart from the graph.

There a gradient by what the function closes over would be lost: here it raises.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch._C._functorch as _functorch  # pyright: ignore[reportMissingImports]

from funcopt.errors import GradientLostError
from funcopt.execution import levels
from funcopt.types import Tensor


def is_possible() -> bool:
    """Whether a backward of one's own is worth while, and right.

    Forward mode keeps no graph, nor does a pass without gradients; a compiler chooses
    itself what is kept, and would draw other random numbers.
    """
    if levels.in_forward_mode() or torch.compiler.is_compiling():
        return False
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        return False
    if levels.without_functions():
        return False
    return levels.inside() or torch.is_grad_enabled()


class CallContext:
    """The grad mode and depth of transforms where one call of a function was made."""

    def __init__(self) -> None:
        self.depth = levels.depth()
        self.following = torch.is_grad_enabled()
        self.vmaps = 0  #: how many were running when it was made

    def run(
        self, function: Callable[[list[Tensor]], Sequence[Tensor]], values: Any
    ) -> list[Tensor]:
        """``function`` of the values alone.

        Raises:
            GradientLostError: it depends on something else that a gradient is asked of.
        """
        below = levels.depth()
        self.vmaps = levels.vmaps()
        results: Sequence[Tensor] = []
        try:
            with torch.set_grad_enabled(self.following), ExitStack() as stack:
                # The levels of torch.func between the call and here are not running. In
                # their places empty ones follow what the function closes over, as those
                # would: unlike the values, which are cut from every graph.
                for _ in range(self.depth - below):
                    stack.enter_context(_empty_level())
                results = function([x.detach() for x in values])
                lost = any(map(levels.is_tracked, results))
                results = [_stripped(x, below) for x in results]
        except RuntimeError as error:
            if "INTERNAL ASSERT FAILED" not in str(error):
                raise
            lost = True  # it closes over a tensor of a level that was left
        if lost:
            raise GradientLostError(
                "the inner loss, the optimizer or a schedule closes over a tensor that "
                "requires grad, or that a transform outside follows or batches; with a "
                "backward of its own (grad_mode='mixed', remat) unroll would lose its "
                "gradient. Pass it as meta=, batch= or hyper= (a schedule by its values: "
                "fo.per_step(torch.stack([schedule(k) for k in range(steps)]))), or pass "
                "fo.detach(...) of it"
            )
        # The graph is to hang on these alone: the optimizer keeps its own results, to
        # write into them again, and would be held by the graph that they hold.
        return [x.detach() for x in results]

    def back(
        self,
        function: Callable[[list[Any], list[Any]], Sequence[Tensor | None]],
        saved: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
    ) -> list[Tensor | None]:
        """``function(saved, cotangents)`` in a backward pass, without a graph of its own.

        torch.func.grad always asks for a graph of its backward pass, and drops it. So
        the function runs one level lower, where second derivatives by an outer transform
        still pass; at this level they raise (`_OnceDifferentiable`).
        """
        saved = [*map(levels.alive, saved)]
        given = [*saved, *cotangents]
        top = _functorch.peek_interpreter_stack()
        if (
            top is not None
            and top.key() == _functorch.TransformType.Vmap
            and levels.vmaps() > self.vmaps
            and not any(_is_batch_of(x, top.level()) for x in saved)
        ):
            return self._each(function, saved, cotangents)
        if (
            top is None
            or top.key() != _functorch.TransformType.Grad
            or levels.depth() != self.depth
            or not any(_is_of(x, top.level()) for x in saved)
        ):
            return [*function([*saved], [*cotangents])]
        followed = [x for x in given if x is not None and _is_of(x, top.level())]
        below = [
            _functorch.get_unwrapped(x) if x is not None and _is_of(x, top.level()) else x
            for x in given
        ]
        found = function(below[: len(saved)], below[len(saved) :])
        return [
            g if g is None else _OnceDifferentiable.apply(top.level(), g, *followed)
            for g in found
        ]

    def _each(
        self,
        function: Callable[[list[Any], list[Any]], Sequence[Tensor | None]],
        saved: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
    ) -> list[Tensor | None]:
        """`back` for a batch of cotangents alone, as of torch.func.jacrev.

        What is made again is the same for all of them, and so are its random numbers,
        whatever that vmap says of those.
        """
        from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
        from torch._functorch.vmap import restore_vmap, unwrap_batched, wrap_batched

        inmost: Any = retrieve_current_functorch_interpreter()
        level, size = inmost.level(), inmost.batch_size()
        given, axes = unwrap_batched(tuple(cotangents), level)

        def each(*bars: Tensor | None) -> tuple[Tensor | None, ...]:
            return tuple(function([*saved], [*bars]))

        with inmost.lower():
            found, out = restore_vmap(each, axes, size, "same")(*given)
        return [*wrap_batched(found, out, level)]


class CustomVJP(torch.autograd.Function):
    """An autograd.Function of a call, which knows how it goes and how it goes back.

    The call has ``context``, ``forward(tensors)`` and ``backward(saved, cotangents,
    wanted)``; what is saved, a subclass says in its ``setup_context``.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(call: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            levels.of_each_task(call.context.run(call.forward, tensors), tensors)
        )

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        call, wanted = ctx.call, ctx.needs_input_grad[1:]
        found = call.context.back(
            lambda saved, bars: call.backward(saved, bars, wanted),
            ctx.saved_tensors,
            cotangents,
        )
        return None, *found


def _is_of(x: Tensor, level: int) -> bool:
    """Whether this running level of torch.func.grad follows the tensor."""
    return (
        _functorch.is_gradtrackingtensor(x)
        and _functorch.maybe_get_level(x) == level
        and _functorch.unwrap_if_dead(x) is x
    )


def _is_batch_of(x: Tensor, level: int) -> bool:
    """Whether this level of vmap batches the tensor."""
    return _functorch.is_batchedtensor(x) and _functorch.maybe_get_level(x) == level


def distinct(results: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The results, as an autograd.Function may return them: none twice, no input."""
    taken = {id(x) for x in inputs}
    made = []
    for x in results:
        made.append(x.clone() if id(x) in taken or x._is_view() else x)
        taken.add(id(x))
    return made


class _OnceDifferentiable(torch.autograd.Function):
    """A gradient that at one level raises if it is differentiated; elsewhere itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(level: int, gradient: Tensor, *_: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.refuses = inputs[0] == levels.depth()
        ctx.others = len(inputs) - 2

    @staticmethod
    def backward(ctx: Any, cotangent: Any) -> Any:
        if ctx.refuses:
            raise GradientLostError(
                "inside a transform of torch.func, grad_mode='mixed' and remat give "
                "first derivatives by autograd; take the second by a torch.func.grad "
                "around, or use grad_mode='reverse' and remat=None"
            )
        return None, cotangent, *[None] * ctx.others


@contextmanager
def _empty_level() -> Iterator[None]:
    _functorch._grad_increment_nesting()
    try:
        yield
    finally:
        _functorch._grad_decrement_nesting()


def _stripped(x: Tensor, below: int) -> Tensor:
    """Without the wrappers of the empty levels."""
    while _functorch.is_gradtrackingtensor(x) and _functorch.maybe_get_level(x) > below:
        x = _functorch.get_unwrapped(x)
    return x
