"""The tables of meta.py, drawn from results/meta.json."""

from __future__ import annotations

from typing import Any

import measure
from report import targets
from report.tables import markdown, ratio
from report.targets import verdict

RIVALS = ("higher", "torchopt")


def meta_tables() -> str:
    results = measure.load("meta")
    if results is None:
        return "Not measured yet."
    parts = {
        "compiled": _compiled,
        "loops": _loops,
        "forward": _forward,
        "logistic": _logistic,
    }
    return "\n\n".join(
        draw(results[name]) if name in results else f"{name}: not measured."
        for name, draw in parts.items()
    )


def _compiled(results: list[dict[str, Any]]) -> str:
    rows = []
    for r in results:
        times, seconds = r["milliseconds"], r["first_call_seconds"]
        again, plain = r["again_seconds"], times["funcopt"]["median"]
        least: dict[str, float] = targets.COMPILED.get(r["problem"], {})
        for way in ("compiled", "traced"):
            judged, first = way == "compiled", f"{seconds[way]:.3g}"
            if judged:
                met = verdict(seconds[way] <= targets.COMPILE_SECONDS)
                first += f" (≤ {targets.COMPILE_SECONDS:g}, {met})"
            saved = (plain - times[way]["median"]) / 1e3
            rows.append(
                [
                    f"{r['problem']}, {way}",
                    f"{r['threads']}",
                    *(_span(times[name]) for name in (way, "funcopt", *RIVALS)),
                    *(
                        f"{x:.1f} ×" + _judged(x, least.get(rival) if judged else None)
                        for rival in RIVALS
                        for x in [ratio(times, way, rival)]
                    ),
                    first,
                    f"{again[way]:.0f}" if way in again else "",
                    f"{seconds[way] / saved:,.0f}" if saved > 0 else "never",
                    f"{r['difference'][way]:.0e}",
                ]
            )
    return markdown(
        [
            "meta-step",
            "threads",
            "so, ms",
            "as it is, ms",
            "higher, ms",
            "TorchOpt, ms",
            "faster than higher",
            "than TorchOpt",
            "first call, s",
            "again in a new process, s",
            "pays after, meta-steps",
            "difference",
        ],
        rows,
    )


def _judged(times: float, least: float | None) -> str:
    return "" if least is None else f" (≥ {least:g}, {verdict(times >= least)})"


def _loops(results: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for r in results for name in r["held_bytes"]))
    rows, reached = [], []
    for r in results:
        rows.append(
            [
                r["network"],
                f"{r['steps']}",
                *(_size(r["held_bytes"].get(name)) for name in names),
                *(_size(r["peak_bytes"].get(name)) for name in names),
                *(_median(r["milliseconds"].get(name)) for name in names),
            ]
        )
        if "mixed, sqrt" not in r["held_bytes"] or r["steps"] < 16:
            continue
        share = r["held_bytes"]["mixed, sqrt"] / min(r["held_bytes"][n] for n in RIVALS)
        time = 1 / ratio(r["milliseconds"], "mixed", "reverse")
        judged = f"≤ {targets.HELD:g}, {verdict(share <= targets.HELD)}"
        reached.append(
            [
                r["network"],
                f"{r['steps']}",
                f"{share:.3f}",
                judged if r["steps"] == 16 else "",
                f"{time:.2f}",
                f"≤ {targets.MIXED:g}, {verdict(time <= targets.MIXED)}",
            ]
        )
    groups = ("held MB", "peak MB", "ms")
    header = ["Adam, K steps", "K", *(f"{n}, {unit}" for unit in groups for n in names)]
    table = markdown(header, rows)
    if not reached:
        return f"{table}\n\nThis version has no mixed mode: not measured."
    columns = ["", "K", "mixed, sqrt: held / least rival's", ""]
    return f"{markdown([*columns, 'mixed: time / reverse', ''], reached)}\n\n{table}"


def _forward(results: list[dict[str, Any]]) -> str:
    rows = []
    for r in results:
        short, long = (r["peak_bytes"][k] for k in ("100", "1000"))
        rows.append(
            [
                f"{r['hyperparameters']}",
                _size(short),
                _size(long),
                verdict(long <= targets.CONSTANT * short),
                f"{r['seconds']:.2f}",
            ]
        )
    return markdown(
        [
            "forward mode, hyperparameters",
            "peak MB, K = 100",
            "K = 1,000",
            "independent of K",
            "K = 1,000, s",
        ],
        rows,
    )


def _logistic(r: dict[str, Any]) -> str:
    times = r["milliseconds"]
    rows = []
    for name in ("compiled", "traced", "funcopt", "by recomputation"):
        faster = ratio(times, name, "by recomputation")
        judged = _judged(faster, targets.LOGISTIC) if name == "compiled" else ""
        difference = f"{r['difference'][name]:.0e}"
        rows.append([name, _span(times[name]), f"{faster:.2f} ×{judged}", difference])
    header = [f"outer step, K = {r['inner_steps']}", "ms", "faster", "difference"]
    return markdown(header, rows)


def _size(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.3g}"


def _median(times: measure.Times | None) -> str:
    return "" if times is None else f"{times['median']:.3g}"


def _span(times: measure.Times) -> str:
    return f"{times['median']:.4g} ({times['min']:.4g}–{times['max']:.4g})"
