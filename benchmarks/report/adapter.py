"""The table of adapter.py, drawn from results/adapter.json."""

from __future__ import annotations

from typing import Any

import measure
from report import targets
from report.tables import markdown

Ratios = dict[tuple[str, str], list[float]]  # by class and network


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
    *small, large = sizes
    adamw = {("AdamW", size): ratios["AdamW", size] for size in small[:2]}
    alone = {
        (r["name"], large): ratios[r["name"], large]
        for r in steps
        if r["size"] == large and "fused" not in r["times"]
    }
    goals = [
        _goal("never slower", ratios, targets.BEST),
        _goal(f"AdamW on {' and '.join(small[:2])}", adamw, targets.SMALL_ADAMW),
        _goal(f"no fused kernel in torch, {large}", alone, targets.UNFUSED),
    ]
    for what in ("construction", "state_dict"):
        share = _least(many, what, "funcopt") / _least(many, what, "torch")
        goal = f"{what} of 1,000 parameters, of torch's time"
        met = targets.verdict(share <= targets.OF_TORCHS)
        goals.append([goal, f"≤ {targets.OF_TORCHS}", f"{share:.2f}", met])
    verdicts = markdown(["goal", "", "worst", ""], goals)
    return f"{markdown(header, rows)}\n\n{verdicts}"


def _goal(what: str, ratios: Ratios, at_least: float) -> list[str]:
    """Its row: the least ratio, and the classes that miss it."""
    least = {key: min(each) for key, each in ratios.items()}
    short = ", ".join(
        dict.fromkeys(name for (name, _), r in least.items() if r < at_least)
    )
    verdict = targets.verdict(not short) + (f" by {short}" if short else "")
    return [what, f"≥ {at_least:g} ×", f"{min(least.values()):.2f}", verdict]


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
