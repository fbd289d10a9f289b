"""A rule's derivatives as functions of tensors alone, for the tracer to call."""

from collections.abc import Sequence
from itertools import compress

import torch

from funcopt.execution.program import Function
from funcopt.types import Tensor


def vjp(function: Function, wanted: Sequence[bool]) -> Function:
    """The gradients of the inputs that are ``wanted``, from all inputs and cotangents.

    By plain autograd: it can be nested, and unlike torch.func does not import Dynamo.
    """
    count = len(wanted)

    def gradients(*tensors: Tensor) -> Sequence[Tensor]:
        inputs = [_leaf(x) for x in tensors[:count]]
        asked = [*compress(inputs, wanted)]
        return _gradients(function(*inputs), asked, tensors[count:])

    return gradients


def jvp(function: Function, moving: Sequence[bool]) -> Function:
    """The tangents of the outputs, from all inputs and tangents of the ``moving``.

    J·t as the derivative of uᵀ·J in u: forward mode could not be nested in forward mode.
    """
    count = len(moving)

    def tangents(*tensors: Tensor) -> Sequence[Tensor]:
        inputs = [_leaf(x) for x in tensors[:count]]
        outputs = function(*inputs)
        anything = [_leaf(torch.ones_like(x)) for x in outputs]
        pulled = _gradients(outputs, [*compress(inputs, moving)], anything)
        return _gradients(pulled, anything, tensors[count:])

    return tangents


def _leaf(x: Tensor) -> Tensor:
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()


def _gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> Sequence[Tensor]:
    followed = [i for i, x in enumerate(outputs) if x.requires_grad]
    return torch.autograd.grad(
        [outputs[i] for i in followed],
        inputs,
        [cotangents[i] for i in followed],
        create_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
