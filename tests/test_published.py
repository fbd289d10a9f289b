"""The numbers are those of published implementations, from their files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from published.problem import GIVEN, gradient, start
from table import ROWS

import funcopt as fo

FILES = sorted((Path(__file__).parent / "published").glob("*.json"))
RUNS = [
    pytest.param(record, run, id=f"{record['optimizer']}-{k}")
    for record in map(json.loads, (path.read_text() for path in FILES))
    for k, run in enumerate(record["runs"])
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)],
    ids=str,
)
@pytest.mark.parametrize("record, run", RUNS)
def test_trajectory(record: dict[str, Any], run: dict[str, Any], dtype: torch.dtype):
    opt = getattr(fo, record["optimizer"])(**run["arguments"])
    shapes = [tuple(shape) for shape in record["shapes"]]
    params = [torch.tensor(p, dtype=dtype) for p in start(shapes)]
    state, first = opt.init(params), params
    moved = [torch.zeros_like(p, dtype=torch.bool) for p in params]
    size = 2 * [p.abs().max().item() for p in params]
    expected = dict(zip(record["steps"], run["params"], strict=True))
    for step in range(1, max(expected) + 1):
        grads = [torch.tensor(g, dtype=dtype) for g in gradient(step, shapes)]
        data = {
            name: [torch.tensor(x, dtype=dtype) for x in values]
            for name in record.get("given", ())
            if (values := GIVEN[name](step, shapes)) is not None
        }
        params, state = opt.update(grads, state, params, **data)
        found = list(params)
        if record.get("evaluated"):
            found += opt.eval_params(state, params)
        for i, theirs in enumerate(expected.get(step, ())):
            theirs = torch.tensor(theirs, dtype=torch.float64)
            # The largest number held so far is the scale, as in the race with a twin.
            size[i] = max(size[i], theirs.abs().max().item())
            error = (found[i].double() - theirs).abs().max().item()
            assert error <= TOLERANCE[dtype] * size[i], f"leaf {i}, step {step}: {error}"
        moved = [m | (p != q) for m, p, q in zip(moved, params, first)]
    assert all(m.all() for m in moved)


def test_every_row_has_an_oracle():
    published = {path.stem for path in FILES}
    assert {row.name for row in ROWS if row.twin is None} <= published
