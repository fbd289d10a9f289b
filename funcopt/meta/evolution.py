"""Estimators that look at values alone: evolution strategies, whole and in windows."""

import torch

from funcopt import tree
from funcopt.meta.antithetic_pairs import AntitheticPairs
from funcopt.meta.estimate import Estimate, check_eta
from funcopt.meta.problem import Carry, Problem
from funcopt.types import HyperValue, Tree


def es(
    problem: Problem,
    eta: Tree,
    *,
    carry: Carry | None = None,
    generator: torch.Generator,
    sigma: HyperValue = 0.1,
    particles: int = 32,
    chunk_size: int | None = None,
) -> Estimate:
    r"""Evolution strategies over the full horizon: antithetic pairs of whole trainings.

    .. math::
        \text{grads} = \frac{1}{2 N \sigma^2} \sum_{i=1}^N \varepsilon_i
        \big(V(\eta + \varepsilon_i) - V(\eta - \varepsilon_i)\big),
        \qquad \varepsilon_i \sim \mathcal N(0, \sigma^2 I)

    Unbiased for the derivative of V smoothed by a Gaussian of width σ, which is finite
    and tame where V itself is chaotic. Needs no derivative of the outer loss or of the
    step; the variance grows with the number of meta-parameters. All 2N trainings run as
    one batch under vmap.

    Args:
        problem: a `Problem`.
        eta: a dict with any of "init", "hyper", "meta": see `Problem`.
        carry: where every training begins; None, or a carry at the end, is the start.
        generator: what the perturbations are drawn from.
        sigma: their width σ > 0: a float, or a prefix tree of eta, or `by_name`. In half
            precision "init" and "meta" are rounded to the losses' own: a width that this
            has no digits for moves nothing.
        particles: how many pairs N ≥ 1.
        chunk_size: how many trainings to run at once; None for all.

    Returns:
        An `Estimate`; the value is the mean over all trainings; diagnostics: ``values``
        [N, 2] at η + ε and η − ε; ``standard_error``, like eta, of N > 1 pairs. The carry
        has the trainings as leading axis [2N] and serves for looking.

    Raises:
        HyperparameterError: ``particles`` below 1; a ``sigma`` that is not positive, or
            does not fit eta.
        HyperparameterTypeError: no generator.
        MetaParameterError: eta of other keys, or "init" beside a carry.
        Whatever else `unroll` raises.

    Source:
        Salimans, Ho, Chen, Sidor, Sutskever, "Evolution strategies as a scalable
        alternative to reinforcement learning", 2017; for meta-learning Metz et al., 2019.

    Example:
        >>> import torch, funcopt as fo
        >>> problem = fo.meta.Problem(
        ...     fo.sgd(), lambda p, _: 0.5 * p**2, lambda p, _: 0.5 * p**2, steps=2,
        ...     params=torch.tensor(1.0))
        >>> eta, generator = {"hyper": {"lr": torch.tensor(0.5)}}, torch.Generator()
        >>> estimate = fo.meta.es(
        ...     problem, eta, generator=generator.manual_seed(0), particles=1000)
        >>> error = estimate.diagnostics["standard_error"]["hyper"]["lr"]
        >>> smoothed = -2 * (0.5**3 + 3 * 0.5 * 0.1**2)            # reverse: -2 (1 - lr)³
        >>> bool((estimate.grads["hyper"]["lr"] - smoothed).abs() < 3 * error)
        True
    """
    check_eta("es", problem, eta, carry)
    pairs = AntitheticPairs(problem, eta, sigma, particles, generator, chunk_size)
    noise = pairs.draw()
    return pairs.estimate(noise, noise, carry, None)


def pes(
    problem: Problem,
    eta: Tree,
    *,
    carry: Carry | None = None,
    window: int,
    generator: torch.Generator,
    sigma: HyperValue = 0.1,
    particles: int = 32,
    chunk_size: int | None = None,
) -> Estimate:
    r"""Persistent evolution strategies: windows without short-horizon bias.

    .. math::
        \text{grads} = \frac{1}{2 N \sigma^2} \sum_{i=1}^N \xi_i
        \big(L(\eta + \varepsilon_i) - L(\eta - \varepsilon_i)\big), \qquad
        \xi_i \leftarrow \xi_i + \varepsilon_i

    Each particle goes on from where its own window ended, with a new perturbation, and
    what is correlated with the window's loss L is the sum ξ of all perturbations since
    the start. Summed over the windows of a training (with "mean": averaged, each by its
    number of steps) the estimates are unbiased for the derivative of the smoothed V. The
    variance grows with the number of windows.

    Args:
        problem: a `Problem`. L is the window's part of its objective: the sum or the mean
            of the outer loss over the window's steps; with "last" what the outer loss has
            changed by within the window (in the first one: the loss itself).
        eta: a dict with any of "init", "hyper", "meta": see `Problem`.
        carry: that of the last window; None, or a carry at the end, is the start; one by
            `advance` starts all particles there.
        window: how many steps W ≥ 1; at the end there may be fewer left.
        generator: as for `es`.
        sigma: as for `es`; the same in all windows of a training.
        particles: as for `es`; the same in all windows of a training.
        chunk_size: as for `es`.

    Returns:
        An `Estimate`; value and diagnostics as by `es`, of the window. The carry holds
        all trainings along a leading axis [2N], and ``"perturbation_sums"`` ξ [N, ...].

    Raises:
        StructureError: a carry of another number of particles, with another eta, or of
            another problem.
        Whatever else `es` raises.

    Source:
        Vicol, Metz, Sohl-Dickstein, "Unbiased gradient estimation in unrolled
        computation graphs with persistent evolution strategies", 2021, algorithm 2.

    Example:
        >>> import torch, funcopt as fo
        >>> problem = fo.meta.Problem(
        ...     fo.sgd(), lambda p, _: 0.5 * p**2, lambda p, _: 0.5 * p**2, steps=4,
        ...     params=torch.tensor(1.0))
        >>> eta, carry = {"hyper": {"lr": torch.tensor(0.5)}}, None
        >>> generator, total = torch.Generator().manual_seed(0), 0.0
        >>> for _ in range(2):
        ...     estimate = fo.meta.pes(problem, eta, carry=carry, window=2, sigma=0.01,
        ...                            generator=generator, particles=2000)
        ...     carry, total = estimate.carry, total + estimate.grads["hyper"]["lr"]
        >>> bool((total - -4 * 0.5**7).abs() < 0.02)               # what reverse gives
        True
    """
    check_eta("pes", problem, eta, carry)
    pairs = AntitheticPairs(
        problem, eta, sigma, particles, generator, chunk_size, "perturbation_sums"
    )
    noise, kept = pairs.draw(), pairs.kept(carry)
    total = noise if kept is None else tree.map(torch.add, kept, noise)
    return pairs.estimate(noise, total, carry, window)


def es_single(
    problem: Problem,
    eta: Tree,
    *,
    carry: Carry | None = None,
    window: int,
    generator: torch.Generator,
    sigma: HyperValue = 0.1,
    particles: int = 32,
    chunk_size: int | None = None,
) -> Estimate:
    r"""ES-Single: windows with one perturbation for the whole training.

    .. math::
        \text{grads} = \frac{1}{2 N \sigma^2} \sum_{i=1}^N \varepsilon_i
        \big(L(\eta + \varepsilon_i) - L(\eta - \varepsilon_i)\big),
        \qquad \varepsilon_i \text{ drawn at the start}

    Summed over the windows of a training (with "mean": averaged, as of `pes`) it is `es`
    over the full horizon, number by number where eta stays; the variance does not grow
    with the number of windows, so that a few particles do where `pes` needs a thousand.

    Args:
        problem: as for `pes`.
        eta: a dict with any of "init", "hyper", "meta": see `Problem`.
        carry: as for `pes`.
        window: as for `pes`.
        generator: as for `es`; drawn from where a training starts.
        sigma: as for `es`; the same in all windows of a training.
        particles: as for `es`; the same in all windows of a training.
        chunk_size: as for `es`.

    Returns:
        As by `pes`; ``"perturbations"`` ε [N, ...] in the carry.

    Raises:
        Whatever `pes` raises.

    Source:
        Vicol, "Low-variance gradient estimation in unrolled computation graphs with
        ES-Single", 2023.

    Example:
        >>> import torch, funcopt as fo
        >>> problem = fo.meta.Problem(
        ...     fo.sgd(), lambda p, _: 0.5 * p**2, lambda p, _: 0.5 * p**2, steps=4,
        ...     params=torch.tensor(1.0))
        >>> eta, carry = {"hyper": {"lr": torch.tensor(0.5)}}, None
        >>> generator, total = torch.Generator().manual_seed(0), 0.0
        >>> for _ in range(2):
        ...     estimate = fo.meta.es_single(
        ...         problem, eta, carry=carry, window=2, sigma=0.01, generator=generator,
        ...         particles=2000)
        ...     carry, total = estimate.carry, total + estimate.grads["hyper"]["lr"]
        >>> bool((total - -4 * 0.5**7).abs() < 0.002)              # what reverse gives
        True
    """
    check_eta("es_single", problem, eta, carry)
    pairs = AntitheticPairs(problem, eta, sigma, particles, generator, chunk_size)
    kept = pairs.kept(carry)
    noise = pairs.draw() if kept is None else kept
    return pairs.estimate(noise, noise, carry, window)
