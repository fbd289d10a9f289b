"""A program printed as Triton: one kernel for each sweep, one for sums and scalars.

A kernel is given tables (`tables`) and no numbers, so that nothing is compiled
anew when a step, a hyperparameter or a leaf changes. Each block of a sweep computes the
scalars that it needs in float64: nothing waits for them, and in a replayed CUDA graph
they follow their tensors.
"""

from collections.abc import Iterable

import torch

from funcopt.execution.program import Program
from funcopt.execution.triton.expressions import Expressions
from funcopt.execution.triton.tables import ENTRY

#: dtypes that are stored → their names in Triton; halves are computed in float32
DTYPES = {
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
}

_SWEEP = """\
@triton.jit(do_not_specialize=["leaves"])
def sweep(blocks, table, totals, partials, leaves, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    blocks += 6 * block
    leaf, row, task = tl.load(blocks), tl.load(blocks + 1), tl.load(blocks + 2)
    group, start, stop = tl.load(blocks + 3), tl.load(blocks + 4), tl.load(blocks + 5)
    {addresses}
    {scalars}
    even = (({all}) | start * {size}) % 16 == 0
    {zeros}
    i = tl.arange(0, BLOCK)
    for at in range(start, stop, BLOCK):
        inside = i < stop - at
        here = at * {size}
        full = even & (stop - at >= BLOCK)
        if full:
            {loads}
        else:
            {masked_loads}
        {streams}
        if full:
            {stores}
        else:
            {masked_stores}
        {sums}
    {partials}
"""

_FINISH = """\
@triton.jit(do_not_specialize=["leaves", "count"])
def finish(groups, table, totals, partials, results, leaves, count, WIDTH: tl.constexpr):
    group = tl.program_id(0)
    number = tl.num_programs(0)
    groups += 4 * group
    row, task = tl.load(groups), tl.load(groups + 1)
    first, last = tl.load(groups + 2), tl.load(groups + 3)
    i = tl.arange(0, WIDTH)
    {zeros}
    for at in range(first, last, WIDTH):
        inside = at + i < last
        {loads}
    {sums}
    {stores}
    {scalars}
    {results}
"""


class Printer:
    """The kernels of one program for leaves stored in one dtype.

    Args:
        program: what to print.
        stored: a key of `DTYPES`.

    Raises:
        KeyError: an operation that no kernel has.
    """

    def __init__(self, program: Program, stored: torch.dtype) -> None:
        self.program = program
        self.stored = DTYPES[stored]
        self.size = stored.itemsize
        self.computed = DTYPES[program.dtype]
        inputs = range(len(program.inputs))
        self.streams = [i for i in inputs if program.inputs[i]]
        self.numbers = [i for i in inputs if not program.inputs[i]]
        #: the streams that the program writes, in the order of the table's columns
        self.written = [o for sweep in program.passes for o in sweep.outputs]
        self.sums = [s for sweep in program.passes for s in sweep.sums]
        self.columns = len(self.streams) + len(self.written)
        self._of_streams = Expressions(program, "v", self.computed)
        self._of_scalars = Expressions(program, "s", "tl.float64")

    def warps(self, k: int) -> int:
        """How many warps work on a block of 1,024 elements in sweep ``k``.

        Four while registers last: each computes the scalars. Never so many that a thread
        has less than 16 bytes to read.
        """
        read = self.program.streams_read(self.program.passes[k])
        wide = self.program.dtype.itemsize * len(read)
        return 4 if wide <= 16 or self.size == 2 else 8

    def sweep(self, k: int) -> str:
        """The kernel of sweep ``k``; with no stream to compute, an empty text."""
        program, sweep = self.program, self.program.passes[k]
        name, expression = self._of_streams.name, self._of_streams.expression
        if not sweep.outputs and not sweep.sums:
            return ""
        read = sorted(program.streams_read(sweep))
        first = len(self.streams)  # one sweep writes all
        columns = {f"a{v}": self.streams.index(v) for v in read}
        columns |= {f"b{j}": first + j for j in range(len(sweep.outputs))}
        values = [program.op(s).args[0] for s in sweep.sums]
        parameters = program.scalars_read(sweep)
        load = "v{0} = tl.load({1}(a{0} + here, {2}) + i{3}).to({4})"
        store = "tl.store({1}(b{0} + here, {2}) + i, {4}.to({2}){3})"

        def loads(kind: str, mask: str) -> list[str]:
            return [
                load.format(v, kind, self.stored, mask, self.computed) for v in read
            ] or ["pass"]

        def stores(kind: str, mask: str) -> list[str]:
            return [
                store.format(j, kind, self.stored, mask, name(v))
                for j, v in enumerate(sweep.outputs)
            ] or ["pass"]

        return _filled(
            _SWEEP,
            size=str(self.size),
            all=" | ".join(columns),
            addresses=[
                f"{name} = tl.load(table + {column} * leaves + leaf)"
                for name, column in columns.items()
            ],
            scalars=[
                *self._scalars(parameters, {}),
                *(f"v{v} = s{v}.to({self.computed})" for v in parameters),
            ],
            zeros=[f"t{j} = tl.zeros((), tl.float64)" for j in range(len(values))],
            loads=loads("aligned", ""),
            masked_loads=loads("pointer", ", mask=inside, other=0"),
            streams=[f"v{v} = {expression(program.op(v))}" for v in sweep.streams],
            stores=stores("aligned", ""),
            masked_stores=stores("pointer", ", mask=inside"),
            sums=[
                f"t{j} += tl.sum(tl.where(inside, {name(v)}, 0).to(tl.float64))"
                for j, v in enumerate(values)
            ],
            partials=[
                f"tl.store(partials + {j} * tl.num_programs(0) + block, t{j})"
                for j in range(len(values))
            ],
        )

    def finish(self, k: int) -> str:
        """The kernel after sweep ``k``: its sums, and after the last sums the scalars.

        With nothing to add and no scalar to give, an empty text.
        """
        passes = self.program.passes
        sums = passes[k].sums
        last = k == max(len(passes) - 2, 0)  # the last pass has no sums
        results = self.results if last else []
        if not sums and not results:
            return ""
        known = {s: f"t{j}" for j, s in enumerate(sums)}
        return _filled(
            _FINISH,
            zeros=[f"t{j} = tl.zeros([WIDTH], tl.float64)" for j in range(len(sums))],
            loads=[
                f"t{j} += tl.load(partials + {j} * count + at + i, mask=inside, other=0)"
                for j in range(len(sums))
            ]
            or ["pass"],
            sums=[f"t{j} = tl.sum(t{j})" for j in range(len(sums))],
            stores=[
                f"tl.store(totals + {len(self.sums)} * group + {self.sums.index(s)}, "
                f"{known[s]})"
                for s in sums
            ],
            scalars=self._scalars(results, known),
            results=[
                f"tl.store(results + {j} * number + group, {self._of_scalars.name(v)})"
                for j, v in enumerate(results)
            ],
        )

    @property
    def results(self) -> list[int]:
        """The scalars among the program's outputs, each once."""
        outputs = (o for o in self.program.outputs if not self.program.is_stream(o))
        return list(dict.fromkeys(outputs))

    def _scalars(self, wanted: Iterable[int], known: dict[int, str]) -> list[str]:
        """Lines that compute the scalars, from the table and from sums."""
        program, of_scalars = self.program, self._of_scalars
        needed, ahead = set[int](), list(wanted)
        while ahead:
            v = ahead.pop()
            if v not in needed and not program.is_literal(v):
                needed.add(v)
                if not program.is_input(v) and program.op(v).name != "sum":
                    ahead.extend(program.op(v).args)
        lines = []
        if any(program.is_input(v) for v in needed):
            width = ENTRY * len(self.numbers)
            lines.append(f"entries = table + {self.columns} * leaves + {width} * row")
        for v in sorted(needed):
            if program.is_input(v):
                entry = ENTRY * self.numbers.index(v)
                value = f"scalar(table, entries + {entry}, task)"
            elif program.op(v).name == "sum":
                place = f"totals + {len(self.sums)} * group + {self.sums.index(v)}"
                value = known.get(v) or f"tl.load({place})"
            else:
                value = of_scalars.expression(program.op(v))
            if of_scalars.is_truth(v):
                value = f"({value}).to(tl.float64)"
            lines.append(f"s{v} = {value}")
        return lines


def _filled(template: str, **parts: str | list[str]) -> str:
    """The template with each part in its place, as deep as that is; empty lines go."""
    lines = []
    for line in template.splitlines():
        inner = line.strip()
        whole = inner[1:-1] if inner.startswith("{") and inner.endswith("}") else ""
        if whole in parts and not isinstance(parts[whole], str):
            indent = line[: len(line) - len(inner)]
            lines += [indent + part for part in parts[whole]]
        else:
            lines.append(
                line.format(**{k: v for k, v in parts.items() if isinstance(v, str)})
                if "{" in line
                else line
            )
    return "\n".join(lines) + "\n"
