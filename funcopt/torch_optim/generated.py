"""A class for each optimizer of the registry."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from funcopt import optimizers
from funcopt.torch_optim.adapter import Adapter
from funcopt.torch_optim.flags import EXECUTION, Flags
from funcopt.torch_optim.layout import StateLayout

#: how torch.optim writes the state of what differs from most
_LAYOUTS = {
    "adagrad": StateLayout(early=True),
    "sgd": StateLayout(counts=""),
    "muon": StateLayout(counts=""),
    "sparse_adam": StateLayout(counts="int"),
    "rmsprop": StateLayout(order=("square_avg", "momentum_buffer", "grad_avg")),
}

#: names that are not their parts with capitals
_NAMES = {
    "adabelief": "AdaBelief",
    "ademamix": "AdEMAMix",
    "adopt": "ADOPT",
    "amsgrad": "AMSGrad",
    "dog": "DoG",
    "lamb": "LAMB",
    "lars": "LARS",
    "madgrad": "MADGRAD",
    "mars_adamw": "MARSAdamW",
    "novograd": "NovoGrad",
    "schedule_free_adamw": "ScheduleFreeAdamW",
    "schedule_free_sgd": "ScheduleFreeSGD",
    "sgld": "SGLD",
    "signsgd": "SignSGD",
    "soap": "SOAP",
}

_TORCH = {
    name.lower(): cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
}


@cache
def class_of(title: str) -> type[Adapter]:
    """The class of this name."""
    name = FACTORIES[title]
    factory = getattr(optimizers, name)
    flags = Flags(factory)
    members: dict[str, Any] = {
        "__module__": "funcopt.torch_optim",
        "__doc__": f"An optimizer whose steps are those of `funcopt.{name}`.",
        "flags": flags,
    }
    twin = _TORCH.get(title.lower())
    if twin is not None:
        # Its constructor, with its signature and its errors; its keys of groups.
        members["layout"] = _LAYOUTS.get(name, StateLayout())
        return type(title, (Adapter, twin), members)
    members["layout"] = StateLayout(own=True)
    members["__init__"] = _constructor(flags)
    return type(title, (Adapter,), members)


def _constructor(flags: Flags) -> Callable[..., None]:
    """``__init__`` with the factory's arguments, and the flags of torch.optim."""
    kinds = inspect.Parameter
    first = [kinds(name, kinds.POSITIONAL_OR_KEYWORD) for name in ("self", "params")]
    more = [
        kinds(name, kinds.KEYWORD_ONLY, default=default)
        for name, default in EXECUTION.items()
    ]
    signature = flags.signature.replace(
        parameters=[*first, *flags.signature.parameters.values(), *more],
        return_annotation=None,
    )

    def __init__(self: Adapter, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        _, params, *_ = given.args
        values = {k: v for k, v in given.arguments.items() if k not in ("self", "params")}
        if values["fused"] and (values["differentiable"] or values["foreach"]):
            other = "differentiable" if values["differentiable"] else "foreach"
            raise RuntimeError(f"`fused` and `{other}` cannot be `True` together.")
        super(Adapter, self).__init__(params, values)

    __init__.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    return __init__


def _title(name: str) -> str:
    """The class that is named for a factory."""
    twin = _TORCH.get(name.replace("_", ""))
    if twin is not None:
        return twin.__name__
    return _NAMES.get(name) or "".join(map(str.capitalize, name.split("_")))


#: by the name of the class
FACTORIES = {_title(name): name for name in optimizers.__all__ if name != "lbfgs"}
