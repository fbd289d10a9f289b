"""What depends on what where a training ends, as autograd records it."""

from collections.abc import Callable

from funcopt import tree
from funcopt.derivatives import Trees, is_smooth, vjp
from funcopt.errors import GradientLostError
from funcopt.execution import levels
from funcopt.inner.loss import InnerLoss
from funcopt.inner.rng_state import RngState
from funcopt.inner.step import Step
from funcopt.meta.problem import (
    Carry,
    Problem,
    batch_at,
    inputs_at,
    meta_of,
    outer_value,
    ready,
)
from funcopt.types import Tree


def moving_leaves(problem: Problem, eta: Tree, carry: Carry) -> Tree:
    """Which leaves the optimizer steps: those that depend on the gradient or the state.

    The others (of `freeze`) are constants: at the end of the training the loss need not
    be stationary in them, so that they have no part in the Hessian.
    """
    step, state = Step(problem.opt, problem.inner_loss), carry["state"]
    given = inputs_at(problem, {**carry, "eta": eta}, problem.steps - 1)
    leaves, structure = tree.flatten(carry["params"])

    def update(at: Trees) -> Trees:
        params, state = step.updated(at["grads"], {**given, "state": at["state"]})
        return {"params": params, "state": state}

    moving: list[bool] = []
    with RngState(leaves).restored():
        for _ in range(problem.steps):  # `accumulate` moves nothing in most
            at = {"grads": carry["params"], "state": state}  # any gradient will do
            stepped, moving = _recorded(update, at, "params")
            if any(moving):
                break
            state = stepped["state"]
    found = iter(moving)
    return tree.unflatten(structure, [x is not None and next(found) for x in leaves])


def check_buffers(problem: Problem, eta: Tree, end: Carry) -> None:
    """Raise where parameters reach the losses through buffers too.

    Buffers carry the parameters of all earlier steps, which the end alone does not tell.
    """
    loss, batch = InnerLoss(problem.inner_loss), batch_at(problem, problem.steps)
    at = {"params": end["params"], "meta": meta_of(ready(problem, eta))}
    buffers = end["buffers"]

    def written(given: Trees) -> Tree:
        return loss(batch=batch, buffers=buffers, **given)[2]

    def read(given: Trees) -> Tree:
        value = outer_value(problem, ready(problem, eta), {**end, **given}, problem.steps)
        return value, loss.grad(batch=batch, **at, **given)[0]

    with RngState(tree.leaves(end)).restored():
        if _follows(written, at) and _follows(read, {"buffers": buffers}):
            raise GradientLostError(
                "implicit cannot see what parameters do through the buffers, which the "
                "losses read and the inner loss makes of the parameters. Write "
                "fo.detach(...) into them, to say that they are constants, or use "
                "'weight_update_implicit' or 'reverse'"
            )


def _follows(function: Callable[[Trees], Tree], given: Trees) -> bool:
    """Whether a derivative of any of the function's results is recorded."""
    return any(_recorded(lambda at: {"all": function(at)}, given, "all")[1])


def _recorded(
    function: Callable[[Trees], Trees], given: Trees, name: str
) -> tuple[Trees, list[bool]]:
    """What the function gives; and of which smooth leaves a derivative is recorded."""
    found: list[bool] = []

    def noting(given: Trees) -> Trees:
        results = function(given)
        smooth = [x for x in tree.leaves(results[name]) if is_smooth(x)]
        found.extend(levels.recorded([x]) for x in smooth)
        return results

    return vjp(noting, given)[0], found
