"""Meta-gradients over batches of tasks."""

from funcopt.meta.tasks import value_and_grad

__all__ = ["value_and_grad"]
