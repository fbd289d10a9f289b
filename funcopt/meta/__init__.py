"""Meta-gradients: a step's derivatives, estimators, constraints, tasks, families."""

from funcopt.inner.curvature import hvp, mixed_vp
from funcopt.inner.step import Stepped
from funcopt.inner.step_derivatives import step_jvp, step_vjp, update_vjp
from funcopt.meta.adjoints import clip_adjoint
from funcopt.meta.constrained import constrained
from funcopt.meta.constraints import (
    Constraint,
    box,
    exp,
    one_minus_exp,
    sigmoid,
    simplex,
    softplus,
)
from funcopt.meta.estimate import Estimate
from funcopt.meta.evolution import es, es_single, pes
from funcopt.meta.families import (
    Family,
    adapt,
    anil,
    cavia,
    fomaml,
    imaml,
    lslr,
    maml,
    metasgd,
    reptile,
    step_weights,
)
from funcopt.meta.forward_mode import forward
from funcopt.meta.hypergradient_descent import hypergradient_descent
from funcopt.meta.implicit import implicit, weight_update_implicit
from funcopt.meta.nonfinite import nonfinite
from funcopt.meta.problem import Problem
from funcopt.meta.reverse_mode import (
    first_order,
    mixed,
    reptile_gradient,
    reverse,
)
from funcopt.meta.rollout import advance
from funcopt.meta.smoothness import metasmoothness
from funcopt.meta.tasks import value_and_grad
from funcopt.meta.windows import random_window, truncated

__all__ = [
    "Constraint",
    "Estimate",
    "Family",
    "Problem",
    "Stepped",
    "adapt",
    "advance",
    "anil",
    "box",
    "cavia",
    "clip_adjoint",
    "constrained",
    "es",
    "es_single",
    "exp",
    "first_order",
    "fomaml",
    "forward",
    "hvp",
    "hypergradient_descent",
    "imaml",
    "implicit",
    "lslr",
    "maml",
    "metasgd",
    "metasmoothness",
    "mixed",
    "mixed_vp",
    "nonfinite",
    "one_minus_exp",
    "pes",
    "random_window",
    "reptile",
    "reptile_gradient",
    "reverse",
    "sigmoid",
    "simplex",
    "softplus",
    "step_jvp",
    "step_vjp",
    "step_weights",
    "truncated",
    "update_vjp",
    "value_and_grad",
    "weight_update_implicit",
]
