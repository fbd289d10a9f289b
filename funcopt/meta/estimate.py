"""What every estimator gives, and which meta-parameters each of them can see."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from funcopt import tree
from funcopt.checks import check_floats
from funcopt.errors import (
    GradientLostError,
    HyperparameterTypeError,
    MetaParameterError,
    StructureError,
)
from funcopt.execution import levels
from funcopt.meta.problem import Carry, Problem, data_of, stands_at
from funcopt.types import Tensor, Tree


class Estimate(NamedTuple):
    """What an estimator of ``fo.meta`` gives: numbers without a graph."""

    value: Tensor  #: 0-d, the objective over the steps that were made
    grads: Tree  #: the estimate of the objective's derivative, like eta
    diagnostics: dict[str, Any]  #: what else is known; each estimator says
    carry: Carry  #: where the inner loop stands; pass it on, or save it

    def without_influence(self) -> list[str]:
        """Names of the leaves of eta whose gradient is 0 in every element.

        Such a leaf does not reach the objective at all, in all likelihood: a loss that
        has no use for it, a hyperparameter that another one switches off. Reads the
        gradients, and so waits for an accelerator.
        """
        leaves, structure = tree.flatten(self.grads)
        return [
            name
            for name, g in zip(tree.paths(structure), leaves)
            if g is not None and not bool(g.any())
        ]


#: the kinds of meta-parameters: the key of eta under which they stand, and what they are
KINDS: Mapping[str, tuple[str, str]] = {
    "init": ("init", "initialisation"),
    "rates": ("hyper", "lr, betas, momentum"),
    "decay": ("hyper", "decoupled weight decay"),
    "rule": ("hyper", "weights of a learned rule"),
    "meta": ("meta", "loss and data weights"),
}

EXACT, BIASED, SMOOTHED = "exact", "biased", "unbiased, smoothed"
_ALL, _HYPER = tuple(KINDS), ("rates", "decay", "rule")

#: what each estimator gives for each kind that it sees; a kind that is not there it
#: refuses. The checks, the tests and the table of docs/estimators.md are made from this.
SEES: Mapping[str, Mapping[str, str]] = {
    "reverse": dict.fromkeys(_ALL, EXACT),
    "mixed": dict.fromkeys(_ALL, EXACT),
    "forward": dict.fromkeys(_ALL, EXACT),
    "truncated": {
        "init": "exact, first window only",
        **dict.fromkeys((*_HYPER, "meta"), BIASED),
    },
    "first_order": dict.fromkeys(("init", *_HYPER), BIASED),
    "reptile_gradient": {"init": BIASED},
    "implicit": {"meta": "exact at convergence"},
    "weight_update_implicit": dict.fromkeys((*_HYPER, "meta"), BIASED),
    "es": dict.fromkeys(_ALL, SMOOTHED),
    "pes": dict.fromkeys(_ALL, SMOOTHED),
    "es_single": dict.fromkeys(_ALL, SMOOTHED),
    "hypergradient_descent": dict.fromkeys((*_HYPER, "meta"), "greedy"),
}

_WAY = "it is the way from the start to the end, which is a direction for the start alone"
#: why an estimator is blind to what stands under a key
_WHY: Mapping[tuple[str, str], str] = {
    ("first_order", "meta"): "it takes each inner gradient, through which alone the "
    "inner loss's weights act, as a constant",
    ("reptile_gradient", "hyper"): _WAY,
    ("reptile_gradient", "meta"): _WAY,
    ("implicit", "hyper"): "a fixed point of the training does not move with the "
    "optimizer's settings",
    ("implicit", "init"): "a fixed point of the training does not depend on its start; "
    "put a proximal term to it in the inner loss, and the start in eta['meta'] (iMAML)",
    ("weight_update_implicit", "init"): "a fixed point of the training does not depend "
    "on its start",
    ("hypergradient_descent", "init"): "it looks back over one step only",
}


def keys_seen(name: str) -> list[str]:
    """The keys of eta that an estimator sees; what compares values alone sees all."""
    return sorted({KINDS[kind][0] for kind in SEES.get(name, KINDS)})


def check_eta(name: str, problem: Problem, eta: Tree, carry: Carry | None = None) -> None:
    """Raise for what is no eta, and for what the estimator ``name`` is blind to."""
    check_keys(eta, least=1)
    if not isinstance(eta.get("hyper", {}), Mapping):
        raise HyperparameterTypeError(
            "eta['hyper'] is a dict of names and values, as {'lr': torch.tensor(0.1)}, "
            f"not {type(eta['hyper']).__name__}"
        )
    check_floats(eta, "eta")
    check_no_level(name, [eta, carry, *data_of(problem)])
    seen = keys_seen(name)
    for key in sorted(eta):
        if key not in seen:
            others = [other for other in SEES if key in keys_seen(other)]
            raise MetaParameterError(
                f"{name} cannot see eta['{key}']: {_WHY[name, key]}. It sees "
                f"{_quoted(seen)}; {_quoted(others)} see '{key}'"
            )
    step = stands_at(problem, carry)
    if carry is None or not step:
        return
    if "init" in eta and _MEMORY.get(name) not in carry:
        raise MetaParameterError(
            f"{name} cannot see eta['init'] from step {step} on: the carry was "
            "cut from where training started. Leave 'init' out of eta until the carry "
            f"has come to the end, or use {_quoted([*_MEMORY])}, whose own carries "
            "remember"
        )
    if _MEMORY.get(name) not in carry:
        check_alone(name, carry)


def check_keys(eta: Tree, least: int = 0) -> None:
    """Raise for what is no dict, or has keys that no eta has, or too few."""
    keys = {key for key, _ in KINDS.values()}
    if not isinstance(eta, Mapping):
        raise HyperparameterTypeError(
            f"eta is a dict with any of the keys {_quoted(sorted(keys))}, not "
            f"{type(eta).__name__}"
        )
    if len(eta) < least or not keys >= eta.keys():
        raise MetaParameterError(
            f"eta has the keys {_quoted(list(eta)) or 'none'}; it takes any of "
            f"{_quoted(sorted(keys))}" + (", and one at least" if least else "")
        )


def check_alone(name: str, carry: Carry) -> None:
    """Raise where a carry stands for many trainings."""
    if not carry.keys().isdisjoint(_SWARMS):
        raise StructureError(
            f"{name} goes on from one training, and this carry holds a swarm of them; "
            "begin with carry=None, or with one by fo.meta.advance"
        )


def check_remembered(what: str, kept: Tree, eta: Tree) -> None:
    """Raise where the rows that a carry keeps, [N, ...], are not like this eta."""
    given, wanted = _leaves_of(kept, 1), _leaves_of(eta, 0)
    if given != wanted:
        raise StructureError(
            f"the carry's {what} are of another eta: it has {tree.some(given)}, and eta "
            f"now {tree.some(wanted)}. Go on with the eta that the carry was made with, "
            "or from the start"
        )


def _leaves_of(values: Tree, rows: int) -> list[str]:
    """The path of each tensor, and its shape if it has axes beside those of ``rows``."""
    found, structure = tree.flatten(values)
    return [
        f"{path} {[*x.shape[rows:]]}" if x.ndim > rows else path
        for path, x in zip(tree.paths(structure), found)
        if x is not None
    ]


def check_no_level(name: str, values: Tree) -> None:
    """Raise where torch.func follows any of these tensors."""
    followed = (
        isinstance(x, Tensor) and levels.is_transformed(x) for x in tree.leaves(values)
    )
    if any(followed):
        raise GradientLostError(
            f"{name} gives numbers without a graph, and torch.func asks for a "
            "derivative of them, which would be 0. Take grads as they are, or "
            "differentiate fo.unroll"
        )


#: by what the carry of some keeps how the state depends on eta
_MEMORY: Mapping[str, str] = {
    "forward": "tangents",
    "pes": "perturbation_sums",
    "es_single": "perturbations",
}
_SWARMS = {"perturbation_sums", "perturbations"}


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
