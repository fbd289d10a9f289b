"""optax's schedules, step by step in float64."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import optax

STEPS = 60
DICTS = "boundaries_and_scales"

# Of optax, of funcopt, and the settings; a dict of boundaries stands as pairs, and the
# parts of what is joined as runs of their own.
RUNS: list[tuple[str, str, dict[str, Any]]] = [
    (
        "polynomial_schedule",
        "polynomial_decay",
        {"init_value": 0.5, "end_value": 0.1, "power": 2.5, "transition_steps": 20},
    ),
    (
        "polynomial_schedule",
        "polynomial_decay",
        {
            "init_value": 0.1,
            "end_value": 0.7,
            "power": 1.0,
            "transition_steps": 30,
            "transition_begin": 7,
        },
    ),
    (
        "exponential_decay",
        "exponential_decay",
        {"init_value": 0.5, "transition_steps": 7, "decay_rate": 0.6},
    ),
    (
        "exponential_decay",
        "exponential_decay",
        {
            "init_value": 0.5,
            "transition_steps": 7,
            "decay_rate": 0.6,
            "transition_begin": 5,
            "staircase": True,
            "end_value": 0.11,
        },
    ),
    (
        "exponential_decay",
        "exponential_decay",
        {
            "init_value": 0.5,
            "transition_steps": 9,
            "decay_rate": 1.5,
            "end_value": 2.0,
        },
    ),
    ("cosine_decay_schedule", "cosine_decay", {"init_value": 0.5, "decay_steps": 40}),
    (
        "cosine_decay_schedule",
        "cosine_decay",
        {"init_value": 0.5, "decay_steps": 33, "alpha": 0.2, "exponent": 1.7},
    ),
    (
        "piecewise_constant_schedule",
        "piecewise_constant",
        {"init_value": 0.5, DICTS: [[20, 0.5], [5, 0.3], [40, 4.0]]},
    ),
    *(
        (
            "piecewise_interpolate_schedule",
            "piecewise_interpolate",
            {
                "interpolate_type": kind,
                "init_value": 0.5,
                DICTS: [[first, 0.5], [21, 3.0], [40, 0.1]],
            },
        )
        for kind, first in (("linear", 6), ("cosine", 6), ("linear", 0), ("cosine", 0))
    ),
    (
        "linear_onecycle_schedule",
        "linear_one_cycle",
        {"transition_steps": 50, "peak_value": 0.5},
    ),
    (
        "linear_onecycle_schedule",
        "linear_one_cycle",
        {
            "transition_steps": 47,
            "peak_value": 0.5,
            "pct_start": 0.41,
            "pct_final": 0.7,
            "div_factor": 5.0,
            "final_div_factor": 20.0,
        },
    ),
    (
        "cosine_onecycle_schedule",
        "cosine_one_cycle",
        {"transition_steps": 50, "peak_value": 0.5},
    ),
    (
        "cosine_onecycle_schedule",
        "cosine_one_cycle",
        {
            "transition_steps": 47,
            "peak_value": 0.5,
            "pct_start": 0.41,
            "div_factor": 5.0,
            "final_div_factor": 20.0,
        },
    ),
    (
        "warmup_constant_schedule",
        "warmup_constant",
        {"init_value": 0.1, "peak_value": 0.5, "warmup_steps": 13},
    ),
    *(
        (
            "warmup_cosine_decay_schedule",
            "warmup_cosine_decay",
            {
                "init_value": 0.1,
                "peak_value": 0.5,
                "warmup_steps": warmup,
                "decay_steps": 50,
                "end_value": 0.05,
                "exponent": exponent,
            },
        )
        for warmup, exponent in ((13, 1.0), (0, 1.0), (7, 2.5))
    ),
    (
        "warmup_exponential_decay_schedule",
        "warmup_exponential_decay",
        {
            "init_value": 0.1,
            "peak_value": 0.5,
            "warmup_steps": 9,
            "transition_steps": 6,
            "decay_rate": 0.7,
        },
    ),
    (
        "warmup_exponential_decay_schedule",
        "warmup_exponential_decay",
        {
            "init_value": 0.0,
            "peak_value": 0.5,
            "warmup_steps": 9,
            "transition_steps": 6,
            "decay_rate": 0.7,
            "transition_begin": 4,
            "staircase": True,
            "end_value": 0.15,
        },
    ),
    (
        "join_schedules",
        "sequential",
        {
            "schedules": [
                (
                    "warmup_cosine_decay_schedule",
                    "warmup_cosine_decay",
                    {
                        "init_value": 0.1,
                        "peak_value": 0.5,
                        "warmup_steps": 4,
                        "decay_steps": 17,
                        "end_value": 0.05,
                    },
                ),
                (
                    "cosine_decay_schedule",
                    "cosine_decay",
                    {"init_value": 0.3, "decay_steps": 20},
                ),
                (
                    "exponential_decay",
                    "exponential_decay",
                    {"init_value": 0.2, "transition_steps": 7, "decay_rate": 0.6},
                ),
            ],
            "milestones": [17, 33],
        },
    ),
]


def made(name: str, arguments: dict[str, Any]) -> Any:
    """optax's schedule."""
    if DICTS in arguments:
        arguments = {**arguments, DICTS: dict(arguments[DICTS])}
    if "schedules" in arguments:
        parts = [made(part, given) for part, _, given in arguments["schedules"]]
        return optax.schedules.join_schedules(parts, arguments["milestones"])
    return getattr(optax.schedules, name)(**arguments)


def values(name: str, arguments: dict[str, Any]) -> list[float]:
    """What optax gives at each count."""
    schedule = made(name, arguments)
    return [float(schedule(jax.numpy.float64(count))) for count in range(STEPS)]


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    found = {
        "source": f"optax {version('optax')}",
        "runs": [
            {"optax": theirs, "ours": ours, "arguments": given, "values": v}
            for theirs, ours, given in RUNS
            for v in [values(theirs, given)]
        ],
    }
    Path(__file__).with_name("optax.json").write_text(json.dumps(found) + "\n")
