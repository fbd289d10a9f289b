"""Meta-gradients over batches of tasks, and the families of meta-learning."""

from funcopt.meta.families import (
    Family,
    adapt,
    anil,
    cavia,
    fomaml,
    lslr,
    maml,
    metasgd,
    reptile,
    step_weights,
)
from funcopt.meta.tasks import value_and_grad

__all__ = [
    "Family",
    "adapt",
    "anil",
    "cavia",
    "fomaml",
    "lslr",
    "maml",
    "metasgd",
    "reptile",
    "step_weights",
    "value_and_grad",
]
