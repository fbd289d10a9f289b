"""Functions of whole matrices that rules are made of."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from funcopt.execution import levels, own_dtype
from funcopt.optimizers._parts import spare
from funcopt.types import Tensor


def orthogonalized(x: Tensor, *how: Any, **out: Any) -> Tensor:
    """`Orthogonalized` of a matrix; where no derivative is asked for, the bare iteration.

    The call of a Function takes 0.1 ms, and Dynamo cannot trace it.
    """
    if torch.compiler.is_compiling() or not levels.differentiating([x]):
        return _newton_schulz(x, *how, **out)
    if levels.without_functions():
        smooth = _iteration(x, *how[:-1])
        return _newton_schulz(x.detach(), *how) + (smooth - smooth.detach())
    return Orthogonalized.apply(x, *how)


class Orthogonalized(torch.autograd.Function):
    """A matrix with its singular values moved towards 1: Newton-Schulz, in ``dtype``.

    ``apply(x, coefficients, steps, eps, dtype)``; the derivative is that of the same
    iteration in x's own dtype. bfloat16's roundings, through which torch would
    differentiate, leave two digits of it.
    """

    @staticmethod
    def forward(x: Tensor, *how: Any) -> Any:
        return _newton_schulz(x, *how)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, *ctx.how = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        back = own_dtype.pulled(_own(ctx.how), ctx.saved_tensors, [cotangent])
        return *back, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return own_dtype.pushed(_own(ctx.how), ctx.saved_tensors, [tangent])

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, *how: Any) -> tuple[Tensor, int]:
        return Orthogonalized.apply(x.movedim(in_dims[0], 0), *how), 0


def _own(how: Sequence[Any]) -> Callable[[Tensor], Tensor]:
    """The iteration in the matrix's own dtype."""
    coefficients, steps, eps, _ = how
    return partial(_iteration, coefficients=coefficients, steps=steps, eps=eps)


def _newton_schulz(
    x: Tensor,
    coefficients: Any,
    steps: int,
    eps: float,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """The iteration in ``dtype``, by three products a step; of a stack, by batched ones.

    A product is written into memory that the last step but one has left: to allocate it
    fifteen times costs an eighth of the time of products of a thousand rows.
    """
    a, b, c = coefficients
    times, plus_times = torch.mm, torch.addmm
    y = x.to(dtype)
    if x.ndim > 2:
        times, plus_times, y = torch.bmm, torch.baddbmm, y.flatten(0, -3)
    y = y.mT if x.shape[-2] > x.shape[-1] else y
    size = torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True).clamp(min=eps)
    over = spare()
    y = torch.div(y, size, **over(y) if y.dtype is not x.dtype else {})  # no view of x
    rounded = _unchanged
    if x.ndim == 2 and _is_faster_wide(y):
        rounded, y = partial(_rounded, dtype=dtype), y.to(torch.float32)
    gram = inner = last = None
    for _ in range(steps):
        gram = rounded(times(y, y.mT, **over(gram)))
        inner = plus_times(gram, gram, gram, beta=b, alpha=c, **over(inner))
        inner = rounded(inner)
        new = rounded(plus_times(y, inner, y, beta=a, **over(last)))
        y, last = new, y if y.is_contiguous() else None
    y = y.mT if x.shape[-2] > x.shape[-1] else y
    if out is not None:
        return out.copy_(y.reshape(x.shape))
    # contiguous, as its tangent is; only a conversion copies by itself
    y = y.to(x.dtype, memory_format=torch.contiguous_format).contiguous()
    return y.reshape(x.shape)


def _is_faster_wide(y: Tensor) -> bool:
    """Whether products in float32, rounded to half, take less time than half products.

    They give the same: a CPU adds half products up in float32, and rounds once. But a
    half product's call costs 20 µs, except of the very smallest matrices.
    """
    least, most = _SMALL
    return (
        y.dtype.itemsize == 2
        and y.is_cpu
        and least < y.shape[-2] ** 2 * y.shape[-1] <= most
    )


_SMALL = 1 << 12, 1 << 19


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).to(x.dtype)


def _unchanged(x: Tensor) -> Tensor:
    return x


def _iteration(x: Tensor, coefficients: Any, steps: int, eps: float) -> Tensor:
    """Newton-Schulz in x's own dtype, of operations with all derivatives."""
    a, b, c = coefficients
    squares = (x * x).sum((-2, -1), keepdim=True)
    free = squares > eps**2
    y = x / torch.where(free, torch.where(free, squares, 1.0).sqrt(), eps)
    y = y.mT if x.shape[-2] > x.shape[-1] else y
    for _ in range(steps):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y.mT if x.shape[-2] > x.shape[-1] else y


def inverse_root(x: Tensor, power: int) -> Tensor:
    """x^(-1/power) of a symmetric positive matrix, with all derivatives.

    Rounding leaves eigenvalues below 0: to each is added the machine epsilon times the
    norm and the length of x. Of a zero matrix it is the identity.
    """
    x = (x + x.mT) / 2  # what eigenvalues are made of; else only half of x is read
    if torch.compiler.is_compiling() or levels.without_functions():
        return _newton(x, power)
    if not levels.differentiating([x]):
        return InverseRoot.forward(x, power)
    return InverseRoot.apply(x, power)


class InverseRoot(torch.autograd.Function):
    """The root by an eigendecomposition, its derivative by that of `_newton`.

    The derivative of eigenvectors is NaN where two eigenvalues are equal, as in the
    identity; and `_newton` alone, with its hundred products, takes many times as long.
    """

    @staticmethod
    def forward(x: Tensor, power: int) -> Tensor:
        scale, ridge, one = _regularized(x)
        values, vectors = torch.linalg.eigh(x / scale)
        values = (values.clamp(min=0) + ridge) ** (-1 / power)
        root = (vectors * values.unsqueeze(-2)) @ vectors.mT / scale ** (1 / power)
        return torch.where(
            (x != 0).any(-1, keepdim=True).any(-2, keepdim=True), root, one
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, ctx.power = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        newton = partial(_newton, power=ctx.power)
        return *own_dtype.pulled(newton, ctx.saved_tensors, [cotangent]), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:
        newton = partial(_newton, power=ctx.power)
        return own_dtype.pushed(newton, ctx.saved_tensors, [tangent])

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, power: int) -> tuple[Tensor, int]:
        return InverseRoot.apply(x.movedim(in_dims[0], 0), power), 0


def _regularized(x: Tensor) -> tuple[Tensor, float, Tensor]:
    """x's norm (1 for 0), what is added to eigenvalues, relative to it; the identity."""
    squares = (x * x).sum((-2, -1), keepdim=True)
    scale = torch.where(squares > 0, squares, 1.0).sqrt()
    ridge = max(x.shape[-1], 1) * torch.finfo(x.dtype).eps
    return scale, ridge, torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)


def _newton(x: Tensor, power: int) -> Tensor:
    """The inverse root by a coupled Newton iteration: products in a fixed number."""
    scale, ridge, one = _regularized(x)
    m, root = x / scale + ridge * one, one
    for _ in range(_ROUNDS[x.dtype]):
        t = ((power + 1) * one - m) / power
        root, m = root @ t, torch.linalg.matrix_power(t, power) @ m
    there = (x != 0).any(-1, keepdim=True).any(-2, keepdim=True)
    return torch.where(there, root / scale ** (1 / power), one)


#: until an eigenvalue of machine epsilon has grown to 1, and six to settle
_ROUNDS = {torch.float32: 25, torch.float64: 46}


def renewed(
    step: Any, every: int, make: Callable[[], Tensor], old: Tensor | None
) -> Tensor:
    """What ``make`` gives at the first of ``every`` so many steps, else ``old``."""
    if every == 1 or old is None:
        return make()
    return either((step - 1) % every == 0, make, lambda: old)


def either(
    condition: Any, make: Callable[[], Tensor], other: Callable[[], Tensor]
) -> Tensor:
    """What one of two functions gives; both are called if the condition is a tensor."""
    if isinstance(condition, bool):
        return make() if condition else other()
    return torch.where(condition, make(), other())  # unequal tasks: all pay
