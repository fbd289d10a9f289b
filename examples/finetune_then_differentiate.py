"""Fine-tune with `funcopt.torch_optim`, differentiate its next steps, and go on.

    python examples/finetune_then_differentiate.py            # about a minute on a CPU
    python examples/finetune_then_differentiate.py --corrupted 0.4 --steps 40

A network that knows the digits 0 to 4 learns 5 to 9 by AdamW, in the classic loop; some
of its labels are wrong. In mid-training ``fo.from_torch`` turns the optimizer, with its
groups and state, into a function of the next steps. Its derivative says what every
example, and every group's rate and weight decay, will do to the loss on a few clean
digits. It is compared with finite differences, and with trainings that leave an example
out. Then weights and rates are learned by it, the optimizer is given what came out, and
the loop goes on. Prints tables; writes ``results.json`` and a picture to
``runs/finetune_then_differentiate``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import funcopt as fo
from digits import data, handover, handover_picture
from digits.data import Digits
from digits.handover import LeftOut, Params, Task
from digits.network import Network, groups
from digits.training import Training
from funcopt import torch_optim as optim

EXAMPLES, CLEAN, BATCH = 320, 100, 64
RATE, BACKBONE = 4e-3, 0.1  # of the head; the backbone's share of it


class Trained(NamedTuple):
    """Where the classic loop stands."""

    net: nn.Module
    optimizer: optim.Adapter
    curve: list[tuple[int, float]]


class Learned(NamedTuple):
    """What the next steps should have been like."""

    eta: dict[str, Any]
    end: dict[str, Any]  #: parameters and state after them
    values: list[float]  #: the clean loss, of each iteration


def task_of(options: argparse.Namespace) -> tuple[Task, Digits]:
    """5 to 9 in float64, with wrong labels; and 0 to 4 to start from."""
    everything, _ = data.load(options.seed, training=1797)
    old, new = (data.only(everything, part) for part in (range(5), range(5, 10)))
    new = Digits(new.x.double(), new.y)
    given, rest = new.rows(slice(EXAMPLES)), new.rows(slice(EXAMPLES, None))
    generator = data.seeded(options.seed)
    labels = handover.with_wrong_labels(given, options.corrupted, generator)
    clean, test = rest.rows(slice(CLEAN)), rest.rows(slice(CLEAN, None))
    wrong = labels != given.y
    task = Task(Digits(given.x, labels), clean, test, wrong, given.y)
    return task, old


def batches(steps: int, generator: torch.Generator) -> Tensor:
    """Rows [steps, BATCH], every example once in an epoch."""
    epochs = -(-steps * BATCH // EXAMPLES)
    rows = [torch.randperm(EXAMPLES, generator=generator) for _ in range(epochs)]
    return torch.cat(rows).view(-1, BATCH)[:steps]


def train(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    params: Params,
    task: Task,
    rows: Tensor,
    weights: Tensor,
    first: int = 0,
) -> list[tuple[int, float]]:
    """The classic loop; the test accuracy after some of the steps."""
    curve = []
    for step, batch in enumerate(rows, first + 1):
        optimizer.zero_grad()
        loss = handover.weighted_loss(net, params, task.training, batch, weights)
        loss.backward()
        optimizer.step()
        if step % 2 == 0 or step == first + len(rows):
            curve.append((step, accuracy(net, params, task.test)))
    return curve


def accuracy(net: nn.Module, params: Params, digits: Digits) -> float:
    with torch.no_grad():
        right = handover.logits(net, params, digits.x).argmax(1) == digits.y
    return right.double().mean().item()


def learn(
    problem: fo.meta.Problem, eta: dict[str, Any], options: argparse.Namespace
) -> Learned:
    """Weights from 0 to 2 and positive rates, by Adam on the hypergradient."""
    constrain = fo.meta.constrained(
        {"hyper": {"lr": fo.meta.exp()}, "meta": {"weights": fo.meta.box(0.0, 2.0)}}
    )
    free = constrain.inverse({"hyper": {"lr": eta["hyper"]["lr"]}, "meta": eta["meta"]})
    constrained = replace(problem, constrain=constrain)
    outer = fo.adam(lr={"hyper": 0.05, "meta": 0.3})
    state, values = outer.init(free), []
    for _ in tqdm(range(options.iterations), desc="learning weights and rates"):
        found = fo.meta.reverse(constrained, free)
        values.append(found.value.item())
        free, state = outer.update(found.grads, state, free)
    end = fo.meta.advance(constrained, free, problem.steps)
    values.append(handover.value(constrained, free))
    return Learned(constrain(free), end, values)


def go_on(
    start: Trained,
    problem: fo.meta.Problem,
    learned: Learned,
    task: Task,
    rows: Tensor,
    done: int,
) -> tuple[dict[str, list[tuple[int, float]]], float]:
    """Three ways from where the steps were differentiated, on the same batches.

    Also the largest difference between the next steps as a function and as a loop.
    """
    net, ones = start.net, torch.ones(EXAMPLES, dtype=torch.float64)
    curves, ends = {}, {}
    assert problem.state is not None
    for way, weights in (
        ("as before", ones),
        ("right labels only", (~task.wrong).double()),
    ):
        optimizer, params = fo.to_torch(problem.opt, problem.params, problem.state)
        near, far = rows[: problem.steps], rows[problem.steps :]
        curve = train(net, optimizer, params, task, near, weights, done)
        ends[way] = [{n: p.detach().clone() for n, p in g.items()} for g in params]
        there = done + problem.steps
        curves[way] = curve + train(net, optimizer, params, task, far, weights, there)
    plain = fo.meta.advance(
        problem, handover.as_it_runs(start.optimizer, task), problem.steps
    )
    apart = max(
        (p - group[name]).abs().max().item()
        for end, group in zip(ends["as before"], plain["params"])
        for name, p in end.items()
    )

    start.optimizer.load(learned.end["params"], learned.end["state"])
    params, there = handover.live(start.optimizer), done + problem.steps
    curve = [(there, accuracy(net, params, task.test))]
    weights = learned.eta["meta"]["weights"]
    curve += train(
        net, start.optimizer, params, task, rows[problem.steps :], weights, there
    )
    curves["learned weights and rates"] = [start.curve[-1], *curve]
    return curves, apart


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(1)  # small tensors; and the same numbers on every machine
    started = time.perf_counter()
    task, old = task_of(options)
    start, rows = fine_tune(task, old, options)
    near = rows[options.before : options.before + options.steps]
    problem = handover.next_steps(start.optimizer, start.net, task, near)
    eta = handover.as_it_runs(start.optimizer, task)
    estimate = fo.meta.reverse(problem, eta)
    slopes = estimate.grads["meta"]["weights"]
    order = [i for i in slopes.argsort(descending=True).tolist() if slopes[i]]
    checks = handover.check(problem, eta, estimate.grads, order[:: options.sparse])
    some = torch.randperm(EXAMPLES, generator=data.seeded(options.seed)).tolist()
    some = some[: options.left_out]
    left_out = handover.leave_out(problem, eta, estimate, task, some)
    losses = losses_of_examples(start.net, task)
    learned = learn(problem, eta, options)
    curves, apart = go_on(
        start, problem, learned, task, rows[options.before :], options.before
    )
    found = {
        "largest_error": max(c.error for c in checks),
        "checks": [c._asdict() for c in checks],
        "loop_against_function": apart,
        "wrong_ranked_above_right": {
            "by hypergradient": handover.ranked_above(slopes, task.wrong),
            "by training loss": handover.ranked_above(losses, task.wrong),
        },
        "left_out": [each._asdict() for each in left_out],
        "correlation": correlation(left_out),
        "clean_loss": {"before": learned.values[0], "after": learned.values[-1]},
        "rates": {
            name: [rate.item() for rate in each["hyper"]["lr"]]
            for name, each in (("before", eta), ("learned", learned.eta))
        },
        "test_accuracy": {way: curve[-1][1] for way, curve in curves.items()},
        "seconds": time.perf_counter() - started,
    }
    print(f"\n{tables(found)}\n")
    options.out.mkdir(parents=True, exist_ok=True)
    asked = ("corrupted", "before", "steps", "after", "iterations", "left_out", "seed")
    settings = {key: getattr(options, key) for key in asked}
    results = {"settings": settings, "torch": torch.__version__, **found}
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    path = options.out / "finetune_then_differentiate.png"
    shown = handover_picture.Shown(
        task, slopes, losses, checks, left_out, start.curve, curves, options.steps
    )
    handover_picture.save(path, shown)
    print(f"results.json and {path.name} are in {options.out}")


def fine_tune(
    task: Task, old: Digits, options: argparse.Namespace
) -> tuple[Trained, Tensor]:
    """The classic loop for a while; and the rows of all batches, those to come too."""
    known = Training(optim.AdamW, steps=options.known, seed=options.seed, classes=5)
    known.run(old, old, every=options.known, title="0 to 4")
    torch.manual_seed(options.seed)
    net = Network(5, dropout=0.0).double()
    net.backbone.load_state_dict(known.net.backbone.state_dict())
    optimizer = optim.AdamW(groups(net, RATE, BACKBONE))
    total = options.before + options.steps + options.after
    rows = batches(total, data.seeded(options.seed + 1))
    ones = torch.ones(EXAMPLES, dtype=torch.float64)
    params = handover.live(optimizer)
    curve = [(0, accuracy(net, params, task.test))]
    curve += train(net, optimizer, params, task, rows[: options.before], ones)
    return Trained(net, optimizer, curve), rows


def losses_of_examples(net: nn.Module, task: Task) -> Tensor:
    """What is usually looked at to find wrong labels."""
    with torch.no_grad():
        found = net(task.training.x)
    return F.cross_entropy(found, task.training.y, reduction="none")


def correlation(left_out: Sequence[LeftOut]) -> float:
    pairs = torch.tensor([[each.predicted, each.actual] for each in left_out])
    return torch.corrcoef(pairs.T)[0, 1].item()


def tables(found: dict[str, Any]) -> str:
    ranked, rates = found["wrong_ranked_above_right"], found["rates"]
    clean = found["clean_loss"]
    lines = [
        "| the next steps, differentiated | |",
        "| --- | --- |",
        f"| {len(found['checks'])} hypergradients against differences, "
        f"largest relative error | {found['largest_error']:.1e} |",
        "| the steps as a function against the loop "
        f"| {found['loop_against_function']:.1e} |",
        f"| left out: correlation of predicted and actual | {found['correlation']:.3f} |",
        *(
            f"| a wrong label ranks above a right one, {way} | {100 * share:.1f} % |"
            for way, share in ranked.items()
        ),
        f"| loss on clean digits, as before | {clean['before']:.3f} |",
        f"| ... with learned weights and rates | {clean['after']:.3f} |",
        "",
        "| rates | backbone | its biases, norms | head | its bias |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {name} | " + " | ".join(f"{rate:.2g}" for rate in each) + " |"
            for name, each in rates.items()
        ),
        "",
        "| trained to the end | test accuracy |",
        "| --- | --- |",
        *(
            f"| {way} | {100 * value:.1f} % |"
            for way, value in found["test_accuracy"].items()
        ),
    ]
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary)
    add = parser.add_argument
    add("--corrupted", type=float, default=0.3, help="part of the labels (0.3)")
    add("--before", type=int, help="steps of the loop, to begin with (30; quick: 10)")
    add("--steps", type=int, help="steps to differentiate (20; quick: 5)")
    add("--after", type=int, help="steps of the loop, to end with (50; quick: 10)")
    add("--iterations", type=int, help="of learning weights (40; quick: 5)")
    add("--left-out", type=int, help="examples to train without (80; quick: 8)")
    add("--quick", action="store_true", help="short trainings, and few of them")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("runs/finetune_then_differentiate"))
    options = parser.parse_args(arguments)
    usual = {"before": 30, "steps": 20, "after": 50, "iterations": 40, "left_out": 80}
    small = {"before": 10, "steps": 5, "after": 10, "iterations": 5, "left_out": 8}
    for name, number in (small if options.quick else usual).items():
        if getattr(options, name) is None:
            setattr(options, name, number)
    if min(getattr(options, name) for name in usual) < 1 or options.left_out > EXAMPLES:
        parser.error("--before, --steps, --after, --iterations, --left-out: 1 or more")
    if not 0 < options.corrupted < 1:
        parser.error("--corrupted: between 0 and 1")
    options.sparse = 80 if options.quick else 10
    options.known = 30 if options.quick else 150
    return options


if __name__ == "__main__":
    main()
