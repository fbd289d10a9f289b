"""funcopt: functional, differentiable optimizers for PyTorch."""

from funcopt import (
    func,
    meta,
    optimizers,
    projections,
    schedules,
    torch_optim,
    transforms,
)
from funcopt.errors import (
    CheckpointError,
    CompileError,
    ExecutionError,
    FuncoptError,
    GradientLostError,
    HyperparameterError,
    HyperparameterTypeError,
    LeafError,
    MetaParameterError,
    RemoteTaskError,
    StructureError,
    UnknownHyperparameterError,
)
from funcopt.execution.executor_choice import execution
from funcopt.gradient_transformation import as_torchopt, from_transform
from funcopt.inner.per_step import per_step
from funcopt.inner.unroll import Unrolled, unroll
from funcopt.normal import normal_like
from funcopt.optimizer import Optimizer, elementwise, per_tensor
from funcopt.optimizers import *
from funcopt.plan import plan
from funcopt.schedules.schedule import Schedule
from funcopt.select import by_name
from funcopt.torch_optim.bridges import from_torch, to_torch
from funcopt.transforms import *
from funcopt.tree import detach

__all__ = [
    "CheckpointError",
    "CompileError",
    "ExecutionError",
    "FuncoptError",
    "GradientLostError",
    "HyperparameterError",
    "HyperparameterTypeError",
    "LeafError",
    "MetaParameterError",
    "RemoteTaskError",
    "Optimizer",
    "Schedule",
    "StructureError",
    "UnknownHyperparameterError",
    "Unrolled",
    "as_torchopt",
    "by_name",
    "detach",
    "elementwise",
    "execution",
    "from_torch",
    "from_transform",
    "func",
    "meta",
    "normal_like",
    "per_step",
    "per_tensor",
    "plan",
    "projections",
    "schedules",
    "to_torch",
    "torch_optim",
    "unroll",
]
__all__ += optimizers.__all__
__all__ += transforms.__all__
