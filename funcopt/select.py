"""One value per leaf, from a prefix tree or from globs over the leaves' names."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from funcopt import tree
from funcopt.errors import HyperparameterError, StructureError


class ByName:
    """Values chosen by a leaf's name; made by `by_name`."""

    __slots__ = ("default", "patterns")

    def __init__(self, patterns: Mapping[str, Any], default: Any) -> None:
        self.patterns = dict(patterns)
        self.default = default

    def __repr__(self) -> str:
        return f"by_name({self.patterns!r}, default={self.default!r})"

    def per_leaf(self, structure: tree.Structure, what: str) -> list[Any]:
        """The value of the first pattern that fits each leaf, else the default."""
        for value in (*self.patterns.values(), self.default):
            if _children(value) is not None:
                raise HyperparameterError(
                    f"{what}: by_name takes one value for each glob, not {value!r}"
                )
        names, globs = tree.paths(structure), tuple(self.patterns)
        choice = _first_fit(globs, names)
        for glob in globs:
            if not _any_fits(glob, names):
                raise HyperparameterError(
                    f"{what}: the glob '{glob}' fits none of the parameters "
                    f"{tree.some(list(names))}"
                )
        return [self.default if g is None else self.patterns[g] for g in choice]


class ByLabel(dict[str, Any]):
    """The values of `partition`'s optimizers, by the labels that its leaves have."""

    def __init__(self, labels: Any) -> None:
        super().__init__()
        self.labels = labels

    def per_leaf(self, structure: tree.Structure, what: str) -> list[Any]:
        """What the optimizer has that steps each leaf; None where it has no such."""
        names = per_leaf(self.labels, structure, "labels")
        columns = {x: per_leaf(self.get(x), structure, what) for x in {*names}}
        return [columns[name][i] for i, name in enumerate(names)]


def _first_fit(globs: tuple[str, ...], names: tuple[str, ...]) -> list[str | None]:
    """The first glob that fits each name."""
    return [next((g for g in globs if fnmatchcase(n, g)), None) for n in names]


def _any_fits(glob: str, names: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, glob) for name in names)


# Names are constants of a compiled graph: Dynamo calls these, for it cannot trace `re`.
# What torch.compiler.assume_constant_result does, without importing Dynamo.
for _constant in (_first_fit, _any_fits):
    vars(_constant)["_dynamo_marked_constant"] = True


def by_name(patterns: Mapping[str, Any], *, default: Any) -> ByName:
    """Select a value for each leaf by globs over its path.

    A leaf's path is the keys that lead to it joined by dots (``"layers.0.bias"``); the
    first pattern that fits gives the value, and a leaf that none fits takes ``default``.

    Args:
        patterns: glob (``*``, ``?``, ``[...]``; case counts) → value. A value is a
            float, a tensor, a `Schedule`, in `unroll` a `per_step`; for `partition` a
            label; for `freeze` a bool.
        default: value of the leaves that no pattern fits.

    Returns:
        A selector, to be given wherever a hyperparameter is taken, also for a branch of
        a tree of them; the names are then those within the branch.

    Raises:
        HyperparameterError: at use, when a pattern fits no leaf at all, or has a tree.

    Source:
        The globs are those of Python's ``fnmatch``.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.sgd(lr=fo.by_name({"*.bias": 0.0}, default=0.5))
        >>> params = {"layer": {"weight": torch.ones(2), "bias": torch.ones(2)}}
        >>> params, _ = opt.update(params, opt.init(params), params)
        >>> params["layer"]["weight"], params["layer"]["bias"]
        (tensor([0.5000, 0.5000]), tensor([1., 1.]))
    """
    return ByName(patterns, default)


# A selector is a tree of its values: all that is done to the tensors of a tree of
# hyperparameters (batched, differentiated, taken step by step) is done to those in it.
tree.register(
    ByName,
    lambda given: ([*given.patterns.values(), given.default], tuple(given.patterns)),
    lambda globs, found: ByName(dict(zip(globs, found := [*found])), found[-1]),
)


def copied(value: Any) -> Any:
    """The same selector or tree in containers of its own, which nobody else changes."""
    return tree.map(lambda x: x, value)


def per_leaf(value: Any, structure: tree.Structure, what: str) -> list[Any]:
    """``value`` spread over the leaves: a tree that is a prefix, or has selectors."""
    if isinstance(value, float):  # the usual case needs no walk
        return [value] * structure.num_leaves
    spread: list[Any] = []
    _spread(value, structure, what, "", spread)
    return spread


def _spread(
    value: Any, structure: tree.Structure, what: str, at: str, out: list[Any]
) -> None:
    """Walk values and params together, so that a misfit is named on both sides."""
    if isinstance(value, ByName | ByLabel):
        out.extend(value.per_leaf(structure, f"{what} at '{at}'" if at else what))
        return
    children = _children(value)
    if children is None:
        out.extend([value] * structure.num_leaves)
        return
    here, given = at or "<root>", list(children)
    if structure.is_leaf():
        raise StructureError(
            f"{what}: the tree of values has '{_join(at, given[:1])}' where params has "
            f"a leaf '{here}'; a value tree must be a prefix of params"
        )
    keys = structure.entries()
    if set(keys) != set(given):
        lacking = [key for key in keys if key not in children] or keys
        unknown = [key for key in given if key not in keys] or given
        raise StructureError(
            f"{what}: the tree of values does not fit params at '{here}': params has "
            f"{_named(at, lacking)}, the values have {_named(at, unknown)}; a value tree "
            "must be a prefix of params (one value for a whole branch, or one for each "
            "child)"
        )
    for key, child in zip(keys, structure.children()):
        _spread(children[key], child, what, _join(at, [key]), out)


def _children(value: Any) -> Mapping[Any, Any] | None:
    """What a container holds, by its keys there; None of anything else."""
    return value if isinstance(value, Mapping) else tree.children(value)


def _named(at: str, keys: list[Any]) -> str:
    return tree.some([_join(at, [key]) for key in keys]) or "no entry"


def _join(at: str, keys: list[Any]) -> str:
    return ".".join([*([at] if at else []), *(str(key) for key in keys)])
