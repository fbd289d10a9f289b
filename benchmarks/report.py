"""The tables of README.md, drawn from results/*.json."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import measure

README = Path(__file__).parent / "README.md"
RIVALS = ("higher", "torchopt")


def write() -> None:
    """Put each table between its two marks in README.md."""
    text = README.read_text(encoding="utf-8")
    tables = {
        "environment": environment_line(),
        "maml": maml_table(),
        "overhead": overhead_table(),
        "auto": auto_table(),
    }
    for name, table in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, found = re.subn(
            pattern, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.S
        )
        assert found == 1, f"README.md has no marks for {name}"
    README.write_text(text, encoding="utf-8")


def environment_line() -> str:
    e = measure.load("environment")
    if e is None:
        return "Not measured yet."
    return (
        f"{e['date']}: {e['processor']}, {e['cores']} cores, {e['memory_gib']} GiB; "
        f"Python {e['python']}, torch {e['torch']}, funcopt {e['funcopt']}, higher "
        f"{e['higher']}, TorchOpt {e['torchopt']}, optree {e['optree']}."
    )


def maml_table() -> str:
    results = measure.load("maml")
    if results is None:
        return "Not measured yet."
    rows = []
    for r in results:
        times = r["milliseconds"]
        ours = times["funcopt"]["median"]
        fastest = min(times[rival]["median"] for rival in RIVALS)
        rows.append(
            [
                r["problem"],
                f"{r['tasks']}",
                f"{r['threads']}",
                *(_span(times[name]) for name in ("funcopt", *RIVALS)),
                *(f"{times[rival]['median'] / ours:.2f} ×" for rival in RIVALS),
                f"{ours / fastest:.2f}",
                " / ".join(_size(r["peak_bytes"][n]) for n in ("funcopt", *RIVALS)),
                f"{max(r['difference'].values()):.0e}",
            ]
        )
    return _markdown(
        [
            "meta-step",
            "tasks",
            "threads",
            "funcopt, ms",
            "higher, ms",
            "TorchOpt, ms",
            "faster than higher",
            "than TorchOpt",
            "time / the faster rival's",
            "peak MB (same order)",
            "difference",
        ],
        rows,
    )


def overhead_table() -> str:
    result = measure.load("overhead")
    if result is None:
        return "Not measured yet."
    update = _markdown(
        ["`update`, 18 leaves", "overhead, µs (best / median)", "whole call, µs"],
        [
            [name, f"{r['best']:.1f} / {r['median']:.1f}", f"{r['whole']:.0f}"]
            for name, r in result["update"].items()
        ],
    )
    pytree = _markdown(
        ["pytree, µs", "flatten", "flatten_up_to", "unflatten", "compare"],
        [
            [
                f"{library}, {leaves} leaves",
                *(
                    f"{times[operation]:.1f}"
                    for operation in ("flatten", "flatten_up_to", "unflatten", "compare")
                ),
            ]
            for leaves, libraries in result["pytree"].items()
            for library, times in libraries.items()
        ],
    )
    imports = result["import_seconds"]
    added = imports["torch, funcopt"]["median"] - imports["torch"]["median"]
    words = (
        f"`import torch` takes {imports['torch']['median']:.2f} s, "
        f"`import torch, funcopt` {imports['torch, funcopt']['median']:.2f} s: "
        f"{added:.2f} s more (medians of {imports['torch']['repeats']})."
    )
    return f"{update}\n\n{pytree}\n\n{words}"


def auto_table() -> str:
    results = measure.load("auto")
    if results is None:
        return "Not measured yet."
    nets = sorted({(r["net"], r["steps"]) for r in results}, key=_natural)
    counts = sorted({r["tasks"] for r in results})
    cells = {(r["net"], r["steps"], r["tasks"]): r for r in results}
    rows = [
        [net, f"{steps}", *(_cell(cells.get((net, steps, count))) for count in counts)]
        for net, steps in nets
    ]
    header = ["network", "inner steps", *(f"{count} tasks" for count in counts)]
    ratios = [_regret(r) for r in results]
    wrong = [ratio for ratio in ratios if ratio > 1]
    verdict = (
        f"The rule takes the faster path in {len(ratios) - len(wrong)} of {len(ratios)} "
        f"cells; where it does not, it loses "
        f"{100 * (sum(wrong) / len(wrong) - 1) if wrong else 0:.0f} % on average and "
        f"{100 * (max(ratios) - 1):.0f} % at most."
    )
    return f"{_markdown(header, rows)}\n\n{verdict}"


def _cell(result: dict[str, Any] | None) -> str:
    if result is None:
        return ""
    mark = "**" if _regret(result) == 1 else ""
    times = result["milliseconds"]
    ratio = times["vmap"]["median"] / times["loop"]["median"]
    return f"{ratio:.2f} {mark}{result['chosen']}{mark}"


def _regret(result: dict[str, Any]) -> float:
    """The time of the path chosen over that of the faster one."""
    times = {path: t["median"] for path, t in result["milliseconds"].items()}
    return times[result["chosen"]] / min(times.values())


def _span(times: measure.Times) -> str:
    return f"{times['median']:.4g} ({times['min']:.4g}–{times['max']:.4g})"


def _size(count: int) -> str:
    return f"{count / 1e6:.3g}"


def _natural(key: tuple[str, int]) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", f"{key[0]} {key[1]}")
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    write()
