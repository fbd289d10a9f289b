"""The native executor: a program as C, built once and called over a table of pointers."""

import ctypes
import os
from array import array
from collections.abc import Callable, Sequence
from functools import reduce
from itertools import repeat, starmap
from operator import add, itemgetter
from typing import Any

import torch

from funcopt.execution import scalars
from funcopt.execution.executor import (
    BuildError,
    Column,
    Direct,
    PerTask,
    Rows,
    empty_like,
)
from funcopt.execution.native import driver, objects, self_check, source
from funcopt.execution.native.build import library
from funcopt.execution.program import Program
from funcopt.execution.sweeping import Sweeping
from funcopt.types import Tensor

# Fewer elements are done sooner than a second thread wakes up.
_PARALLEL = 32768
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_NO_SUMS = array("d")  # nothing is written to what is empty

_SPREAD = 4  # columns that the driver fills with one number

# As many bytes of output would push everything else out of the cache.
_PAST_CACHE = 32 << 20


class Native(Sweeping):
    """A program as C, built or fetched from the cache when this object is made.

    Raises:
        BuildError: there is no kernel; the message says why.
    """

    def __init__(self, program: Program, stored: torch.dtype) -> None:
        super().__init__(program, stored)
        if os.environ.get("FUNCOPT_NATIVE") == "0":
            raise BuildError("native kernels are turned off: FUNCOPT_NATIVE=0")
        if stored not in _DTYPES:
            raise BuildError(f"there are no native kernels for {stored}")
        self._read = [program.streams_read(sweep) for sweep in program.passes]
        self._parameters = [program.scalars_read(sweep) for sweep in program.passes]
        self._objects, shared = objects.load(), driver.load()
        built = [library(source.print_c(program, s, stored)) for s in program.passes]
        try:
            self._kernels = [_kernel(each.loaded, shared) for each in built]
            if any(each.made for each in built):
                self_check.compare(self)
            for each in built:
                each.keep()
        finally:
            for each in built:
                each.discard()

    def direct(
        self,
        like: Column,
        which: Sequence[int],
        pooled: bool = False,
        tasks: int = 0,
        spread: Sequence[int] = (),
    ) -> Direct:
        program = self.program
        at = [k for k, each in enumerate(program.passes) if each.outputs or each.sums]
        computed = at and all(program.passes[k].streams for k in at)
        if not computed or len(spread) > _SPREAD or (spread and len(at) > 1):
            return super().direct(like, which, pooled, tasks, spread)
        # Everything that does not change is worked out here, once.
        scalars_out = [v for v in program.outputs if not program.is_stream(v)]
        count, owners, sums, launches = len(like), which, [], []
        for k in at:
            known = tuple(sums)
            launches.append(self._launch(k, like, owners, known, pooled, tasks, spread))
            sums += program.passes[k].sums
            owners = range(count) if sums and not pooled else which
        *first, last = launches
        reads, writes = (getattr(program.passes[at[-1]], x) for x in ("sums", "outputs"))
        vectors = tasks and not spread and (sums or scalars_out)  # would come out
        if vectors or (pooled and first) or (reads and writes and not pooled):
            return super().direct(like, which, pooled, tasks, spread)
        after = scalars.on_numbers(program, scalars_out, sums)
        order = [program.is_stream(v) for v in program.outputs]

        def run(
            tensors: Sequence[Tensor],
            addresses: bytes,
            rows: Rows,
            out: Sequence[Column] | None,
        ) -> Sequence[Column] | None:
            results: Any = ()
            try:
                for launch in first:
                    rows = launch(rows, addresses, ())
                if scalars_out and not reads:  # before anything is written
                    results = [after(*row) for row in rows]
                rows = last(rows, addresses, out)
                if scalars_out and reads:
                    results = [after(*row) for row in rows]
            except (ArithmeticError, ValueError):
                return None  # an infinity, or NaN
            if not scalars_out:
                return out or ()
            if not pooled and len(results) < count:
                results = [results[row] for row in which]
            columns: Any = iter(out or repeat(None))
            values = zip(*results)
            return [next(columns if is_stream else values) for is_stream in order]

        return run

    def _launch(
        self,
        k: int,
        like: Column,
        which: Sequence[int],
        known: Sequence[int],
        pooled: bool,
        tasks: int,
        spread: Sequence[int],
    ) -> Callable[..., Rows]:
        """Sweep ``k`` on leaves like these, whose rows hold the sums that are ``known``.

        It gives the rows with its own sums in them: then one for each leaf, unless these
        are pooled.
        """
        program, sweep = self.program, self.program.passes[k]
        before = scalars.on_numbers(program, self._parameters[k], known, packed=True)
        count, total = len(like), sum(map(Tensor.numel, like))
        sizes = array("q", [x.numel() // max(tasks, 1) for x in like])
        owners, sums_out = array("q", which), len(sweep.sums)
        of_row = [[i for i in range(count) if which[i] == row] for row in {*which}]
        each = 8 * count  # bytes of a column's addresses
        stream = {value: k * each for k, value in enumerate(self._streams)}
        read = [slice(stream[v], stream[v] + each) for v in self._read[k]]
        numbers = {self._streams[i] for i in spread}
        bits = sum(1 << i for i, value in enumerate(self._read[k]) if value in numbers)
        in_place = itemgetter(slice(each, (1 + len(sweep.outputs)) * each))
        large = total * len(sweep.outputs) * self.stored.itemsize >= _PAST_CACHE
        fixed = self._kernels[k], count, max(tasks, 1), sizes, owners
        call, addresses_of = self._objects.run, self._objects.addresses
        parallel = total >= _PARALLEL
        #: addresses of the last step in place, and the pointers made of them
        last = b"", b""

        def launch(rows: Rows, addresses: bytes, out: Sequence[Column] | None) -> Rows:
            nonlocal last
            if tasks and not spread:
                rows = [each for row in rows for each in _of_tasks(row, tasks)]
            table = b"".join(starmap(before, rows))
            before_it, pointers = last
            if out is not None or addresses != before_it:
                pointers = b"".join(map(addresses.__getitem__, read))
                pointers += in_place(addresses) if out is None else addresses_of(*out)
            if out is None:
                last = addresses, pointers
            sums = array("d", bytes(8 * count * sums_out)) if sums_out else _NO_SUMS
            threads = torch.get_num_threads() if parallel else 1
            streaming = large and out is not None
            failed = call(*fixed, table, pointers, sums, streaming, threads, bits)
            if failed:
                raise MemoryError("no memory for the sums of a kernel")
            if not sums_out:
                return rows
            found = [sums[k::sums_out] for k in range(sums_out)]
            if pooled:
                totals = [[_total(s, leaves) for s in found] for leaves in of_row]
                return [(*row, *more) for row, more in zip(rows, totals)]
            return [(*rows[row], *more) for row, *more in zip(which, *found)]

        return launch

    def _sweep(
        self,
        k: int,
        columns: dict[int, Column],
        env: Sequence[list[Any]],
        which: Sequence[int],
        out: Sequence[Column] | None,
        tasks: int,
    ) -> tuple[Sequence[Column], Sequence[Column]]:
        sweep = self.program.passes[k]
        first = columns[self._streams[0]]
        sizes = array("q", map(Tensor.numel, first))
        total = sum(sizes)
        if tasks:
            sizes = array("q", [size // tasks for size in sizes])
        if out is None:
            out = [empty_like(first) for _ in sweep.outputs]
        addresses = self._objects.addresses
        given = addresses(*(columns[value] for value in self._read[k]))
        written = addresses(*out)
        rows = _table([[v[i] for i in self._parameters[k]] for v in env], tasks)
        sums = array("d", bytes(8 * len(first) * max(tasks, 1) * len(sweep.sums)))
        large = total * len(out) * self.stored.itemsize >= _PAST_CACHE
        last = array("Q", written)[-1:]  # of what is written in place the line is there
        failed = self._objects.run(
            self._kernels[k],
            len(first),
            max(tasks, 1),
            sizes,
            array("q", which),
            rows,
            given + written,
            sums,
            large and last[0] not in array("Q", given),
            torch.get_num_threads() if total >= _PARALLEL else 1,
            0,
        )
        if failed:
            raise MemoryError("no memory for the sums of a kernel")
        return out, _columns(sums, len(sweep.sums), tasks)


def _total(sums: array, leaves: Sequence[int]) -> float:
    """A row's sum over its leaves, added in the order of `Sweeping`."""
    return reduce(add, map(sums.__getitem__, leaves), 0.0)


def _of_tasks(row: Sequence[Any], tasks: int) -> list[tuple[float, ...]]:
    """A row for each task, with its own numbers in it."""
    spread = [
        x.values.tolist() if isinstance(x, PerTask) else repeat(x, tasks) for x in row
    ]
    return [*zip(*spread)]


def _table(rows: Sequence[Sequence[Any]], tasks: int) -> array:
    """The rows one after the other; each once per task, with that task's values."""
    table = array("d")
    if not tasks:
        for row in rows:
            table.extend(map(float, row))
        return table
    for row in rows:
        spread = [
            value.tolist()
            if isinstance(value, Tensor) and value.ndim
            else [float(value)] * tasks
            for value in row
        ]
        for values in zip(*spread):
            table.extend(values)
    return table


def _columns(sums: array, count: int, tasks: int) -> list[list[Any]]:
    """Each sum's column: a float per leaf, or with tasks a vector."""
    if not count:
        return []
    if not tasks:
        return [sums[k::count].tolist() for k in range(count)]
    table = torch.tensor(sums, dtype=torch.float64, device="cpu").view(-1, tasks, count)
    return [list(table[..., k].unbind()) for k in range(count)]


def _kernel(loaded: ctypes.CDLL, driver: ctypes.CDLL) -> int:
    """The address of a library's ``run``, which goes by the driver from now on."""
    loaded.bind.argtypes = [ctypes.c_void_p] * 2
    loaded.bind(*(ctypes.cast(x, ctypes.c_void_p) for x in (driver.drive, driver.stream)))
    return ctypes.cast(loaded.run, ctypes.c_void_p).value or 0
