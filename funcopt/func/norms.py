"""Norm layers with right derivatives: plain arithmetic in place of torch's kernels."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from funcopt.execution import levels
from funcopt.types import HALF, Tensor


@contextmanager
def exact_norms() -> Iterator[None]:
    r"""Batch, layer and instance norm as plain arithmetic, inside the ``with`` block.

    .. math::
        y = \frac{x - \operatorname{mean}(x)}{\sqrt{\operatorname{var}(x) + \epsilon}}
        \cdot \text{weight} + \text{bias}

    torch's kernels have derivative and batching rules of their own, and of these some
    are wrong without a word: the gradient, taken outside of vmap, of a function that
    takes a gradient inside it (``grad(vmap(adapt))``), where the norm has a batched
    weight; reverse or forward mode over forward mode; third derivatives. Plain arithmetic
    has only the rules of its operations, which are right. It is slower than a kernel,
    and every torch function called inside the block takes some microseconds more.

    What is replaced: ``torch.nn.functional.batch_norm``, ``layer_norm`` and
    ``instance_norm``, and so the modules of ``torch.nn``. Values are torch's but for
    rounding. Running statistics are updated in place, by torch's own kernel, with its
    rules and errors. What torch refuses it still does. Enter the block outside of
    ``grad`` and ``vmap``, or inside. `unroll` enters it by itself for the inner gradient
    where a derivative is asked for outside of vmap, or a second one by a transform, and
    `value_and_grad` where a derivative of its result is asked for.

    Returns:
        A context manager, which is a decorator, too.

    Raises:
        Nothing of its own.

    Source:
        The wrong derivatives: pytorch/functorch#534, pytorch/pytorch#196699.

    Example:
        >>> import torch, funcopt as fo
        >>> from torch.func import grad, vmap
        >>> def adapted(p, x):
        ...     def loss(p):
        ...         y = torch.nn.functional.layer_norm(p["w"] * x, (3,), p["scale"])
        ...         return (y - x).square().sum()
        ...     slope = grad(loss)(p)
        ...     return loss({name: p[name] - 0.1 * slope[name] for name in p})
        >>> p = {"w": torch.tensor([1.0, 2.0, 3.0]), "scale": torch.ones(3)}
        >>> x = torch.tensor([[1.0, 0.0, -1.0], [2.0, 1.0, -3.0]])
        >>> right = vmap(grad(adapted), (None, 0))(p, x)["w"].sum(0)
        >>> usual = lambda p: vmap(adapted, (None, 0))(p, x).sum()
        >>> torch.allclose(grad(usual)(p)["w"], right, rtol=0.01)
        False
        >>> with fo.func.exact_norms():
        ...     torch.allclose(grad(usual)(p)["w"], right, rtol=1e-4)
        True
    """
    with _ExactNorms():
        yield


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As ``torch.nn.functional.batch_norm``: each channel, over the batch."""
    per_channel = (running_mean, running_var, weight, bias)
    how = (training, momentum, eps)
    if input.ndim < 2 or input.numel() <= input.shape[1] * training:
        return F.batch_norm(input, *per_channel, *how)  # torch refuses it, and says why
    over = [0, *range(2, input.ndim)]
    return _of_channels(F.batch_norm, input, over, per_channel, how)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As ``torch.nn.functional.instance_norm``: each channel of each sample alone."""
    per_channel = (running_mean, running_var, weight, bias)
    how = (use_input_stats, momentum, eps)
    if input.ndim < 3 or input.shape[2:].numel() <= use_input_stats:
        return F.instance_norm(input, *per_channel, *how)
    over = [*range(2, input.ndim)]
    return _of_channels(F.instance_norm, input, over, per_channel, how)


def _of_channels(
    norm: Callable[..., Tensor],
    input: Tensor,
    over: Sequence[int],
    per_channel: tuple[Tensor | None, ...],
    how: tuple[bool, float, float],
) -> Tensor:
    """Each channel by its statistics over axes; or by the running ones, if not new."""
    mean, var, weight, bias = per_channel
    running, (new, momentum, eps) = (mean, var), how
    if not _all_of(per_channel, input.shape[1:2]) or not (new or _both(running)):
        return norm(input, *per_channel, *how)
    if not new:
        return _affine(_standard(input, *running, eps), input, 1, weight, bias)
    if _both(running):  # torch's own norm brings them on
        norm(input.detach(), *running, None, None, True, momentum, eps)
    return _affine(_normalized(input, over, eps), input, 1, weight, bias)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """As ``torch.nn.functional.layer_norm``: each sample, over its last dimensions."""
    shape = torch.Size(normalized_shape)
    first = input.ndim - len(shape)
    if not shape or input.shape[first:] != shape or not _all_of((weight, bias), shape):
        return F.layer_norm(input, list(shape), weight, bias, eps)
    return _affine(
        _normalized(input, range(first, input.ndim), eps), input, first, weight, bias
    )


def _normalized(x: Tensor, over: Sequence[int], eps: float) -> Tensor:
    """To mean 0 and variance 1, over some dimensions."""
    x, over = _wide(x), list(over)
    centred = x - x.mean(over, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(over, keepdim=True) + eps)


def _standard(x: Tensor, mean: Any, var: Any, eps: float) -> Tensor:
    """By statistics that are given, of dimension 1."""
    mean, var = (_along(_wide(s), x, 1) for s in (mean, var))
    return (_wide(x) - mean) * torch.rsqrt(var + eps)


def _affine(
    y: Tensor, x: Tensor, first: int, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Scaled and shifted from dimension ``first`` on, in the dtype of ``x``."""
    if weight is not None:
        y = y * _along(_wide(weight), x, first)
    if bias is not None:
        y = y + _along(_wide(bias), x, first)
    return y.to(x.dtype)


def _along(value: Tensor, x: Tensor, first: int) -> Tensor:
    """With dimensions of size 1 after it, so that it starts at ``first`` of ``x``."""
    return value.reshape(*value.shape, *[1] * (x.ndim - first - value.ndim))


def _wide(x: Tensor) -> Tensor:
    """Half precision as float32, as torch's kernels compute."""
    return x.float() if x.dtype in HALF else x


def _both(running: Sequence[Tensor | None]) -> bool:
    return all(x is not None for x in running)


def _all_of(values: Sequence[Tensor | None], shape: torch.Size) -> bool:
    return all(x is None or x.shape == shape for x in values)


_EXACT: dict[Any, Callable[..., Tensor]] = {
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    F.layer_norm: layer_norm,
}


class _ExactNorms(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        exact = _EXACT.get(func) or func
        return exact(*args, **(kwargs or {}))


class RunningStatistics(TorchFunctionMode):
    """Running statistics are constants in a norm, and are written wherever they lie.

    torch's kernels write them without a derivative, and refuse those that require grad,
    or have a tangent: as the buffers do that a differentiated loop carries. And under
    vmap they write into a copy, which is lost, of statistics that do not lie one after
    another: a row of a table with one for each step, say.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func not in _NAMES:
            return func(*args, **(kwargs or {}))
        names = _NAMES[func]
        call = dict(zip(names, args)) | (kwargs or {})
        kept = {n: call[n].detach() for n in names[1:3] if call.get(n) is not None}
        batched = torch.compiler.is_compiling() or levels.vmaps()
        if not (batched and call.get(names[5], func is F.instance_norm)):
            return func(**call | kept)
        lying = torch.contiguous_format
        written = {n: x.clone(memory_format=lying) for n, x in kept.items()}
        out = func(**call | written)
        for name, x in kept.items():
            x.copy_(written[name])
        return out


#: what each takes: the input, two running statistics, weight, bias, whether to renew them
_NAMES = {
    norm: [*signature(_EXACT[norm]).parameters]
    for norm in (F.batch_norm, F.instance_norm)
}
