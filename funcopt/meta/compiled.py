"""A pure function of trees of tensors as one compiled graph for each kind of inputs."""

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from funcopt import tree
from funcopt.checks import check_no_graph
from funcopt.errors import CompileError, LeafError
from funcopt.execution import choice, levels
from funcopt.types import Tensor, Tree

_MOST_GRAPHS = 16
_PLAIN = {Tensor, torch.nn.Parameter}

# What is used twice is kept rather than computed twice, and the ends of loops are
# scalar: a third less to compile for Adam's inner loop, which runs no slower.
_ON_CPU = {
    "realize_reads_threshold": 1,
    "realize_opcount_threshold": 10,
    "cpp.enable_loop_tail_vec": False,
}
_ON_CUDA = {"triton.cudagraphs": True}  # as mode="reduce-overhead"; not run on a GPU yet


class Graph(NamedTuple):
    """One compiled graph, and what it needs beside its arguments."""

    run: Callable[..., Sequence[Tensor]]
    #: what the function closes over: read at each call, so changes in place are seen
    held: list[Tensor]
    rebuild: Callable[[Sequence[Any]], Tree]


class Compiled:
    """``function`` of trees of tensors, compiled for each structure, shape and stride.

    The function is run once, on tensors without values; the transforms of torch.func and
    the backward passes in it leave one flat graph of aten operations, and Inductor makes
    kernels of that. Dynamo, which would trace the transforms themselves, has no part in
    it: it takes longer than all the rest, and there are no guards to fail.

    What the function reads beside its arguments is read that once: Python's values are
    frozen, tensors are kept by reference.

    Raises:
        CompileError: the function asks for a tensor's value, or the compiler fails.
        GradientLostError: a derivative of the result is asked for: it has no graph.
        LeafError: an input is a tensor subclass.
    """

    def __init__(self, function: Callable[..., Tree], name: str) -> None:
        self.function = function
        self.name = name
        self._graphs: dict[Any, Graph] = {}

    def __call__(self, *trees: Tree) -> Tree:
        split = [tree.flatten(given) for given in trees]
        inputs = [x for leaves, _ in split for x in leaves if x is not None]
        key = (
            tuple(structure for _, structure in split),
            tuple(map(_kind, (x for leaves, _ in split for x in leaves))),
            torch.get_default_dtype(),
        )
        graph = self._graphs.get(key)
        self._check(inputs, graph.held if graph else [])
        if graph is None:
            graph = self._graph(trees, inputs)
            self._check(inputs, graph.held)
            if len(self._graphs) >= _MOST_GRAPHS:
                del self._graphs[next(iter(self._graphs))]  # the oldest
            self._graphs[key] = graph
        return graph.rebuild(_run(graph, inputs))

    def _check(self, inputs: Sequence[Any], held: Sequence[Tensor]) -> None:
        for x in inputs:
            if type(x) not in _PLAIN and not levels.inside():
                raise LeafError(
                    f"{self.name} is compiled for plain tensors, but was given a "
                    f"{type(x).__name__}; leave out compile=True"
                )
        what = f"a compiled {self.name}"
        check_no_graph(inputs, what, "an input")
        check_no_graph(held, what, "a tensor that it closes over")

    def _graph(self, trees: Sequence[Tree], inputs: list[Tensor]) -> Graph:
        try:
            with torch.no_grad():
                traced, held, rebuild = _traced(self.function, trees, inputs)
        except Exception as error:
            # What fails without the compiler, too, is to fail as it does there.
            self.function(*trees)
            raise CompileError(
                f"{self.name} cannot be compiled: {_reason(error)}{_place(error)}. A "
                "compiled function sees no values: write the choice with torch.where, "
                "keep numbers as tensors, or leave out compile=True"
            ) from error
        try:
            run = _kernels(traced, [*inputs, *held])
        except Exception as error:
            raise CompileError(
                f"torch's compiler failed on {self.name}: {_reason(error)}. On a CPU it "
                "needs a C++ compiler (on the PATH, or named by CXX); or leave out "
                "compile=True"
            ) from error
        return Graph(run, held, rebuild)


def _kind(x: Tensor | None) -> Any:
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device)


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

    def flat(*leaves: Tensor) -> list[Tensor]:
        rest = iter(leaves)
        given = [back([next(rest) for _ in present]) for present, back in put_back]
        present, rebuild = tree.without_none(function(*given))
        rebuilds.append(rebuild)
        return present

    # A mode of our own, without symbols: to ask for a value is an error at its line.
    without_values = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [without_values.from_tensor(x.detach()) for x in inputs]
    with choice.execution("reference"), without_values:
        graph = make_fx(flat)(*fakes)
    return graph, _lifted(graph), rebuilds[-1]


def _lifted(graph: torch.fx.GraphModule) -> list[Tensor]:
    """Make inputs of the tensors that the graph took from outside its arguments.

    As constants small ones would be frozen into the kernels. What was written down as a
    literal stays one.
    """
    literal = torch.ops.aten.lift_fresh_copy.default
    held: list[Tensor] = []
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1:]
    for node in list(graph.graph.nodes):
        if node.op != "get_attr" or any(u.target is literal for u in node.users):
            continue
        value = getattr(graph, node.target)
        if not isinstance(value, Tensor):
            continue
        with graph.graph.inserting_after(*last):
            lifted = graph.graph.placeholder(f"held_{len(held)}")
        lifted.meta = node.meta
        node.replace_all_uses_with(lifted)
        graph.graph.erase_node(node)
        last, held = [lifted], [*held, value]
    graph.recompile()
    return held


def _kernels(
    graph: torch.fx.GraphModule, inputs: list[Tensor]
) -> Callable[..., Sequence[Tensor]]:
    import torch._inductor
    from torch._inductor import config

    options = _ON_CUDA if any(x.is_cuda for x in inputs) else _ON_CPU
    with torch.no_grad(), config.patch(options):
        return torch._inductor.standalone_compile(
            graph,
            [x.detach() for x in inputs],
            dynamic_shapes="from_example_inputs",
            donate_graph_module=True,
        )


def _run(graph: Graph, inputs: list[Tensor]) -> Sequence[Tensor]:
    with torch.no_grad():
        if not any(x.is_cuda for x in inputs):
            return graph.run(*inputs, *graph.held)
        # The next replay writes over what this one gives.
        torch.compiler.cudagraph_mark_step_begin()
        return [x.clone() for x in graph.run(*inputs, *graph.held)]


def _reason(error: Exception) -> str:
    """The first line of the error, with its kind."""
    lines = [line.strip() for line in str(error).splitlines()]
    words = next(filter(None, lines), "")
    return f"{type(error).__name__}: {words}".rstrip(": .")


def _place(error: Exception) -> str:
    """The last line of the user's that led to the error."""
    own = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not frame.filename.startswith(own)]
    if not theirs:
        return ""
    return f", at {theirs[-1].filename}:{theirs[-1].lineno} ({theirs[-1].line})"
