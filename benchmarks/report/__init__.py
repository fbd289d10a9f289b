"""The tables of README.md, and those of other pages, drawn from results/*.json."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import measure
from report import excerpts, tables, targets
from report.adapter import adapter_tables
from report.meta import meta_tables
from report.step import step_tables
from report.targets import verdict

ROOT = Path(__file__).parents[2]
RIVALS = ("higher", "torchopt")


def write() -> None:
    """Put each table between its two marks in its page."""
    for page, text in filled().items():
        page.write_text(text, encoding="utf-8")


def filled() -> dict[Path, str]:
    """The pages, with the tables that results/*.json give."""
    drawn = {
        "benchmarks/README.md": {
            "environment": environment_line(),
            "maml": maml_table(),
            "overhead": overhead_table(),
            "auto": auto_table(),
            "step": step_tables(),
            "unroll": unroll_table(),
            "ensemble": ensemble_table(),
            "cold": cold_table(),
            "gpu": gpu_table(),
            "meta": meta_tables(),
            "adapter": adapter_tables(),
        },
        "README.md": {"meta-steps": excerpts.meta_steps()},
        "docs/memory.md": {"held": excerpts.held()},
        "docs/scaling.md": {"compiled": excerpts.compiled()},
    }
    return {ROOT / page: _filled(page, parts) for page, parts in drawn.items()}


def _filled(page: str, drawn: dict[str, str]) -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, table in drawn.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, found = re.subn(
            pattern, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.S
        )
        assert found == 1, f"{page} has no marks for {name}"
    return text


def environment_line() -> str:
    e = measure.load("environment")
    if e is None:
        return "Not measured yet."
    return (
        f"{e['date']}: {e['processor']}, {e['cores']} cores, {e['memory_gib']} GiB; "
        f"Python {e['python']}, torch {e['torch']}, funcopt {e['funcopt']}, higher "
        f"{e['higher']}, TorchOpt {e['torchopt']}, optree {e['optree']}, "
        f"optax {e.get('optax')}, jax {e.get('jax')}."
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
    return tables.markdown(
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
    update = tables.markdown(
        ["`update`, 18 leaves", "pure, µs (best / median)", "donated, µs"],
        [
            [
                name,
                *(
                    f"{r[kind]['best']:.1f} / {r[kind]['median']:.1f}"
                    for kind in ("pure", "donated")
                ),
            ]
            for name, r in result["update"].items()
        ],
    )
    scan = tables.markdown(
        ["choice of the executor, 72 tensors", "µs (best / median)", "≤ 10"],
        [
            [kind, f"{t['best']:.1f} / {t['median']:.1f}", verdict(t["median"] <= 10)]
            for kind, t in result["scan"].items()
        ],
    )
    pytree = tables.markdown(
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
        f"{added:.2f} s more (medians of {imports['torch']['repeats']}; ≤ 0.3: "
        f"{verdict(added <= 0.3)})."
    )
    return "\n\n".join([update, scan, pytree, words])


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
    return f"{tables.markdown(header, rows)}\n\n{verdict}"


def unroll_table() -> str:
    results = measure.load("unroll")
    if results is None:
        return "Not measured yet."
    rows = []
    for r in results:
        faster = tables.ratio(r["milliseconds"], "funcopt", "per tensor")
        saved = r["saved_bytes"]["funcopt"] / r["saved_bytes"]["per tensor"]
        wanted = targets.UNROLL[r["tree"]]
        rows.append(
            [
                r["tree"],
                f"{r['threads']}",
                *(_span(r["milliseconds"][name]) for name in ("funcopt", "per tensor")),
                f"{faster:.2f} ×",
                f"≥ {wanted:g} ×, {verdict(faster >= wanted)}",
                " / ".join(
                    _size(r["saved_bytes"][name]) for name in ("funcopt", "per tensor")
                ),
                f"{100 * saved:.0f} %",
                f"≤ {100 * targets.SAVED:g} %, {verdict(saved <= targets.SAVED)}",
                f"{max(r['difference'].values()):.0e}",
            ]
        )
    table = tables.markdown(
        [
            "5 steps, forward and backward",
            "threads",
            "funcopt, ms",
            "per tensor, ms",
            "faster",
            "target",
            "saved MB",
            "share",
            "target",
            "difference",
        ],
        rows,
    )
    return f"{table}\n\n{tables.others(results)}"


def ensemble_table() -> str:
    results = measure.load("ensemble")
    if results is None:
        return "Not measured yet."
    *ours, plain = results[0]["milliseconds"]
    rows = []
    for r in results:
        faster = [tables.ratio(r["milliseconds"], name, plain) for name in ours]
        rows.append(
            [
                r["tree"],
                r["rates"],
                f"{r['threads']}",
                *(_span(r["milliseconds"][name]) for name in (*ours, plain)),
                *(f"{x:.1f} ×, {verdict(x >= targets.ENSEMBLE)}" for x in faster),
                f"{max(r['difference'].values()):.0e}",
            ]
        )
    header = ["32 tasks", "learning rate", "threads", *(f"{n}, ms" for n in ours)]
    header += [f"{plain}, ms", *(f"{n} (≥ {targets.ENSEMBLE:g} ×)" for n in ours)]
    header += ["difference"]
    return f"{tables.markdown(header, rows)}\n\n{tables.others(results)}"


def cold_table() -> str:
    result = measure.load("cold")
    if result is None:
        return "Not measured yet."
    rows = []
    for name in result["never built"]:
        row = [name]
        for kind, most in targets.COLD.items():
            times = result[kind][name]
            row += [f"{_span(times)}", verdict(times["median"] <= most)]
        rows.append(row)
    header = ["first step"]
    for kind, most in targets.COLD.items():
        header += [f"{kind}, ms", f"≤ {most:g}"]
    return tables.markdown(header, rows)


def gpu_table() -> str:
    result = measure.load("gpu")
    if result is None:
        return "Not run on a GPU."
    e = result["environment"]
    rows = []
    for line in result["lines"]:
        if "error" in line:
            rows.append([line["what"], "", "", f"**not measured**: {line['error']}"])
            continue
        value, least, most = line["value"], line.get("least"), line.get("most")
        met = (least is None or value >= least) and (most is None or value <= most)
        wanted = f"≥ {least:.3g}" if least else f"≤ {most:.3g}" if most else ""
        rows.append(
            [line["what"], f"{value:.3g}", wanted, verdict(met) if wanted else ""]
        )
    words = (
        f"{e['date']}: {e['device']}, {e['device_memory_gib']} GiB; CUDA {e['cuda']}, "
        f"torch {e['torch']}, Triton {e['triton']}, funcopt {e['funcopt']}."
    )
    return f"{words}\n\n{tables.markdown(['', 'measured', 'target', ''], rows)}"


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


if __name__ == "__main__":
    write()
