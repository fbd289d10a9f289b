"""Derivatives by kernels: one autograd.Function for a step, and one for its derivative.

A step of the rule saves its inputs and nothing else, and runs one kernel forward and one
backward, or one for the tangents. The Function works under autograd and under every
torch.func transform. Third derivatives, forward over reverse and forward mode within
forward mode are made of torch's own operations.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from funcopt.execution import batched, levels
from funcopt.execution.executor import BuildError
from funcopt.execution.outside import beneath
from funcopt.execution.rule_call import RuleCall
from funcopt.execution.trace import UntraceableError
from funcopt.types import Tensor


def run(call: RuleCall, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The call's outputs, at whatever level of transforms this is."""
    if call.signature.of is not None and levels.vectorized(tensors):
        return call.plain(*tensors)
    if batched.is_vmapped():
        return batched.unbatched(run, call, tensors)
    followed = levels.differentiating(tensors) and levels.followed(tensors)
    third = call.signature.what in ("second_vjp", "jvp")
    if followed and (third or levels.without_functions()):
        return call.plain(*tensors)  # third order, or torch would lose the tangent
    try:
        _ = call.signature.executor
    except (UntraceableError, BuildError):  # of a derivative: the step was tried
        return call.plain(*tensors)
    if not followed:
        return call.execute(tensors, recycle=call.signature.of is None)
    if levels.inside() or levels.in_forward_mode():
        return _Transformed.apply(call, *tensors)
    return _Recorded.apply(call, *tensors)


def record(call: RuleCall, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """As `run`, for tensors that autograd follows and no transform ever touched.

    It goes past `torch.autograd.Function.apply`, which checks each for a wrapper of
    torch.func.
    """
    recorded: Any = super(torch.autograd.Function, _Recorded)
    return recorded.apply(call, *tensors)


def _pulled(
    ctx: Any, saved: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    call = ctx.call.vjp(ctx.needs_input_grad[1:])
    found = run(call, (*saved, *cotangents))
    return None, *call.signature.spread((*found, None))


class _Recorded(torch.autograd.Function):
    """For plain autograd: without ``setup_context`` a call is three times as cheap."""

    @staticmethod
    def forward(ctx: Any, call: RuleCall, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(call.signature.of is not None)
        return tuple(call.execute(tensors))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, given = ctx.saved_tensors, [c for c in cotangents if c is not None]
        if len(given) == len(cotangents):
            return _pulled(ctx, saved, given)
        # As without kernels, a leaf of which nothing is asked has no gradient: by zeros
        # an outer optimizer would decay it.
        _, *found = _pulled(ctx, saved, ctx.call.with_zeros(cotangents, saved))
        reached = ctx.call.signature.reached(cotangents)
        return None, *(g if asked else None for g, asked in zip(found, reached))


class _Transformed(torch.autograd.Function):
    """For torch.func and for forward mode."""

    @staticmethod
    def forward(call: RuleCall, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(call.execute(tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        # A pullback of torch.func.vjp runs when its level is gone.
        return _pulled(ctx, [*map(levels.alive, ctx.saved_tensors)], cotangents)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        saved, signature = ctx.saved_tensors, ctx.call.signature
        call = ctx.call.jvp()
        # A kernel reads the leaf's dtype. Of a 0-d float32 tensor and a Python number
        # torch makes a float64 tangent (https://github.com/pytorch/pytorch/issues/90065).
        given = [
            torch.zeros_like(x) if t is None else t.to(x.dtype)
            for x, t, (i, _) in zip(saved, tangents, signature.places)
            if signature.moving[i]
        ]
        if signature.of is None:
            return tuple(beneath(partial(run, call), (*saved, *given)))
        return call.plain(*saved, *given)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], call: RuleCall, *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        outputs, own = batched.stacked(run, call, tensors, in_dims[1:], info.batch_size)
        return tuple(outputs), tuple(0 if has else None for has in own)
