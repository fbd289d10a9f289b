"""What Triton kernels read instead of arguments: addresses, blocks and numbers."""

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from funcopt.execution.layout import is_lazy
from funcopt.types import Tensor

#: elements that a program works on at once
BLOCK = 1024
# A long leaf's programs each walk over several blocks, and compute their scalars once;
# but only as long as there are this many programs, which keeps every processor busy.
_PROGRAMS = 2048
_WALK = 8

# What a capture may copy: so many tables of the latest size, and of small ones as many
# as an inner loop has steps.
_SPARE, _SPARE_WORDS = 4, 1 << 16


@dataclass(frozen=True)
class BlockLayout:
    """How leaves of certain sizes are cut into blocks, and whose sums are added."""

    blocks: Tensor  #: [count, 6]: leaf, row, task, group, first element, end
    groups: Tensor  #: [number, 4]: row, task, first block, end

    @property
    def count(self) -> int:
        return self.blocks.shape[0]

    @property
    def number(self) -> int:
        return self.groups.shape[0]


def block_layout(
    sizes: Sequence[int], which: Sequence[int], rows: int, tasks: int, pooled: bool
) -> BlockLayout:
    """The layout of leaves of these sizes, on the CPU.

    A group is what has a sum of its own: a leaf, or with ``pooled`` a row, in each task.
    Its blocks follow one another, always in the same order.
    """
    size = torch.tensor(sizes, dtype=torch.int64)
    row = torch.tensor(which, dtype=torch.int64)
    tasks = max(tasks, 1)
    leaf = torch.arange(len(sizes)).repeat_interleave(tasks)
    task = torch.arange(tasks).repeat(len(sizes))
    number = (rows if pooled else len(sizes)) * tasks
    group = (row[leaf] if pooled else leaf) * tasks + task
    order = group.argsort(stable=True)
    leaf, task, group = leaf[order], task[order], group[order]
    length = size[leaf] // tasks
    walk = BLOCK * min(max(sum(sizes) // (BLOCK * _PROGRAMS), 1), _WALK)
    counts = (length + walk - 1) // walk
    ends = counts.cumsum(0)
    segment = torch.arange(len(leaf)).repeat_interleave(counts)
    within = torch.arange(len(segment)) - (ends - counts)[segment]
    start = (task * length)[segment] + within * walk
    stop = torch.minimum(start + walk, ((task + 1) * length)[segment])
    of = leaf[segment]
    blocks = torch.stack([of, row[of], task[segment], group[segment], start, stop], 1)
    last = torch.zeros(number, dtype=torch.int64).index_add_(0, group, counts).cumsum(0)
    first = torch.cat([last.new_zeros(1), last[:-1]])
    every = torch.arange(number)
    owner = every // tasks
    row = owner if pooled else row[owner]
    groups = torch.stack([row, every % tasks, first[:number], last], 1)
    return BlockLayout(blocks, groups)


ENTRY = 3  #: words of a scalar's entry


def words(
    addresses: bytes, rows: Sequence[Sequence[Any]], device: torch.device
) -> tuple[bytes, list[Tensor]]:
    """The table of one call, and tensors that must live until its kernels are queued.

    First the address of every tensor, column after column; then an entry for each row
    and scalar: its address, whether that counts from the table's start, and how many
    bytes further the next task's lies. A tensor on the device is read where it is, as
    float64. A number that is known here follows at the end of the table.
    """
    table, numbers = array("q"), array("d")
    end = len(addresses) // table.itemsize + ENTRY * sum(map(len, rows))
    alive: list[Tensor] = []
    for row in rows:
        for value in row:
            own = isinstance(value, Tensor) and value.ndim  # each task's
            if isinstance(value, Tensor) and value.device == device:
                value = value.to(torch.float64)
                if is_lazy(value):
                    value = torch.empty_like(value).copy_(value)
                alive.append(value)
                table.extend((value.data_ptr(), 0, 8 * value.stride(0) if own else 0))
                continue
            table.extend((8 * (end + len(numbers)), 1, 8 if own else 0))
            numbers.extend(value.tolist() if own else [float(value)])
    return addresses + table.tobytes() + numbers.tobytes(), alive


class Uploads:
    """Tables on their way to the device; the last few stay there.

    Steps over the same tensors, as donated ones are, have the same table again and again,
    and nothing is copied. What a CUDA graph was captured with lives as long as this
    object: a replay reads it again. Before a capture there must have been a like step.

    A table is used on one stream, on which its memory was given out: the allocator gives
    it out again as soon as it is forgotten, whatever other streams have yet to do.
    """

    def __init__(self) -> None:
        self._last: deque[_Upload] = deque(maxlen=4)
        self._captured: list[Any] = []
        self._spare: Tensor | None = None  # pinned: none may be allocated in a capture

    def __call__(
        self, content: bytes, device: torch.device, beside: Sequence[Tensor]
    ) -> Tensor:
        """The table on the device. The kernels read what is ``beside`` it, too."""
        words = torch.frombuffer(bytearray(content), dtype=torch.int64)
        if device.type != "cuda":
            return words
        capturing = torch.cuda.is_current_stream_capturing()
        current = torch.cuda.current_stream(device)
        stream = current.cuda_stream
        if capturing:
            self._captured.append(beside)
        else:
            for x in beside:
                x.record_stream(current)
        for upload in [*self._last]:  # to which another thread may add
            if upload.content == content and upload.ready(device, stream, capturing):
                if capturing:
                    self._captured.append(upload.table)
                return upload.table
        pinned = self._pinned(len(words), capturing).copy_(words)
        table = pinned.to(device, non_blocking=True)
        if capturing:
            self._captured.append((pinned, table))
        else:
            event = torch.cuda.Event()
            event.record(current)
            self._last.append(_Upload(content, device, stream, table, event))
        return table

    def _pinned(self, count: int, capturing: bool) -> Tensor:
        """Memory that nothing writes to before the copy from it is done.

        torch's own pool sees to that, except in a capture, where replays copy again.
        """
        if not capturing:
            room = max(_SPARE * count, _SPARE_WORDS)
            if self._spare is None or len(self._spare) < room:
                self._spare = _pinned(room)
            return _pinned(count)
        if self._spare is None or len(self._spare) < count:
            return _pinned(count)
        part, self._spare = self._spare[:count], self._spare[count:]
        return part


@dataclass
class _Upload:
    content: bytes
    device: torch.device
    stream: int
    table: Tensor
    event: torch.cuda.Event | None  #: none once the copy is known to be done

    def ready(self, device: torch.device, stream: int, capturing: bool) -> bool:
        """Whether work queued on this stream finds the table filled, and in its place."""
        if self.device != device:
            return False
        # an event cannot be asked while a graph is captured
        if self.event is not None and not capturing and self.event.query():
            self.event = None
        return self.stream == stream or (capturing and self.event is None)


def _pinned(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.int64, pin_memory=True)
