"""What the tables of README.md have in common."""

from __future__ import annotations

from typing import Any

from measure import Times


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ratio(times: dict[str, Times], ours: str, rival: str) -> float:
    """How many times as fast ours is, in medians."""
    return times[rival]["median"] / times[ours]["median"]


def others(results: list[dict[str, Any]]) -> str:
    """How quiet the machine was."""
    most = {n: max(r["others"] for r in results if r["threads"] == n) for n in (1, 2)}
    return (
        f"Meanwhile other processes used {most[1]:.2f} of a core (one thread) and "
        f"{most[2]:.2f} (two)."
    )
