"""L-BFGS: a quasi-Newton step along what the last gradients tell of the curvature."""

from collections.abc import Callable
from functools import partial

import torch

from funcopt.checks import check_count
from funcopt.conditions import Condition, Number, everywhere, most, no, where
from funcopt.errors import HyperparameterError
from funcopt.flat import Slope, flat
from funcopt.hyper import Hyper
from funcopt.optimizer import Optimizer
from funcopt.optimizers._line_search import Point, strong_wolfe
from funcopt.optimizers._pairs import Pairs, Slots
from funcopt.stepping import pages
from funcopt.types import HyperValue, Tensor

_CURVED = 1e-10  # y·s of a pair that is remembered
_SOME = 16  # elements that are looked at before all are


def rule(
    evaluate: Slope,
    f: Number,
    g: Tensor,
    x: Tensor,
    slots: Slots,
    moves: Tensor | None,
    *,
    donate: bool,
    lr: Number,
    tolerance_grad: Number,
    tolerance_change: Number,
    max_iter: int,
    max_eval: int,
    search: bool,
) -> tuple[Tensor, Slots]:
    d, last_g = slots["d"], slots["prev_flat_grad"]
    if moves is not None:
        d, last_g = torch.where(moves, d, 0.0), torch.where(moves, last_g, 0.0)
    n_iter = slots["n_iter"]
    rounds = min(max_iter, max_eval)
    begun = most(n_iter, 1) > 0  # else the first step's is no pair
    pairs = Pairs(slots, rounds - 1 + begun, donate)
    in_place = pairs.in_place

    def read(x: Number) -> Number:
        return x.item() if in_place and isinstance(x, Tensor) else x

    def memory(used: Tensor | None) -> Tensor | None:
        """What to write over, where nobody follows what is computed."""
        if not in_place:
            return None
        return pages.large_like(g) if used is None else used

    def within(x: Tensor, bound: Number) -> Condition:
        """Whether no element is larger; that one is, a few tell mostly."""
        if in_place:
            few = x[:: 1 + x.shape[0] // _SOME].tolist()
            if any(abs(value) > bound for value in few):
                return False
        return read(_largest(x)) <= bound

    n_iter, evals = read(n_iter), 1
    lr, tolerance_grad, tolerance_change = map(
        read, (lr, tolerance_grad, tolerance_change)
    )
    t, scale, last_f = (read(slots[key]) for key in ("t", "H_diag", "prev_loss"))
    f = read(f.to(x.dtype))
    s = d * t if begun else None
    done = within(g, tolerance_grad)
    for i in range(rounds):
        if everywhere(done):
            break
        n_iter = n_iter + no(done)

        if s is not None:
            y = torch.sub(g, last_g, out=pairs.y.room())
            ys = y.dot(s)
            new = no(done) & (read(ys) > _CURVED)
            if not everywhere(no(new)):
                ys = where(new, ys, 1.0)
                pairs.push(y, s, ys.reciprocal(), new)
                scale = where(new, read(ys / where(new, y.dot(y), 1.0)), scale)
        way = pairs.direction(g, scale, memory(d if i or donate else None))
        if moves is not None:
            way = torch.where(moves, way, 0.0)
        spare = last_g if i and last_g is not g else None
        d, last_g, last_f = (
            where(done, old, new) for old, new in ((d, way), (last_g, g), (last_f, f))
        )
        rate = lr
        if not everywhere(n_iter != 1):
            size = read(g.abs().sum())
            far = (n_iter == 1) & (size > 1)
            rate = lr * where(far, 1 / where(far, size, 1.0), 1.0)
        t = where(done, t, rate)

        slope = read(g.dot(d))
        done = done | (slope > -tolerance_change)
        if everywhere(done):
            break
        if search:
            found, tried = strong_wolfe(
                _line(evaluate, x, d, read),
                Point(0 * t, f, g, slope),
                t,
                read(_largest(d)),
                tolerance_change,
                max_eval - evals,
                max(max_eval - 1 - i, 0),
                no(done),
            )
            t, f, g = where(done, t, found.t), found.loss, found.g
            evals = evals + tried
        s = torch.mul(d, t, out=pairs.s.room())
        x = where(done, x, _moved(x, d, t, memory(spare)))
        if not search and i + 1 < max_iter:
            new_g, new_f = evaluate(x)
            f, g = where(done, f, read(new_f.to(x.dtype))), where(done, g, new_g)
            evals = evals + no(done)
        done = (
            done
            | (evals >= max_eval)
            | within(g, tolerance_grad)
            | within(s, tolerance_change)
            | (abs(f - last_f) < tolerance_change)
        )
    kept = {
        "func_evals": slots["func_evals"] + evals,
        "n_iter": n_iter,
        "d": d,
        "t": t,
        "H_diag": scale,
        "prev_flat_grad": last_g,
        "prev_loss": last_f,
    }
    if donate and d is slots["d"]:
        del kept["d"]
    kept = {key: _own(value, slots[key]) for key, value in kept.items()}
    return x, {**slots, **kept, **pairs.slots()}


def _own(value: Number, old: Tensor) -> Tensor:
    """The value as a tensor like the old one, and neither that nor the caller's."""
    if isinstance(value, Tensor):
        return value.clone() if value is old or not value.ndim else value
    return old.new_tensor(value)


def _line(
    evaluate: Slope,
    x: Tensor,
    d: Tensor,
    read: Callable[[Tensor], Number],
) -> Callable[[Number], Point]:
    """The loss at x + t·d, as a function of t."""

    def at(t: Number) -> Point:
        g, f = evaluate(_moved(x, d, t))
        return Point(t, read(f.to(x.dtype)), g, read(g.dot(d)))

    return at


def _moved(x: Tensor, d: Tensor, t: Number, memory: Tensor | None = None) -> Tensor:
    """x + t·d; in one pass, and rounded as torch's, where t is Python's number."""
    if isinstance(t, Tensor):
        return x + d * t
    return torch.add(x, d, alpha=t, out=memory)


def _largest(x: Tensor) -> Tensor:
    """The largest magnitude; 0 of nothing."""
    if not x.shape[0]:
        return x.sum()
    least, most = x.aminmax()
    return torch.maximum(-least, most)


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
        An Optimizer whose ``update`` takes two keywords more: ``loss_fn(params) -> 0-d
        loss``, and ``value``, the loss at params where it is known, as the ``grads``
        are: which spares one evaluation. Its state is torch's, with a fixed shape:
        ``old_dirs`` (the y), ``old_stps`` (the s) and ``ro``, whose last rows are the
        newest, 0 where there are none yet; ``d``, ``t``, ``H_diag``, ``prev_flat_grad``
        and ``prev_loss`` of the last step; ``n_iter`` and ``func_evals``, counted over
        all updates. Vectors hold all leaves in a row, in the widest dtype, float32 at
        least.

    Raises:
        HyperparameterError: a number out of its range, a line search not known; by
            ``update``, values that differ between leaves.
        HyperparameterTypeError: by ``update``, without a ``loss_fn``, or with a ``value``
            that is no 0-d tensor.

    Note:
        Under vmap each task stops on its own: what it has is held while others go on.
        With ``donate=True`` the history is written as the update goes on: after a
        ``loss_fn`` that raises, start from ``init`` or a copy of the state.
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
        ...     g, value = torch.func.grad_and_value(loss_fn)(p)
        ...     p, state = opt.update(g, state, p, loss_fn=loss_fn, value=value)
        >>> p
        tensor([1.0000, 1.0000])
    """
    check_count("max_iter of lbfgs", max_iter)
    check_count("history_size of lbfgs", history_size)
    if max_eval is None:
        max_eval = max_iter * 5 // 4
    check_count("max_eval of lbfgs", max_eval)
    if line_search_fn not in (None, "strong_wolfe"):
        raise HyperparameterError(
            f"line_search_fn must be 'strong_wolfe' or None, got {line_search_fn!r}"
        )
    fixed = {
        "max_iter": max_iter,
        "max_eval": max_eval,
        "search": line_search_fn is not None,
    }
    return flat(
        partial(rule, **fixed),
        name="lbfgs",
        slots=partial(_slots, history_size),
        hyper={
            "lr": Hyper(lr),
            "tolerance_grad": Hyper(tolerance_grad),
            "tolerance_change": Hyper(tolerance_change),
        },
    )


def _slots(history_size: int, x: Tensor) -> Slots:
    return {
        "func_evals": x.new_zeros((), dtype=torch.int64),
        "n_iter": x.new_zeros((), dtype=torch.int64),
        "d": torch.zeros_like(x),
        "t": x.new_zeros(()),
        "old_dirs": pages.zeros((history_size, x.shape[0]), x),
        "old_stps": pages.zeros((history_size, x.shape[0]), x),
        "ro": x.new_zeros(history_size),
        "H_diag": x.new_ones(()),
        "prev_flat_grad": torch.zeros_like(x),
        "prev_loss": x.new_zeros(()),
    }
