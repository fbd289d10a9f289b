"""Steps in their tensors' own dtypes, derivatives too, wherever torch.autocast is on."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import compress
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from funcopt import tree
from funcopt.execution import autocast, levels, pullback
from funcopt.types import Tensor

#: whether it was on around `keeping`
_left: ContextVar[bool] = ContextVar("autocast", default=False)


@contextmanager
def keeping() -> Iterator[None]:
    """Run with torch.autocast off, and products of matrices `apart`."""
    if torch.compiler.is_compiling():
        with autocast.choosing(autocast.OFF):
            yield
    elif not autocast.is_on():
        yield
    else:
        token = _left.set(True)
        try:
            with autocast.choosing(autocast.OFF), _Products():
                yield
        finally:
            _left.reset(token)


class _Products(TorchFunctionMode):
    """Products of matrices, and what has such in its derivative, are made `apart`."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS or kwargs.get("out") is not None or autocast.is_on():
            return func(*args, **kwargs)
        leaves, structure = tree.flatten((args, kwargs))
        among = [isinstance(x, Tensor) for x in leaves]

        def of_tensors(*tensors: Tensor) -> Tensor:
            given = iter(tensors)
            merged = [next(given) if here else x for x, here in zip(leaves, among)]
            args, kwargs = tree.unflatten(structure, merged)
            return func(*args, **kwargs)

        return apart(of_tensors, *compress(leaves, among))


#: those that give one tensor
_PRODUCTS = {
    getattr(module, name)
    for module, names in (
        (torch, "matmul mm bmm mv addmm addmv addbmm baddbmm einsum tensordot inner"),
        (torch, "chain_matmul matrix_power inverse cholesky_inverse cov"),
        (Tensor, "matmul mm bmm mv addmm addmv addbmm baddbmm inner"),
        (Tensor, "matrix_power inverse cov"),
        (torch.linalg, "matmul multi_dot matrix_power matrix_norm inv pinv cholesky"),
        (torch.linalg, "solve solve_triangular svdvals eigvalsh"),
        (torch.nn.functional, "linear bilinear scaled_dot_product_attention"),
    )
    for name in names.split()
}


def apart(function: Callable[..., Any], *tensors: Tensor) -> Any:
    """``function(*tensors)``, with autocast off; and so in derivatives of every order.

    Those that torch makes where that is on have products of matrices in half precision.
    """
    if not (autocast.is_on() or _left.get()):
        return function(*tensors)
    with autocast.choosing(autocast.OFF):
        if levels.followed(tensors) and not levels.without_functions():
            return Apart.apply(function, *tensors)
        return function(*tensors)


class Apart(torch.autograd.Function):
    """A function of tensors that makes its derivatives `apart`, as functions of them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(function: Callable[..., Any], *tensors: Tensor) -> Any:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.function, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        return None, *pulled(ctx.function, ctx.saved_tensors, cotangents)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor) -> Any:
        return pushed(ctx.function, ctx.saved_tensors, tangents)


def pulled(
    function: Callable[..., Any], tensors: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The gradients of a function by its tensors, made `apart`."""

    def of_list(values: Sequence[Tensor]) -> Sequence[Tensor]:
        out = function(*values)
        return out if isinstance(out, tuple) else (out,)

    def back(*given: Tensor) -> tuple[Tensor, ...]:
        values, bars = given[: len(tensors)], given[len(tensors) :]
        found = pullback.pull(of_list, values, bars, range(len(values)))
        return tuple(
            torch.zeros_like(x) if g is None else g for x, g in zip(values, found)
        )

    return apart(back, *map(levels.alive, tensors), *cotangents)


def pushed(
    function: Callable[..., Any], tensors: Sequence[Tensor], tangents: Sequence[Tensor]
) -> Any:
    """The tangents of what a function gives, made `apart`.

    By reverse mode twice, for forward is not nested in forward.
    """

    def along(*given: Tensor) -> Any:
        made: Any = torch.func.vjp(function, *given[: len(tensors)])
        out, pull = made
        push: Any = torch.func.vjp(pull, tree.map(torch.zeros_like, out))[1]
        return tree.map(Tensor.contiguous, push(given[len(tensors) :])[0])

    return apart(along, *map(levels.alive, tensors), *tangents)
