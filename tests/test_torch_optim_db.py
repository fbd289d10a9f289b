"""torch's own database of optimizers, run against the classes of funcopt.torch_optim."""

import warnings
from typing import Any

import pytest
import torch
from test_torch_optim import assert_like
from torch import Tensor

from funcopt import torch_optim

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_optimizers import (
        _get_optim_inputs_including_global_cliquey_kwargs as with_execution_flags,
    )
    from torch.testing._internal.common_optimizers import optim_db

STEPS = 5
CPU = torch.device("cpu")
Params = list[torch.nn.Parameter]


def name_of(info: Any) -> str:
    return info.optim_cls.__name__


def class_of(info: Any) -> Any:
    return getattr(torch_optim, name_of(info))


def inputs(info: Any) -> list[Any]:
    """Each configuration, with each of the flags that say how a step is run."""
    return with_execution_flags(CPU, torch.float64, info)


def errors(info: Any) -> list[Any]:
    return info.optim_error_inputs_func(device="cpu", dtype=torch.float32)


INPUTS = [
    pytest.param(
        info, i, id=f"{name_of(info)}-{i}", marks=[pytest.mark.slow] if i else []
    )
    for info in optim_db
    for i in range(len(inputs(info)))
]
ERRORS = [
    pytest.param(info, i, id=f"{name_of(info)}-{i}")
    for info in optim_db
    for i in range(len(errors(info)))
]


def parameters(info: Any) -> Params:
    generator = torch.Generator().manual_seed(1)
    shapes = [(3, 4), (4, 2), (5, 5)]
    if name_of(info) != "Muon":
        shapes += [(3,), (), (2, 3, 2)]
    if info.only_supports_sparse_grads:
        shapes = [shape for shape in shapes if shape]  # a scalar has no rows
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        for shape in shapes
    ]


def train(info: Any, opt: Any, params: Params, differentiable: bool) -> list[Tensor]:
    """Some steps; what the steps have made of the parameters."""
    generator = torch.Generator().manual_seed(2)
    if differentiable:  # what is changed in place, and followed, may be no leaf
        clones = {p: p.clone() for p in params}
        for group in opt.param_groups:
            group["params"] = [clones[p] for p in group["params"]]
        for p in [*opt.state]:  # Adagrad has some before the first step
            opt.state[clones[p]] = opt.state.pop(p)
        params = [*clones.values()]  # pyright: ignore[reportAssignmentType]
    targets = [torch.randn(p.shape, generator=generator).double() for p in params]

    def closure() -> Tensor:
        opt.zero_grad()
        loss = sum(((p - t) ** 2).mean() for p, t in zip(params, targets))
        assert isinstance(loss, Tensor)
        loss.backward()
        return loss

    for step in range(STEPS):
        if info.step_requires_closure:
            opt.step(closure)
            continue
        for i, p in enumerate(params):
            g = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            if info.only_supports_sparse_grads:
                p.grad = (
                    g * (torch.rand(p.shape, generator=generator) < 0.5)
                ).to_sparse()
            else:
                p.grad = g if (i, step) != (1, 2) else None  # one is left out once
        opt.step()
    return [p.detach() for p in params]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("info, index", INPUTS)
def test_every_input_trains_to_the_same(info: Any, index: int, float64_scalars: None):
    both = []
    for cls in (class_of(info), info.optim_cls):
        given = inputs(info)[index]
        kwargs = dict(given.kwargs)
        # torch on a CPU refuses to step by it; ours takes it for what it is elsewhere.
        if kwargs.get("capturable"):
            if cls is info.optim_cls:
                kwargs["capturable"] = False
        params = parameters(info)
        opt = cls(params, **kwargs)
        made = train(info, opt, params, bool(kwargs.get("differentiable")))
        state = opt.state_dict()
        for group in state["param_groups"]:
            group.pop("capturable", None)
        both.append((made, _detached(state)))
    (ours, found), (theirs, expected) = both
    assert_like(ours, theirs)
    assert_like(found, expected)


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {key: _detached(entry) for key, entry in value.items()}
    return [*map(_detached, value)] if isinstance(value, list) else value


@pytest.mark.parametrize("info, index", ERRORS)
def test_every_error_input_raises_the_same(info: Any, index: int):
    error = errors(info)[index]
    given = error.optimizer_error_input
    cls = class_of(info)
    if error.error_type is UserWarning:
        with pytest.warns(UserWarning, match=error.error_regex):
            cls(given.params, **given.kwargs)
    elif error.error_on.name == "CONSTRUCTION_ERROR":
        with pytest.raises(error.error_type, match=error.error_regex):
            cls(given.params, **given.kwargs)
    else:
        opt = cls(given.params, **given.kwargs)
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = torch.rand_like(p)
        with pytest.raises(error.error_type, match=error.error_regex):
            opt.step()
