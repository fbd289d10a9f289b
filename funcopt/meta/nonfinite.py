"""Which leaves of a meta-gradient are not finite."""

import torch

from funcopt import tree
from funcopt.types import Tensor, Tree


def nonfinite(values: Tree) -> dict[str, Tensor]:
    """How many elements of each leaf are NaN or infinite.

    A meta-gradient is not finite where an inner loop left the range of its dtype (rates
    trained for fewer steps, a chaotic loss) or a loss has no derivative. This says which
    leaves; `skip_nonfinite` around the outer optimizer makes no step then, and the first
    stage of a `chain` may be `zero_nans`, `clip_by_value` or `clip_by_global_norm`.

    Args:
        values: a tree of tensors: meta-gradients, or any other.

    Returns:
        path → 0-d int64 count, on the leaf's device, which is not waited for;
        ``sum(counts.values())`` is the whole tree's.

    Raises:
        Nothing of its own.

    Source:
        funcopt.

    Example:
        >>> import torch, funcopt as fo
        >>> grads = {"lr": torch.tensor(0.5), "init": torch.tensor([1.0, float("nan")])}
        >>> fo.meta.nonfinite(grads)
        {'init': tensor(1), 'lr': tensor(0)}
    """
    leaves, structure = tree.flatten(values)
    return {
        path: torch.sum(~torch.isfinite(leaf))
        for path, leaf in zip(tree.paths(structure), leaves)
        if leaf is not None
    }
