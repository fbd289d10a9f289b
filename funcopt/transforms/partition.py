"""Different rules for different leaves; none for frozen ones."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from funcopt import select, tree
from funcopt.checks import check_keys
from funcopt.errors import HyperparameterError, HyperparameterTypeError
from funcopt.execution import donation
from funcopt.hyper import unknown
from funcopt.optimizer import Optimizer, check_optimizer
from funcopt.types import HyperValue, State, Tree


def partition(optimizers: Mapping[str, Optimizer], labels: Any) -> Optimizer:
    """One Optimizer that gives every leaf to the optimizer its label names.

    Args:
        optimizers: label → Optimizer.
        labels: a label for each leaf: a tree of labels that is a prefix of params, or a
            `by_name` selector.

    Returns:
        An Optimizer; its state is a dict label → that optimizer's state, in which the
        leaves of the others are ``None``. Hyperparameters given to ``update`` go to
        every optimizer that has them; so does a ``loss_fn`` of the whole tree, in which
        the leaves of the others stay as they were.

    Raises:
        HyperparameterTypeError: what is no dict of Optimizers.
        HyperparameterError: at ``init`` and ``update``, for a label without optimizer.
        UnknownHyperparameterError: by ``update``, when no optimizer has that name.
        StructureError: labels that are no prefix of params; the state of another tree.

    Source:
        The idea is optax's ``partition`` (DeepMind, 2020).

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.partition(
        ...     {"matrix": fo.sgd(lr=0.5), "rest": fo.adam(lr=0.1)},
        ...     fo.by_name({"*weight": "matrix"}, default="rest"))
        >>> params = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
        >>> new, state = opt.update(params, opt.init(params), params)
        >>> new["bias"], sorted(state["rest"])
        (tensor([0.9000, 0.9000]), ['exp_avg', 'exp_avg_sq', 'step'])
    """
    if not isinstance(optimizers, Mapping):
        raise HyperparameterTypeError(
            "partition takes a dict, label → Optimizer, and which leaf has which label; "
            f"not {optimizers!r}"
        )
    optimizers, labels = dict(optimizers), select.copied(labels)
    for label, opt in optimizers.items():
        check_optimizer(opt, f"partition's {label!r}")

    hyper: dict[str, HyperValue] = {}
    for label, opt in optimizers.items():
        for name, value in opt.hyper.items():
            hyper.setdefault(name, select.ByLabel(labels))[label] = value
    its = _Partition(optimizers, labels, hyper)
    return Optimizer(
        its.init, its.update, "partition", hyper, eval_params=its.eval_params
    )


@dataclass(frozen=True, eq=False)
class _Partition:
    """The functions of `partition`."""

    optimizers: Mapping[str, Optimizer]
    labels: Any
    hyper: Mapping[str, HyperValue]

    def _split(self, structure: tree.Structure) -> dict[str, list[bool]]:
        names = select.per_leaf(self.labels, structure, "labels")
        for path, name in zip(tree.paths(structure), names):
            if name not in self.optimizers:
                raise HyperparameterError(
                    f"'{path}' has the label {name!r}, but the optimizers are "
                    f"{sorted(self.optimizers)}"
                )
        return {label: [name == label for name in names] for label in self.optimizers}

    def _shares(self, overrides: Mapping[str, HyperValue]) -> dict[str, Any]:
        """Of the hyperparameters given, those of each optimizer."""
        for name in overrides:
            if not any(name in opt.hyper for opt in self.optimizers.values()):
                raise unknown(name, self.hyper, "partition")
        return {
            label: {k: v for k, v in overrides.items() if k in opt.hyper}
            for label, opt in self.optimizers.items()
        }

    def init(self, params: Tree) -> State:
        leaves, structure = tree.flatten(params)
        return {
            label: self.optimizers[label].init(_keep(leaves, structure, mine))
            for label, mine in self._split(structure).items()
        }

    def update(
        self,
        grads: Tree,
        state: State,
        params: Tree,
        *,
        donate: bool = False,
        execution: str | None = None,
        **overrides: HyperValue,
    ) -> tuple[Tree, State]:
        given = self._shares(overrides)
        leaves, structure = tree.flatten(params)
        gradients = tree.flatten_like(structure, grads, "grads")
        check_keys(state, self.optimizers, "partition")
        if donate:  # for all parts: one may not step before another may not be written
            donation.check_trees(gradients, leaves, state, others=overrides)
        start = leaves
        if donate and overrides.get("loss_fn"):  # a part is not to see another's step
            start = [x if x is None else x.clone() for x in leaves]
        merged, new_state = list(leaves), {}
        for label, mine in self._split(structure).items():
            its = _with_loss_of_part(given[label], start, structure, mine)
            its_params, new_state[label] = self.optimizers[label].update(
                _keep(gradients, structure, mine),
                state[label],
                _keep(leaves, structure, mine),
                donate=donate,
                execution=execution,
                **its,
            )
            for i, leaf in enumerate(tree.leaves(its_params)):
                if mine[i]:
                    merged[i] = leaf
        return tree.unflatten(structure, merged), new_state

    def eval_params(self, state: State, params: Tree, **overrides: HyperValue) -> Tree:
        check_keys(state, self.optimizers, "partition")
        given = self._shares(overrides)
        leaves, structure = tree.flatten(params)
        merged = list(leaves)
        for label, mine in self._split(structure).items():
            its = _keep(leaves, structure, mine)
            its = self.optimizers[label].eval_params(state[label], its, **given[label])
            found = tree.leaves(its)
            merged = [x if keep else y for x, y, keep in zip(found, merged, mine)]
        return tree.unflatten(structure, merged)


def freeze(opt: Optimizer, frozen: Any) -> Optimizer:
    """``opt`` for the leaves that are not frozen; those stay, and keep no state.

    Args:
        opt: the Optimizer of the other leaves.
        frozen: a bool for each leaf: a tree of bools that is a prefix of params, or a
            `by_name` selector.

    Returns:
        An Optimizer with ``opt``'s state, in which frozen leaves are ``None``. The
        gradient of a frozen leaf may be ``None`` or anything of its shape: it is not
        read.

    Raises:
        HyperparameterError: at ``init`` and ``update``, for a value that is no bool.
        StructureError: ``frozen`` is no prefix of params.

    Source:
        funcopt.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.freeze(fo.sgd(lr=1.0), {"body": True, "head": False})
        >>> params = {"body": torch.ones(1), "head": torch.ones(1)}
        >>> opt.update(params, opt.init(params), params)[0]
        {'body': tensor([1.]), 'head': tensor([0.])}
    """
    check_optimizer(opt, "freeze")
    its = _Freeze(opt, select.copied(frozen))
    name = f"freeze({opt.name})"
    return Optimizer(its.init, its.update, name, opt.hyper, eval_params=its.eval_params)


@dataclass(frozen=True, eq=False)
class _Freeze:
    """The functions of `freeze`."""

    opt: Optimizer
    frozen: Any

    def _active(self, structure: tree.Structure) -> list[bool]:
        flags = select.per_leaf(self.frozen, structure, "frozen")
        for path, flag in zip(tree.paths(structure), flags):
            if not isinstance(flag, bool):
                raise HyperparameterError(
                    f"freeze wants True or False for '{path}', got {flag!r}"
                )
        return [not flag for flag in flags]

    def init(self, params: Tree) -> State:
        leaves, structure = tree.flatten(params)
        return self.opt.init(_keep(leaves, structure, self._active(structure)))

    def update(
        self,
        grads: Tree,
        state: State,
        params: Tree,
        *,
        donate: bool = False,
        execution: str | None = None,
        **overrides: HyperValue,
    ) -> tuple[Tree, State]:
        leaves, structure = tree.flatten(params)
        gradients = tree.flatten_like(structure, grads, "grads")
        moving = self._active(structure)
        its_params, state = self.opt.update(
            _keep(gradients, structure, moving),
            state,
            _keep(leaves, structure, moving),
            donate=donate,
            execution=execution,
            **_with_loss_of_part(overrides, leaves, structure, moving),
        )
        merged = [
            new if moves else old
            for new, old, moves in zip(tree.leaves(its_params), leaves, moving)
        ]
        return tree.unflatten(structure, merged), state

    def eval_params(self, state: State, params: Tree, **overrides: HyperValue) -> Tree:
        leaves, structure = tree.flatten(params)
        moving = self._active(structure)
        found = self.opt.eval_params(state, _keep(leaves, structure, moving), **overrides)
        rows = zip(tree.leaves(found), leaves, moving)
        return tree.unflatten(structure, [x if moves else p for x, p, moves in rows])


def _keep(leaves: list[Any], structure: tree.Structure, mine: list[bool]) -> Tree:
    """The tree with ``None`` for every leaf that is another's."""
    return tree.unflatten(
        structure, [x if keep else None for x, keep in zip(leaves, mine)]
    )


def _with_loss_of_part(
    given: dict[str, Any], leaves: list[Any], structure: tree.Structure, mine: list[bool]
) -> dict[str, Any]:
    """What is given, its ``loss_fn`` as a function of the leaves that are ``mine``."""
    whole: Callable[[Tree], Any] | None = given.get("loss_fn")
    if not callable(whole):
        return given

    def of_part(part: Tree) -> Any:
        rows = zip(tree.leaves(part), leaves, mine, strict=True)
        return whole(tree.unflatten(structure, [x if keep else p for x, p, keep in rows]))

    return {**given, "loss_fn": of_part}
