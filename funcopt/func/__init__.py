"""What torch.func lacks: a vmap of trees with gaps, right derivatives of norm layers."""

from funcopt.func.norms import exact_norms
from funcopt.func.tree_vmap import vmap

__all__ = ["exact_norms", "vmap"]
