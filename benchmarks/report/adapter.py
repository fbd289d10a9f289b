"""The table of adapter.py, drawn from results/adapter.json."""

from __future__ import annotations

from typing import Any

import measure
from report.tables import markdown


def adapter_tables() -> str:
    results = measure.load("adapter")
    if results is None:
        return "Not measured yet."
    *steps, many = results
    sizes = list(dict.fromkeys(r["size"] for r in steps))
    ratios = {(r["name"], r["size"]): _ratios(r) for r in steps}
    rows = [
        [name, *(" / ".join(map(_marked, ratios[name, size])) for size in sizes)]
        for name in dict.fromkeys(r["name"] for r in steps)
    ]
    header = ["`step()`, times faster than torch.optim's fastest", *sizes]
    shares = [
        [what, f"{_least(many, what, 'funcopt') / _least(many, what, 'torch'):.2f}"]
        for what in ("construction", "state_dict")
    ]
    small = markdown(["1,000 parameters", "of torch's time (≤ 1.5)"], shares)
    return f"{markdown(header, rows)}\n\n{small}"


def _ratios(result: dict[str, Any]) -> list[float]:
    """Least times, torch's fastest by ours: in a fresh process, in a widened heap."""
    found = []
    for times in (result[key] for key in ("times", "widened") if key in result):
        least = {way: each["min"] for way, each in times.items()}
        ours = least.pop("funcopt")
        found.append(min(least.values()) / ours)
    return found


def _marked(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio >= 1 else f"**{ratio:.2f}**"


def _least(many: dict[str, dict[str, dict[str, float]]], what: str, of: str) -> float:
    return many["times"][f"{what}, {of}"]["min"]
