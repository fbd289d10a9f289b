"""What the execution layer is to reach on two cores, and whether it does.

Every target is a ratio of two contenders in one run, ``rival's time / ours``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One step of AdamW on a tree: at least so many times as fast as the rival."""

    tree: str
    ours: str
    rival: str
    at_least: float


DONATED, PURE = "funcopt, donated", "funcopt, pure"
#: torch.optim's own, by the name of its flag
TORCH = {name: f"torch, {name}" for name in ("fused", "foreach", "for-loop")}
FUSED = TORCH["fused"]
ADAMW = "AdamW, donated"
LARGE = "10 M in 10"

STEP = [
    Target("Omniglot net", DONATED, FUSED, 2.5),
    Target("small MLP", DONATED, FUSED, 6.0),
    Target(LARGE, DONATED, FUSED, 1.0),
    Target("10 M in 2,500", DONATED, FUSED, 1.0),
    Target("Omniglot net", PURE, FUSED, 1.5),
    Target("Omniglot net", PURE, "optax, jit", 3.0),
    Target("Omniglot net", PURE, "TorchOpt", 12.0),
    Target(LARGE, PURE, FUSED, 1 / 1.6),
]

#: what every rule of the registry is stepped on
REGISTRY = ("Omniglot net", "MLP", "300 × 4,096", LARGE)
#: donated, times as fast as the best of torch.optim's own
BEST = 1.0
#: on the last tree: times faster than foreach where torch has no fused kernel, and the
#: most time of an elementwise rule for each byte moved, AdamW's being 1
FOREACH, PER_BYTE = 4.0, 1.25

#: classes of torch_optim: AdamW's on the small nets; those without a fused kernel in
#: torch on the largest; construction and state_dict, the most of torch's time
SMALL_ADAMW, UNFUSED, OF_TORCHS = 2.0, 3.0, 1.5

#: differentiable AdamW: times faster than per-tensor autograd, and the share of its bytes
UNROLL = {"Omniglot net": 10.0, "small MLP": 15.0}
SAVED = 0.45

#: vmap(update): times faster than vmap of the plain rule
ENSEMBLE = 12.0

#: compiled meta-steps: times faster than the rivals; the most seconds of a first call
COMPILED = {"sinusoid MLP, sgd, 5 steps": {"higher": 60.0, "torchopt": 45.0}}
COMPILE_SECONDS = 40.0

#: long inner loops: the most of the rivals' bytes that mixed mode with a recomputation
#: holds at K = 16, and the most of the time of reverse mode that mixed mode takes
HELD, MIXED = 0.1, 1.1

#: forward mode: the most of the peak at K = 100 that K = 1,000 takes
CONSTANT = 1.02

#: compiled outer step of learned rates: times faster than going back step by step
LOGISTIC = 10.0

#: most milliseconds of a rule's first step
COLD = {"never built": 600.0, "from the cache": 20.0}


def verdict(met: bool) -> str:
    """A miss catches the eye."""
    return "met" if met else "**missed**"
