"""Leaving transforms and modes for as long as something is made."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch._C._functorch as _functorch  # pyright: ignore[reportMissingImports]
from torch._C import _autograd
from torch.overrides import _pop_mode_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from funcopt.execution import levels
from funcopt.types import Tensor


@contextmanager
def outside() -> Iterator[None]:
    """Below every transform, recording: as if no function were being transformed."""
    with torch.inference_mode(False), torch.enable_grad():
        if _functorch.peek_interpreter_stack() is None:
            yield
            return
        from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

        with temporarily_clear_interpreter_stack():
            yield


@contextmanager
def undisturbed() -> Iterator[None]:
    """`outside`, and nobody looks on: for what is made once, whoever asks first.

    No mode of dispatch or of functions, no hook of saved tensors, no anomaly detection.
    """
    anomaly = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    hooks = _autograd._saved_tensors_hooks_set_tracing(True)
    with outside(), _disable_current_modes(), ExitStack() as modes:
        for _ in range(torch._C._len_torch_function_stack()):
            modes.enter_context(_pop_mode_temporarily())
        try:
            torch.set_anomaly_enabled(False)
            yield
        finally:
            torch.set_anomaly_enabled(*anomaly)
            _autograd._saved_tensors_hooks_set_tracing(hooks)


def beneath(
    function: Callable[[Sequence[Tensor]], Sequence[Tensor]], tensors: Sequence[Tensor]
) -> Sequence[Tensor]:
    """``function`` of the tensors, computed below the innermost level if it is a jvp's.

    For what computes tangents: that level would follow them a second time. The levels
    around it do follow. Anywhere else this is ``function(tensors)``.
    """
    if not levels.inside():
        return function(tensors)
    from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

    inmost = retrieve_current_functorch_interpreter()
    if inmost.key() != _functorch.TransformType.Jvp:
        return function(tensors)
    level = inmost.level()
    given = [_functorch._unwrap_for_grad(x, level) for x in tensors]
    with inmost.lower():
        found = function(given)
    return [_functorch._wrap_for_grad(x, level) for x in found]
