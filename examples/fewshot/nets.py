"""The two Omniglot networks of MAML (Finn et al., 2017), as pure functions.

Batch norm normalises with the statistics of the batch at hand, also at test time
(*transductive*): a network has no state but its parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import init

Params: TypeAlias = dict[str, Tensor]


class Net(NamedTuple):
    """A network is two functions: ``init(generator)`` and ``apply(params, x)``.

    The last layer is ``head.weight`` and ``head.bias``; everything else is the body.
    """

    init: Callable[[torch.Generator], Params]
    apply: Callable[[Params, Tensor], Tensor]


def conv4(ways: int, *, filters: int = 64, pool: bool = False) -> Net:
    """Four blocks of 3 × 3 convolution, batch norm and ReLU, then a linear layer.

    Each block halves the image, by stride 2 (the paper's choice for Omniglot) or, with
    ``pool``, by 2 × 2 max pooling after a stride of 1. The head sees each feature's
    mean over the places left, as in the authors' code. Their initialisation, too:
    Glorot uniform convolutions; but a Glorot head in place of their unit normal one.

    ``apply`` takes float ``[n, 1, 28, 28]`` to logits ``[n, ways]``.
    """

    def initial(generator: torch.Generator) -> Params:
        params: Params = {}
        for layer in range(1, 5):
            # No bias: the batch norm that follows would take it away.
            weight = torch.empty(filters, 1 if layer == 1 else filters, 3, 3)
            params[f"conv{layer}.weight"] = init.xavier_uniform_(
                weight, generator=generator
            )
            params |= _norm(layer, filters)
        weight = torch.empty(ways, filters)
        params["head.weight"] = init.xavier_uniform_(weight, generator=generator)
        params["head.bias"] = torch.zeros(ways)
        return params

    def apply(params: Params, x: Tensor) -> Tensor:
        for layer in range(1, 5):
            stride = 1 if pool else 2
            x = F.conv2d(x, params[f"conv{layer}.weight"], stride=stride, padding=1)
            x = F.relu(batch_norm(x, params, layer))
            if pool:
                x = F.max_pool2d(x, 2)
        return F.linear(x.mean((2, 3)), params["head.weight"], params["head.bias"])

    return Net(initial, apply)


def mlp(ways: int, *, widths: Sequence[int] = (256, 128, 64, 64)) -> Net:
    """Linear layers, each with batch norm and ReLU, then a linear layer.

    Weights start as in the authors' code: normal with σ = 0.01, cut off at 2σ.

    ``apply`` takes float ``[n, 1, 28, 28]`` to logits ``[n, ways]``.
    """

    def normal(outputs: int, inputs: int, generator: torch.Generator) -> Tensor:
        w = torch.empty(outputs, inputs)
        return init.trunc_normal_(w, std=0.01, a=-0.02, b=0.02, generator=generator)

    def initial(generator: torch.Generator) -> Params:
        params: Params = {}
        inputs = 28 * 28
        for layer, width in enumerate(widths, 1):
            params[f"linear{layer}.weight"] = normal(width, inputs, generator)
            params |= _norm(layer, width)
            inputs = width
        params["head.weight"] = normal(ways, inputs, generator)
        params["head.bias"] = torch.zeros(ways)
        return params

    def apply(params: Params, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in range(1, len(widths) + 1):
            x = F.linear(x, params[f"linear{layer}.weight"])
            x = F.relu(batch_norm(x, params, layer))
        return F.linear(x, params["head.weight"], params["head.bias"])

    return Net(initial, apply)


def batch_norm(x: Tensor, params: Params, layer: int) -> Tensor:
    """Each channel (axis 1) to mean 0 and variance 1 over the batch, then affine.

    The affine part stands outside of F.batch_norm, whose derivative is wrong when
    reverse mode is taken over vmap and the weight is batched (pytorch/functorch#534).
    So written, first and second derivatives are right in reverse mode and in forward
    over reverse, under vmap or not; forward over forward and third derivatives are
    not (pytorch/pytorch#196699). Plain arithmetic is right in all, at half the speed.
    """
    shape = [-1 if axis == 1 else 1 for axis in range(x.dim())]
    weight = params[f"norm{layer}.weight"].view(shape)
    bias = params[f"norm{layer}.bias"].view(shape)
    # ε = 1e-3 as in the authors' code; it also tames second derivatives.
    return F.batch_norm(x, None, None, training=True, eps=1e-3) * weight + bias


def _norm(layer: int, width: int) -> Params:
    return {
        f"norm{layer}.weight": torch.ones(width),
        f"norm{layer}.bias": torch.zeros(width),
    }
