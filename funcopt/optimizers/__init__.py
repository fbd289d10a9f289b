"""The optimizers, a file each: the rule, then the factory that documents it."""

from funcopt.optimizers.adadelta import adadelta
from funcopt.optimizers.adagrad import adagrad
from funcopt.optimizers.adam import adam
from funcopt.optimizers.adamax import adamax
from funcopt.optimizers.adamw import adamw
from funcopt.optimizers.asgd import asgd
from funcopt.optimizers.lamb import lamb
from funcopt.optimizers.lars import lars
from funcopt.optimizers.lion import lion
from funcopt.optimizers.madgrad import madgrad
from funcopt.optimizers.nadam import nadam
from funcopt.optimizers.novograd import novograd
from funcopt.optimizers.radam import radam
from funcopt.optimizers.rmsprop import rmsprop
from funcopt.optimizers.rprop import rprop
from funcopt.optimizers.sgd import sgd
from funcopt.optimizers.signsgd import signsgd, signum

__all__ = [
    "adadelta",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "asgd",
    "lamb",
    "lars",
    "lion",
    "madgrad",
    "nadam",
    "novograd",
    "radam",
    "rmsprop",
    "rprop",
    "sgd",
    "signsgd",
    "signum",
]
