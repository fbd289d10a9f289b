"""The table of adapter.py, drawn from results/adapter.json."""

import measure
from report.tables import markdown


def adapter_tables() -> str:
    results = measure.load("adapter")
    if results is None:
        return "Not measured yet."
    *steps, many = results
    sizes = list(dict.fromkeys(r["size"] for r in steps))
    ratios = {(r["name"], r["size"]): r["ratio"] for r in steps}
    rows = [
        [name, *(_marked(ratios[name, size]) for size in sizes)]
        for name in dict.fromkeys(r["name"] for r in steps)
    ]
    header = ["`step()`, times faster than torch.optim's fastest", *sizes]
    shares = [
        [what, f"{_least(many, what, 'funcopt') / _least(many, what, 'torch'):.2f}"]
        for what in ("construction", "state_dict")
    ]
    small = markdown(["1,000 parameters", "of torch's time (≤ 1.5)"], shares)
    return f"{markdown(header, rows)}\n\n{small}"


def _marked(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio >= 1 else f"**{ratio:.2f}**"


def _least(many: dict[str, dict[str, dict[str, float]]], what: str, of: str) -> float:
    return many["times"][f"{what}, {of}"]["min"]
