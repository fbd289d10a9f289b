"""Whether training responds smoothly to a meta-parameter."""

from contextlib import nullcontext

import torch

from funcopt import tree
from funcopt.derivatives import widened
from funcopt.errors import HyperparameterError, StructureError
from funcopt.inner.rng_state import RngState
from funcopt.meta.estimate import check_eta
from funcopt.meta.problem import Problem, as_given, data_of
from funcopt.meta.rollout import advance
from funcopt.stepping.complex_leaves import parts
from funcopt.types import Tensor, Tree


def metasmoothness(problem: Problem, eta: Tree, direction: Tree, h: float) -> Tensor:
    r"""How well the training's response keeps its sign, from one step of eta to the next.

    .. math::
        S = \sum_i \frac{|\Delta_i|}{\lVert \Delta \rVert_1}
            \operatorname{sign}(\Delta_i) \operatorname{sign}(\Delta'_i), \qquad
        \Delta = \theta_K(\eta + h v) - \theta_K(\eta), \quad
        \Delta' = \theta_K(\eta + 2 h v) - \theta_K(\eta + h v)

    Three trainings, on the same random numbers, and no derivative. 1 says that
    meta-gradients at this scale ``h`` point somewhere, 0 that they are noise, however
    exact: then change the training (larger batches, smoother networks, smaller rates, an
    earlier or longer start).

    Args:
        problem: a `Problem`.
        eta: a dict with any of "init", "hyper", "meta": see `Problem`.
        direction: v, a tree like eta.
        h: the step along v, > 0.

    Returns:
        A 0-d tensor in [-1, 1]; NaN where ``direction`` does not change the training.

    Raises:
        HyperparameterError: ``h`` that is not positive.
        StructureError: a direction that is not like eta, in shapes too; a training
            without parameters.
        MetaParameterError: eta of other keys.
        Whatever `unroll` raises.

    Source:
        Engstrom, Ilyas, Chen, Feldmann, Moses, Madry, "Optimizing ML training with
        metagradient descent", 2025 (arXiv 2503.13751), definition 2.

    Example:
        >>> import torch, funcopt as fo
        >>> problem = fo.meta.Problem(
        ...     fo.sgd(), lambda p, _: (torch.cos(3 * p) + 0.1 * p**2).sum(), None,
        ...     steps=30, params=torch.linspace(0.5, 4.0, 50))
        >>> def smoothness(lr):
        ...     eta = {"hyper": {"lr": torch.tensor(lr)}}
        ...     along = {"hyper": {"lr": torch.tensor(1.0)}}
        ...     return fo.meta.metasmoothness(problem, eta, along, h=1e-3)
        >>> smoothness(0.01) > 0.9, smoothness(1.0) > 0.0       # the second is chaos
        (tensor(True), tensor(False))
    """
    check_eta("metasmoothness", problem, eta)
    if not 0 < h < float("inf"):
        raise HyperparameterError(f"h must be positive, got {h!r}")

    _check_direction(direction, eta)
    # the same numbers in all three trainings, wherever they are drawn
    rng = RngState(tree.leaves([eta, *data_of(problem)]))
    wide = tree.map(widened, eta)  # of half precision, the step's digits

    def end(times: int) -> Tensor:
        at = tree.map(lambda x, v: x + times * h * v, wide, direction)
        with rng.restored() if times else nullcontext():
            params = advance(problem, as_given(at, eta), problem.steps)["params"]
        found = tree.present(params)
        if not found:
            raise StructureError(
                "metasmoothness looks at the way parameters go, and this training has no "
                "parameters: give some as Problem(params=...), or eta['init']"
            )
        return torch.cat([parts(widened(x)).flatten() for x in found])

    with torch.no_grad():
        first, second, third = (end(times) for times in range(3))
        change, after = second - first, third - second
        agreed = change.abs() * change.sign() * after.sign()
        return agreed.sum() / change.abs().sum()


def _check_direction(direction: Tree, eta: Tree) -> None:
    leaves, structure = tree.flatten(eta)
    along = tree.flatten_like(structure, direction, "direction", like="eta")
    for path, x, v in zip(tree.paths(structure), leaves, along):
        if x is not None and (not isinstance(v, Tensor) or v.shape != x.shape):
            found = [*v.shape] if isinstance(v, Tensor) else repr(v)
            raise StructureError(
                f"direction['{path}'] must be a tensor {[*x.shape]}, not {found}"
            )
