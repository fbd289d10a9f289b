"""Functions with a backward of their own: what they close over, and what they draw.

Inside an autograd.Function a function runs apart from the graph, and may run once more on
the way back. A gradient by what it closes over would be lost, and random numbers would be
others: here the first is found, and the second are drawn again as they were.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
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
    if levels.pushing() or torch.compiler.is_compiling():
        return False
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        return False
    return levels.inside() or torch.is_grad_enabled()


class Apart:
    """What one call of such a function has to know of where it was made."""

    def __init__(self) -> None:
        self.depth = levels.depth()
        self.following = torch.is_grad_enabled()

    def run(
        self, function: Callable[[list[Tensor]], Sequence[Tensor]], values: Any
    ) -> list[Tensor]:
        """``function`` of the values alone.

        Raises:
            GradientLostError: it depends on something else that a gradient is asked of.
        """
        below = levels.depth()
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
            # a tensor of one of those levels that were left, of another kind
            lost = True
        if lost:
            raise GradientLostError(
                "the inner loss, or the optimizer, closes over a tensor that requires "
                "grad, or that a transform outside follows or batches; with a backward "
                "of its own (grad_mode='mixed', remat) unroll would lose its gradient. "
                "Pass it as meta=, batch= or hyper=, or pass fo.detach(...) of it"
            )
        return [*results]

    @contextmanager
    def once(self) -> Iterator[bool]:
        """A backward pass of which torch.func will keep no graph; whether it is that.

        torch.func.grad always asks for a graph of the backward pass, and drops it: a
        derivative of higher order is that of another level, which is not stopped here.
        """
        top = _functorch.peek_interpreter_stack()
        is_same = (
            top is not None
            and top.key() == _functorch.TransformType.Grad
            and levels.depth() == self.depth
        )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_same):
            yield is_same


def distinct(results: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The results, as an autograd.Function may return them: none twice, no input."""
    taken = {id(x) for x in inputs}
    made = []
    for x in results:
        made.append(x.clone() if id(x) in taken or x._is_view() else x)
        taken.add(id(x))
    return made


def guarded(gradients: Sequence[Any]) -> list[Any]:
    """The same, but a derivative of them at this level raises."""
    return [g if g is None else _Once.apply(g) for g in gradients]


class _Once(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        raise GradientLostError(
            "inside a transform of torch.func, grad_mode='mixed' and remat give first "
            "derivatives by autograd; take the second by a torch.func.grad around, or "
            "use grad_mode='reverse' and remat=None"
        )


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


class Draws:
    """Where torch's random generators stand: of the CPU and of the tensors' devices."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.states: dict[Any, Tensor] = {None: torch.get_rng_state()}
        for device in {x.device for x in tensors} - {torch.device("cpu")}:
            module = torch.get_device_module(device)
            if hasattr(module, "get_rng_state"):
                self.states[device] = module.get_rng_state(device)

    def moved(self) -> bool:
        """Whether numbers have been drawn since."""
        with levels.outside():
            now = Draws([])._of(self.states)
            return not all(torch.equal(now[d], s) for d, s in self.states.items())

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw the same numbers within; the generators go on as if nothing were drawn."""
        now = self._of(self.states)
        self._restore(self.states)
        try:
            yield
        finally:
            self._restore(now)

    @staticmethod
    def _of(devices: Iterable[Any]) -> dict[Any, Tensor]:
        return {
            d: torch.get_rng_state()
            if d is None
            else torch.get_device_module(d).get_rng_state(d)
            for d in devices
        }

    @staticmethod
    def _restore(states: dict[Any, Tensor]) -> None:
        for device, state in states.items():
            if device is None:
                torch.set_rng_state(state)
            else:
                torch.get_device_module(device).set_rng_state(state, device)
