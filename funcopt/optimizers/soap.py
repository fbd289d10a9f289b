"""SOAP: Adam in the basis in which Shampoo's sums are diagonal."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch

from funcopt.errors import HyperparameterError
from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer, per_tensor
from funcopt.optimizers._bases import eigenbasis, iterated
from funcopt.optimizers._matrices import either, renewed
from funcopt.optimizers._parts import (
    Number,
    average,
    decoupled_decay,
    root,
    towards,
    where,
)
from funcopt.types import HyperValue, Tensor

#: of a shape: the shape to work in, and the length of its axes, 0 for those left alone
Sides = Callable[[Sequence[int]], tuple[Sequence[int], Sequence[int]]]


def rule(
    g: Tensor,
    p: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    GG: Tensor,  # the squares of all axes, one after another
    Q: Tensor,
    *,
    step: Any,
    lr: Number,
    beta1: Number,
    beta2: Number,
    eps: Number,
    weight_decay: Number,
    shampoo_beta: Number = None,
    precondition_frequency: int,
    sides_of: Sides,
    maximize: bool,
) -> tuple[Tensor, ...]:
    g = -g if maximize else g
    shape, sides = sides_of(p.shape)
    bases = _squares(Q, sides)
    first = step == 1  # there is no basis yet: it is made, and nothing else
    exp_avg = towards(exp_avg, g, where(first, 0.0, 1 - beta1))
    turned = _turned(g, shape, bases)
    exp_avg_sq = towards(exp_avg_sq, turned * turned, where(first, 0.0, 1 - beta2))
    move = _turned(exp_avg, shape, bases) / (root(exp_avg_sq) + eps)
    move = _turned(move, shape, [basis.mT for basis in bases])
    count = where(first, 1, step - 1)
    correction = (1 - beta2**count) ** 0.5 / (1 - beta1**count)
    lr = where(first, 0.0, lr)
    p = decoupled_decay(p - lr * correction * move, lr, weight_decay)

    if not any(sides):
        return p, exp_avg, exp_avg_sq, GG, Q
    beta = beta2 if shampoo_beta is None else shampoo_beta
    x = g.reshape(shape)
    sums = [
        average(sum_, _gram(x, axis), beta) if sum_.numel() else sum_
        for axis, sum_ in enumerate(_squares(GG, sides))
    ]

    def made() -> Tensor:
        new = (
            either(first, partial(eigenbasis, sum_), partial(iterated, sum_, basis))
            if sum_.numel()
            else sum_
            for sum_, basis in zip(sums, bases)
        )
        return _packed(new)

    Q = renewed(step, precondition_frequency, made, Q)
    return p, exp_avg, exp_avg_sq, _packed(sums), Q


def _turned(x: Tensor, shape: Sequence[int], bases: Sequence[Tensor]) -> Tensor:
    """Along every axis that has a basis, in its coordinates."""
    y = x.reshape(shape)
    for basis in bases:
        y = y.movedim(0, -1)  # after as many as there are axes each is back
        y = y @ basis if basis.numel() else y
    return y.reshape(x.shape)


def _gram(x: Tensor, axis: int) -> Tensor:
    rows = x.movedim(axis, 0).flatten(1) if x.ndim > 1 else x.unsqueeze(1)
    return rows @ rows.mT


def _squares(packed: Tensor, sides: Sequence[int]) -> list[Tensor]:
    parts = packed.split([n * n for n in sides])
    return [part.reshape(n, n) for part, n in zip(parts, sides)]


def _packed(squares: Iterable[Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in squares])


def _sides(
    shape: Sequence[int], max_precond_dim: int, merge_dims: bool, precondition_1d: bool
) -> tuple[Sequence[int], Sequence[int]]:
    alone = len(shape) < 2
    shape = shape or (1,)
    if 0 in shape or alone and not precondition_1d:
        return shape, [0] * len(shape)
    shape = _merged(shape, max_precond_dim) if merge_dims else shape
    return shape, [n if n <= max_precond_dim else 0 for n in shape]


def _merged(shape: Sequence[int], most: int) -> Sequence[int]:
    """Neighbouring axes as one, as long as that is not longer than ``most``."""
    merged = [1]
    for n in shape:
        if merged[-1] * n <= most:
            merged[-1] *= n
        else:
            merged.append(n)
    return [n for n in merged if n > 1] or [1]


def _first_squares(p: Tensor) -> Tensor:
    """In float32 at least: they spread as eigenvalues do, past what float16 reaches."""
    return torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))


def _first_sums(p: Tensor, sides_of: Sides) -> Tensor:
    return torch.zeros_like(_first_bases(p, sides_of))


def _first_bases(p: Tensor, sides_of: Sides) -> Tensor:
    """Identities; in float32 at least, as matrices of half precision have no basis."""
    dtype = torch.promote_types(p.dtype, torch.float32)
    sides = sides_of(p.shape)[1]
    return _packed([torch.eye(n, dtype=dtype, device=p.device) for n in sides])


def soap(
    lr: HyperValue = 3e-3,
    betas: tuple[HyperValue, HyperValue] = (0.95, 0.95),
    shampoo_beta: HyperValue | None = None,
    eps: HyperValue = 1e-8,
    weight_decay: HyperValue = 0.01,
    precondition_frequency: int = 10,
    max_precond_dim: int = 10000,
    merge_dims: bool = False,
    precondition_1d: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""SOAP, Shampoo with Adam in the preconditioner's eigenbasis.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) \, g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) \, (Q_L^\top g_t \, Q_R)^2 \\
        p_t &= (1 - \text{lr} \cdot \text{weight\_decay}) \left( p_{t-1}
            - \text{lr} \, \frac{\sqrt{1 - \beta_2^{t-1}}}{1 - \beta_1^{t-1}} \;
            Q_L \, \frac{Q_L^\top m_t \, Q_R}{\sqrt{v_t} + \text{eps}} \, Q_R^\top
            \right) \\
        L_t &= \beta_s L_{t-1} + (1 - \beta_s) \, g_t g_t^\top, \qquad
        R_t = \beta_s R_{t-1} + (1 - \beta_s) \, g_t^\top g_t \\
        Q_L &\leftarrow \mathrm{qr}(L_t Q_L), \qquad Q_R \leftarrow \mathrm{qr}(R_t Q_R)
            \qquad \text{every precondition\_frequency steps}

    The first step makes :math:`Q_L` and :math:`Q_R`, the eigenvectors of L and R, and
    moves nothing: averages begin with the second. A leaf of more axes has a sum and a
    basis for each.

    Args:
        lr: learning rate, ≥ 0.
        betas: decay rates of m and v, each in [0, 1).
        shampoo_beta: decay rate :math:`\beta_s` of the sums, in [0, 1); None is that of
            v. Like it, one number for a leaf.
        eps: added to the denominator, ≥ 0.
        weight_decay: the share of ``lr`` by which a parameter shrinks, ≥ 0.
        precondition_frequency: after how many steps the bases are renewed, ≥ 1.
        max_precond_dim: the longest axis that has a basis, ≥ 1.
        merge_dims: take neighbouring axes for one, up to ``max_precond_dim``.
        precondition_1d: give vectors a basis too; else they are stepped by Adam alone.
        maximize: ascend.

    Returns:
        An `Optimizer`; state ``step, exp_avg, exp_avg_sq`` of each parameter's shape and
        dtype, and ``GG, Q``: vectors that hold the square matrices of all axes one after
        another, in float32 where the parameter is half.

    Raises:
        HyperparameterError: a number out of its range.

    Note:
        ``exp_avg_sq`` is in the coordinates of ``Q``, whose columns keep their places
        when the authors sort them: the steps are the same. So are they where the authors
        keep ``exp_avg`` in these coordinates too. Their ``normalize_grads``,
        ``correct_bias=False`` and ``data_format`` are left out.

        Where a sum has not full rank, as at first with an axis longer than the others
        together, rounding picks the basis of what it lacks, and steps depend on it. The
        derivative takes that part of a basis for a constant, and is exact where a basis
        is determined; so it is finite everywhere.

        A second gradient that equals the first, as in an inner loop on one batch, is
        diagonal in its own basis: what is off it is rounding, and a step by rounding
        over ``eps``. Give ``eps`` the size of gradients that do not matter.

    Source:
        Vyas, Morwani, Zhao, Kwun, Shapira, Brandfonbrener, Janson, Kakade, "SOAP:
        improving and stabilizing Shampoo using Adam", 2024, algorithms 3 and 4.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.soap(lr=0.1, precondition_frequency=1)
        >>> p = torch.tensor([[1.0, -0.2]])
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     p, state = opt.update(2 * p, state, p)      # the gradient of p²
        >>> p
        tensor([[ 0.6045, -0.1280]])
    """
    if precondition_frequency < 1 or max_precond_dim < 1:
        raise HyperparameterError(
            "soap takes precondition_frequency and max_precond_dim ≥ 1, got "
            f"{precondition_frequency} and {max_precond_dim}"
        )
    sides_of = partial(
        _sides,
        max_precond_dim=max_precond_dim,
        merge_dims=merge_dims,
        precondition_1d=precondition_1d,
    )
    hyper = {
        "lr": Hyper(lr),
        "betas": Hyper(betas, below=1.0, parts=("beta1", "beta2"), scalar=(1,)),
        "eps": Hyper(eps),
        "weight_decay": Hyper(weight_decay),
    }
    if shampoo_beta is not None:
        hyper["shampoo_beta"] = Hyper(shampoo_beta, below=1.0, scalar=(0,))
    return per_tensor(
        partial(
            rule,
            precondition_frequency=precondition_frequency,
            sides_of=sides_of,
            maximize=maximize,
        ),
        name="soap",
        slots={
            "exp_avg": torch.zeros_like,
            "exp_avg_sq": _first_squares,
            "GG": partial(_first_sums, sides_of=sides_of),
            "Q": partial(_first_bases, sides_of=sides_of),
        },
        hyper=hyper,
    )
