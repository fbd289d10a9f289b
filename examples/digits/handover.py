"""A running optimizer's next steps as a function of example weights and rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

import funcopt as fo
from digits.data import Digits

Params = list[dict[str, Tensor]]  # named parameters, group by group


class Task(NamedTuple):
    """Digits with labels of which some are wrong; a few clean ones; a test set."""

    training: Digits
    clean: Digits
    test: Digits
    wrong: Tensor  #: [n] bool: a label of ``training`` that was replaced
    truth: Tensor  #: [n]: the labels as they were


def with_wrong_labels(data: Digits, share: float, generator: torch.Generator) -> Tensor:
    """Labels of which a share, at random, was replaced by others."""
    count, classes = len(data.y), int(data.y.max()) + 1
    wrong = torch.randperm(count, generator=generator) < share * count
    other = data.y + torch.randint(1, classes, (count,), generator=generator)
    return torch.where(wrong, other % classes, data.y)


def live(optimizer: torch.optim.Optimizer) -> Params:
    """The parameters that it steps, in the shape that `fo.from_torch` gives."""
    groups = optimizer.param_groups
    return [dict(zip(group["param_names"], group["params"])) for group in groups]


def logits(net: nn.Module, params: Params, x: Tensor) -> Tensor:
    merged = {name: p for group in params for name, p in group.items()}
    return functional_call(net, merged, (x,))


def weighted_loss(
    net: nn.Module, params: Params, data: Digits, rows: Tensor, weights: Tensor
) -> Tensor:
    batch = data.rows(rows)
    each = F.cross_entropy(logits(net, params, batch.x), batch.y, reduction="none")
    return (weights[rows] * each).mean()


def next_steps(
    optimizer: torch.optim.Optimizer, net: nn.Module, task: Task, batches: Tensor
) -> fo.meta.Problem:
    """The loss on clean digits after the next steps, from where the optimizer stands.

    Its meta-parameters are ``{"hyper": {"lr", "weight_decay"}}``, a value for each group,
    and ``{"meta": {"weights"}}``, one for each example.
    """
    opt, params, state = fo.from_torch(optimizer)

    def inner(params: Params, rows: Tensor, meta: dict[str, Tensor]) -> Tensor:
        return weighted_loss(net, params, task.training, rows, meta["weights"])

    def outer(params: Params, data: Digits, meta: Any = None) -> Tensor:
        return F.cross_entropy(logits(net, params, data.x), data.y)

    return fo.meta.Problem(
        opt,
        inner,
        outer,
        steps=len(batches),
        params=params,
        state=state,
        batches=batches,
        outer_batch=task.clean,
    )


def as_it_runs(optimizer: torch.optim.Optimizer, task: Task) -> dict[str, Any]:
    """The meta-parameters that change nothing."""
    groups = optimizer.param_groups
    hyper = {
        name: [torch.tensor(group[name], dtype=torch.float64) for group in groups]
        for name in ("lr", "weight_decay")
    }
    weights = torch.ones(len(task.training.y), dtype=torch.float64)
    return {"hyper": hyper, "meta": {"weights": weights}}


def value(problem: fo.meta.Problem, eta: dict[str, Any]) -> float:
    """The clean loss after the steps; no graph, by the fast executors."""
    end = fo.meta.advance(problem, eta, problem.steps)
    with torch.no_grad():
        assert problem.outer_loss is not None
        return problem.outer_loss(end["params"], problem.outer_batch).item()


def with_weight(eta: dict[str, Any], example: int, weight: float) -> dict[str, Any]:
    weights = eta["meta"]["weights"].clone()
    weights[example] = weight
    return {**eta, "meta": {"weights": weights}}


def with_number(
    eta: dict[str, Any], name: str, group: int, number: float
) -> dict[str, Any]:
    values = [*eta["hyper"][name]]
    values[group] = torch.tensor(number, dtype=torch.float64)
    return {**eta, "hyper": {**eta["hyper"], name: values}}


class Checked(NamedTuple):
    """A number of eta: its hypergradient, and what differences say."""

    name: str
    hypergradient: float
    difference: float

    @property
    def error(self) -> float:
        return abs(self.hypergradient - self.difference) / abs(self.difference)


def check(
    problem: fo.meta.Problem,
    eta: dict[str, Any],
    grads: dict[str, Any],
    examples: Sequence[int],
) -> list[Checked]:
    """Every rate and decay of a group, and the weights of some examples."""
    found = []
    for name, values in eta["hyper"].items():
        for group, number in enumerate(values):
            at, h = number.item(), 1e-4 * (number.item() or 1.0)
            ahead, behind = (
                value(problem, with_number(eta, name, group, at + sign * h))
                for sign in (1, -1)
            )
            slope = grads["hyper"][name][group].item()
            found.append(Checked(f"{name}[{group}]", slope, (ahead - behind) / (2 * h)))
    for example in examples:
        ahead, behind = (
            value(problem, with_weight(eta, example, 1 + sign * 1e-4)) for sign in (1, -1)
        )
        slope = grads["meta"]["weights"][example].item()
        found.append(Checked(f"weights[{example}]", slope, (ahead - behind) / 2e-4))
    return found


class LeftOut(NamedTuple):
    """What the clean loss does where an example is not trained on."""

    wrong: bool
    predicted: float  #: by the hypergradient
    actual: float  #: by training


def leave_out(
    problem: fo.meta.Problem,
    eta: dict[str, Any],
    estimate: fo.meta.Estimate,
    task: Task,
    examples: Sequence[int],
) -> list[LeftOut]:
    before, slopes = estimate.value.item(), estimate.grads["meta"]["weights"]
    return [
        LeftOut(
            bool(task.wrong[i]),
            -slopes[i].item(),
            value(problem, with_weight(eta, i, 0.0)) - before,
        )
        for i in tqdm(examples, desc="leaving examples out")
    ]


def ranked_above(scores: Tensor, wrong: Tensor) -> float:
    """How often the wrong one of a pair has the larger score: the area under the ROC."""
    larger = scores[wrong, None] > scores[~wrong]
    equal = scores[wrong, None] == scores[~wrong]
    return (larger.double() + 0.5 * equal.double()).mean().item()
