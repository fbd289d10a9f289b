"""The stateful adapter: a torch.optim.Optimizer whose steps are funcopt's."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.autograd import _profiler_enabled  # pyright: ignore
from torch.optim import Optimizer
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

from funcopt.torch_optim import batch
from funcopt.torch_optim.flags import Flags
from funcopt.torch_optim.layout import Layout
from funcopt.torch_optim.repeat import Repeat, repeat

Closure = Callable[[], Any] | None


class Adapter(Optimizer):
    """What the classes of `funcopt.torch_optim` have in common.

    ``state[p]`` holds the tensors, ``param_groups`` the numbers, as in torch.optim; a
    step reads both, and writes over parameters and state.
    """

    flags: ClassVar[Flags]  #: the keyword arguments of the factory behind the class
    layout: ClassVar[Layout]

    _repeat: Repeat | None = None

    def _step(self, closure: Closure = None, **data: Any) -> Any:
        """Perform a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss, which is returned.
            data: a value for each parameter, in the order of the groups, for numbers of
                the rule that are data of a step (``hessian`` of `SophiaG`).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults.get("differentiable", False)):
            if torch.compiler.is_compiling():
                torch._dynamo.graph_break()
            if not self._overflowed():
                self._advance(data)
        return loss

    def _advance(self, data: dict[str, Any]) -> None:
        groups, state = self.param_groups, self.state
        if not data and self._repeat is not None and self._repeat.run(groups, state):
            return
        self._repeat = None
        differentiable = self.defaults.get("differentiable", False)
        name = type(self).__name__
        params = [id(p) for group in groups for p in group["params"]]
        given = {key: dict(zip(params, column)) for key, column in data.items()}
        batches = batch.gather(groups, state, self.flags, self.layout, name)
        for each in batches:
            batch.step(each, given, differentiable)
        if not data and not differentiable:
            self._repeat = repeat(groups, state, batches, self.flags)

    def _overflowed(self) -> bool:
        """Undo a GradScaler's scale where it leaves that to the step; or skip it."""
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.item():
            return True
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.div_(scale)
        return False

    _hooked = Optimizer.profile_hook_step(_step)

    @functools.wraps(_step)
    def step(*args: Any, **kwargs: Any) -> Any:
        self = args[0]
        plain = not (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or _profiler_enabled()
        )
        return (self._step if plain else self._hooked)(*args[1:], **kwargs)

    # torch would do at every step what is done here where there is a hook
    vars(step)["hooked"] = True
