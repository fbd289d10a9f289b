"""The step under vmap, forward and reverse mode, dual tensors and torch.compile."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from row import Case
from table import ENDS, MIXES, PLAINEST, QUICK, SMOOTH
from torch import Tensor
from torch._dynamo.exc import Unsupported
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from trees import assert_close, assert_moved, random_like, relative

import funcopt as fo
from funcopt import tree
from funcopt.types import State, Tree

TASKS = 3


def stack(trees: list[Tree]) -> Tree:
    return tree.map(lambda *rows: torch.stack(rows), *trees)


def after(opt: fo.Optimizer, params: Tree, steps: int) -> State:
    """A state that is ``steps`` updates old."""
    state = opt.init(params)
    for seed in range(steps):
        _, state = opt.update(random_like(params, seed), state, params)
    return state


def tasks(case: Case, dtype: torch.dtype) -> list[tuple[Tree, State, Tree]]:
    """Gradients, state and parameters of tasks that have come differently far."""
    opt, found = case.optimizer(), []
    for i in range(TASKS):
        params = case.mixed(dtype, seed=i)
        state = after(opt, params, case.row.warm * i)
        found.append((case.mixed(dtype, seed=10 + i), state, params))
    return found


def spread(hyper: Any) -> list[Any]:
    """Other values for each task; betas move the other way, to stay below 1."""
    return [tree.map(lambda v, i=i: v * (1 - 0.1 * i), hyper) for i in range(TASKS)]


PRECISION = {torch.float64: 1e-14, torch.float32: 1e-6}


def precision(case: Case, dtype: torch.dtype) -> float:
    """Of a batch and a loop; as many times more as the row's sums of products need."""
    return PRECISION[dtype] * case.row.rounding / PRECISION[torch.float64]


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize("case", MIXES, ids=str)
def test_vmap_is_a_loop(case: Case, dtype: torch.dtype):
    """Everything batched, the state's step too: tasks unequally old."""
    opt = case.optimizer()
    rows = tasks(case, dtype)
    expected = stack([opt.update(*row) for row in rows])
    result = vmap(opt.update)(*stack(rows))
    assert_close(result, expected, precision(case, dtype))
    start = stack([params for _, _, params in rows])
    assert_moved(result[0], start, everywhere=case.row.moves)


@pytest.mark.costly
@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize("case", MIXES, ids=str)
def test_vmap_with_hyperparameters_of_each_task(case: Case, dtype: torch.dtype):
    opt, values = case.optimizer(), spread(case.tensors())
    rows = tasks(case, dtype)

    def update(row: Any, hyper: Any) -> Any:
        return opt.update(*row, **hyper)

    expected = stack([update(row, hyper) for row, hyper in zip(rows, values)])
    assert_close(
        vmap(update)(stack(rows), stack(values)), expected, precision(case, dtype)
    )
    shared = stack([update(row, values[1]) for row in rows])
    found = vmap(update, in_dims=(0, None))(stack(rows), values[1])
    assert_close(found, shared, precision(case, dtype))


@pytest.mark.parametrize("case", MIXES, ids=str)
def test_vmap_over_one_argument(case: Case):
    """Only the gradients, or only a hyperparameter, differ between tasks."""
    opt = case.optimizer()
    rows = tasks(case, torch.float64)
    grads, (_, state, params) = [g for g, _, _ in rows], rows[1]
    expected = stack([opt.update(g, state, params) for g in grads])
    result = vmap(opt.update, in_dims=(0, None, None))(stack(grads), state, params)
    assert_close(result, expected, 1e-14)
    for name, values in case.tensors().items():
        several = spread(values)
        expected = stack(
            [opt.update(grads[0], state, params, **{name: v})[0] for v in several]
        )
        result = vmap(lambda v, n=name: opt.update(grads[0], state, params, **{n: v})[0])
        assert_close(result(stack(several)), expected, 1e-14)


@pytest.mark.parametrize("case", MIXES, ids=str)
def test_nested_vmap(case: Case):
    """Tasks × learning rates."""
    opt = case.optimizer()
    rows, rates = tasks(case, torch.float64), torch.tensor([0.1, 0.01]).double()

    def update(row: Any, lr: Tensor) -> Any:
        return opt.update(*row, lr=lr)

    expected = stack([stack([update(row, lr) for lr in rates]) for row in rows])
    result = vmap(lambda row: vmap(lambda lr: update(row, lr))(rates))(stack(rows))
    assert_close(result, expected, 1e-14)


@pytest.mark.parametrize("case", ENDS, ids=str)
def test_vmap_of_unroll(case: Case):
    opt, starts = case.optimizer(), [case.small(seed=i) for i in range(TASKS)]
    targets, values = (
        [case.small(seed=9 + i) for i in range(TASKS)],
        spread(case.tensors()),
    )

    def run(params: Tree, target: Tree, hyper: Any) -> Any:
        return fo.unroll(opt, distance, params, target, steps=3, hyper=hyper)[:3]

    expected = stack([run(*row) for row in zip(starts, targets, values)])
    result = vmap(run)(stack(starts), stack(targets), stack(values))
    assert_close(result, expected, 1e-13)


def distance(params: Tree, target: Tree) -> Tensor:
    parts = tree.map(lambda p, t: ((p - t) ** 2 + torch.exp(p * t)).sum(), params, target)
    return torch.stack(tree.leaves(parts)).sum()


def outer_of(
    case: Case,
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...], tuple[str, ...]]:
    """Some steps, then a loss: of the leaves of parameters, data and hyperparameters."""
    opt, steps = case.optimizer(), case.row.warm + 1
    point = {
        "params": case.small(seed=1),
        "data": case.small(seed=2),
        "hyper": case.tensors(),
    }
    leaves, structure = tree.flatten(point)

    def outer(*leaves: Tensor) -> Tensor:
        x = tree.unflatten(structure, leaves)
        run = fo.unroll(
            opt, distance, x["params"], x["data"], steps=steps, hyper=x["hyper"]
        )
        return distance(run.params, x["data"])

    return outer, tuple(leaves), tree.paths(structure)


def everything(count: int) -> tuple[int, ...]:
    return tuple(range(count))


@pytest.mark.costly
@pytest.mark.parametrize("case", MIXES, ids=str)
def test_forward_and_reverse_mode_agree(case: Case):
    opt = case.optimizer()
    grads, state, params = tasks(case, torch.float64)[1]
    step = state.pop("step")

    def update(grads: Tree, slots: Tree, params: Tree, hyper: Any) -> Any:
        new, state = opt.update(grads, {"step": step, **slots}, params, **hyper)
        return tree.leaves(new), [tree.leaves(v) for k, v in state.items() if k != "step"]

    arguments = (grads, state, params, case.tensors())
    forward = jacfwd(update, argnums=(0, 1, 2, 3))(*arguments)
    reverse = jacrev(update, argnums=(0, 1, 2, 3))(*arguments)
    assert_close(forward, reverse, 1e-12)
    assert any(block.any() for block in tree.leaves(reverse))

    tangents = random_like(arguments, seed=5)
    slope = jvp(update, arguments, tangents)[1]
    h = 1e-6
    ahead, behind = (
        update(*tree.map(lambda x, t, s=s: x + s * h * t, arguments, tangents))
        for s in (1, -1)
    )
    numeric = tree.map(lambda a, b: (a - b) / (2 * h), ahead, behind)
    assert_close(slope, numeric, 1e-7)

    with forward_ad.dual_level():
        duals = tree.map(lambda x, t: forward_ad.make_dual(x, t), arguments, tangents)
        tangent = tree.map(lambda x: forward_ad.unpack_dual(x).tangent, update(*duals))
    assert_close(tangent, slope, 1e-14)


@pytest.mark.costly
@pytest.mark.parametrize("case", SMOOTH, ids=str)
def test_eager_autograd_is_func_grad(case: Case):
    outer, point, paths = outer_of(case)
    expected = grad(outer, argnums=everything(len(point)))(*point)
    leaves = [leaf.clone().requires_grad_() for leaf in point]
    found = torch.autograd.grad(outer(*leaves), leaves, materialize_grads=True)
    assert_close(list(found), list(expected), 1e-13)
    assert all(x.any() for path, x in zip(paths, expected) if case.drives(path))


@pytest.mark.costly
@pytest.mark.parametrize("case", ENDS, ids=str)
def test_hessian(case: Case):
    outer, point, _ = outer_of(case)
    columns = everything(len(point))
    second = hessian(outer, argnums=columns)(*point)
    slope_of = grad(outer, argnums=columns)
    tangents, h = random_like(list(point), seed=6), 1e-6
    ahead, behind = (
        slope_of(*(x + s * h * t for x, t in zip(point, tangents))) for s in (1, -1)
    )
    for i in columns:
        for j in columns:  # the order of the two derivatives does not matter
            a, b = second[i][j], second[j][i]
            flat = a.reshape(point[i].numel(), point[j].numel())
            assert_close(flat, b.reshape(flat.shape[::-1]).T, 1e-10)
        along = [
            torch.tensordot(second[i][j], tangents[j], dims=point[j].ndim)
            for j in columns
        ]
        assert relative((ahead[i] - behind[i]) / (2 * h), sum(along[1:], along[0])) < 1e-6


@pytest.mark.costly
@pytest.mark.parametrize("case", QUICK, ids=str)
def test_forward_mode_within_forward_mode(case: Case):
    """Where torch loses the derivative of an autograd.Function: none may be called."""
    outer, point, _ = outer_of(case)
    first, second = (tuple(random_like(list(point), seed=s)) for s in (6, 7))

    def slope(*point: Tensor) -> Tensor:
        return jvp(outer, point, first)[1]

    if case.row.name == "soap":
        with pytest.raises(fo.GradientLostError, match="soap's bases"):
            jvp(slope, point, second)
        return
    found = jvp(slope, point, second)[1]
    with fo.execution("reference"):  # to build no kernels
        backward = grad(outer, argnums=everything(len(point)))
        columns = jvp(backward, point, second)[1]
    expected = sum((a * b).sum() for a, b in zip(columns, first))
    assert_close(found, expected, 1e-10)


# torch.compile ----------------------------------------------------------------------


class Counting:
    """A backend that runs the traced graph as it is, and counts the graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, example: Any) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


HYPER: dict[str, Callable[[Tensor], Any]] = {
    "0-d tensor": lambda lr: lr,
    "prefix tree": lambda lr: {"layers": lr, "empty": 0.5},
    "by_name": lambda lr: fo.by_name({"*.bias": 0.01}, default=lr),
    "Schedule": lambda lr: fo.Schedule(lambda count: lr * 0.9**count),
}


def check_compiled(case: Case, form: Callable[[Tensor], Any], backend: Any) -> None:
    opt = case.optimizer()
    grads, state, start = tasks(case, torch.float64)[1]

    def update(grads: Tree, state: State, params: Tree, lr: Tensor) -> Any:
        return opt.update(grads, state, params, lr=form(lr))

    torch.compiler.reset()
    compiled = torch.compile(update, fullgraph=True, backend=backend)
    params = start
    for rate in (0.1, 0.2, 0.4):
        lr = torch.tensor(rate, dtype=torch.float64)
        expected = update(grads, state, params, lr)
        found = compiled(grads, state, params, lr)
        assert_close(found, expected, case.row.rounding)
        params, state = expected
    assert_moved(params, start)


# Every form for one optimizer, and every optimizer in the form that asks most of it.
COMPILED = [(ENDS[0], form) for form in HYPER] + [(c, "Schedule") for c in QUICK]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # Dynamo does
@pytest.mark.parametrize("case, form", COMPILED, ids=str)
def test_compile(case: Case, form: str):
    """One graph, and none more when lr changes or the steps go on."""
    backend = Counting()
    check_compiled(case, HYPER[form], backend)
    assert backend.graphs == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
@pytest.mark.parametrize("case", PLAINEST, ids=str)
def test_compile_through_aot_autograd(case: Case):
    check_compiled(case, HYPER["0-d tensor"], "aot_eager")


def kept(opt: fo.Optimizer) -> fo.Optimizer:
    return fo.chain(fo.clip_by_global_norm(1.0), opt, fo.ema(0.9))


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrapped",
    [lambda opt: fo.accumulate(opt, 2), fo.skip_nonfinite, fo.master_weights, kept],
    ids=["accumulate", "skip_nonfinite", "master_weights", "chain"],
)
def test_a_wrapper_steps_in_place_when_compiled(wrapped: Callable[..., fo.Optimizer]):
    opt, (start, g) = wrapped(fo.adam(lr=0.1)), random_like([torch.empty(3)] * 2, 1)
    torch.compiler.reset()
    in_place = partial(opt.update, donate=True)
    compiled = torch.compile(in_place, fullgraph=True, backend="eager")
    p, q = start.clone(), start.clone()
    state, other = opt.init(p), opt.init(q)
    for _ in range(4):
        p, state = opt.update(g, state, p)
        new, _ = compiled(g, other, q)
        assert new is q
    assert_close((q, other), (p, state), 1e-6)
    assert_moved(q, start)


@pytest.mark.slow
def test_a_compiled_step_in_place_loses_no_derivative():
    opt, p = fo.adam(), torch.ones(3, requires_grad=True)
    torch.compiler.reset()
    in_place = partial(opt.update, donate=True)
    compiled = torch.compile(in_place, fullgraph=True, backend="eager")
    with pytest.raises(Unsupported, match="what a derivative still needs"):
        compiled(torch.ones(3), opt.init(p), p)
    with torch.no_grad():
        assert compiled(torch.ones(3), opt.init(p), p)[0] is p
