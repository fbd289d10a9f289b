"""DoG, by the authors' package."""

import importlib
from functools import partial
from importlib.metadata import version

from published.record import torch_stepper, write

RUNS = [
    {"reps_rel": 0.1, "eps": 1e-8, "weight_decay": 0.0},
    {"lr": 0.7, "reps_rel": 0.05, "eps": 0.01, "weight_decay": 0.1},
]

if __name__ == "__main__":
    make = importlib.import_module("dog").DoG
    source = f"dog-optimizer {version('dog-optimizer')}: DoG"
    write("dog", source, [(run, torch_stepper(partial(make, **run))) for run in RUNS])
