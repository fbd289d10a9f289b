"""The pairs by which L-BFGS knows the curvature, and the direction that follows."""

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from funcopt.conditions import Condition, Number, alone, everywhere, most, where
from funcopt.stepping import pages
from funcopt.types import Tensor

Slots = dict[str, Tensor]


class Pairs:
    """The last pairs y, s, the oldest first, and their ρ = 1 / s·y, 0 where none is yet.

    And the coefficients of the two loops of the recursion, each loop a triangular system
    with ones on its diagonal, both in one matrix. With i before j it holds ρⱼ sᵢ·yⱼ at
    (i, j), and ρᵢ sᵢ·yⱼ at (j, i); what is on the diagonal is not looked at.

    Args:
        slots: the state.
        more: how many pairs are expected.
        donate: whether the state may be written over.
    """

    def __init__(self, slots: Slots, more: int, donate: bool) -> None:
        y, s, ro = (slots[key] for key in ("old_dirs", "old_stps", "ro"))
        size = ro.shape[0]
        known = min(size, most((ro > 0).sum(), size))
        self._ro = _Rows(ro, known)
        self._both = ro.new_zeros(0, 0)
        if known:
            products = s[size - known :] @ y[size - known :].T
            products = products.triu() + products.T.tril(-1)
            self._both = products * ro[size - known :]
        #: whether no derivative, transform or mode sees what is computed
        self.in_place = alone(ro)
        if self.in_place:
            self.y, self.s = (_Ring(rows, known, more, donate) for rows in (y, s))
        else:
            self.y, self.s = _Rows(y, known), _Rows(s, known)

    def push(self, y: Tensor, s: Tensor, ro: Tensor, new: Condition) -> None:
        """Remember a pair where it is new; the oldest makes room."""
        for rows, row in ((self.y, y), (self.s, s), (self._ro, ro)):
            rows.push(row, new)
        (rhos,) = self._ro.blocks()
        both, products = self._both, _products(self.s, y)
        full = rhos.shape[0] == both.shape[0]  # so that the oldest is gone
        longer = both[1:, 1:] if full else both
        longer = torch.cat([longer, (rhos * products)[None, :-1]])
        longer = torch.cat([longer, (ro * products)[:, None]], 1)
        if not everywhere(new):
            longer = where(new, longer, both if full else pad(both, (1, 0, 1, 0)))
        self._both = longer

    def direction(self, g: Tensor, scale: Number, memory: Tensor | None) -> Tensor:
        """-H·g, where H begins as the scale times 1; in ``memory``, if there is any.

        The two loops of the recursion are the substitutions in two triangular systems:
        so they cost a few operations, and not some for each row.
        """
        way = torch.mul(g, -scale, out=memory)
        (ro,) = self._ro.blocks()
        if not ro.shape[0]:
            return way
        alpha = _solved(self._both, ro * _products(self.s, g), upper=False)
        way = self._added(way, scale, alpha, self.y)
        right = torch.addcmul(alpha, ro, _products(self.y, way))
        return self._added(way, -1, _solved(self._both, right, upper=True), self.s)

    def _added(
        self, x: Tensor, scale: Number, factors: Tensor, rows: "_Rows | _Ring"
    ) -> Tensor:
        """x and the rows by scaled factors, in the memory of x if it may be."""
        blocks = rows.blocks()
        for part, block in zip(_parts(factors, blocks), blocks):
            if self.in_place:
                x.addmv_(block.t(), part, alpha=scale)
            else:
                x = x + (scale * part) @ block
        return x

    def slots(self) -> Slots:
        """Their part of the new state."""
        kept = {"old_dirs": self.y, "old_stps": self.s, "ro": self._ro}
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

    def room(self) -> None:
        """None: what is followed is not written over."""

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
        self._rows = old if donate else pages.zeros(old.shape, old)
        self._known, turn, first = known, more % size, size - known
        self._next = (size - turn) % size
        self._room: Tensor | None = None  # for the next row, and perhaps written
        turned = old[first:turn].clone() if first < turn else None
        for i in range(max(first, turn), size):  # from the oldest on, in one memory
            self._rows[i - turn] = old[i]
        if turned is not None:
            self._rows[size - turned.shape[0] :] = turned
        self._blocks = self._known_rows()

    def room(self) -> Tensor:
        """Memory for the next row: in its place, if no pair is to be driven out of it."""
        if self._room is None:
            row = self._rows[self._next]
            full = self._known == self._rows.shape[0]
            self._room = torch.empty_like(row) if full else row
        return self._room

    def push(self, row: Tensor, new: Condition) -> None:
        size = self._rows.shape[0]
        if row is not self._room or self._known == size:
            self._rows[self._next] = row
        if self._known < size:
            self._known, self._room = self._known + 1, None
        self._next = (self._next + 1) % size
        self._blocks = self._known_rows()

    def blocks(self) -> list[Tensor]:
        """The known rows, in one or two pieces."""
        return self._blocks

    def _known_rows(self) -> list[Tensor]:
        """Those after the newest, if they are older ones, and those up to it."""
        first, split = self._next - self._known, self._next
        if first >= 0:
            return [self._rows[first:split]]
        older = self._rows[first:]
        return [older, self._rows[:split]] if split else [older]

    def whole(self) -> Tensor:
        if self._room is not None and self._known < self._rows.shape[0]:
            self._room.zero_()
        if self._next:  # fewer rows came
            known = torch.cat(self.blocks())
            for block in self.blocks():
                block.zero_()
            self._rows[self._rows.shape[0] - known.shape[0] :] = known
        return self._rows


def _products(rows: "_Rows | _Ring", x: Tensor) -> Tensor:
    found = [torch.mv(block, x) for block in rows.blocks()]
    return found[0] if len(found) == 1 else torch.cat(found)


def _parts(factors: Tensor, blocks: Sequence[Tensor]) -> Sequence[Tensor]:
    if len(blocks) == 1:
        return (factors,)
    return factors.split_with_sizes([block.shape[0] for block in blocks])


def _solved(both: Tensor, right: Tensor, upper: bool) -> Tensor:
    """The row x of x·r = right, r one triangle of both, with ones on its diagonal."""
    return torch.linalg.solve_triangular(
        both, right[None], upper=upper, left=False, unitriangular=True
    )[0]
