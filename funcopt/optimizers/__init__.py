"""The optimizers, a file each: the rule, then the factory that documents it."""

from funcopt.optimizers.adabelief import adabelief
from funcopt.optimizers.adadelta import adadelta
from funcopt.optimizers.adafactor import adafactor
from funcopt.optimizers.adagrad import adagrad
from funcopt.optimizers.adam import adam, amsgrad
from funcopt.optimizers.adam_atan2 import adam_atan2
from funcopt.optimizers.adamax import adamax
from funcopt.optimizers.adamw import adamw
from funcopt.optimizers.adan import adan
from funcopt.optimizers.ademamix import ademamix
from funcopt.optimizers.adopt import adopt
from funcopt.optimizers.asgd import asgd
from funcopt.optimizers.dog import dog
from funcopt.optimizers.lamb import lamb
from funcopt.optimizers.lars import lars
from funcopt.optimizers.lbfgs import lbfgs
from funcopt.optimizers.lion import lion
from funcopt.optimizers.madgrad import madgrad
from funcopt.optimizers.mars_adamw import mars_adamw
from funcopt.optimizers.muon import muon
from funcopt.optimizers.nadam import nadam
from funcopt.optimizers.novograd import novograd
from funcopt.optimizers.prodigy import prodigy
from funcopt.optimizers.radam import radam
from funcopt.optimizers.rmsprop import rmsprop
from funcopt.optimizers.rprop import rprop
from funcopt.optimizers.schedule_free_adamw import schedule_free_adamw
from funcopt.optimizers.schedule_free_sgd import schedule_free_sgd
from funcopt.optimizers.sgd import sgd
from funcopt.optimizers.sgld import sgld
from funcopt.optimizers.shampoo import shampoo
from funcopt.optimizers.signsgd import signsgd, signum
from funcopt.optimizers.soap import soap
from funcopt.optimizers.sophia_g import sophia_g
from funcopt.optimizers.sparse_adam import sparse_adam
from funcopt.optimizers.yogi import yogi

__all__ = [
    "adabelief",
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adam_atan2",
    "adamax",
    "adamw",
    "adan",
    "ademamix",
    "adopt",
    "amsgrad",
    "asgd",
    "dog",
    "lamb",
    "lars",
    "lbfgs",
    "lion",
    "madgrad",
    "mars_adamw",
    "muon",
    "nadam",
    "novograd",
    "prodigy",
    "radam",
    "rmsprop",
    "rprop",
    "schedule_free_adamw",
    "schedule_free_sgd",
    "sgd",
    "sgld",
    "shampoo",
    "signsgd",
    "signum",
    "soap",
    "sophia_g",
    "sparse_adam",
    "yogi",
]
