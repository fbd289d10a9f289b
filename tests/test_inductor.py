"""What is done with a flat graph before kernels are made of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

import funcopt as fo
from funcopt.meta.inductor import _Once, kernels

X = torch.linspace(0.5, 2.0, 6).reshape(2, 3)


def exps(x: Tensor) -> Tensor:
    return (x.exp() + 1) * x.exp()


def parts(x: Tensor) -> Tensor:
    return x.max(0).values + x.max(0).values


def of_two_numbers(x: Tensor) -> Tensor:
    return x.clamp(min=1.0) + x.clamp(min=1.5)


def of_two_dtypes(x: Tensor) -> Tensor:
    return x.to(torch.float64) + x.to(torch.bfloat16)


def draws(x: Tensor) -> Tensor:
    return torch.rand_like(x) - torch.rand_like(x)


def results(x: Tensor) -> list[Tensor]:
    return [x.exp(), x.exp()]


def views_of_results(x: Tensor) -> list[Tensor]:
    return [x.exp().t(), x.exp().t()]


# function → how many of its operations are left of how many
CASES: dict[str, tuple[Callable[[Tensor], Any], int, int]] = {
    "once": (exps, 3, 4),
    "of several results": (parts, 4, 7),
    "other numbers": (of_two_numbers, 3, 3),
    "other dtypes": (of_two_dtypes, 3, 3),
    "random numbers": (draws, 3, 3),
    "results": (results, 2, 2),
    "views of results": (views_of_results, 4, 4),
}


def operations(graph: torch.fx.GraphModule) -> int:
    return sum(node.op == "call_function" for node in graph.graph.nodes)


@pytest.mark.parametrize("name", CASES)
def test_what_is_computed_twice_is_computed_once(name: str):
    function, left, before = CASES[name]
    graph = make_fx(function, tracing_mode="fake")(X)
    assert operations(graph) == before
    _Once()(graph.graph)
    graph.recompile()
    assert operations(graph) == left
    for seed in (1, 2):
        torch.manual_seed(seed)
        found = graph(X)
        torch.manual_seed(seed)
        assert_close(found, function(X), rtol=0, atol=0)


def test_torch_2_11_knows_fewer_options(monkeypatch: pytest.MonkeyPatch):
    def older(gm: Any, example_inputs: Any, *, dynamic_shapes: str) -> Any:
        return gm

    monkeypatch.setattr(torch._inductor, "standalone_compile", older)
    graph = make_fx(exps)(X)
    assert_close(kernels(graph, [X])(X), exps(X))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own
def test_equal_results_are_tensors_of_their_own_and_draws_differ():
    def task_loss(theta: Tensor, task: Tensor) -> Any:
        drawn = [torch.rand(3), torch.rand(3)]
        equal = [task.exp(), task.exp(), task.exp().unsqueeze(0)]
        return (theta * task).sum(), {"drawn": drawn, "equal": equal}

    meta = fo.meta.value_and_grad(
        task_loss, tasks="vmap", randomness="different", has_aux=True, compile=True
    )
    (_, aux), _ = meta(torch.ones(3), X)
    first, second = aux["drawn"]
    assert (first != second).all()
    for x in aux["equal"]:
        assert_close(x.flatten(), X.exp().flatten())
        x.zero_()
