"""Optimizers made of optimizers, and stages to chain with them."""

from funcopt.transforms.accumulate import accumulate
from funcopt.transforms.averages import ema, lookahead, polyak
from funcopt.transforms.cautious import cautious
from funcopt.transforms.chain import chain
from funcopt.transforms.clip import (
    clip_by_block_rms,
    clip_by_global_norm,
    clip_by_value,
    normalize,
)
from funcopt.transforms.gradients import (
    add_decayed_weights,
    add_noise,
    centralize,
    zero_nans,
)
from funcopt.transforms.groups import from_param_groups
from funcopt.transforms.master_weights import master_weights
from funcopt.transforms.partition import freeze, partition
from funcopt.transforms.project import project
from funcopt.transforms.sam import sam
from funcopt.transforms.scheduled import scheduled
from funcopt.transforms.skip_nonfinite import skip_nonfinite
from funcopt.transforms.trust_region import trust_region

__all__ = [
    "accumulate",
    "add_decayed_weights",
    "add_noise",
    "cautious",
    "centralize",
    "chain",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "clip_by_value",
    "ema",
    "freeze",
    "from_param_groups",
    "lookahead",
    "master_weights",
    "normalize",
    "partition",
    "polyak",
    "project",
    "sam",
    "scheduled",
    "skip_nonfinite",
    "trust_region",
    "zero_nans",
]
