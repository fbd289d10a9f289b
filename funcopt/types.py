"""The type names that annotations use, and which tensors are plain, which dtypes half."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch

Tensor: TypeAlias = torch.Tensor

#: A nested dict, list, tuple or namedtuple of tensors; a ``None`` leaf is an absent one.
Tree: TypeAlias = Any

#: ``{"step": int64 [leaves], slot: tree like params, ...}``; float64 [leaves] where a
#: slot is one number per leaf.
State: TypeAlias = dict[str, Any]

#: What a slot holds before the first step: made from a parameter, or a number per leaf.
SlotStart: TypeAlias = Callable[[Tensor], Tensor] | float

#: float, 0-d tensor, prefix tree, full tree, leaf-shaped tensor, `by_name`, `Schedule`.
HyperValue: TypeAlias = Any

#: One leaf's arithmetic: ``(g, p, *slots, step=, **hyper) -> (p, *slots)``.
RuleFunction: TypeAlias = Callable[..., tuple[Tensor, ...]]

#: ``loss_fn(params, batch[, meta])`` -> 0-d loss, or ``(loss, aux)``.
LossFunction: TypeAlias = Callable[..., Any]

InitFunction: TypeAlias = Callable[[Tree], State]
UpdateFunction: TypeAlias = Callable[..., tuple[Tree, State]]
HyperMapping: TypeAlias = Mapping[str, HyperValue]

#: dtypes in which steps and sums would lose too much
HALF = (torch.float16, torch.bfloat16)

#: tensors whose operations are torch's own
PLAIN = {Tensor, torch.nn.Parameter}
