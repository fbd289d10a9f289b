"""L-BFGS: a quasi-Newton step along what the last gradients tell of the curvature."""

import torch

from funcopt.errors import HyperparameterError
from funcopt.flat import Loss, alone, everywhere, flat, most, slope_of, where
from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer
from funcopt.optimizers._line_search import Point, strong_wolfe
from funcopt.types import HyperValue, Tensor

_CURVED = 1e-10  # y·s of a pair that is remembered

Slots = dict[str, Tensor]


def direction(
    g: Tensor, y: Tensor, s: Tensor, ro: Tensor, products: Tensor, scale: Tensor
) -> Tensor:
    """-H·g by the rows of y, s and ρ, the oldest first; a row with ρ = 0 has no part.

    The two loops of the recursion are the substitutions in two triangular systems, made
    of the ``products`` s·y: so they cost a few operations, and not some for each row.
    """
    newer = (ro[:, None] * products).triu(1)
    older = (ro[:, None] * products.T).tril(-1)
    alpha = _solved(newer, ro * -(s @ g), upper=True)
    r = scale * -(g + alpha @ y)
    return r + _solved(older, alpha - ro * (y @ r), upper=False) @ s


def _solved(strict: Tensor, right: Tensor, upper: bool) -> Tensor:
    """x of (1 + strict)·x = right."""
    return torch.linalg.solve_triangular(
        strict, right[:, None], upper=upper, unitriangular=True
    )[:, 0]


def rule(
    loss: Loss,
    g: Tensor,
    x: Tensor,
    slots: Slots,
    moves: Tensor | None,
    *,
    lr: Tensor,
    tolerance_grad: Tensor,
    tolerance_change: Tensor,
    max_iter: int,
    max_eval: int,
    search: bool,
) -> tuple[Tensor, Slots]:
    evaluate = slope_of(loss)
    d, t, scale = slots["d"], slots["t"], slots["H_diag"]
    last_g, last_f = slots["prev_flat_grad"], slots["prev_loss"]
    n_iter = slots["n_iter"]
    if moves is not None:
        d, last_g = torch.where(moves, d, 0.0), torch.where(moves, last_g, 0.0)
    size = slots["ro"].shape[0]
    known = min(size, most((slots["ro"] > 0).sum(), size))
    memory = [slots[key][size - known :] for key in ("old_dirs", "old_stps", "ro")]
    products = memory[1] @ memory[0].T
    rounds = min(max_iter, max_eval)
    rooms = [_Room(rows, rounds) for rows in memory] if alone(x) else None
    f = loss(x).to(x.dtype)
    evals = torch.ones_like(n_iter)
    done = _largest(g) <= tolerance_grad
    for i in range(rounds):
        if everywhere(done):
            break
        n_iter = n_iter + ~done

        y, s = g - last_g, d * t
        ys, yy = y @ s, y @ y
        curved = ~done & (ys > _CURVED)
        ys = torch.where(curved, ys, 1.0)
        products = _bordered(products, memory[1] @ y, memory[0] @ s, ys, curved, size)
        new = (y, s, 1 / ys)
        if rooms is None:
            pairs = zip(memory, new, strict=True)
            memory = [_pushed(rows, row, curved, size) for rows, row in pairs]
        elif curved:
            memory = [
                room.pushed(row, size) for room, row in zip(rooms, new, strict=True)
            ]
        scale = where(curved, ys / torch.where(curved, yy, 1.0), scale)
        way = direction(g, *memory, products, scale)
        if moves is not None:
            way = torch.where(moves, way, 0.0)
        d, last_g, last_f = (
            where(done, old, new) for old, new in ((d, way), (last_g, g), (last_f, f))
        )
        size_g = g.abs().sum()
        far = (n_iter == 1) & (size_g > 1)
        t = where(done, t, lr * torch.where(far, 1 / torch.where(far, size_g, 1.0), 1.0))

        slope = g @ d
        done = done | (slope > -tolerance_change)
        if everywhere(done):
            break
        if search:

            def at(t: Tensor, x: Tensor = x, d: Tensor = d) -> Point:
                g, f = evaluate(x + t * d)
                return Point(t, f.to(x.dtype), g, g @ d)

            start = Point(torch.zeros_like(t), f, g, slope)
            found, tried = strong_wolfe(
                at,
                start,
                t,
                _largest(d),
                tolerance_change,
                max_eval - evals,
                max(max_eval - 1 - i, 0),
                ~done,
            )
            t, f, g = where(done, t, found.t), found.loss, found.g
            x, evals = where(done, x, x + t * d), evals + tried
        else:
            x = where(done, x, x + t * d)
            if i + 1 < max_iter:
                new_g, new_f = evaluate(x)
                f, g = where(done, f, new_f.to(x.dtype)), where(done, g, new_g)
                evals = evals + ~done
        done = (
            done
            | (evals >= max_eval)
            | (_largest(g) <= tolerance_grad)
            | (_largest(d * t) <= tolerance_change)
            | ((f - last_f).abs() < tolerance_change)
        )
    y, s, ro = (_padded(rows, size, rooms is not None) for rows in memory)
    return x, {
        "func_evals": slots["func_evals"] + evals,
        "n_iter": n_iter.clone(),  # what may be the old state's, or the loss's
        "d": d.clone(),
        "t": t.clone(),
        "old_dirs": y,
        "old_stps": s,
        "ro": ro,
        "H_diag": scale.clone(),
        "prev_flat_grad": last_g.clone(),
        "prev_loss": last_f.clone(),
    }


def _largest(x: Tensor) -> Tensor:
    """The largest magnitude; 0 of nothing."""
    return x.abs().amax() if x.shape[0] else x.sum()


def _pushed(rows: Tensor, row: Tensor, new: Tensor, size: int) -> Tensor:
    """The rows and, where it is ``new``, the row after them; the last ``size``."""
    if everywhere(~new):
        return rows
    row = row[None]
    longer = torch.cat([rows, row])[-size:]
    if everywhere(new):  # which spares two copies of a long history
        return longer
    return torch.where(new, longer, torch.cat([torch.zeros_like(row), rows])[-size:])


def _bordered(
    products: Tensor, right: Tensor, below: Tensor, corner: Tensor, new: Tensor, size: int
) -> Tensor:
    """The products of rows that are `_pushed`."""
    columns = _pushed(products.T, right, new, size).T
    return _pushed(columns, torch.cat([below, corner[None]])[-size:], new, size)


class _Room:
    """Memory for rows to come, so that none is copied for another. Nobody may follow."""

    def __init__(self, rows: Tensor, more: int) -> None:
        self._end = rows.shape[0]
        self._rows = rows.new_empty(self._end + more, *rows.shape[1:])
        self._rows[: self._end] = rows

    def pushed(self, row: Tensor, size: int) -> Tensor:
        """The last ``size`` rows, this one among them."""
        self._rows[self._end] = row
        self._end += 1
        return self._rows[max(0, self._end - size) : self._end]


def _padded(rows: Tensor, size: int, in_place: bool) -> Tensor:
    missing = size - rows.shape[0]
    if in_place:  # pages of zeros that nobody touches cost nothing
        full = rows.new_zeros(size, *rows.shape[1:])
        full[missing:] = rows
        return full
    return torch.cat([rows.new_zeros(missing, *rows.shape[1:]), rows])


def lbfgs(
    lr: HyperValue = 1,
    max_iter: int = 20,
    max_eval: int | None = None,
    tolerance_grad: HyperValue = 1e-7,
    tolerance_change: HyperValue = 1e-9,
    history_size: int = 100,
    line_search_fn: str | None = None,
) -> Optimizer:
    r"""L-BFGS; equal to ``torch.optim.LBFGS``.

    One update makes up to ``max_iter`` steps along

    .. math::
        d = -H g, \qquad x \leftarrow x + t \, d

    where :math:`H` starts as :math:`(y \cdot s / y \cdot y) \, 1` of the newest, and is
    corrected by each, pair :math:`s = t d`, :math:`y = g - g_{\text{prev}}` remembered:

    .. math::
        H \leftarrow (1 - \rho s y^\top) H (1 - \rho y s^\top) + \rho s s^\top,
        \qquad \rho = 1 / (y \cdot s)

    :math:`t` is :math:`\gamma`, in the very first step
    :math:`\gamma \min(1, 1 / \lVert g \rVert_1)`, or what a line search from there finds.

    Args:
        lr: γ ≥ 0, one number for all parameters.
        max_iter: the most steps of one update, ≥ 1.
        max_eval: the most evaluations of the loss, ≥ 1; a line search may add one, the
            last. 5/4 of ``max_iter`` unless given.
        tolerance_grad: an update ends where no gradient is larger, ≥ 0.
        tolerance_change: or where neither a parameter nor the loss changes by more, ≥ 0.
        history_size: how many pairs are remembered, ≥ 1.
        line_search_fn: ``"strong_wolfe"``, or None for steps of length ``lr``.

    Returns:
        An Optimizer whose ``update`` takes a keyword more, ``loss_fn(params) -> 0-d
        loss``; ``grads`` are those at params. Its state is torch's, with a fixed shape:
        ``old_dirs`` (the y), ``old_stps`` (the s) and ``ro``, whose last rows are the
        newest, 0 where there are none yet; ``d``, ``t``, ``H_diag``, ``prev_flat_grad``
        and ``prev_loss`` of the last step; ``n_iter`` and ``func_evals``, counted over
        all updates. Vectors hold all leaves in a row, in the widest dtype, float32 at
        least.

    Raises:
        HyperparameterError: a number out of its range, a line search not known; by
            ``update``, values that differ between leaves.
        HyperparameterTypeError: by ``update``, without a ``loss_fn``.

    Note:
        Under vmap each task stops on its own: what it has is held while others go on.
        The derivative is that of the steps made, exact, by second derivatives of the
        loss. Unlike torch's, a leaf without a gradient stays where it is, and the line
        search halves its interval where the interpolation divides by 0.

    Source:
        Nocedal, "Updating quasi-Newton matrices with limited storage", 1980; the line
        search: Nocedal, Wright, "Numerical optimization", 2006, algorithms 3.5 and 3.6.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.lbfgs(max_iter=5, line_search_fn="strong_wolfe")
        >>> loss_fn = lambda p: (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2
        >>> p = torch.zeros(2)
        >>> state = opt.init(p)
        >>> for _ in range(5):
        ...     g = torch.func.grad(loss_fn)(p)
        ...     p, state = opt.update(g, state, p, loss_fn=loss_fn)
        >>> p
        tensor([1.0000, 1.0000])
    """
    _check_count("max_iter", max_iter)
    _check_count("history_size", history_size)
    if max_eval is None:
        max_eval = max_iter * 5 // 4
    _check_count("max_eval", max_eval)
    if line_search_fn not in (None, "strong_wolfe"):
        raise HyperparameterError(
            f"line_search_fn must be 'strong_wolfe' or None, got {line_search_fn!r}"
        )

    def slots(x: Tensor) -> Slots:
        return {
            "func_evals": x.new_zeros((), dtype=torch.int64),
            "n_iter": x.new_zeros((), dtype=torch.int64),
            "d": torch.zeros_like(x),
            "t": x.new_zeros(()),
            "old_dirs": x.new_zeros(history_size, x.shape[0]),
            "old_stps": x.new_zeros(history_size, x.shape[0]),
            "ro": x.new_zeros(history_size),
            "H_diag": x.new_ones(()),
            "prev_flat_grad": torch.zeros_like(x),
            "prev_loss": x.new_zeros(()),
        }

    fixed = {
        "max_iter": max_iter,
        "max_eval": max_eval,
        "search": line_search_fn is not None,
    }
    return flat(
        lambda *args, **hyper: rule(*args, **fixed, **hyper),
        name="lbfgs",
        slots=slots,
        hyper={
            "lr": Hyper(lr),
            "tolerance_grad": Hyper(tolerance_grad),
            "tolerance_change": Hyper(tolerance_change),
        },
    )


def _check_count(name: str, count: int) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise HyperparameterError(
            f"{name} of lbfgs must be a whole number ≥ 1, got {count!r}"
        )
