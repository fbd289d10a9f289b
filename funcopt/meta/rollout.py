"""Some steps of a problem's inner loop, from where it stands."""

from dataclasses import replace
from operator import itemgetter
from typing import Any

import torch

from funcopt import tree
from funcopt.derivatives import Trees
from funcopt.errors import HyperparameterError
from funcopt.inner.loop import uses
from funcopt.inner.rng_state import RngState
from funcopt.inner.unroll import Unrolled, unroll
from funcopt.meta.estimate import check_alone, check_keys
from funcopt.meta.problem import (
    Carry,
    Problem,
    drawing_ahead,
    go_on,
    hyper_at,
    meta_of,
    outer_value,
    ready,
    standing,
    stands_at,
)
from funcopt.types import LossFunction, Tensor, Tree


def roll(
    problem: Problem, eta: Tree, carry: Carry, count: int, **how: Any
) -> tuple[Tensor, Carry, Tensor]:
    """``count`` steps on: their objective, where they end, and the inner losses."""
    if problem.objective == "last":
        carry, losses = steps_on(problem, eta, carry, count, **how)
        return outer_value(problem, eta, carry, carry["step"]), carry, losses
    if how.get("remat") or how.get("grad_mode") == "mixed":
        return _judged(problem, eta, carry, count, **how)
    values: list[Tensor] = []
    inner: list[Tensor] = []
    use = uses(eta)
    for k in range(count):
        eta = use()
        carry, loss = steps_on(problem, eta, carry, 1, **how)
        with drawing_ahead(problem, carry, k + 1 == count):
            values.append(outer_value(problem, eta, carry, carry["step"]))
        inner.append(loss)
    return _total(problem, values), carry, torch.cat(inner)


def steps_on(
    problem: Problem, eta: Tree, carry: Carry, count: int, **how: Any
) -> tuple[Carry, Tensor]:
    """``count`` steps on: where they end, and the losses before each."""
    run = _run(problem, problem.inner_loss, eta, carry, count, meta_of(eta), **how)
    return _end(carry, count, run), run.losses


def _judged(
    problem: Problem, eta: Tree, carry: Carry, count: int, **how: Any
) -> tuple[Tensor, Carry, Tensor]:
    """As `roll`, all steps in one `unroll`, which can then rematerialize them.

    The outer loss after a step is taken as the aux of the next step's inner loss, at the
    same parameters. That of the first step is not used: where it would draw random
    numbers that step is made alone, which keeps a carry more.
    """

    def both(params: Tree, batch: Tree, given: Trees, **buffers: Tree) -> Any:
        meta = {} if given["meta"] is None else {"meta": given["meta"]}
        alike = replace(problem, outer_batch=given["outer_batch"])
        outer = outer_value(alike, meta, {"params": params, **buffers}, 0)
        return problem.inner_loss(params, batch, *meta.values(), **buffers), outer

    if problem.outer_loss is None or count == 1:
        run = _run(problem, problem.inner_loss, eta, carry, count, meta_of(eta), **how)
        values, losses = run.losses[1:], run.losses
    else:
        alone: list[Tensor] = []
        if _draws(problem, eta, carry):
            carry, loss = steps_on(problem, eta, carry, 1, **how)
            alone, count = [loss], count - 1
        given = {"meta": meta_of(eta), "outer_batch": problem.outer_batch}
        run = _run(problem, both, eta, carry, count, given, has_aux=True, **how)
        values, losses = run.aux[1 - len(alone) :], torch.cat([*alone, run.losses])
    end = _end(carry, count, run)
    last = outer_value(problem, eta, end, end["step"])
    return _total(problem, [*values, last]), end, losses


def _draws(problem: Problem, eta: Tree, carry: Carry) -> bool:
    """Whether the outer loss draws from torch's generators."""
    rng = RngState(tree.leaves(carry["params"]))
    with rng.restored(), torch.no_grad():
        outer_value(problem, eta, carry, carry["step"])
        return rng.has_advanced()


def _total(problem: Problem, values: list[Tensor]) -> Tensor:
    total = torch.stack(values).sum()
    return total / len(values) if problem.objective == "mean" else total


def _end(carry: Carry, count: int, run: Unrolled) -> Carry:
    return {**standing(run._asdict()), "step": carry["step"] + count}


def _run(
    problem: Problem,
    loss_fn: LossFunction,
    eta: Tree,
    carry: Carry,
    count: int,
    meta: Tree,
    **how: Any,
) -> Unrolled:
    """``count`` steps on, on a loss that gets ``meta``."""
    start = carry["step"]
    part = slice(start, start + count)

    batches = problem.batches
    if batches is not None:
        batches = tree.map(itemgetter(part), batches)
    hyper = hyper_at(problem, eta, part)
    given = {"batches": batches, "hyper": hyper, "meta": meta, **how}
    at = standing(carry)
    params = at.pop("params")
    return unroll(problem.opt, loss_fn, params, problem.batch, steps=count, **at, **given)


def advance(
    problem: Problem, eta: Tree, steps: int, *, carry: Carry | None = None
) -> Carry:
    r"""Make inner steps without a derivative, to where an estimator shall go on.

    Staggered starts are windows that begin at different steps; the last W of K steps
    (truncated reverse mode as Shaban et al. have it) are ``truncated`` after an advance
    by K − W. The steps keep no graph, and so run by the fast executors.

    Args:
        problem: a `Problem`.
        eta: the meta-parameters, as every estimator takes them.
        steps: how many steps, ≥ 0, at most those left.
        carry: where to begin; None, or a carry at the end, is the start.

    Returns:
        A carry for an estimator, ``{"params", "state", "buffers", "step"}``, detached.

    Raises:
        HyperparameterError: more steps than are left, or fewer than 0.
        MetaParameterError: eta of other keys.
        StructureError: no parameters to start from; a carry of many trainings, or of
            another problem.

    Source:
        Vicol, Metz, Sohl-Dickstein, "Unbiased gradient estimation in unrolled
        computation graphs with persistent evolution strategies", 2021 (staggering).

    Example:
        >>> import torch, funcopt as fo
        >>> problem = fo.meta.Problem(
        ...     fo.sgd(lr=0.5), lambda p, _: 0.5 * p**2, lambda p, _: p**2, steps=9,
        ...     params=torch.tensor(8.0))
        >>> carry = fo.meta.advance(problem, {}, 3)
        >>> carry["params"], carry["step"]
        (tensor(1.), 3)
    """
    check_keys(eta)
    start = stands_at(problem, carry)
    if carry is not None and start:
        check_alone("advance", carry)
    if not isinstance(steps, int) or not 0 <= steps <= problem.steps - start:
        raise HyperparameterError(
            f"steps must be in [0, {problem.steps - start}], as {start} of "
            f"{problem.steps} are made; got {steps!r}"
        )
    with torch.no_grad():
        eta = ready(problem, tree.detach(eta))
        return tree.detach(steps_on(problem, eta, go_on(problem, eta, carry), steps)[0])
