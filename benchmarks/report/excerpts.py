"""What the README and the docs show of the results."""

from __future__ import annotations

import measure
from report.tables import markdown, ratio

#: what docs/memory.md compares, by the names of results/meta.json
MODES = {"reverse": "default", "mixed": "mixed", "mixed, sqrt": 'mixed, `remat="sqrt"`'}


def meta_steps() -> str:
    """README.md: a meta-step of each library."""
    results, versions = measure.load("maml"), measure.load("environment")
    if results is None or versions is None:
        return "Not measured yet."
    rivals = {"higher": "higher", "torchopt": "TorchOpt"}
    rows = []
    for r in results:
        times = r["milliseconds"]
        row = [f"{r['problem']}, {r['tasks']} tasks"]
        row += [f"{times['funcopt']['median']:.1f} ms"]
        row += [
            f"{times[name]['median']:.1f} ms ({ratio(times, 'funcopt', name):.2f} ×)"
            for name in rivals
        ]
        rows.append(row)
    named = (f"{title} {versions[name]}" for name, title in rivals.items())
    return markdown(["meta-step", "funcopt", *named], rows)


def compiled() -> str:
    """docs/scaling.md: what compiling a meta-step costs and gives."""
    results = measure.load("meta")
    if results is None:
        return "Not measured yet."
    rows = []
    for r in results["compiled"]:
        plain, again = r["milliseconds"]["funcopt"]["median"], r["again_seconds"]
        for way, name in (("traced", '`"trace"`'), ("compiled", "`True`")):
            ours, first = r["milliseconds"][way]["median"], r["first_call_seconds"][way]
            row = [r["problem"], name, f"{plain:.3g} ms", f"{ours:.3g} ms"]
            row += [f"{first:.2g} s", f"{again[way]:.0f} s" if way in again else ""]
            rows.append([*row, f"{1e3 * first / (plain - ours):,.0f}"])
    header = ["meta-step", "`compile=`", "as it is", "so", "first call"]
    return markdown([*header, "in a new process", "won back after, meta-steps"], rows)


def held() -> str:
    """docs/memory.md: what K steps keep for the backward pass, and what that takes."""
    results = measure.load("meta")
    if results is None:
        return "Not measured yet."
    header = ["Adam", "K", *(f"{title}, MB" for title in MODES.values())]
    header += [f"{title}: time / default" for title in [*MODES.values()][1:]]
    rows = []
    for r in results["loops"]:
        row = [r["network"], f"{r['steps']}"]
        row += [f"{r['held_bytes'][name] / 1e6:.3g}" for name in MODES]
        row += [
            f"{ratio(r['milliseconds'], 'reverse', name):.2f}" for name in [*MODES][1:]
        ]
        rows.append(row)
    return markdown(header, rows)
