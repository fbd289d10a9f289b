"""One Optimizer from an optimizer and what is done before and after it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from funcopt import tree
from funcopt.checks import check_keys
from funcopt.errors import HyperparameterTypeError
from funcopt.execution import concrete, donation
from funcopt.optimizer import Optimizer, from_spec
from funcopt.transforms.stage import GradientStage, ParameterStage, Stage, joined
from funcopt.types import HyperValue, State, Tensor, Tree


def chain(*links: Stage | Optimizer) -> Optimizer:
    """Stages for gradients, one optimizer, stages for parameters: one Optimizer.

    .. math::
        g' = s_k(\\dots s_1(g)), \\qquad p' = r_m(\\dots r_1(\\text{step}(g', p)))

    A stage sees the whole tree, not one group of it: `clip_by_global_norm` before a
    `partition` clips by the norm of all gradients.

    Args:
        links: gradient stages (`clip_by_global_norm`, `clip_by_value`,
            `clip_by_block_rms`, `zero_nans`, `normalize`, `centralize`, `add_noise`,
            `add_decayed_weights`), the optimizer, parameter stages (`project`, `ema`,
            `polyak`, `lookahead`, `trust_region`), in the order in which they act.

    Returns:
        An Optimizer with the hyperparameters of all its links; where a stage's name for
        one is taken, the stage's own stands before it. An optimizer with a rule becomes
        one rule with its stages, which runs and is differentiated as any other, and has
        one flat state. Others (a `partition`) keep theirs under ``"optimizer"``, the
        stages under ``"gradient_stages"`` and ``"parameter_stages"``.

    Raises:
        HyperparameterTypeError: a link that is none, no optimizer or two, a gradient
            stage after it or a parameter stage before it, a stage that `sparse_adam`
            cannot have.

    Source:
        The idea is optax's ``chain`` (DeepMind, 2020), with the order checked.

    Example:
        >>> import torch, funcopt as fo
        >>> opt = fo.chain(fo.clip_by_global_norm(1.0), fo.sgd(lr=1.0), fo.ema(0.5))
        >>> p = torch.zeros(2)
        >>> p, state = opt.update(torch.tensor([3.0, 4.0]), opt.init(p), p)
        >>> p, opt.eval_params(state, p)
        (tensor([-0.6000, -0.8000]), tensor([-0.6000, -0.8000]))
    """
    before, opt, after = _sorted(links)
    name = f"chain({', '.join(_name(link) for link in links)})"
    if opt.spec:
        return from_spec(joined(before, opt.spec, after, name))
    return _in_turn(before, opt, after, name)


def _sorted(links: Any) -> tuple[list[Any], Optimizer, list[Any]]:
    """The specs before the optimizer, the optimizer, those after it."""
    found = [i for i, link in enumerate(links) if isinstance(link, Optimizer)]
    if len(found) != 1:
        raise HyperparameterTypeError(
            f"chain takes exactly one optimizer, got {len(found)}; for different leaves "
            "use fo.partition"
        )
    (at,) = found
    kinds = [GradientStage] * at + [Optimizer] + [ParameterStage] * (len(links) - at - 1)
    for i, (link, kind) in enumerate(zip(links, kinds)):
        if isinstance(link, kind):
            continue
        if isinstance(link, Stage):
            side = "before" if isinstance(link, GradientStage) else "after"
            raise HyperparameterTypeError(
                f"chain: {link!r} acts {side} the optimizer, so it must stand there"
            )
        raise HyperparameterTypeError(
            f"chain: link {i} is {link!r}, no stage; a stage is made by calling its "
            "function, as in fo.clip_by_global_norm(1.0)"
        )
    return [s.spec for s in links[:at]], links[at], [s.spec for s in links[at + 1 :]]


def _name(link: Any) -> str:
    return link.name if isinstance(link, Optimizer) else link.spec.name


def _in_turn(before: list[Any], opt: Optimizer, after: list[Any], name: str) -> Optimizer:
    """The links one by one, for an optimizer that is more than one rule."""
    links = {_MAIN: opt}
    hyper: dict[str, HyperValue] = dict(opt.hyper)
    for key, specs, sides in (
        ("gradient_stages", before, (before, [])),
        ("parameter_stages", after, ([], after)),
    ):
        if specs:
            links[key] = from_spec(joined(sides[0], None, sides[1], name, hyper))
            hyper |= links[key].hyper

    owner = {name: key for key, link in links.items() for name in link.hyper}
    its = _InTurn(name, links, owner)
    return Optimizer(its.init, its.update, name, hyper, eval_params=its.eval_params)


#: the state's key of a chain's optimizer
_MAIN = "optimizer"


@dataclass(frozen=True, eq=False)
class _InTurn:
    """The functions of a chain whose links are called one by one."""

    name: str
    links: Mapping[str, Optimizer]
    #: hyperparameter → the link that has it; what no link has is the optimizer's to know
    #: (lbfgs has a loss_fn), or to refuse
    owner: Mapping[str, str]

    def init(self, params: Tree) -> State:
        return {key: link.init(params) for key, link in self.links.items()}

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
        check_keys(state, self.links, self.name)
        if donate:
            donation.check_trees(grads, state, params, others=overrides)
        new_state: State = {}

        def run(key: str, values: Tree, given: Tree) -> Tree:
            """A link's step, of the leaves that are ``given``."""
            its = {k: v for k, v in overrides.items() if self.owner.get(k, _MAIN) == key}
            made, new_state[key] = self.links[key].update(
                _where_given(values, given, params),
                state[key],
                params,
                execution=execution,
                **its,
            )
            return made

        new = grads
        if "gradient_stages" in self.links:
            new = run("gradient_stages", new, grads)
        new = run(_MAIN, new, grads)
        if "parameter_stages" in self.links:
            new = run("parameter_stages", new, _stepped(grads, new, params))
        new_state = {key: new_state[key] for key in self.links}
        if donate:
            return donation.write_over(params, new), donation.write_over(state, new_state)
        return new, new_state

    def eval_params(self, state: State, params: Tree, **overrides: HyperValue) -> Tree:
        check_keys(state, self.links, self.name)
        stages = self.links.get("parameter_stages")
        averages = stages and stages.spec and stages.spec.evaluated
        last = "parameter_stages" if averages else _MAIN
        given = {k: v for k, v in overrides.items() if self.owner.get(k, last) == last}
        return self.links[last].eval_params(state[last], params, **given)


def _where_given(values: Tree, given: Tree, params: Tree) -> Tree:
    """``values`` with ``None`` where nothing is given: that leaf does not step."""
    leaves, structure = tree.flatten(values)
    marks = tree.flatten_like(tree.flatten(params)[1], given, "grads")
    return tree.unflatten(
        structure, [x if g is not None else None for x, g in zip(leaves, marks)]
    )


def _stepped(grads: Tree, new: Tree, params: Tree) -> Tree:
    """``grads``, and what moved without one: `accumulate` goes by earlier ones, too."""

    def mark(p: Tensor, x: Tensor, g: Any) -> Any:
        return x if g is None and _moved(x, p) else g

    return tree.map(mark, params, new, grads)


def _moved(x: Tensor, p: Tensor) -> bool:
    """Whether it is another value; another tensor, where values cannot be read."""
    if x is p:
        return False
    same = concrete.peek(x == p)  # a transform adds zeros, a master is rounded again
    return same is None or not bool(same.all())
