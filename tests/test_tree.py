"""Trees: what comes apart goes together again, gaps keep places, leaves have names."""

from collections import OrderedDict, defaultdict
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optree import PyTreeSpec

import funcopt as fo
from funcopt import traced_tree, tree


class Point(NamedTuple):
    x: Any
    y: Any


TREES: dict[str, tuple[Any, list[Any], tuple[str, ...]]] = {
    "a leaf": (1.0, [1.0], ("<root>",)),
    "no value": (None, [None], ("<root>",)),
    "dict, keys sorted": ({"b": 1, "a": 2}, [2, 1], ("a", "b")),
    "ordered dict, in its order": (OrderedDict(b=1, a=2), [1, 2], ("b", "a")),
    "default dict": (defaultdict(list, a=1), [1], ("a",)),
    "list": ([1, 2], [1, 2], ("0", "1")),
    "tuple of one": ((1,), [1], ("0",)),
    "namedtuple": (Point(1, 2), [1, 2], ("x", "y")),
    "nested": (
        {"layers": [{"w": 1, "b": None}, (2, Point(3, {}))], "head": 4},
        [4, None, 1, 2, 3],
        ("head", "layers.0.b", "layers.0.w", "layers.1.0", "layers.1.1.x"),
    ),
    "int keys": ({1: "a", 0: "b"}, ["b", "a"], ("0", "1")),
    "keys with dots": ({"layer.weight": 1}, [1], ("layer.weight",)),
    "gaps": ([None, 1, {"a": None}], [None, 1, None], ("0", "1", "2.a")),
    "empty dict": ({}, [], ()),
    "empty list": ([], [], ()),
    "empty branches": ({"a": [], "b": ({}, 1)}, [1], ("b.1",)),
}


@pytest.mark.parametrize("name", TREES)
def test_apart_and_together(name: str):
    whole, leaves, paths = TREES[name]
    found, structure = tree.flatten(whole)
    assert found == leaves == tree.leaves(whole)
    assert tree.paths(structure) == paths and structure.num_leaves == len(leaves)
    again = tree.unflatten(structure, found)
    assert again == whole and type(again) is type(whole)
    assert tree.flatten_like(structure, whole, "tree") == leaves


@pytest.mark.parametrize("name", TREES)
def test_map_keeps_the_structure_and_the_gaps(name: str):
    whole, leaves, _ = TREES[name]
    pairs = tree.map(lambda a, b: (a, b), whole, whole)
    flat = tree.flatten_like(tree.flatten(whole)[1], pairs, "pairs")
    assert flat == [None if leaf is None else (leaf, leaf) for leaf in leaves]
    assert tree.map(lambda leaf: leaf, whole) == whole


@pytest.mark.parametrize("name", TREES)
def test_without_none_leaves_the_gaps_out_and_back_in(name: str):
    whole, leaves, _ = TREES[name]
    present, rebuild = tree.without_none(whole)
    assert present == [leaf for leaf in leaves if leaf is not None]
    assert rebuild(present) == whole


def test_two_trees_are_aligned_by_their_gaps():
    a, b = {"w": 1, "b": None, "c": 3}, {"w": 10, "b": None, "c": 30}
    assert tree.map(lambda x, y: x + y, a, b) == {"w": 11, "b": None, "c": 33}
    with_more = tree.map(lambda x, y: (x, y), a, {"w": None, "b": 20, "c": 30})
    assert with_more == {"w": (1, None), "b": None, "c": (3, 30)}


nested = st.recursive(
    st.integers() | st.none(),
    lambda children: (
        st.lists(children, max_size=3)
        | st.tuples(children, children)
        | st.builds(Point, children, children)
        | st.dictionaries(st.sampled_from(["a", "b", "c"]), children, max_size=3)
    ),
    max_leaves=12,
)


@given(nested)
def test_any_tree(whole: Any):
    leaves, structure = tree.flatten(whole)
    assert tree.unflatten(structure, leaves) == whole
    assert len(tree.paths(structure)) == len(leaves) == structure.num_leaves
    present, rebuild = tree.without_none(whole)
    assert rebuild(present) == whole
    numbered = tree.unflatten(structure, list(range(len(leaves))))
    assert tree.leaves(numbered) == list(range(len(leaves)))


@given(nested, nested)
def test_any_difference_is_told(one: Any, other: Any):
    expected, found = tree.flatten(one)[1], tree.flatten(other)[1]
    assert isinstance(expected, PyTreeSpec) and isinstance(found, PyTreeSpec)
    if expected.is_prefix(found):
        assert len(tree.flatten_like(expected, other, "it")) == len(tree.leaves(one))
    else:
        with pytest.raises(fo.StructureError, match="^it must have the structure"):
            tree.flatten_like(expected, other, "it")


def in_order(whole: Any) -> str:
    """With the order of a dict's keys, which equality does not see."""
    return repr(whole)


@given(nested, nested)
def test_a_traced_tree_is_no_other(one: Any, other: Any):
    leaves, structure = traced_tree.flatten(one)
    expected, of_optree = tree.flatten(one)
    assert leaves == expected and structure.num_leaves == len(leaves)
    assert structure.entries() == of_optree.entries()
    assert structure.is_leaf() == of_optree.is_leaf()
    assert tree.paths(structure) == tree.paths(of_optree)
    numbers = list(range(len(leaves)))
    rebuilt = tree.unflatten(structure, numbers)
    assert in_order(rebuilt) == in_order(tree.unflatten(of_optree, numbers))
    try:
        found = of_optree.flatten_up_to(other)
    except ValueError:
        with pytest.raises(ValueError):
            structure.flatten_up_to(other)
    else:
        assert structure.flatten_up_to(other) == found


ORDERS = [
    {"b": 1, "a": {"d": 2, "c": None}},
    OrderedDict(b=1, a=2),
    defaultdict(list, b=1, a=2),
]


@pytest.mark.parametrize("one", [*(x for x, _, _ in TREES.values()), *ORDERS])
@pytest.mark.parametrize("other", ORDERS)
def test_a_traced_tree_has_the_order_of_its_keys(one: Any, other: Any):
    test_a_traced_tree_is_no_other.hypothesis.inner_test(one, other)  # type: ignore[attr-defined]


# expected, found, and what the message says of it
DIFFERENCES: list[tuple[Any, Any, str]] = [
    ({"a": 1, "b": 2}, {"a": 1}, "missing 'b'"),
    ({"a": 1}, {"a": 1, "b": {"c": 2}}, "not in params 'b.c'"),
    ({"a": 1}, {"b": 1}, "missing 'a'; not in params 'b'"),
    ({"a": [1, 2]}, {"a": [1]}, "missing 'a.1'"),
    ({"a": [1]}, {"a": 1}, "missing 'a.0'; not in params 'a'"),
    ({"a": 1}, 1, "missing 'a'; not in params '<root>'"),
    ([1], (1,), "the containers differ"),
    (Point(1, 2), {"x": 1, "y": 2}, "the containers differ"),
    ([0] * 6, [], "missing '0', '1', '2', '3' and 2 more"),
]


@pytest.mark.parametrize("expected, found, words", DIFFERENCES)
def test_a_difference_in_words(expected: Any, found: Any, words: str):
    structure = tree.flatten(expected)[1]
    assert words in tree.difference(structure, tree.flatten(found)[1])
    with pytest.raises(fo.StructureError) as caught:
        tree.flatten_like(structure, found, "grads")
    assert str(caught.value).startswith("grads must have the structure of params: ")
    assert words in str(caught.value)


def test_a_branch_in_the_place_of_a_leaf_is_given_back_whole():
    """It is no tensor: whoever takes the leaf says so, and by its name."""
    assert tree.flatten_like(tree.flatten({"a": 1})[1], {"a": [2, 3]}, "it") == [[2, 3]]


def test_no_gap_where_a_branch_is_expected():
    """None is a leaf: it stands for a tensor, and never for a branch."""
    with pytest.raises(fo.StructureError):
        tree.flatten_like(tree.flatten({"a": [1, 2]})[1], {"a": None}, "grads")


@pytest.mark.parametrize(
    "values, length",
    [
        (torch.zeros(3), 3),
        ({"a": torch.zeros(2, 5), "b": [None, torch.zeros(2)]}, 2),
        ([torch.zeros(0, 4)], 0),
    ],
)
def test_leading_axis(values: Any, length: int):
    assert tree.leading_axis(values, "values") == length


# What an optimizer makes of them -------------------------------------------------------


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("opt", [fo.sgd(momentum=0.9), fo.adam()])
def test_an_optimizer_takes_any_tree(name: str, opt: fo.Optimizer):
    structure = tree.flatten(TREES[name][0])[1]
    gaps = [leaf is None for leaf in TREES[name][1]]
    params = tree.unflatten(structure, [None if gap else torch.ones(2) for gap in gaps])
    state = opt.init(params)
    assert state["step"].tolist() == [0] * len(gaps)
    new, state = opt.update(params, state, params)
    assert state["step"].tolist() == [0 if gap else 1 for gap in gaps]
    for tree_of in (new, *(state[slot] for slot in state.keys() - {"step"})):
        leaves = tree.flatten_like(structure, tree_of, "result")
        assert [leaf is None for leaf in leaves] == gaps
    assert all((leaf < 1).all() for leaf in tree.leaves(new) if leaf is not None)


def test_a_tied_leaf_is_two_leaves():
    """One tensor in two places has two states; each place gets its own new value."""
    shared = torch.ones(2)
    params = {"embed": shared, "head": shared}
    grads = {"embed": torch.ones(2), "head": -torch.ones(2)}
    opt = fo.sgd(lr=0.5, momentum=0.9)
    new, state = opt.update(grads, opt.init(params), params)
    assert torch.equal(new["embed"], shared - 0.5)
    assert torch.equal(new["head"], shared + 0.5)
    buffers = state["momentum_buffer"]
    assert buffers["embed"].data_ptr() != buffers["head"].data_ptr()
