"""A float's bits as a number, and a number's as a float: what every executor does alike.

The bits of x > 0 are nearly a line in log x, with which a rule may begin a root.
"""

import torch

from funcopt.types import Tensor

#: the integers that are as long
INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def bits(x: Tensor) -> Tensor:
    """The bits of x, read as an integer, in x's dtype; a constant to derivatives."""
    return x.detach().view(INTEGERS[x.dtype]).to(x.dtype)


def of_bits(number: Tensor) -> Tensor:
    """The float whose bits are the integer next to ``number``, towards 0."""
    return number.detach().to(INTEGERS[number.dtype]).view(number.dtype)
