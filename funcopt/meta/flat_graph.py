"""A flat graph of aten operations: made shorter, and run as it is."""

import operator
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from funcopt.types import Tensor

_full = torch.ops.aten.full.default
#: elements of the largest tensor that is computed ahead
_SMALL = 4096


def shorten(module: GraphModule) -> None:
    """Leave out what the graph does for nothing, or in the same way at each call."""
    _fold(module.graph)
    _compute_once(module.graph)
    _drop_idle_views(module.graph)
    module.graph.eliminate_dead_code(lambda x: x.is_impure() or bool(_written_by(x)))
    module.recompile()


def replay(
    graph: GraphModule, inputs: Sequence[Tensor]
) -> Callable[..., Sequence[Tensor]]:
    """The graph run by torch's own operations."""

    def run(*given: Tensor) -> list[Tensor]:
        with torch.inference_mode():  # autograd's part of each operation, a tenth of it
            results = graph(*given)
        return [x.clone() for x in results]

    return run


def _fold(graph: Graph) -> None:
    """Numbers that depend on no input are written down, as a step's bias corrections."""
    *nodes, output = graph.nodes
    results, written = _apart(nodes, output)
    known: dict[Node, Any] = {}
    for node in nodes:
        if not _is_pure(node) or not all(x in known for x in node.all_input_nodes):
            continue
        if _memory([node]) & (results | written) or _size(node) > _SMALL:
            continue
        args, kwargs = map_arg((node.args, dict(node.kwargs)), known.__getitem__)
        known[node] = node.target(*args, **kwargs)
    for node, value in known.items():
        if isinstance(value, Tensor) and not value.ndim:
            with graph.inserting_before(node):
                like = {"dtype": value.dtype, "device": value.device}
                number = graph.call_function(_full, ([], value.item()), like)
            number.meta = {**node.meta}
            node.replace_all_uses_with(number)


def _compute_once(graph: Graph) -> None:
    """What is computed twice from the same is computed once.

    Each step of an inner loop computes anew what does not depend on it.
    """
    *nodes, output = graph.nodes
    results, written = _apart(nodes, output)
    known: dict[str, Node] = {}
    for node in nodes:
        own, read = _memory([node]), _memory(node.all_input_nodes)
        if _is_pure(node) and not (own & results or (own | read) & written):
            first = known.setdefault(f"{node.target} {node.args} {node.kwargs}", node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


def _apart(nodes: Sequence[Node], output: Node) -> tuple[set[int], set[int]]:
    """The memory of results, which stay tensors of their own, and what is written to."""
    written = chain.from_iterable(map(_written_by, nodes))
    return _memory(output.all_input_nodes), _memory(written)


def _drop_idle_views(graph: Graph) -> None:
    """Views that are a tensor over again go: vmap and autograd make many."""
    *nodes, output = graph.nodes
    for node in nodes:
        if _is_pure(node) and output not in node.users and _is_idle(node):
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)


def _is_idle(node: Node) -> bool:
    """Whether it gives its first argument: the same memory, seen in the same way."""
    values = [x.meta.get("val") for x in (*node.all_input_nodes[:1], node)]
    return len(values) == 2 and len({*map(_looks, values)}) == 1


def _looks(value: Any) -> Any:
    if not _is_strided(value):
        return object()  # like nothing else
    place = value.untyped_storage()._cdata, value.storage_offset(), value.stride()
    return *place, value.shape, value.dtype, value.is_conj(), value.is_neg()


def _is_pure(node: Node) -> bool:
    """Whether it gives the same each time, and changes nothing."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return target is operator.getitem
    random = torch.Tag.nondeterministic_seeded in target.tags
    known = target.namespace in ("aten", "prims")
    return known and not random and not target._schema.is_mutable


#: what a batch norm writes into, though its schema does not say so
_UNDECLARED = ("running_mean", "running_var")


def _written_by(node: Node) -> list[Node]:
    """What an operation writes into."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    declared = node.target._schema.arguments
    given = {**dict(zip([x.name for x in declared], node.args)), **node.kwargs}
    some = [x.name for x in declared if x.alias_info and x.alias_info.is_write]
    values = pytree.tree_leaves([given.get(name) for name in (*some, *_UNDECLARED)])
    return [x for x in values if isinstance(x, Node)]


def _memory(nodes: Iterable[Node]) -> set[int]:
    """That of their tensors: the same of a tensor and its views."""
    values = [x.meta.get("val") for x in nodes]
    found = filter(_is_strided, pytree.tree_leaves(values))
    return {x.untyped_storage()._cdata for x in found}


def _size(node: Node) -> int:
    found = pytree.tree_leaves(node.meta.get("val"))
    return sum(x.numel() for x in found if isinstance(x, Tensor))


def _is_strided(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided
