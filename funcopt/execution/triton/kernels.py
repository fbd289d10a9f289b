"""The Triton executor: one kernel launch for each sweep over all leaves, on CUDA.

Leaves are read where they lie, through a table of their addresses. Nothing here waits for
the device: scalars and sums stay on it, also in the results.
"""

import hashlib
import linecache
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch

from funcopt.execution.executor import (
    BuildError,
    Column,
    Direct,
    Executor,
    Rows,
    as_vector,
    empty_like,
)
from funcopt.execution.native import objects
from funcopt.execution.program import Program
from funcopt.execution.triton.source import DTYPES, Printer
from funcopt.execution.triton.tables import (
    BLOCK,
    BlockLayout,
    Uploads,
    block_layout,
    words,
)
from funcopt.types import Tensor

_OLDEST = (3, 2)
_LAYOUTS = 32  # that are remembered; each holds some 60 bytes per block
FINISHING_WARPS = 8


class Triton(Executor):
    """A program as Triton kernels.

    Scalars may be numbers, or tensors on the leaves' device, which are read there by the
    kernel. Scalars among the outputs are tensors on the device.

    Raises:
        BuildError: there is no kernel; the message says why.
    """

    def __init__(self, program: Program, stored: torch.dtype) -> None:
        super().__init__(program, stored)
        if stored not in DTYPES:
            raise BuildError(f"there are no Triton kernels for {stored}")
        self._printer = printer = Printer(program, stored)
        passes = range(len(program.passes))
        try:
            texts = [(printer.sweep(k), printer.finish(k)) for k in passes]
        except KeyError as error:
            raise BuildError(f"there is no Triton kernel for {error}") from error
        self._kernels = [[_kernel(text) for text in pair] for pair in texts]
        self._warps = [printer.warps(k) for k in passes]
        self._layouts: OrderedDict[Any, BlockLayout] = OrderedDict()
        self._uploads = Uploads()

    def __call__(
        self,
        streams: Sequence[Column],
        rows: Sequence[Sequence[Any]],
        which: Sequence[int],
        *,
        out: Sequence[Column] | None = None,
        tasks: int = 0,
        pooled: bool = False,
    ) -> list[Column]:
        """The program's outputs, a column each; see `Executor`."""
        leaves = streams[0]
        if not leaves:
            raise ValueError("no leaf tells which device this is for")
        if out is None:
            out = [empty_like(leaves) for _ in self._printer.written]
        plan = self._layout(leaves, which, len(rows), tasks, pooled)
        addresses = objects.load().addresses(*streams, *out)
        results = self._launch(plan, addresses, len(leaves), rows)
        return self._outputs(out, results, tasks)

    def direct(
        self,
        like: Column,
        which: Sequence[int],
        pooled: bool = False,
        tasks: int = 0,
        spread: Sequence[int] = (),
    ) -> Direct:
        if spread:
            return super().direct(like, which, pooled, tasks, spread)
        count, written = len(like), len(self._printer.written)
        begin, end = 8 * count, 8 * count * (1 + written)  # bytes, of what is in place
        known: dict[int, BlockLayout] = {}  # by how many rows there are

        def run(
            tensors: Sequence[Tensor],
            addresses: bytes,
            rows: Rows,
            out: Sequence[Column] | None,
        ) -> list[Column]:
            plan = known.get(len(rows))
            if plan is None:
                leaves = tensors[:count]
                plan = self._layout(leaves, which, len(rows), tasks, pooled)
                known[len(rows)] = plan
            if out is None:
                out = [
                    tensors[k * count : (k + 1) * count] for k in range(1, 1 + written)
                ]
                addresses += addresses[begin:end]
            else:
                addresses += objects.load().addresses(*out)
            rows = [[*map(as_vector, row)] for row in rows]
            results = self._launch(plan, addresses, count, rows)
            return self._outputs(out, results, tasks)

        return run

    def _launch(
        self, plan: BlockLayout, addresses: bytes, count: int, rows: Rows
    ) -> Tensor:
        """The scalars among the outputs, a row for each."""
        printer, device = self._printer, plan.blocks.device

        def numbers(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float64, device=device)

        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            content, alive = words(addresses, rows, device)
            table = self._uploads(content, device, (plan.blocks, plan.groups))
            totals = numbers(plan.number, len(printer.sums))
            results = numbers(len(printer.results), plan.number)
            for k, (sweep, finish) in enumerate(self._kernels):
                partials = numbers(len(self.program.passes[k].sums), plan.count)
                if sweep is not None and plan.count:
                    sweep[(plan.count,)](
                        plan.blocks, table, totals, partials, count,
                        BLOCK=BLOCK, num_warps=self._warps[k], enable_fp_fusion=False,
                    )  # fmt: skip
                if finish is not None:
                    finish[(plan.number,)](
                        plan.groups, table, totals, partials, results, count,
                        plan.count, WIDTH=BLOCK, num_warps=FINISHING_WARPS,
                        enable_fp_fusion=False,
                    )  # fmt: skip
        del alive
        return results

    def _outputs(
        self, out: Sequence[Column], results: Tensor, tasks: int
    ) -> list[Column]:
        written: dict[int, Column] = dict(zip(self._printer.written, out))
        for value, row in zip(self._printer.results, results):
            entries = row.view(-1, tasks) if tasks else row
            written[value] = entries.unbind()
        return [written[value] for value in self.program.outputs]

    def _layout(
        self,
        leaves: Column,
        which: Sequence[int],
        rows: int,
        tasks: int,
        pooled: bool,
    ) -> BlockLayout:
        """The layout on the leaves' device: from the last few, or made."""
        sizes, device = tuple(map(Tensor.numel, leaves)), leaves[0].device
        key = (sizes, tuple(which), rows, tasks, pooled, device)
        found = self._layouts.pop(key, None)  # another thread may look here, too
        if found is None:
            made = block_layout(sizes, which, rows, tasks, pooled)
            found = BlockLayout(made.blocks.to(device), made.groups.to(device))
        self._layouts[key] = found
        if len(self._layouts) > _LAYOUTS:
            self._layouts.popitem(last=False)
        return found


@cache
def _kernel(source: str) -> Any:
    """The kernel that the source defines; None of an empty one."""
    if not source:
        return None
    namespace = dict(_vocabulary())
    # Triton reads a kernel's text again, from where Python's tracebacks do.
    name = f"<funcopt {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    exec(compile(source, name, "exec"), namespace)  # of our own making
    return namespace.get("sweep") or namespace["finish"]


@cache
def _vocabulary() -> dict[str, Any]:
    """What the printed source may name.

    Raises:
        BuildError: there is no Triton, or one that is too old.
    """
    try:
        import triton
        import triton.language as tl
    except ImportError as error:
        raise BuildError("Triton is not installed (pip install triton)") from error
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < _OLDEST:
        raise BuildError(f"Triton {triton.__version__} is older than 3.2")
    from funcopt.execution.triton import arithmetic

    return {**vars(arithmetic), "triton": triton, "tl": tl}
