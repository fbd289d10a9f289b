"""What a flat graph does for nothing is left out, and nothing else."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from funcopt.meta.flat_graph import replay, shorten

X = torch.linspace(0.5, 2.0, 6).reshape(2, 3)


# What is computed twice -----------------------------------------------------------------


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


def parts_as_results(x: Tensor) -> list[Tensor]:
    return [x.max(0).values, x.max(0).values]


def of_a_result(x: Tensor) -> list[Tensor]:
    y = x.exp()
    return [y, y * 2 + (y * 2).sum()]


def written_between(x: Tensor) -> Tensor:
    y = x.exp()
    before = y.sum()
    y.add_(1)
    return y.sum() - before


def written_afterwards(x: Tensor) -> Tensor:
    y, z = torch.zeros_like(x), torch.zeros_like(x)
    y.add_(x)
    return y - 2 * z


def written_as_out(x: Tensor) -> Tensor:
    y, z = torch.zeros_like(x), torch.zeros_like(x)
    torch.add(x, 1, out=y)
    return y - 2 * z


def written_in_a_list(x: Tensor) -> Tensor:
    y, z = torch.zeros_like(x), torch.zeros_like(x)
    torch._foreach_add_(  # pyright: ignore[reportPrivateImportUsage]
        [y, x.clone()], 1
    )
    return y - 2 * z


def running_statistics(x: Tensor) -> Tensor:
    mean, var = torch.zeros(3), torch.ones(3)
    for _ in range(2):
        y = F.batch_norm(x, mean, var, training=True)
    return y + mean


# Views that are their tensor ------------------------------------------------------------


def idle_views(x: Tensor) -> Tensor:
    return x.view(2, 3).expand(2, 3) * x.view(3, 2).view(2, 3)


def view_as_result(x: Tensor) -> Tensor:
    return x.view(2, 3)


def lazy_conjugate(x: Tensor) -> Tensor:
    y = torch.complex(x, x + 1)
    return (y.conj() * y).real


def lazy_minus(x: Tensor) -> Tensor:
    return torch._neg_view(x) * x  # pyright: ignore[reportPrivateImportUsage]


def other_bits(x: Tensor) -> Tensor:
    return x.view(torch.int32) + x


def other_places(x: Tensor) -> Tensor:
    first = x[:1]
    return first - first.as_strided((1, 3), (3, 1), 3)


def other_strides(x: Tensor) -> Tensor:
    square = x[:, :2]
    return square - square.t()


# Numbers that depend on no input --------------------------------------------------------


def bias_correction(x: Tensor) -> Tensor:
    steps = torch.zeros(3, dtype=torch.float64) + 1
    return x / (1 - 0.9 ** steps[0])


def of_other_kinds(x: Tensor) -> Tensor:
    truth, endless = torch.ones(()) > 0, torch.ones(()).log() - math.inf
    return torch.where(truth, x, endless)


def number_as_result(x: Tensor) -> list[Tensor]:
    return [torch.ones(()) + 1, x + 1]


def number_that_is_written(x: Tensor) -> Tensor:
    number = torch.ones(())
    before = x + number
    number.add_(1)
    return before * number


def drawn_number(x: Tensor) -> Tensor:
    return torch.rand(()) * x


def of_many(x: Tensor) -> Tensor:
    return torch.ones(5000).sum() * x


# function → how many of its operations are left of how many
CASES: dict[str, tuple[Callable[[Tensor], Any], int, int]] = {
    "once": (exps, 3, 4),
    "of several results": (parts, 3, 7),
    "other numbers": (of_two_numbers, 3, 3),
    "other dtypes": (of_two_dtypes, 3, 3),
    "random numbers": (draws, 3, 3),
    "results": (results, 2, 2),
    "views of results": (views_of_results, 4, 4),
    "parts as results": (parts_as_results, 4, 6),
    "of a result": (of_a_result, 4, 5),
    "written between": (written_between, 5, 5),
    "written afterwards": (written_afterwards, 5, 5),
    "written as out": (written_as_out, 5, 5),
    "written in a list": (written_in_a_list, 6, 6),
    "running statistics": (running_statistics, 6, 13),
    "idle views": (idle_views, 3, 5),
    "a view as result": (view_as_result, 1, 1),
    "a lazy conjugate": (lazy_conjugate, 7, 7),
    "a lazy minus": (lazy_minus, 3, 3),
    "other bits": (other_bits, 2, 3),
    "other places": (other_places, 3, 3),
    "other strides": (other_strides, 3, 3),
    "a bias correction": (bias_correction, 2, 6),
    "numbers of other kinds": (of_other_kinds, 3, 6),
    "a number as result": (number_as_result, 3, 3),
    "a number that is written": (number_that_is_written, 4, 4),
    "a drawn number": (drawn_number, 2, 2),
    "of many": (of_many, 3, 3),
}


def operations(graph: torch.fx.GraphModule) -> int:
    return sum(node.op == "call_function" for node in graph.graph.nodes)


@pytest.mark.parametrize("name", CASES)
def test_what_is_done_for_nothing_is_left_out(name: str):
    function, left, before = CASES[name]

    def listed(x: Tensor) -> list[Tensor]:
        made = function(x)
        return made if isinstance(made, list) else [made]

    graph = make_fx(listed, tracing_mode="fake")(X.clone())
    assert operations(graph) == before, graph.graph
    shorten(graph)
    assert operations(graph) == left, graph.graph
    run = replay(graph, [X])
    for seed in (1, 2):
        torch.manual_seed(seed)
        found = run(X)
        torch.manual_seed(seed)
        assert_close(found, listed(X), rtol=0, atol=0)


def test_results_are_tensors_of_their_own_that_autograd_takes():
    graph = make_fx(lambda x: [x, x.view(3, 2)], tracing_mode="fake")(X.clone())
    found = replay(graph, [X])(X)
    for x in found:
        x.requires_grad_().square().sum().backward()
        assert x.grad is not None and not x.is_inference()
        assert x.untyped_storage()._cdata != X.untyped_storage()._cdata
