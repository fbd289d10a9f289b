"""Antithetic pairs of trainings at once, of which evolution strategies are made."""

from collections.abc import Callable
from typing import Any

import torch

from funcopt import select, tree
from funcopt.checks import check_count
from funcopt.derivatives import widened
from funcopt.errors import HyperparameterError, StructureError
from funcopt.flat_function import FlatFunction
from funcopt.list_vmap import list_vmap
from funcopt.meta.estimate import Estimate, check_remembered
from funcopt.meta.problem import (
    Carry,
    Problem,
    alike,
    as_given,
    beside_params,
    go_on,
    outer_value,
    ready,
    standing,
    stands_at,
    window_of,
)
from funcopt.meta.rollout import roll
from funcopt.normal import normal_like
from funcopt.types import HyperValue, Tensor, Tree


class AntitheticPairs:
    """Antithetic pairs of trainings: a window of all of them, and what it tells."""

    def __init__(
        self,
        problem: Problem,
        eta: Tree,
        sigma: HyperValue,
        particles: int,
        generator: torch.Generator,
        chunk_size: int | None,
        memory: str = "perturbations",
    ) -> None:
        check_count("particles", particles)
        if chunk_size is not None:
            check_count("chunk_size", chunk_size)
        self.problem, self.asked = problem, tree.detach(eta)
        self.given = beside_params(problem, self.asked)
        # Half precision would round ε, and the sum of them, and what is averaged.
        self.eta = tree.map(widened, self.given)
        self.particles, self.generator = particles, generator
        self.chunk_size, self.memory = chunk_size, memory
        leaves, structure = tree.flatten(eta)
        widths = select.per_leaf(sigma, structure, "sigma")
        for path, x, width in zip(tree.paths(structure), leaves, widths):
            if x is not None:
                _check_width(width, x, path)
        self.sigma = tree.map(_beside, self.eta, tree.unflatten(structure, widths))

    def draw(self) -> Tree:
        """Perturbations [N, ...] of width sigma."""
        many = tree.map(lambda x: x.expand(self.particles, *x.shape), self.eta)
        normal = normal_like(many, self.generator)
        return tree.map(lambda z, s: (s * z).to(z.dtype), normal, self.sigma)

    def kept(self, carry: Carry | None) -> Tree:
        """What a carry remembers of perturbations; None where none were drawn."""
        if carry is None or not stands_at(self.problem, carry):
            return None
        if self.memory not in carry:
            return None
        perturbations = carry[self.memory]
        check_remembered("perturbations", perturbations, self.eta)
        found = tree.leading_axis(perturbations, self.memory)
        if found != self.particles:
            raise StructureError(
                f"the carry holds {found} pairs of particles, but particles="
                f"{self.particles} was asked"
            )
        return perturbations

    def estimate(
        self, noise: Tree, weight: Tree, carry: Carry | None, window: int | None
    ) -> Estimate:
        """A window at eta ± noise, and the mean of weight · (L₊ - L₋) / 2σ²."""
        problem, pairs = self.problem, self.particles
        start = stands_at(problem, carry)
        count = window_of(problem, start, window)
        both = tree.map(lambda x, e: torch.cat([x + e, x - e]), self.eta, noise)
        at, apart = None, False
        if carry is not None and start:
            at, apart = standing(carry), self.memory in carry
            if not apart:
                at = tree.map(lambda x: x.expand(2 * pairs, *x.shape), at)

        def one(eta: Tree, at: Tree) -> tuple[Any, ...]:
            eta = ready(problem, as_given(eta, self.given))
            begun = go_on(problem, eta, at and {**at, "step": start})
            value, end, losses = roll(problem, eta, begun, count)
            change = value
            if problem.objective == "last" and apart:  # the first window has V itself
                change = value - outer_value(problem, eta, begun, start)
            return value, change, standing(end), losses

        with torch.no_grad():
            values, change, end, losses = self._all(one, both, at)
            change = change.unflatten(0, (2, pairs))
            slope = (change[0] - change[1]) / 2

            def weighed(w: Tensor, s: Any) -> Tensor:
                by = slope.view(-1, *[1] * (w.ndim - 1)).to(w.device)
                return w * by / s**2

            each = tree.map(weighed, weight, self.sigma)
            diagnostics = {
                "losses": losses.mean(0),
                "values": values.unflatten(0, (2, pairs)).T,
            }
            if pairs > 1:
                errors = tree.map(
                    lambda x: (x.var(0) / pairs).sqrt() if x.numel() else x[0], each
                )
                diagnostics["standard_error"] = alike(errors, self.asked)
        end = {**end, "step": start + count, self.memory: weight}
        grads = alike(tree.map(lambda x: x.mean(0), each), self.asked)
        return Estimate(values.mean(), grads, diagnostics, end)

    def _all(self, one: Callable[..., Any], eta: Tree, at: Tree) -> Any:
        flat = FlatFunction(one, eta, at)
        many = list_vmap(flat, randomness="same", chunk_size=self.chunk_size)
        out = many(*flat.inputs)
        return flat.rebuild(out)


def _beside(x: Tensor, width: Any) -> Any:
    return width.to(x.device) if isinstance(width, Tensor) else width


def _check_width(width: Any, x: Tensor, path: str) -> None:
    if isinstance(width, Tensor):
        ends = zip(reversed(width.shape), reversed(x.shape))
        if width.ndim > x.ndim or any(n not in (1, size) for n, size in ends):
            raise HyperparameterError(
                f"sigma at '{path}' has shape {[*width.shape]}, and eta {[*x.shape]}: "
                "give a number, or a tensor that broadcasts to eta's"
            )
    elif not isinstance(width, float | int) or not 0 < width < float("inf"):
        raise HyperparameterError(f"sigma must be positive, got {width!r}")
