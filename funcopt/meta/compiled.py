"""A pure function of trees of tensors as one compiled graph for each kind of inputs."""

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from funcopt import tree
from funcopt.checks import check_no_graph
from funcopt.errors import CompileError, LeafError
from funcopt.execution import autocast, executor_choice, levels
from funcopt.meta.flat_graph import shorten
from funcopt.types import PLAIN, Tensor, Tree

#: makes of a flat graph, and of inputs like its own, what runs it
Maker: TypeAlias = Callable[
    [torch.fx.GraphModule, list[Tensor]], Callable[..., Sequence[Tensor]]
]

_MOST_GRAPHS = 16
#: what traces and compiles changes what is the whole process's
_COMPILING = RLock()


# What writes into a copy of its first argument. Where that is expanded, as vmap expands
# what all tasks share, Inductor's kernels write into one task's for all of them
# (https://github.com/pytorch/pytorch/issues/183986).
_aten = torch.ops.aten
_WRITING = {
    *(_aten.index_add, _aten.index_copy, _aten.index_fill, _aten.index_put),
    *(_aten.scatter, _aten.scatter_add, _aten.scatter_reduce, _aten.masked_scatter),
    *(_aten.slice_scatter, _aten.select_scatter, _aten.diagonal_scatter),
}


class Graph(NamedTuple):
    """One compiled graph, what it is for, and what it needs beside its arguments."""

    run: Callable[..., Sequence[Tensor]]
    structures: list[tree.Structure]
    kinds: list[Any]  #: of the arguments' leaves
    settings: Any
    devices: Sequence[str]  #: of all of them
    #: what the function closes over: read at each call, so changes in place are seen
    held: list[Tensor]
    held_kinds: list[Any]  #: a module may be cast, or moved
    rebuild: Callable[[Sequence[Any]], Tree]

    def is_for(self, structures: list[tree.Structure], kinds: list[Any]) -> bool:
        return (
            self.kinds == kinds
            and self.structures == structures
            and self.settings == _settings(self.devices)
            and self.held_kinds == [*map(_kind, self.held)]
        )


class Compiled:
    """``function`` of trees of tensors, compiled for each structure, shape and stride.

    The function is run once, on tensors without values; the transforms of torch.func and
    the backward passes in it leave one flat graph of aten operations, and ``make`` gives
    what runs that: Inductor's kernels (`kernels`), or torch's operations (`replay`).
    Dynamo, which would trace the transforms themselves, has no part in it: it takes
    longer than all the rest, and there are no guards to fail.

    What the function reads beside its arguments is read that once: Python's values are
    frozen, tensors are kept by reference. Where one of those has been cast or moved
    since, or autocast chooses otherwise, the function is compiled anew.

    Raises:
        CompileError: the function asks for a tensor's value, or the compiler fails.
        GradientLostError: a derivative of the result is asked for: it has no graph.
        LeafError: an input is a tensor subclass.
    """

    def __init__(self, function: Callable[..., Tree], name: str, make: Maker) -> None:
        self.function = function
        self.name = name
        self.make = make
        self._graphs: tuple[Graph, ...] = ()  # the last used first

    def __call__(self, *trees: Tree) -> Tree:
        done = self.again(*trees)
        if done is not None:
            return done
        with _COMPILING:
            done = self.again(*trees)  # another thread may have made it
            return self._first(trees) if done is None else done

    def again(self, *trees: Tree) -> Tree | None:
        """What a graph made earlier for such arguments gives; None without one."""
        leaves, structures = _flat(trees)
        kinds = [*map(_kind, leaves)]
        for graph in self._graphs:
            if graph.is_for(structures, kinds):
                break
        else:
            return None
        if graph is not self._graphs[0]:
            self._graphs = (graph, *(x for x in self._graphs if x is not graph))
        inputs = [_resolved(x) for x in leaves if x is not None]
        if levels.differentiating([*inputs, *graph.held]):
            self._check(inputs, graph.held)
        return graph.rebuild(_run(graph, inputs))

    def _check(self, inputs: Sequence[Any], held: Sequence[Tensor]) -> None:
        for x in inputs:
            if type(x) not in PLAIN and not levels.inside():
                raise LeafError(
                    f"{self.name} is compiled for plain tensors, but was given a "
                    f"{type(x).__name__}; leave out compile"
                )
        what = f"a compiled {self.name}"
        check_no_graph(inputs, what, "an input")
        check_no_graph(held, what, "a tensor that it closes over")

    def _first(self, trees: Sequence[Tree]) -> Tree:
        """What a new graph gives; some that the compiler takes do not run."""
        leaves, structures = _flat(trees)
        inputs = [_resolved(x) for x in leaves if x is not None]
        self._check(inputs, [])
        try:
            with torch.no_grad():
                traced, held, rebuild = _traced(self.function, trees, inputs)
        except Exception as error:
            # What fails without the compiler, too, is to fail as it does there.
            self.function(*trees)
            raise CompileError(
                f"{self.name} cannot be compiled: {_reason(error)}{_place(error)}. A "
                "compiled function sees no values: write the choice with torch.where, "
                "keep numbers as tensors, or leave out compile"
            ) from error
        self._check(inputs, held)
        devices = sorted({x.device.type for x in (*inputs, *held)})
        kinds, held_kinds = ([*map(_kind, each)] for each in (leaves, held))
        settings = _settings(devices)
        try:
            with autocast.choosing(autocast.OFF):  # what it chose is in the graph
                shorten(traced)
                run = self.make(traced, [*inputs, *map(_resolved, held)])
            graph = Graph(
                run, structures, kinds, settings, devices, held, held_kinds, rebuild
            )
            results = _run(graph, inputs)
        except Exception as error:
            raise CompileError(
                f"torch failed on the graph of {self.name}: {_reason(error)}. On a CPU "
                "compile=True needs a C++ compiler (on the PATH, or named by CXX); "
                "compile='trace' needs none"
            ) from error
        self._graphs = (graph, *self._graphs)[:_MOST_GRAPHS]
        return rebuild(results)


def _flat(trees: Sequence[Tree]) -> tuple[list[Any], list[tree.Structure]]:
    """All leaves, and the structure of each tree."""
    split = [tree.flatten(given) for given in trees]
    return [x for found, _ in split for x in found], [form for _, form in split]


def _resolved(x: Tensor) -> Any:
    """The same numbers as they are in memory, which is all that a kernel looks at."""
    return x.resolve_conj().resolve_neg() if x.is_neg() or x.is_conj() else x


def _settings(devices: Sequence[str]) -> Any:
    """The settings of torch's that stand in a trace for these kinds of devices."""
    on = [torch.get_autocast_dtype(k) for k in devices if torch.is_autocast_enabled(k)]
    return torch.get_default_dtype(), *on


def _is_expanded(x: Tensor) -> bool:
    return any(step == 0 and size > 1 for step, size in zip(x.stride(), x.shape))


def _kind(x: Any) -> Any:
    """What a graph depends on; of no graph where it is no plain tensor."""
    if type(x) not in PLAIN:
        return type(x)
    return x.shape, x.stride(), x.dtype, x.device


def _traced(
    function: Callable[..., Tree], trees: Sequence[Tree], inputs: list[Tensor]
) -> tuple[torch.fx.GraphModule, list[Tensor], Callable[[Sequence[Any]], Tree]]:
    """The flat graph, the tensors that it holds as further inputs, and the result's form.

    Updates in it are the plain rule, for the compiler to fuse.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    put_back = [tree.without_none(given) for given in trees]
    rebuilds: list[Callable[[Sequence[Any]], Tree]] = []
    # A mode of our own, without symbols: to ask for a value is an error at its line.
    without_values = FakeTensorMode(allow_non_fake_inputs=True)
    lifting = _Lifting(without_values)

    def flat(*leaves: Tensor) -> list[Tensor]:
        rest = iter(leaves)
        given = [back([next(rest) for _ in present]) for present, back in put_back]
        with lifting:
            present, rebuild = tree.without_none(function(*given))
            rebuilds.append(rebuild)
            return [*map(lifting.input_of, present)]

    fakes = [without_values.from_tensor(x.detach()) for x in inputs]
    with executor_choice.execution("reference"), without_values:
        graph = make_fx(flat)(*fakes)
    return graph, lifting.held, rebuilds[-1]


class _Lifting(TorchDispatchMode):
    """Makes inputs of a graph of the tensors that come from outside its arguments.

    Left to itself make_fx takes them for constants: small ones would be frozen into the
    kernels, and a number's value read, or written in, during the trace. What was written
    down as a literal stays one.
    """

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # else Dynamo leaves the branches of torch.cond as they are

    def __init__(self, without_values: Any) -> None:
        super().__init__()
        self.without_values = without_values
        self.held: list[Tensor] = []
        self._inputs: dict[int, Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is _aten._efficientzerotensor.default:
            func = _aten.zeros.default  # of no memory, which a kernel would read
        if func is not _aten.lift_fresh.default:
            args, kwargs = tree_map_only(Tensor, self.input_of, (args, kwargs or {}))
        if getattr(func, "overloadpacket", None) in _WRITING and _is_expanded(args[0]):
            args = args[0].contiguous(), *args[1:]
        return func(*args, **kwargs or {})

    def input_of(self, x: Tensor) -> Tensor:
        from torch.fx.experimental import proxy_tensor

        if type(x) not in PLAIN:
            return x
        if id(x) not in self._inputs:
            mode: Any = proxy_tensor.get_proxy_mode()
            tracer = mode.tracer
            *_, last = (n for n in tracer.graph.nodes if n.op == "placeholder")
            with tracer.graph.inserting_after(last):
                name = f"held_{len(self.held)}"
                proxy = tracer.create_proxy("placeholder", name, (), {})
            fake = self.without_values.from_tensor(_resolved(x.detach()))
            proxy_tensor.track_tensor_tree(fake, proxy, constant=None, tracer=tracer)
            self._inputs[id(x)] = fake
            self.held.append(x)
        return self._inputs[id(x)]


def kernels(
    graph: torch.fx.GraphModule, inputs: list[Tensor]
) -> Callable[..., Sequence[Tensor]]:
    """The graph compiled by Inductor."""
    from funcopt.meta.inductor import kernels  # the compiler takes long to import

    return kernels(graph, inputs)


def _run(graph: Graph, inputs: list[Tensor]) -> Sequence[Tensor]:
    with torch.no_grad(), autocast.choosing(autocast.OFF):
        return graph.run(*inputs, *map(_resolved, graph.held))


def _reason(error: Exception) -> str:
    """The first line of the error, with its kind."""
    lines = [line.strip() for line in str(error).splitlines()]
    words = next(filter(None, lines), "")
    return f"{type(error).__name__}: {words}".rstrip(": .")


def _place(error: Exception) -> str:
    """The last line of the user's that led to the error."""
    own = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
    frames = traceback.extract_tb(error.__traceback__)
    # of code that was made and not written, there is no line to show
    theirs = [x for x in frames if x.line and not x.filename.startswith(own)]
    if not theirs:
        return ""
    return f", at {theirs[-1].filename}:{theirs[-1].lineno} ({theirs[-1].line})"
