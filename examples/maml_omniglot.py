"""Few-shot classification by meta-learning, on printed glyphs or on Omniglot.

    python examples/maml_omniglot.py                            # glyphs, 3 minutes
    python examples/maml_omniglot.py --data DIR --minutes 5     # Omniglot
    python examples/maml_omniglot.py --method lslr --iterations 2000

Meta-trains on some alphabets, then learns tasks from alphabets never seen. Prints a
table; writes results.json, pictures and a checkpoint to a folder under runs/. Ctrl-C
stops early with what there is, and --resume goes on from there, bit for bit.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
from tqdm import tqdm

import funcopt as fo
from fewshot import checkpoint, glyphs, nets, omniglot, options, pictures, report
from fewshot.episodes import Distortion, Episodes, Tasks
from fewshot.evaluation import Estimate, evaluate, predict
from fewshot.methods import METHODS
from fewshot.split import Split
from fewshot.training import Progress, beginning, iterations
from funcopt import tree

SAVE_EVERY = 60.0  # seconds of training


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 2 after an error of the user's; 130 after Ctrl-C."""
    parser = options.parser("Few-shot classification by meta-learning.")
    try:
        args, progress = options.parse(parser, argv)
        splits = omniglot.load(args.data) if args.data else glyphs.load()
        first, *streams = generators(args.seed)
        training, testing = (
            episodes(args, split, stream)
            for split, stream in zip(splits, streams, strict=True)
        )
        checkpoint.prepare(args.checkpoint)
        args.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    if args.threads:
        torch.set_num_threads(args.threads)
    if args.net == "conv":
        net = nets.conv4(args.ways, filters=args.filters)
    else:
        net = nets.mlp(args.ways)
    method = METHODS[args.method](net.apply, args.inner_steps, args.inner_lr)
    outer = fo.adam(lr=args.outer_lr)
    if progress is None:
        theta = method.init(net.init(first))
        progress = beginning(theta, outer, training.generator)
    progress = placed(progress, args.device)

    progress, interrupted = meta_train(args, method, outer, training, progress)

    theta = progress.average
    before, after = evaluate(method, net.apply, theta, testing, args.eval_tasks)
    results = report.results(args, splits, progress, interrupted, before, after)
    (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")

    task = tree.map(itemgetter(0), testing.sample(1))  # the next one, unchosen
    draw(args, method, net, progress, task, after)
    print(report.table(args, splits, progress, before, after))
    print(f"Pictures, results.json and the checkpoint are in {args.out}")
    return 130 if interrupted else 0


def generators(seed: int) -> list[torch.Generator]:
    """Unrelated ones for the first weights, the training tasks and the test tasks."""
    root = torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**62, (3,), generator=root).tolist()
    return [torch.Generator().manual_seed(s) for s in seeds]


def episodes(args: Any, split: Split, generator: torch.Generator) -> Episodes:
    images = split.images.to(args.device)
    distort = None if args.data else Distortion()  # a glyph has but twelve faces
    return Episodes(
        images, args.ways, args.shots, args.queries, distort, generator=generator
    )


def placed(progress: Progress, device: torch.device) -> Progress:
    """θ and the outer state on ``device``; generators and records stay on the CPU."""
    theta, average, state = tree.map(
        lambda x: x.to(device), (progress.theta, progress.average, progress.state)
    )
    return progress._replace(theta=theta, average=average, state=state)


def meta_train(
    args: Any,
    method: fo.meta.Family,
    outer: fo.Optimizer,
    tasks: Episodes,
    progress: Progress,
) -> tuple[Progress, bool]:
    """Trains to the limit or to Ctrl-C, and saves; says whether it was Ctrl-C."""
    settings = options.as_data(args)
    last = args.iterations or math.inf
    seconds = 60 * (args.minutes or math.inf)
    saved, interrupted = progress.seconds, False
    steps = iterations(method, outer, tasks, args.meta_batch, progress)
    bar = tqdm(
        total=args.iterations,
        initial=progress.iteration,
        desc=args.method if args.iterations else f"{args.method}, {args.minutes:g} min",
        unit=" it",
        dynamic_ncols=True,
    )
    try:
        while progress.iteration < last and progress.seconds < seconds:
            progress = next(steps)
            loss, accuracy = progress.history[-50:].mean(0).tolist()
            figures = f"loss {loss:.3f}, accuracy {100 * accuracy:.1f} %"
            bar.set_postfix_str(figures, refresh=False)
            bar.update()
            if progress.seconds - saved > SAVE_EVERY:
                checkpoint.save(args.checkpoint, settings, progress)
                saved = progress.seconds
    except KeyboardInterrupt:
        interrupted = True
    bar.close()
    checkpoint.save(args.checkpoint, settings, progress)
    if interrupted:
        print(f"Stopped. To go on from here: --resume {args.checkpoint}", flush=True)
    return progress, interrupted


def draw(
    args: Any,
    method: fo.meta.Family,
    net: nets.Net,
    progress: Progress,
    task: Tasks,
    after: Estimate,
) -> None:
    """The run's pictures, into its folder."""
    theta, out = progress.average, args.out
    kind = f"{args.method}, {args.ways}-way {args.shots}-shot"
    curve, history = out / "curve.png", progress.history
    if len(history):  # not where Ctrl-C came before the first iteration
        pictures.learning_curve(curve, history, after, args.ways, kind)
    logits = predict(method, net.apply, theta, task)
    title = f"One task from alphabets never seen ({kind})"
    pictures.one_task(out / "task.png", task, logits, title)
    title = f"Inner learning rates, first all {args.inner_lr:g} ({kind})"
    if args.method == "metasgd":
        picture = pictures.rates_per_weight
    elif args.method == "lslr":
        picture = pictures.rates_per_step
    else:
        return
    picture(out / "rates.png", theta["lr"], args.inner_lr, title)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before training, or a second one after it
        sys.exit(130)
