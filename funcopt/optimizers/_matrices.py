"""Functions of whole matrices that rules are made of."""

from collections.abc import Callable
from typing import Any

import torch

from funcopt.types import Tensor


def orthogonalized(x: Tensor, *how: Any) -> Tensor:
    """`Orthogonalized` of a matrix, which Dynamo cannot trace as a Function."""
    if torch.compiler.is_compiling():
        return Orthogonalized.forward(x, *how)
    return Orthogonalized.apply(x, *how)


class Orthogonalized(torch.autograd.Function):
    """A matrix with its singular values moved towards 1: Newton-Schulz, in ``dtype``.

    ``apply(x, coefficients, steps, eps, dtype)``; the derivative is that of the same
    iteration in x's own dtype. bfloat16's roundings, through which torch would
    differentiate, leave two digits of it.
    """

    @staticmethod
    def forward(x: Tensor, coefficients: Any, steps: int, eps: float, dtype: Any) -> Any:
        a, b, c = coefficients
        product, batch = torch.addmm, x.shape[:-2]
        y = x.to(dtype)
        if batch:
            product, y = torch.baddbmm, y.flatten(0, -3)
        y = y.mT if x.shape[-2] > x.shape[-1] else y
        y = y / torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True).clamp(min=eps)
        for _ in range(steps):
            gram = y @ y.mT
            y = product(y, product(gram, gram, gram, beta=b, alpha=c), y, beta=a)
        y = y.mT if x.shape[-2] > x.shape[-1] else y
        return y.reshape(x.shape).to(x.dtype).contiguous()  # as its tangent is

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, *ctx.how = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        pull = _pullback(*ctx.saved_tensors, *ctx.how)
        return *pull(cotangent), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        # By reverse mode twice: forward mode is not nested in forward mode.
        pull = _pullback(*ctx.saved_tensors, *ctx.how)
        along: Any = torch.func.vjp(lambda u: pull(u)[0], torch.zeros_like(tangent))
        return along[1](tangent)[0].contiguous()

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, *how: Any) -> tuple[Tensor, int]:
        return Orthogonalized.apply(x.movedim(in_dims[0], 0), *how), 0


def _pullback(x: Tensor, coefficients: Any, steps: int, eps: float, _: Any) -> Any:
    """The derivative of the iteration at ``x``, as a function of a cotangent."""
    a, b, c = coefficients

    def iteration(x: Tensor) -> Tensor:
        squares = (x * x).sum((-2, -1), keepdim=True)
        free = squares > eps**2
        y = x / torch.where(free, torch.where(free, squares, 1.0).sqrt(), eps)
        y = y.mT if x.shape[-2] > x.shape[-1] else y
        for _ in range(steps):
            gram = y @ y.mT
            y = a * y + (b * gram + c * gram @ gram) @ y
        return y.mT if x.shape[-2] > x.shape[-1] else y

    return torch.func.vjp(iteration, x)[1]


def inverse_root(x: Tensor, power: int) -> Tensor:
    """x^(-1/power) of a symmetric positive matrix, by a coupled Newton iteration.

    Products of matrices alone, always as many: it batches, and has all derivatives, also
    where eigenvalues are equal, of which those of ``eigh`` are NaN. The machine epsilon
    times the size and length of x is added to its eigenvalues.
    """
    one = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    squares = (x * x).sum()
    there = squares > 0
    # Every eigenvalue is then in (0, 1], from which the iteration converges.
    scale = torch.where(there, squares, 1.0).sqrt()
    # Rounding leaves eigenvalues below 0, from which it would not.
    ridge = max(x.shape[-1], 1) * torch.finfo(x.dtype).eps
    m, root = x / scale + ridge * one, one
    for _ in range(_ROUNDS[x.dtype]):
        t = ((power + 1) * one - m) / power
        root, m = root @ t, torch.linalg.matrix_power(t, power) @ m
    return torch.where(there, root / scale ** (1 / power), one)


#: until an eigenvalue of machine epsilon has grown to 1, and six to settle
_ROUNDS = {torch.float32: 25, torch.float64: 46}


def renewed(
    step: Any, every: int, make: Callable[[], Tensor], old: Tensor | None
) -> Tensor:
    """What ``make`` gives at the first of ``every`` so many steps, else ``old``."""
    if every == 1 or old is None:
        return make()
    due = (step - 1) % every == 0
    if isinstance(due, bool):
        return make() if due else old.clone()
    return torch.where(due, make(), old)  # unequal tasks: all pay
