"""Levels of differentiation: which transforms are open, and what follows a tensor."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch._C._functorch as _functorch  # pyright: ignore[reportMissingImports]
from torch.autograd import forward_ad

from funcopt.types import Tensor

_VMAP, _JVP = _functorch.TransformType.Vmap, _functorch.TransformType.Jvp
_FUNCTIONALIZE = _functorch.TransformType.Functionalize


def inside() -> bool:
    """Whether a torch.func transform is running."""
    return _functorch.peek_interpreter_stack() is not None


def _running() -> list[Any]:
    """The kinds of the transforms of torch.func that are running, the outermost first."""
    return [level.key() for level in _functorch.get_interpreter_stack() or ()]


def depth() -> int:
    """How many transforms of torch.func are running, one within the other."""
    return len(_functorch.get_interpreter_stack() or ())


def vmaps() -> int:
    """How many of the transforms that are running are a vmap."""
    return _running().count(_VMAP)


def alive(x: Tensor) -> Tensor:
    """The tensor without the wrappers of levels that have been left.

    A pullback runs when its level is gone, and what was saved for it wears its wrapper:
    the next level to be opened would take that for its own.
    """
    while (within := _functorch.unwrap_if_dead(x)) is not x:
        x = within
    return x


def in_forward_mode() -> bool:
    """Whether a forward-mode level is open, in which any tensor may be dual."""
    return forward_ad._current_level >= 0


def with_alike_tangent(x: Tensor) -> Tensor:
    """``x``, of which forward mode has the tangent in its own dtype.

    Torch makes a float64 one of a 0-d tensor and a Python number, and passes it on
    (https://github.com/pytorch/pytorch/issues/90065). A cast takes the tangent with it;
    to a wider dtype and back no number changes.
    """
    if not in_forward_mode():
        return x
    wide = torch.promote_types(x.dtype, torch.float64)
    return x if x.dtype is wide else x.to(wide).to(x.dtype)


def in_nested_forward_mode() -> bool:
    """Whether forward mode stands in forward mode.

    There an autograd.Function loses the outer tangent of all that its ``jvp`` is given,
    without a word (https://github.com/pytorch/pytorch/issues/197867).
    """
    if not in_forward_mode() or torch.compiler.is_compiling():
        return False
    return _running().count(_JVP) > 1


def without_functions() -> bool:
    """Whether no autograd.Function may be called here.

    In nested forward mode it would lose a tangent; and torch has no rule of it for
    ``functionalize``.
    """
    if torch.compiler.is_compiling():
        return False
    return _FUNCTIONALIZE in _running() or in_nested_forward_mode()


def only_forward(tensors: Iterable[Any]) -> bool:
    """Whether forward mode is open once, and no other derivative is asked for."""
    if not in_forward_mode():
        return False
    if {*_running()} - {_VMAP, _JVP} or in_nested_forward_mode():
        return False
    return not _by_autograd(tensors)


def vectorized(tensors: Iterable[Tensor]) -> bool:
    """Whether one is a batch made by autograd's ``vectorize`` or ``is_grads_batched``.

    Such batches hold cotangents or tangents. No transform is open then, and only torch's
    own operations have a batching rule for them.
    """
    return any(map(_functorch.is_legacy_batchedtensor, tensors))


def differentiating(tensors: Iterable[Any]) -> bool:
    """Whether a derivative may be asked of what is now computed from ``tensors``.

    True inside any torch.func transform (vmap too: foreach and fused kernels have no
    batching rule), inside a forward-mode level, and where grad mode is on and one of the
    tensors requires grad. ``requires_grad`` alone would not do: it is False inside jvp
    and vmap and for dual tensors. What is no tensor is passed over.
    """
    if inside() or in_forward_mode():
        return True
    return torch.is_grad_enabled() and _any_requires_grad(*tensors)


def _one_by_one(*values: Any) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in values)


# The private helper passes over what is no tensor, too, in a third of the time.
_any_requires_grad = getattr(torch._C, "_any_requires_grad", _one_by_one)


def followed(tensors: Iterable[Any]) -> bool:
    """Whether a derivative is asked for, and not a mere vmap.

    For what `differentiating` says yes to.
    """
    if {*_running()} - {_VMAP}:
        return True
    return any(isinstance(t, Tensor) and is_tracked(t) for t in tensors)


def derivative_outside(tensors: Iterable[Any]) -> bool:
    """Whether a derivative is taken of what is now computed from ``tensors``."""
    if torch.compiler.is_compiling():
        return False
    return bool({*_running()} - {_VMAP}) or _followed_below(tensors)


def norms_inexact(tensors: Iterable[Any]) -> bool:
    """Whether torch would get a gradient taken now wrong, of affine norm layers.

    It does where a derivative is taken outside of a vmap that is running, and where two
    derivatives are.
    """
    if torch.compiler.is_compiling():
        return False
    kinds = _running()
    if not kinds:
        return False
    derivatives = [i for i, kind in enumerate(kinds) if kind != _VMAP]
    if len(derivatives) > 1 or derivatives and _VMAP in kinds[derivatives[0] :]:
        return True
    return _followed_below(tensors)


def _followed_below(tensors: Iterable[Any]) -> bool:
    """Whether autograd or forward mode follows one of the tensors below every level."""
    if not in_forward_mode():
        return _by_autograd(tensors)
    found = [bottom(t) for t in tensors if isinstance(t, Tensor)]
    return _by_autograd(found) or any(map(_has_own_tangent, found))


def _by_autograd(tensors: Iterable[Any]) -> bool:
    """Whether autograd follows one of the tensors below every level."""
    if not torch.is_grad_enabled():
        return False
    return any(isinstance(t, Tensor) and bottom(t).requires_grad for t in tensors)


def bottom(tensor: Tensor) -> Tensor:
    """The tensor below every level."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def of_each_task(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs, those with a derivative batched by every vmap that batches something.

    For the forward of an autograd.Function with ``generate_vmap_rule``. Of an output that
    all tasks share the cotangent is that of all of them, and torch's rule would count
    what it is to a shared input once for each task.
    """
    counts = [_vmaps(x) for x in (*outputs, *inputs)]
    most = max(counts, default=0)
    if not most or min(counts) == most:
        return [*outputs]
    zeros = (x.detach().new_zeros((), dtype=torch.bool) for x in (*outputs, *inputs))
    zero = sum(zeros, start=torch.zeros((), device="cpu"))
    return [
        x + zero.to(x) if n < most and (x.is_floating_point() or x.is_complex()) else x
        for x, n in zip(outputs, counts)
    ]


def _vmaps(tensor: Tensor) -> int:
    """How many vmaps batch it."""
    count = 0
    while _functorch.is_functorch_wrapped_tensor(tensor):
        count += _functorch.is_batchedtensor(tensor)
        tensor = _functorch.get_unwrapped(tensor)
    return count


def recorded(tensors: Sequence[Tensor]) -> bool:
    """Whether autograd records each tensor at the level that is now running.

    A derivative can then be taken at this level. A tensor that an outer transform
    follows requires grad, too, but not here: its level tells.
    """
    if not tensors or not torch.is_grad_enabled():
        return False
    top = _functorch.peek_interpreter_stack()
    if top is None:
        return all(t.requires_grad for t in tensors)
    return top.key() == _functorch.TransformType.Grad and all(
        t.requires_grad and _functorch.maybe_get_level(t) == top.level() for t in tensors
    )


def of_inference(tensors: Iterable[Tensor]) -> bool:
    """Whether inference mode keeps autograd from recording these, in any grad mode."""
    return torch.is_inference_mode_enabled() or any(map(Tensor.is_inference, tensors))


def is_tracked(tensor: Tensor) -> bool:
    """Whether this tensor carries a gradient or a tangent, at any transform level."""
    while True:
        if tensor.requires_grad or _has_own_tangent(tensor):
            return True
        if not _functorch.is_functorch_wrapped_tensor(tensor):
            return False
        tensor = _functorch.get_unwrapped(tensor)


def _has_own_tangent(tensor: Tensor) -> bool:
    """Whether it carries a tangent itself; of a batch what is within it does.

    torch has no batching rule to look for one.
    """
    if _functorch.is_batchedtensor(tensor):
        return False
    try:
        return forward_ad.unpack_dual(tensor).tangent is not None
    except RuntimeError:  # torch's own, of tensors of inference mode left by a vmap
        if not tensor.is_inference():
            raise
        return False


def may_be_tracked(tensor: Tensor) -> bool:
    """`is_tracked`, or of the level of a jvp around `grad`.

    There torch does not show tangents: no number may be read, and nothing be refused.
    """
    *around, _ = _functorch.get_interpreter_stack() or (None,)
    jvps = {x.level() for x in around if x.key() == _JVP}
    within = tensor
    while jvps and _functorch.is_functorch_wrapped_tensor(within):
        if _functorch.is_gradtrackingtensor(within):
            if _functorch.maybe_get_level(within) in jvps:
                return True
        within = _functorch.get_unwrapped(within)
    return is_tracked(tensor)


def is_transformed(tensor: Tensor) -> bool:
    """Whether torch.func or forward mode follows this tensor: more than vmap does."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        alive = _functorch.unwrap_if_dead(tensor) is tensor
        if alive and _functorch.is_gradtrackingtensor(tensor) and is_tracked(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return _has_own_tangent(tensor)
