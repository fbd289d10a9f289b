"""An Optimizer with other values for its hyperparameters."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from funcopt import select
from funcopt.hyper import unknown
from funcopt.optimizer import Optimizer, check_optimizer, from_spec
from funcopt.types import HyperValue, State, Tree


def scheduled(opt: Optimizer, **hyper: HyperValue) -> Optimizer:
    """``opt`` with other values for the hyperparameters that are named.

    The same as to make ``opt`` with these values, for any Optimizer: also for one that
    somebody else made, and for one made of others, as `partition` is.

    Args:
        opt: the Optimizer.
        hyper: name → value: whatever ``opt.update`` takes for it, a `Schedule` above all.
            In a `partition` it goes to every part that has it.

    Returns:
        An Optimizer with ``opt``'s state. What a call of ``update`` gives comes first.

    Raises:
        UnknownHyperparameterError: a name that ``opt`` does not have.
        HyperparameterError, HyperparameterTypeError: a value that may not be; of an
            optimizer that is made of others, when it is used.

    Source:
        funcopt; optax's ``inject_hyperparams`` (DeepMind, 2020) makes the factory anew.

    Example:
        >>> import torch, funcopt as fo
        >>> halves = fo.schedules.exponential(1.0, gamma=0.5)
        >>> opt = fo.scheduled(fo.sgd(), lr=halves)
        >>> p, state = torch.zeros(1), opt.init(torch.zeros(1))
        >>> for _ in range(3):
        ...     p, state = opt.update(torch.ones(1), state, p)
        >>> p                                                     # -(1 + 1/2 + 1/4)
        tensor([-1.7500])
    """
    check_optimizer(opt, "scheduled")
    for name in hyper:
        if name not in opt.hyper:
            raise unknown(name, opt.hyper, opt.name)
    # A copy: what the caller does to his dict later is not this optimizer's affair.
    hyper = {name: select.copied(value) for name, value in hyper.items()}
    if opt.spec is not None:  # one rule, whose declarations hold the values
        declared = {
            name: replace(value, value=hyper.get(name, value.value))
            for name, value in opt.spec.hyper.items()
        }
        return from_spec(replace(opt.spec, hyper=declared))
    its = _Scheduled(opt, hyper)
    return replace(
        opt,
        update=its.update,
        eval_params=its.eval_params,
        name=f"scheduled({opt.name})",
        hyper={**opt.hyper, **hyper},
    )


@dataclass(frozen=True, eq=False)
class _Scheduled:
    """The functions of `scheduled`, for an optimizer that is made of others."""

    opt: Optimizer
    hyper: Mapping[str, HyperValue]

    def update(
        self, grads: Tree, state: State, params: Tree, **given: HyperValue
    ) -> tuple[Tree, State]:
        return self.opt.update(grads, state, params, **{**self.hyper, **given})

    def eval_params(self, state: State, params: Tree, **given: HyperValue) -> Tree:
        return self.opt.eval_params(state, params, **{**self.hyper, **given})
