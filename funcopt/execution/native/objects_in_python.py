"""What `objects` does in C, in Python: where that cannot be built."""

import ctypes
from array import array
from collections.abc import Callable, Sequence
from itertools import chain
from operator import is_
from typing import Any, cast

import torch
from torch.nn import Parameter

from funcopt.types import Tensor, Tree

_KERNEL = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int64, ctypes.c_int64, *[ctypes.c_void_p] * 5, ctypes.c_int,
    ctypes.c_int, ctypes.c_int64,
)  # fmt: skip


class InPython:
    """As `objects.Objects` says."""

    def leaves(self, form: Any, tree: Tree) -> list[Any] | None:
        found: list[Any] = []
        return found if _gather(form, tree, found) else None

    def addresses(self, *lists: Sequence[Tensor]) -> bytes:
        return array("Q", map(Tensor.data_ptr, chain(*lists))).tobytes()

    def apart(self, addresses: bytes, extents: bytes) -> bool:
        pairs = zip(array("Q", addresses), array("Q", extents))
        spans = sorted((at, at + size) for at, size in pairs if size)
        return all(end <= at for (_, end), (at, _) in zip(spans, spans[1:]))

    def look(self, *lists: Sequence[Any]) -> tuple[bool, bool, bool]:
        found = [*chain(*lists)]
        tensors = [x for x in found if isinstance(x, Tensor)]
        plain = {*map(type, found)} <= {Tensor, Parameter}
        alike = plain and len({(x.dtype, x.device) for x in tensors}) <= 1
        return plain, alike, any(x.requires_grad for x in tensors)

    def likeness(self, tensors: list[Tensor]) -> bytes | None:
        return None

    def like(self, tensors: list[Any], likeness: bytes) -> bool:
        return False

    def written(self, tensors: list[Tensor], begin: int, end: int) -> None:
        torch.autograd.graph.increment_version(tensors[begin:end])

    def counted(self, steps: Tensor) -> Tensor:
        return steps.add_(1)

    def snapshot(self, tensors: list[Tensor]) -> bytes | None:
        return None

    def unheld(self, tensors: list[Tensor], snapshot: bytes) -> bool:
        return False

    def same(self, one: list[Any], other: list[Any]) -> bool:
        return len(one) == len(other) and all(map(is_, one, other))

    def holds(self, entries: Any, known: list[Any]) -> bool:
        if not isinstance(entries, dict):
            return False
        if not all(isinstance(entry, dict) for entry in entries.values()):
            return False
        found = [x for key, entry in entries.items() for x in (key, *entry.values())]
        return self.same(found, known)

    def run(self, kernel: int, *given: Any) -> int:
        plain = [x.buffer_info()[0] if isinstance(x, array) else x for x in given]
        return _KERNEL(kernel)(*plain)


def _gather(form: Any, tree: Tree, found: list[Any]) -> bool:
    if form is ...:
        return tree is None
    if form is None:
        found.append(tree)
        return isinstance(tree, Tensor)
    if callable(form):
        try:
            found += cast("Callable[[Tree], list[Any]]", form)(tree)
        except ValueError:
            return False
        return True
    if type(form) is not type(tree) or len(form) != len(tree):
        return False
    if isinstance(form, dict):
        return all(
            k in tree and _gather(part, tree[k], found) for k, part in form.items()
        )
    return all(_gather(part, child, found) for part, child in zip(form, tree))
