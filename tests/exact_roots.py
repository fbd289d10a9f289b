"""torch's arithmetic with an exactly rounded square root.

On x86 torch takes the root of a vector from MKL, in float32 and in float64: about one in
a hundred is off by the last bit. Kernels use the processor's, which is exact.
"""

from typing import Any

import numpy
import torch
from torch.overrides import TorchFunctionMode


class ExactRoots(TorchFunctionMode):
    """Within, ``torch.sqrt`` rounds exactly. For what nobody differentiates."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.sqrt, torch.Tensor.sqrt):
            with numpy.errstate(invalid="ignore"):
                return torch.as_tensor(numpy.sqrt(numpy.asarray(args[0])))
        return func(*args, **(kwargs or {}))
