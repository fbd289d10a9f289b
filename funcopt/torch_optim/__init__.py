"""torch.optim's classes, and one for every other optimizer, with funcopt's steps.

A class is made when it is first asked for.
"""

from typing import Any

from funcopt.torch_optim.adapter import Adapter
from funcopt.torch_optim.generated import FACTORIES, class_of
from funcopt.torch_optim.lbfgs import LBFGS

__all__ = ["LBFGS", "Adapter", *FACTORIES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in FACTORIES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return class_of(name)


def __dir__() -> list[str]:
    return __all__
