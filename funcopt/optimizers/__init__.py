"""The optimizers, a file each: the rule, then the factory that documents it."""

from funcopt.optimizers.adam import adam
from funcopt.optimizers.adamw import adamw
from funcopt.optimizers.sgd import sgd

__all__ = ["adam", "adamw", "sgd"]
