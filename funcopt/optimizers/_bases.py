"""Orthogonal bases made of matrices, with derivatives that are finite everywhere."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from funcopt.errors import GradientLostError
from funcopt.execution import levels, own_dtype
from funcopt.types import Tensor


def eigenbasis(x: Tensor) -> Tensor:
    """The eigenvectors of a symmetric matrix in columns, by falling eigenvalue.

    The derivative takes a basis within an eigenspace for a constant: which one it is,
    rounding decides.
    """
    return _made((x + x.mT) / 2, EIGENVECTORS)


def iterated(x: Tensor, basis: Tensor) -> Tensor:
    """``basis`` after a power iteration towards the eigenvectors of x: the Q of x·basis.

    Its columns are made orthogonal by falling eigenvalue, and keep their places. The
    derivative takes columns that x·basis does not determine, where x has not full rank,
    for constants.
    """
    moved = x @ basis
    order = (basis * moved).sum(-2).argsort(dim=-1, descending=True, stable=True)
    return _columns(_made(_columns(moved, order), ORTHONORMAL), order.argsort(dim=-1))


def _columns(x: Tensor, order: Tensor) -> Tensor:
    return torch.gather(x, -1, order.unsqueeze(-2).expand_as(x))


@dataclass(frozen=True, eq=False)
class BasisKind:
    """A matrix's basis q, and its derivative as a turn: dq = q·Ω, Ω skew."""

    make: Callable[[Tensor], Tensor]  #: x → q
    turn: Callable[[Tensor, Tensor, Tensor], Tensor]  #: (x, q, dx) → Ω, linear in dx
    pull: Callable[[Tensor, Tensor, Tensor], Tensor]  #: (x, q, ·), the adjoint of that


def _made(x: Tensor, kind: BasisKind) -> Tensor:
    if torch.compiler.is_compiling():  # Dynamo traces `make` alone at less cost
        return Basis.apply(x, kind) if x.requires_grad else kind.make(x)
    if levels.in_nested_forward_mode():
        raise GradientLostError(
            "soap's bases have no derivative by forward mode within forward mode; take "
            "one of the two backward: torch.func.hessian(f), or jacfwd(grad(f))"
        )
    if levels.without_functions():
        if levels.may_be_tracked(x):
            raise GradientLostError(
                "soap's bases have no derivative with torch.func.functionalize, which "
                "knows no autograd.Function; leave that out"
            )
        return kind.make(x)
    return BasisEverywhere.apply(x, kind)


class Basis(torch.autograd.Function):
    """The basis of x that ``kind`` makes, with the derivative that it has.

    torch's own derivatives of a basis are NaN where two eigenvalues are equal, or one
    is 0.
    """

    @staticmethod
    def forward(x: Tensor, kind: BasisKind) -> Tensor:
        return kind.make(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, ctx.kind = inputs
        ctx.save_for_backward(x, output)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        x, q = ctx.saved_tensors
        return ctx.kind.pull(x, q, q.mT @ cotangent), None


class BasisEverywhere(Basis):
    """The same with what Dynamo, which traces `Basis`, does not trace."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        Basis.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        pull = ctx.kind.pull
        given = *ctx.saved_tensors, cotangent
        return own_dtype.apart(lambda x, q, bar: pull(x, q, q.mT @ bar), *given), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:
        turn = ctx.kind.turn
        given = *ctx.saved_tensors, tangent
        return own_dtype.apart(lambda x, q, dx: (q @ turn(x, q, dx)).contiguous(), *given)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, kind: BasisKind) -> tuple[Tensor, int]:
        return BasisEverywhere.apply(x.movedim(in_dims[0], 0), kind), 0


def _eigenvectors(x: Tensor) -> Tensor:
    return torch.linalg.eigh(x)[1].flip(-1).contiguous()


def _over_gaps(x: Tensor, q: Tensor, turn: Tensor) -> Tensor:
    """Each number over the gap between its two eigenvalues, and 0 where there is none."""
    values = (q * (x @ q)).sum(-2)
    gaps = values.unsqueeze(-2) - values.unsqueeze(-1)
    apart = gaps.abs() > _rounding(values).unsqueeze(-1)
    return torch.where(apart, turn / torch.where(apart, gaps, 1.0), 0.0)


EIGENVECTORS = BasisKind(
    make=_eigenvectors,
    turn=lambda x, q, dx: _over_gaps(x, q, q.mT @ dx @ q),
    pull=lambda x, q, turn: q @ _over_gaps(x, q, turn) @ q.mT,
)


def _orthonormal(x: Tensor) -> Tensor:
    """The Q of x = QR with R's diagonal positive, which makes it continuous in x."""
    q, r = torch.linalg.qr(x)
    diagonal = r.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
    return torch.where(diagonal < 0, -q, q).contiguous()


def _triangle(x: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """R, regular, and which columns of q are determined by x."""
    r = (q.mT @ x).triu()
    sizes = r.diagonal(dim1=-2, dim2=-1)
    given = sizes > _rounding(sizes)
    r = r + torch.diag_embed(torch.where(given, 0.0, 1.0 - sizes))
    return r, given.unsqueeze(-2)


def _orthonormal_turn(x: Tensor, q: Tensor, dx: Tensor) -> Tensor:
    r, given = _triangle(x, q)
    below = torch.linalg.solve_triangular(r, q.mT @ dx, upper=True, left=False).tril(-1)
    below = torch.where(given, below, 0.0)
    return below - below.mT


def _orthonormal_pull(x: Tensor, q: Tensor, turn: Tensor) -> Tensor:
    r, given = _triangle(x, q)
    below = torch.where(given, (turn - turn.mT).tril(-1), 0.0)
    return q @ torch.linalg.solve_triangular(r, below.mT, upper=True).mT


ORTHONORMAL = BasisKind(_orthonormal, _orthonormal_turn, _orthonormal_pull)


def _rounding(values: Tensor) -> Tensor:
    """Below it a number beside ``values`` is nothing but their rounding."""
    limits = torch.finfo(values.dtype)
    largest = values.abs().amax(-1, keepdim=True).clamp(min=limits.tiny**0.5)
    return values.shape[-1] * limits.eps * largest
