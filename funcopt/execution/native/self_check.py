"""Whether a new kernel computes what it was traced from, before it is ever used."""

import torch

from funcopt.execution.executor import BuildError, Executor
from funcopt.types import Tensor

_SIZES = (37, 1, 0)  # more than a vector, less than one, none
# Wide enough for sums and roots that round another way, far from another formula.
_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}


def compare(executor: Executor) -> None:
    """Run the program and its function on the same numbers.

    Raises:
        BuildError: they disagree.
    """
    program, stored = executor.program, executor.stored
    numbers = torch.Generator("cpu").manual_seed(0)

    def some(size: int) -> Tensor:
        given = {"generator": numbers, "dtype": torch.float64, "device": "cpu"}
        return 0.25 + 0.5 * torch.rand(size, **given)

    row = some(len(program.inputs) - sum(program.inputs)).tolist()
    leaves = [[some(size).to(stored) for size in _SIZES] for s in program.inputs if s]
    found = executor(leaves, [row], [0] * len(_SIZES))
    for i in range(len(_SIZES)):
        row_of_tensors = torch.tensor(row, dtype=torch.float64, device="cpu")
        scalars = iter(row_of_tensors.unbind())
        streams = iter([column[i].to(program.dtype) for column in leaves])
        inputs = [next(streams if stream else scalars) for stream in program.inputs]
        for column, expected in zip(found, program.function(*inputs)):
            value = torch.as_tensor(column[i], dtype=torch.float64, device="cpu")
            expected = expected.detach().to(stored if expected.ndim else torch.float64)
            size = expected.double().abs().max().item() if expected.numel() else 0.0
            tolerance = _TOLERANCE[stored] * (1 + size)
            if not torch.allclose(
                value, expected.double(), rtol=0, atol=tolerance, equal_nan=True
            ):
                raise BuildError("the kernel that was built differs from the rule")
