"""How kernels are made of a flat graph."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import config
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

import funcopt as fo
from funcopt.meta.inductor import kernels

X = torch.linspace(0.5, 2.0, 6).reshape(2, 3)


def exps(x: Tensor) -> Tensor:
    return (x.exp() + 1) * x.exp()


def test_torch_2_11_knows_fewer_options(monkeypatch: pytest.MonkeyPatch):
    def older(gm: Any, example_inputs: Any, *, dynamic_shapes: str) -> Any:
        return gm

    monkeypatch.setattr(torch._inductor, "standalone_compile", older)
    graph = make_fx(exps)(X)
    assert_close(kernels(graph, [X])(X), exps(X))


@pytest.mark.parametrize(
    "torchs, asked, expected",
    [
        ("AVX512", None, True),
        ("AVX512", False, False),
        ("AVX2", None, None),
        ("AVX2", True, True),
        ("DEFAULT", None, None),
    ],
)
def test_what_torch_runs_by_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, torchs: str, asked: Any, expected: Any
):
    """What the user has set is left as it is."""
    seen = []

    def compiled(graph: Any, *_: Any, **__: Any) -> Any:
        seen.append(config.cpp.vec_isa_ok)
        return graph

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: torchs)
    monkeypatch.setattr(torch._inductor, "standalone_compile", compiled)
    with config.patch({"cpp.vec_isa_ok": asked}):
        kernels(make_fx(exps)(X), [X])
    assert seen == [expected]


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
