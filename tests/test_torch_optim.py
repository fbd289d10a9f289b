"""funcopt.torch_optim: the numbers, the state and the groups of torch.optim."""

from typing import Any

import pytest
import torch
from torch import Tensor

from funcopt import torch_optim

#: each class with two mixes of its flags
MIXES: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {}),
    ("SGD", {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}),
    ("Adam", {}),
    ("Adam", {"amsgrad": True, "weight_decay": 0.1}),
    ("AdamW", {}),
    ("AdamW", {"amsgrad": True, "maximize": True}),
]
SHAPES = [(3, 4), (5,), (), (2, 3, 4)]
STEPS = 12


def parameters(dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype))
        for shape in SHAPES
    ]


def groups(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:2]}, {"params": params[2:], "lr": 0.02}]


def train(opt: torch.optim.Optimizer, steps: int = STEPS, seed: int = 2) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        opt.step()


def assert_like(found: Any, expected: Any, where: str = "state_dict") -> None:
    """The same keys in the same order, tensors of one form and nearly one value."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key, value in expected.items():
            assert_like(found[key], value, f"{where}[{key!r}]")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, value in enumerate(expected):
            assert_like(found[i], value, f"{where}[{i}]")
    elif isinstance(expected, Tensor):
        assert found.dtype is expected.dtype and found.device == expected.device, where
        assert found.shape == expected.shape, where
        limits = {torch.float64: 1e-12, torch.float32: 2e-6}
        limit = limits.get(found.dtype, 2e-2)
        torch.testing.assert_close(found, expected, rtol=limit, atol=limit, msg=where)
    else:
        assert found == expected, where


@pytest.fixture
def float64_scalars():
    """torch keeps the scalars of its state in the default dtype."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


@pytest.mark.parametrize("name, kwargs", MIXES)
def test_numbers_state_and_groups(name: str, kwargs: dict[str, Any], float64_scalars):
    both = []
    for library in (torch_optim, torch.optim):
        params = parameters()
        opt = getattr(library, name)(groups(params), **kwargs)
        train(opt)
        both.append((params, opt.state_dict()))
    (ours, found), (theirs, expected) = both
    assert_like([*map(Tensor.detach, ours)], [*map(Tensor.detach, theirs)])
    assert_like(found, expected)
