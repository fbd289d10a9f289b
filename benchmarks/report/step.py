"""The tables of step.py."""

from __future__ import annotations

from typing import Any

import measure
from report import tables, targets
from report.targets import DONATED, PURE, TORCH, verdict


def step_tables() -> str:
    results = measure.load("step")
    if results is None:
        return "Not measured yet."
    adamw = [r for r in results if r["part"] == targets.ADAMW]
    registry = [r for r in results if r["part"] != targets.ADAMW]
    cells = {(r["tree"], r["threads"]): r["milliseconds"] for r in adamw}
    threads = sorted({r["threads"] for r in results})
    reached = []
    for t in targets.STEP:
        if any(t.rival not in cells[t.tree, n] for n in threads):
            reached.append(
                [t.tree, t.ours, t.rival, *[""] * len(threads), "not measured"]
            )
            continue
        ratios = [tables.ratio(cells[t.tree, n], t.ours, t.rival) for n in threads]
        if t.at_least < 1:  # said as a time, as the target is
            shown = [f"{1 / x:.2f} of its time" for x in ratios]
            wanted = f"≤ {1 / t.at_least:g}"
        else:
            shown = [f"{x:.2f} ×" for x in ratios]
            wanted = f"≥ {t.at_least:g} ×"
        met = verdict(ratios[-1] >= t.at_least)
        reached.append([t.tree, t.ours, t.rival, *shown, wanted, met])
    on = [f"{n} thread{'s' * (n > 1)}" for n in threads]
    header = ["AdamW", "", "against", *on, f"target, {on[-1]}", ""]
    names = list(dict.fromkeys(name for r in adamw for name in r["milliseconds"]))
    times = [
        [
            r["tree"],
            f"{r['threads']}",
            *(_microseconds(r["milliseconds"].get(name)) for name in names),
            f"{max(r['difference'].values()):.0e}",
        ]
        for r in adamw
    ]
    columns = ["AdamW, µs (least)", "threads", *names, "difference"]
    return "\n\n".join(
        [
            tables.markdown(header, reached),
            tables.markdown(columns, times),
            against_torch(registry),
            at_memory_speed(registry),
            tables.others(results),
        ]
    )


def against_torch(results: list[dict[str, Any]]) -> str:
    """A row for each rule that torch.optim has, a column for each tree."""
    rows = []
    for rule, cells in _by_rule(results).items():
        best = [_best(r) for r in cells.values() if "milliseconds" in r]
        if all(found is None for found in best):
            continue
        shown = [_against(cells.get(tree)) for tree in targets.REGISTRY]
        met = all(found is None or found[1] >= targets.BEST for found in best)
        rows.append([rule, *shown, verdict(met)])
    header = ["donated / pure, ms; × torch's best", *targets.REGISTRY]
    return tables.markdown([*header, f"≥ {targets.BEST:g} ×"], rows)


def at_memory_speed(results: list[dict[str, Any]]) -> str:
    """A row for each rule, on the largest tree."""
    rows = []
    for rule, cells in _by_rule(results).items():
        r = cells.get(targets.LARGE)
        if r is None:
            continue
        if "milliseconds" not in r:
            rows.append([rule, "", _untimed(r), *[""] * 5])
            continue
        times = r["milliseconds"]
        adamw = times.get(targets.ADAMW, times[DONATED])["median"] / r["bytes of AdamW"]
        per_byte = times[DONATED]["median"] / r["bytes"] / adamw
        faster = [
            tables.ratio(each, DONATED, TORCH["foreach"])
            for each in _heaps(r)
            if TORCH["foreach"] in each
        ]
        met = []
        if r["elementwise"]:
            met = [per_byte <= targets.PER_BYTE]
        if faster and TORCH["fused"] not in times and r["elementwise"]:
            met = [met[0] and x >= targets.FOREACH for x in faster]
        rows.append(
            [
                rule,
                f"{r['bytes'] / r['size']:.3g}",
                *(f"{times[name]['median']:.3g}" for name in (DONATED, PURE)),
                f"{per_byte:.2f}",
                " / ".join(f"{x:.2f} ×" for x in faster),
                " / ".join(dict.fromkeys(map(verdict, met))),
                f"{max(r['difference'].values()):.0e}",
            ]
        )
    header = [
        f"rule, {targets.LARGE}",
        "bytes a parameter",
        "donated, ms",
        "pure, ms",
        f"time per byte / AdamW's (≤ {targets.PER_BYTE:g})",
        f"than foreach (≥ {targets.FOREACH:g} ×) / in a widened heap",
        "",
        "difference",
    ]
    return tables.markdown(header, rows)


def _by_rule(results: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for r in sorted(results, key=lambda r: r["rule"]):
        found.setdefault(r["rule"], {})[r["tree"]] = r
    return found


def _heaps(result: dict[str, Any]) -> list[dict[str, measure.Times]]:
    """The times in a fresh process, and those in a widened heap."""
    return [result[key] for key in ("milliseconds", "widened") if key in result]


def _best(result: dict[str, Any]) -> tuple[str, float] | None:
    """torch's fastest, and how many times as fast ours is, where that is least."""
    found = [
        (name, tables.ratio(times, DONATED, TORCH[name]))
        for times in _heaps(result)
        for name in TORCH
        if TORCH[name] in times
    ]
    return min(found, key=lambda each: each[1], default=None)


def _against(result: dict[str, Any] | None) -> str:
    if result is None or "milliseconds" not in result:
        return f"{_untimed(result)}, not compared" if result else ""
    times = result["milliseconds"]
    ours = " / ".join(f"{times[name]['median']:.3g}" for name in (DONATED, PURE))
    name, faster = _best(result) or ("", 0.0)
    mark = "" if faster >= targets.BEST else "**"
    return f"{ours}; {mark}{faster:.2f} ×{mark} {name}"


def _untimed(result: dict[str, Any]) -> str:
    """The first step's milliseconds alone; or that it came to other numbers."""
    return "**wrong**" if "error" in result else f"{1e3 * result['seconds']:,.0f}"


def _microseconds(times: measure.Times | None) -> str:
    if times is None:
        return ""
    return f"{1e3 * times['median']:,.4g} ({1e3 * times['min']:,.4g})"
