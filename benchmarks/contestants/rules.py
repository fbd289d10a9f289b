"""Every optimizer of the registry, with torch.optim's own and the bytes that it moves."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import funcopt as fo
from contestants.foreach_lion import ForeachLion
from funcopt import optimizers

_TORCH: dict[str, Any] = {
    name.lower(): kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)
} | {"amsgrad": partial(torch.optim.Adam, amsgrad=True), "lion": ForeachLion}

#: where the defaults would not move a float32 number, or end before they are timed
_OPTIONS: dict[str, dict[str, Any]] = {
    "lion": {"weight_decay": 1e-2},
    "dog": {"reps_rel": 0.1},
    "prodigy": {"d0": 1e-3},
    "novograd": {"lr": 1.0},
    "lbfgs": {"max_iter": 5, "history_size": 10, "tolerance_change": 0.0},
}
#: what a flag makes another rule
_FLAGGED: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd, momentum": ("sgd", {"momentum": 0.9}),
    "rmsprop, centered, momentum": ("rmsprop", {"centered": True, "momentum": 0.9}),
    "lbfgs, strong Wolfe": (
        "lbfgs",
        _OPTIONS["lbfgs"] | {"line_search_fn": "strong_wolfe"},
    ),
}


@dataclass(frozen=True)
class Rule:
    """A rule, ours and torch's if there is one, with the same arguments."""

    ours: Callable[..., fo.Optimizer]
    theirs: Callable[..., torch.optim.Optimizer] | None
    options: dict[str, Any]

    @property
    def optimizer(self) -> fo.Optimizer:
        return self.ours(**self.options)

    @property
    def elementwise(self) -> bool:
        """Whether each element goes its own way, in one sweep."""
        spec = self.optimizer.spec
        return bool(spec and spec.elementwise and not spec.totals) and not self.sparse

    @property
    def takes_loss(self) -> bool:
        return self.optimizer.spec is None

    @property
    def sparse(self) -> bool:
        spec = self.optimizer.spec
        return bool(spec and spec.sparse == "only")

    @property
    def rounds_coarsely(self) -> bool:
        """Whether it makes a matrix of a leaf, perhaps in bfloat16."""
        spec = self.optimizer.spec
        return bool(spec and not spec.traceable)

    @property
    def amplifies(self) -> bool:
        """Whether float32's rounding grows so that a comparison must be in float64.

        That of a difference of gradients, or of roots and bases of singular matrices.
        """
        return self.takes_loss or (self.rounds_coarsely and self.theirs is None)

    @property
    def implementations(self) -> list[str]:
        """What torch has of it, by the name of the flag."""
        if self.theirs is None:
            return []
        kind = self.theirs.func if isinstance(self.theirs, partial) else self.theirs
        known = inspect.signature(kind).parameters
        return ["for-loop", *(flag for flag in ("foreach", "fused") if flag in known)]

    def fit(self, shapes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The shapes, as matrices where the rule takes no others."""
        spec = self.optimizer.spec
        if not spec or not spec.matrices:
            return shapes
        return [(shape[0], torch.Size(shape[1:]).numel()) for shape in shapes]

    def gradients(self, grads: list[Tensor]) -> list[Tensor]:
        """The gradients, of every eighth row alone where the rule takes sparse ones."""
        if not self.sparse:
            return grads
        return [_every_eighth(g) for g in grads]

    def data(self, params: list[Tensor]) -> dict[str, Any]:
        """What each update is given beside gradients: noise, a Hessian's diagonal."""
        spec = self.optimizer.spec
        awaited = [k for k, h in (spec.hyper if spec else {}).items() if h.wanted]
        numbers = torch.Generator().manual_seed(3)
        return {
            k: [torch.randn(p.shape, generator=numbers).to(p) for p in params]
            for k in awaited
        }

    def bytes(self, params: list[Tensor]) -> int:
        """What a step has to move: gradients, data in; parameters, state in and out."""
        state = self.optimizer.init(params)
        given = [params, *self.data(params).values()]
        kept = [params, *(column for key, column in state.items() if key != "step")]
        return sum(map(_size, given)) + 2 * sum(map(_size, kept))


def _every_eighth(g: Tensor) -> Tensor:
    rows = torch.arange(0, g.shape[0], 8)
    found = torch.sparse_coo_tensor(rows[None], g[rows], g.shape, check_invariants=True)
    return found.coalesce()


def _size(column: Any) -> int:
    return column.nbytes if isinstance(column, Tensor) else sum(map(_size, column))


def _all() -> Iterator[tuple[str, Rule]]:
    flagged = {name: (name, _OPTIONS.get(name, {})) for name in optimizers.__all__}
    for name, (base, options) in sorted((flagged | _FLAGGED).items()):
        theirs = _TORCH.get(base.replace("_", ""))
        yield name, Rule(getattr(fo, base), theirs, options)


#: by name: the registry, and what flags make of some
RULES: dict[str, Rule] = dict(_all())
