"""Optimizers made of optimizers."""

from funcopt.transforms.groups import from_param_groups
from funcopt.transforms.partition import freeze, partition

__all__ = ["freeze", "from_param_groups", "partition"]
