"""A scalar slot: one number per leaf, a float where it can be, a float64 tensor else."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap
from trees import assert_close, assert_same, mixed, random_like

import funcopt as fo
from funcopt import tree
from funcopt.hyper import Hyper
from funcopt.types import State, Tree


def rule(
    g: Tensor, p: Tensor, total: Tensor, fade: Any, last: Tensor, *, step: Any, decay: Any
) -> Any:
    """A rate that shrinks by ``decay`` at each step, between two leaf-shaped slots."""
    fade = fade * decay
    return p - fade * g, total + fade * g, fade, g * 1.0


def optimizer(rule: Callable[..., Any] = rule) -> fo.Optimizer:
    slots = {"total": torch.zeros_like, "fade": 1, "last": torch.zeros_like}
    return fo.elementwise(rule, name="fading", slots=slots, hyper={"decay": Hyper(0.5)})


FADING = optimizer()


def fade_of(state: State) -> list[float]:
    assert state["fade"].dtype == torch.float64
    return state["fade"].tolist()


def test_it_is_one_vector_in_its_place():
    state = FADING.init(mixed())
    assert list(state) == ["step", "total", "fade", "last"]
    assert fade_of(state) == [1.0] * 5
    assert fade_of(FADING.init({"gap": None, "w": torch.ones(2)})) == [1.0, 1.0]
    assert fade_of(FADING.init({})) == fade_of(FADING.update({}, FADING.init({}), {})[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_its_number_is_a_float64_whatever_the_leaf_is(dtype: torch.dtype):
    """0-d and half leaves are worked on in another form; the number is left alone."""
    params, grads = mixed(dtype), random_like(mixed(dtype), seed=1)
    state, expected = FADING.init(params), params
    for rate in (0.1, 0.1**2):
        params, state = FADING.update(grads, state, params, decay=0.1)
        expected = tree.map(
            lambda p, g, r=rate: (p.double() - r * g.double()).to(dtype), expected, grads
        )
    assert fade_of(state) == [1.0 * 0.1 * 0.1] * 5
    assert_close(params, expected, 2 * torch.finfo(dtype).eps)


def test_a_leaf_without_a_gradient_keeps_its_number():
    params = [torch.ones(2), torch.ones(())]
    _, state = FADING.update([None, torch.ones(())], FADING.init(params), params)
    assert fade_of(state) == [1.0, 0.5]
    decay = torch.tensor(0.5, requires_grad=True)
    _, state = FADING.update([None, torch.ones(())], state, params, decay=decay)
    assert fade_of(state) == [1.0, 0.25]
    _, state = FADING.update([None, None], state, params)
    assert fade_of(state) == [1.0, 0.25]


def test_the_rule_gets_a_float_unless_a_derivative_would_be_lost():
    seen = []

    def recording(*leaf: Any, **values: Any) -> Any:
        seen.append(leaf[3])
        return rule(*leaf, **values)

    opt, params = optimizer(recording), torch.ones(2)
    state, decay = opt.init(params), torch.tensor(0.5, requires_grad=True)
    plain = {"execution": "reference"}  # others call the rule once, to see what it does
    _, state = opt.update(params, state, params, **plain)
    _, state = opt.update(params, state, params, decay=decay, **plain)
    assert [type(x) for x in seen] == [float, float]
    assert state["fade"].requires_grad
    _, state = opt.update(params, state, params, **plain)
    assert (seen[2].shape, seen[2].dtype) == ((), torch.float64)
    (slope,) = torch.autograd.grad(state["fade"].sum(), decay)
    assert slope == 0.5 * 0.5


def unrolled(
    decay: Tensor, state: State, params: Tree, all_grads: list[Tree]
) -> tuple[Tree, State]:
    for grads in all_grads:
        params, state = FADING.update(grads, state, params, decay=decay)
    return params, state


def gradients(params: Tree) -> list[Tree]:
    return [random_like(params, seed) for seed in range(3)]


def test_derivatives_pass_through_it():
    """Of p₃ = p₀ - Σ fade₀·decayᵗ·gₜ, by decay and by the number of the start."""
    params, decay = torch.ones(2).double(), torch.tensor(0.5).double()
    state, grads = FADING.init(params), gradients(params)
    g = [x.sum() for x in grads]

    def outer(decay: Tensor, fade: Tensor) -> Tensor:
        return unrolled(decay, {**state, "fade": fade}, params, grads)[0].sum()

    by_decay = -(g[0] + 2 * 0.5 * g[1] + 3 * 0.5**2 * g[2])
    by_fade = -(0.5 * g[0] + 0.5**2 * g[1] + 0.5**3 * g[2])
    point = decay, state["fade"]
    slopes = grad(outer, argnums=(0, 1))(*point)
    assert_close(slopes, (by_decay, by_fade.reshape(1)), 1e-14)
    ones = torch.ones(()).double(), torch.ones(1).double()
    assert_close(jvp(outer, point, ones)[1], by_decay + by_fade, 1e-14)
    second = grad(lambda d: grad(outer)(d, state["fade"]))(decay)
    assert_close(second, -(2 * g[1] + 6 * 0.5 * g[2]), 1e-14)


def stack(trees: list[Tree]) -> Tree:
    return tree.map(lambda *rows: torch.stack(rows), *trees)


def test_vmap_is_a_loop():
    """One number for all tasks, and then, as the first run leaves it, one for each."""
    params, decays = mixed(), torch.tensor([0.5, 0.1, 0.9]).double()
    state, grads = FADING.init(params), gradients(params)
    rows = [unrolled(decay, state, params, grads) for decay in decays]
    result = vmap(unrolled, in_dims=(0, None, None, None))(decays, state, params, grads)
    assert_close(result, stack(rows), 1e-14)
    states = [state for _, state in rows]
    rows = [unrolled(d, s, params, grads) for d, s in zip(decays, states)]
    batched = stack(states)
    result = vmap(unrolled, in_dims=(0, 0, None, None))(decays, batched, params, grads)
    assert_close(result, stack(rows), 1e-14)


def test_it_compiles_into_one_graph_for_every_value():
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(FADING.update, fullgraph=True, backend=backend)
    params = mixed()
    state = FADING.init(params)
    for seed in range(3):
        grads = random_like(params, seed)
        expected = FADING.update(grads, state, params)
        assert_close(compiled(grads, state, params), expected, 1e-14)
        params, state = expected
    assert len(graphs) == 1


def test_it_can_be_saved():
    params = mixed(torch.float32)
    params, state = FADING.update(params, FADING.init(params), params, decay=0.3)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert_same(torch.load(file, weights_only=True), state)
