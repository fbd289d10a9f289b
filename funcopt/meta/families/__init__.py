"""Families of meta-learning, one a file: each says what is learned, and how a task is."""

from funcopt.meta.families.adapt import adapt
from funcopt.meta.families.anil import anil
from funcopt.meta.families.cavia import cavia
from funcopt.meta.families.family import Family
from funcopt.meta.families.imaml import imaml
from funcopt.meta.families.lslr import lslr, step_weights
from funcopt.meta.families.maml import fomaml, maml
from funcopt.meta.families.metasgd import metasgd
from funcopt.meta.families.reptile import reptile

__all__ = [
    "Family",
    "adapt",
    "anil",
    "cavia",
    "fomaml",
    "imaml",
    "lslr",
    "maml",
    "metasgd",
    "reptile",
    "step_weights",
]
