"""Noise from an explicit generator: normal, repeatable, of its leaf's kind."""

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap
from trees import assert_same, mixed

import funcopt as fo
from funcopt import tree
from funcopt.types import Tree


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_leaf_is_drawn_in_its_own_dtype(dtype: torch.dtype):
    params = {"w": torch.zeros(200, 300, dtype=dtype), "none": None, "x": mixed()}
    noise = fo.normal_like(params, seeded())
    assert noise["none"] is None and noise["w"].dtype == dtype
    like = tree.map(lambda p: (p.shape, p.dtype), params)
    assert tree.map(lambda n: (n.shape, n.dtype), noise) == like
    w = noise["w"].double()
    assert abs(w.mean()) < 0.02 and abs(w.std() - 1) < 0.02
    assert abs((w**4).mean() - 3) < 0.1


def test_a_seed_repeats_and_a_generator_moves_on():
    generator, params, before = seeded(), mixed(), torch.get_rng_state()
    first, second = (fo.normal_like(params, generator) for _ in range(2))
    assert_same(fo.normal_like(params, seeded()), first)
    pairs = zip(tree.leaves(first), tree.leaves(second))
    assert all((a != b).all() for a, b in pairs)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_it_refuses():
    with pytest.raises(fo.HyperparameterTypeError, match="explicit generator.*None"):
        fo.normal_like(torch.zeros(2), None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(fo.LeafError, match="'w' is torch.int64"):
        fo.normal_like({"w": torch.tensor(1)}, seeded())
    with pytest.raises(fo.LeafError, match="'w' is float"):
        fo.normal_like({"w": 1.0}, seeded())


# --- as the noise of a step


def distance(params: Tree, target: Tensor) -> Tensor:
    return ((params["w"] - target) ** 2).sum() / 2


def test_a_chain_samples_what_it_is_told_to():
    """Of exp(-|p - t|²/2T): ten thousand chains at once, by vmap."""
    opt, temperature, chains = fo.sgld(lr=0.1), 0.5, 10_000
    params = {"w": torch.zeros(chains)}
    state, generator, target = opt.init(params), seeded(), torch.tensor(3.0)
    for _ in range(80):
        grads = grad(distance)(params, target)
        noise = fo.normal_like(params, generator)
        params, state = opt.update(
            grads, state, params, noise=noise, temperature=temperature
        )
    assert abs(params["w"].mean() - target) < 0.03
    spread = temperature / (1 - 0.1 / 2)  # what a step this long makes of T
    assert abs(params["w"].var() / spread - 1) < 0.05


def test_noise_of_each_task_and_step():
    """vmap over tasks of an unroll whose steps have noise of their own."""
    opt, steps, tasks = fo.sgld(lr=0.1), 3, 4
    like = {"w": torch.zeros(tasks, steps, 2)}
    noise = fo.normal_like(like, seeded())
    targets = torch.arange(8.0).view(tasks, 2)

    def adapted(noise: Tree, target: Tensor, temperature: Tensor) -> Tensor:
        hyper = {"noise": fo.per_step(noise), "temperature": temperature}
        start = {"w": torch.zeros(2)}
        run = fo.unroll(opt, distance, start, target, steps=steps, hyper=hyper)
        return run.params["w"]

    temperature = torch.tensor(0.5)
    found = vmap(adapted, in_dims=(0, 0, None))(noise, targets, temperature)
    for task in range(tasks):
        expected = torch.zeros(2)
        for n in noise["w"][task]:
            expected = expected - 0.1 * (expected - targets[task]) + 0.1**0.5 * n
        torch.testing.assert_close(found[task], expected)
    slope = grad(lambda t: adapted({"w": noise["w"][0]}, targets[0], t).sum())
    assert slope(temperature).isfinite() and slope(temperature) != 0


def test_an_average_of_samples_is_evaluated_without_noise():
    opt = fo.chain(fo.sgld(lr=0.1), fo.polyak())
    params = torch.ones(2)
    state = opt.init(params)
    with pytest.raises(fo.HyperparameterError, match="noise"):
        opt.update(params, state, params)
    noise = fo.normal_like(params, seeded())
    params, state = opt.update(params, state, params, noise=noise)
    assert_same(opt.eval_params(state, params), params)
