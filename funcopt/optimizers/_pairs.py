"""The pairs by which L-BFGS knows the curvature, and the direction that follows."""

import math
import mmap
from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from funcopt.conditions import Condition, Number, alone, everywhere, most, where
from funcopt.execution import reading
from funcopt.types import Tensor

Slots = dict[str, Tensor]


class Pairs:
    """The last pairs y, s, the oldest first, and their ρ = 1 / s·y, 0 where none is yet.

    And the matrix R of products s·y, of which only those above the diagonal are read: of
    each s with all later y.

    Args:
        slots: the state.
        more: how many pairs are expected.
        donate: whether the state may be written over.
    """

    def __init__(self, slots: Slots, more: int, donate: bool) -> None:
        y, s, ro = (slots[key] for key in ("old_dirs", "old_stps", "ro"))
        self._size = ro.shape[0]
        known = min(self._size, most((ro > 0).sum(), self._size))
        self._ro = _Rows(ro, known)
        self._r = s[self._size - known :] @ y[self._size - known :].T
        #: whether no derivative, transform or mode sees what is computed
        self.in_place = alone(ro)
        if self.in_place:
            self._y, self._s = (_Ring(rows, known, more, donate) for rows in (y, s))
        else:
            self._y, self._s = _Rows(y, known), _Rows(s, known)

    def push(self, y: Tensor, s: Tensor, ys: Number, new: Condition) -> None:
        """Remember a pair where it is new; the oldest makes room."""
        column = _products(self._s, y)[:, None]
        r = pad(torch.cat([self._r, column], 1), (0, 0, 0, 1))
        if not everywhere(new):
            r = where(new, r, pad(self._r, (1, 0, 1, 0)))
        self._r = r[-self._size :, -self._size :]
        self._y.push(y, new)
        self._s.push(s, new)
        self._ro.push(torch.as_tensor(1 / ys, dtype=y.dtype, device=y.device), new)

    def direction(self, g: Tensor, scale: Number, memory: Tensor | None) -> Tensor:
        """-H·g, where H begins as the scale times 1; in ``memory``, if there is any.

        The two loops of the recursion are the substitutions in two triangular systems:
        so they cost a few operations, and not some for each row.
        """
        (ro,) = self._ro.blocks()
        if not ro.shape[0]:
            return torch.mul(g, -scale, out=memory)
        way = torch.neg(g, out=memory)
        newer = (ro[:, None] * self._r).triu(1)
        older = (ro[:, None] * self._r.T).tril(-1)
        alpha = _solved(newer, ro * _products(self._s, way), upper=True)
        way = self._added(way, -alpha, self._y)
        way = torch.mul(way, scale, out=way if self.in_place else None)
        right = alpha - ro * _products(self._y, way)
        beta = _solved(older, right, upper=False)
        return self._added(way, beta, self._s)

    def _added(self, x: Tensor, factors: Tensor, rows: "_Rows | _Ring") -> Tensor:
        """x and the rows by their factors, in the memory of x if it may be."""
        blocks = rows.blocks()
        parts = factors.split([block.shape[0] for block in blocks])
        for part, block in zip(parts, blocks):
            x = x.addmv_(block.T, part) if self.in_place else x + part @ block
        return x

    def slots(self) -> Slots:
        """Their part of the new state."""
        kept = {"old_dirs": self._y, "old_stps": self._s, "ro": self._ro}
        return {key: rows.whole() for key, rows in kept.items()}


class _Rows:
    """The newest rows of a history, each task's own."""

    def __init__(self, old: Tensor, known: int) -> None:
        self._size = old.shape[0]
        self._rows = old[self._size - known :]

    def push(self, row: Tensor, new: Condition) -> None:
        row = row[None]
        longer = torch.cat([self._rows, row])
        if not everywhere(new):
            same = torch.cat([torch.zeros_like(row), self._rows])
            longer = where(new, longer, same)
        self._rows = longer[-self._size :]

    def blocks(self) -> list[Tensor]:
        return [self._rows]

    def whole(self) -> Tensor:
        missing = self._size - self._rows.shape[0]
        return torch.cat(
            [self._rows.new_zeros(missing, *self._rows.shape[1:]), self._rows]
        )


class _Ring:
    """A history in which a row takes the place of the oldest.

    It is turned beforehand such that the expected rows come to be the last. So each is
    written once, to where it stays: large rows are what an update takes its time for.
    """

    def __init__(self, old: Tensor, known: int, more: int, donate: bool) -> None:
        size = old.shape[0]
        self._rows = old if donate else zeros(old.shape, old)
        self._known, turn, first = known, more % size, size - known
        self._next = (size - turn) % size
        turned = old[first:turn].clone()
        for i in range(max(first, turn), size):  # from the oldest on, in one memory
            self._rows[i - turn] = old[i]
        self._rows[size - turned.shape[0] :] = turned

    def push(self, row: Tensor, new: Condition) -> None:
        self._rows[self._next] = row
        self._next = (self._next + 1) % self._rows.shape[0]
        self._known = min(self._known + 1, self._rows.shape[0])

    def blocks(self) -> list[Tensor]:
        """The known rows: those after the newest, and those up to it."""
        size, split = self._rows.shape[0], self._next
        unknown = size - self._known
        after = self._rows[min(split + unknown, size) :]
        blocks = [after, self._rows[max(0, split + unknown - size) : split]]
        return [block for block in blocks if block.shape[0]] or blocks[:1]

    def whole(self) -> Tensor:
        if self._next:  # fewer rows came
            known = torch.cat(self.blocks())
            for block in self.blocks():
                block.zero_()
            self._rows[self._rows.shape[0] - known.shape[0] :] = known
        return self._rows


_LARGE = 1 << 20  # bytes


def zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    """Zeros of the dtype and device of ``like``.

    Many are pages that the system hands out on the first write: a history that is
    not written yet takes neither memory nor time.
    """
    size = math.prod(shape) * like.element_size()
    if size < _LARGE or not reading.readable(like) or not hasattr(mmap, "MAP_ANONYMOUS"):
        return like.new_zeros(shape)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=like.dtype).view(*shape)


def _products(rows: "_Rows | _Ring", x: Tensor) -> Tensor:
    return torch.cat([block @ x for block in rows.blocks()])


def _solved(r: Tensor, right: Tensor, upper: bool) -> Tensor:
    """x of r·x = right, r with ones on its diagonal, and one triangle that counts."""
    return torch.linalg.solve_triangular(
        r, right[:, None], upper=upper, unitriangular=True
    )[:, 0]
