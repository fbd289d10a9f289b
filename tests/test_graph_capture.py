"""A CUDA graph in which the count of steps would stand still is refused."""

from typing import Any

import pytest
import torch
from trees import mixed

import funcopt as fo
from funcopt import tree
from funcopt.stepping import vectors

OPTIMIZERS = {
    "adamw": fo.adamw(),
    "chain": fo.chain(fo.clip_by_global_norm(1.0), fo.radam()),
    "whole leaves": fo.lamb(),
    "an average": fo.schedule_free_sgd(),
}


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_count_on_the_cpu(name: str, donate: bool, monkeypatch: pytest.MonkeyPatch):
    opt, params = OPTIMIZERS[name], mixed()
    state = opt.init(params)
    for seed in range(2):  # the second goes by a fast path
        params, state = opt.update(mixed(seed=seed + 1), state, params)
    before = tree.map(torch.clone, (params, state))
    with monkeypatch.context() as capture:
        capture.setattr(torch.Tensor, "is_cuda", True)
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        for update in (opt.update, torch.func.vmap(opt.update, (None, None, 0))):
            given: Any = params, {}
            if update is not opt.update:
                given = tree.map(lambda x: torch.stack([x, x]), params), {}
            elif donate:
                given = params, {"donate": True}
            with pytest.raises(fo.ExecutionError, match=r"'step' is on the CPU; move it"):
                update(mixed(seed=3), state, given[0], **given[1])
    found = tree.leaves((params, state))
    assert all(map(torch.equal, found, tree.leaves(before)))
    opt.update(mixed(seed=3), state, params)


def test_what_is_evaluated_with_goes_by_the_count_too(monkeypatch: pytest.MonkeyPatch):
    opt, params = OPTIMIZERS["an average"], mixed()
    _, state = opt.update(mixed(seed=1), opt.init(params), params)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(fo.ExecutionError, match="'step' is on the CPU"):
        opt.eval_params(state, params)


@pytest.mark.parametrize("capturing", [False, True])
def test_where_the_count_begins(capturing: bool, monkeypatch: pytest.MonkeyPatch):
    leaves = [torch.empty(3, device="meta"), None]
    assert vectors.first_steps(leaves).device.type == "cpu"
    monkeypatch.setattr(vectors, "is_captured", lambda _: capturing)
    where = vectors.first_steps(leaves).device.type
    assert where == ("meta" if capturing else "cpu")
