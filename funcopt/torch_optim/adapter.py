"""The stateful adapter: a torch.optim.Optimizer whose steps are funcopt's."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch._compile import _disable_dynamo
from torch.autograd import _profiler_enabled  # pyright: ignore
from torch.optim import Optimizer
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

from funcopt.errors import (
    ExecutionError,
    HyperparameterError,
    HyperparameterTypeError,
)
from funcopt.execution import autocast, own_dtype
from funcopt.hyper import unknown
from funcopt.torch_optim import batch, checkpoint
from funcopt.torch_optim import functional as functions
from funcopt.torch_optim.cached_step import CachedStep, cached
from funcopt.torch_optim.flags import Flags, row
from funcopt.torch_optim.layout import StateLayout
from funcopt.types import State, Tensor, Tree

Closure = Callable[[], Any] | None


# Parameters may have gradients in turn: those of two networks, or of some experts.
_MOST_PLANS = 4


class Adapter(Optimizer):
    """What the classes of `funcopt.torch_optim` have in common.

    ``state[p]`` holds the tensors, ``param_groups`` the numbers, as in torch.optim; a
    step reads both, and writes over parameters and state.
    """

    flags: ClassVar[Flags]  #: the keyword arguments of the factory behind the class
    layout: ClassVar[StateLayout] = StateLayout()

    _cached: tuple[CachedStep, ...] = ()  # the last one used first

    def functional(self) -> tuple[functions.Optimizer, Tree, State]:
        """The optimizer with its groups, and copies of its parameters and their state.

        Returns:
            ``(opt, params, state)``, as `funcopt.from_torch` gives them.
        """
        groups, own = self.param_groups, self.flags
        return functions.extract(groups, self.state, own, self.layout)

    def load(self, params: Tree, state: State) -> None:
        """Go on from what steps made of `functional`.

        Args:
            params: the tree that `functional` gave, after any number of updates; written
                over the parameters, which stay the same tensors.
            state: the functional state that belongs to it.

        Raises:
            StructureError: a tree of other parameters, or another optimizer's state.
        """
        groups, own = self.param_groups, self.flags
        functions.restore(params, state, groups, self.state, own, self.layout)

    def named_state_dict(self) -> dict[str, Any]:
        """`state_dict` with the parameters' names in place of their numbers.

        `load_state_dict` takes it, too, whatever the order of the parameters.

        Raises:
            CheckpointError: the parameters have no names, or two have the same.
        """
        return checkpoint.by_name(self.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class, or of torch.optim's of the same name.

        Args:
            state_dict: from ``state_dict`` or `named_state_dict`. Where it and the
                optimizer have names, parameters are matched by them, else by position.
                Its tensors are copied, and cast as torch.optim does.

        Raises:
            CheckpointError: it is another optimizer's, or of other parameters.
        """
        found: list[dict[str, Any]] = []

        def fit(self: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
            found.append(self._fitted(state_dict))
            return found[0]

        handle = self.register_load_state_dict_pre_hook(fit)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        if self.layout.own:  # torch has cast all to what the parameters are
            groups, state = self.param_groups, self.state
            checkpoint.restore_dtypes(found[0], groups, state, self.flags)

    def _fitted(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        name = type(self).__name__
        groups = self.param_groups
        return checkpoint.fitted(state_dict, groups, self.flags, self.layout, name)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; what it does not set is as the constructor was told."""
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        if self.layout.own:
            values = {k: v for k, v in group.items() if k in self.flags.names}
            for value in values.values():
                if isinstance(value, Tensor) and value.numel() != 1:
                    raise ValueError("Tensor lr must be 1-element")
            self.flags.factory(**values)  # which looks at ranges
            row(self.flags.stepper(self.flags.key(group)).spec, group)  # and at kinds
        if self.flags.matrices:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(
                        f"{type(self).__name__} only supports 2D parameters whereas we "
                        f"found a parameter with size: {p.size()}"
                    )

    def __getstate__(self) -> dict[str, Any]:
        """All attributes but hooks, as in torch.optim, and a scheduler's wrapped step."""
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("step", "_cached", "_zero_grad_profile_name")
            and not name.startswith("_optimizer_")
        }

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
                _outside_of_graphs(self, data)
            else:
                self._advance(data)
        return loss

    def _advance(self, data: dict[str, Any]) -> None:
        if autocast.is_on():  # which is about losses
            with own_dtype.keeping():
                return self._advance(data)
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise ExecutionError(
                f"{type(self).__name__} counts its steps on the host, and a CUDA graph "
                "would make this one again and again: capture what comes before, and "
                "step outside of the graph"
            )
        if self._overflowed():
            return
        groups, state = self.param_groups, self.state
        for plan in () if data else self._cached:
            if plan.run(groups, state):
                if plan is not self._cached[0]:
                    others = (x for x in self._cached if x is not plan)
                    self._cached = (plan, *others)
                return
        differentiable = self.defaults.get("differentiable", False)
        name = type(self).__name__
        given = {key: self._by_parameter(key, column) for key, column in data.items()}
        batches = batch.gather(groups, state, self.flags, self.layout, name)
        for each in batches:
            batch.step(each, given, differentiable)
        plan = None
        if not data and not differentiable:
            plan = cached(groups, state, batches, self.flags)
        still = (x for x in self._cached if x.fits(groups, state))
        self._cached = (*([plan] if plan else []), *still)[:_MOST_PLANS]

    def _by_parameter(self, key: str, column: Any) -> dict[int, Any]:
        """A number of this step: by each parameter's ``id``, the value given for it."""
        name = type(self).__name__
        params = [p for group in self.param_groups for p in group["params"]]
        if key not in self.flags.data:
            raise unknown(key, dict.fromkeys(self.flags.data), f"{name}.step")
        if not isinstance(column, (list, tuple, Tensor)):
            raise HyperparameterTypeError(
                f"{name}.step takes a list of {key}, a value for each of its parameters "
                f"in the order of the groups, not {type(column).__name__}"
            )
        if len(column) != len(params):
            raise HyperparameterError(
                f"{name}.step takes a value of {key} for each of its {len(params)} "
                f"parameters, and was given {len(column)}"
            )
        return dict(zip(map(id, params), column))

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

    def _again(self, *args: Any, **kwargs: Any) -> Any:
        return self._step(*args, **kwargs)

    _again.__qualname__ = "Adapter.step"  # which torch's words on a wrong hook name
    _hooked = Optimizer.profile_hook_step(_again)

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


# Kernels step all parameters at once, which a compiler would trace one by one.
_outside_of_graphs = _disable_dynamo(Adapter._advance)
