"""The first step of a rule: never built on this machine, and from the cache on disk.

    python benchmarks/cold.py          # four minutes on two cores

A fresh process imports torch and funcopt, and then times the first `update` of AdamW,
which also imports what tracing needs, and of every other rule in turn. With an empty
cache folder, and again with the folder that this has filled. Writes
``results/cold.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

from tqdm import tqdm

from report.targets import COLD

REPEATS = 31


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--child", action="store_true", help="measure once, print JSON")
    if parser.parse_args().child:
        print(json.dumps(first_steps()))
        return
    import measure
    import report

    samples: dict[str, dict[str, list[float]]] = {kind: {} for kind in COLD}
    for _ in tqdm(range(REPEATS), desc="cold start"):
        with tempfile.TemporaryDirectory() as folder:
            for kind in COLD:  # the first run fills the folder for the second
                for name, milliseconds in in_a_process(folder).items():
                    samples[kind].setdefault(name, []).append(milliseconds)
    result = {
        kind: {name: measure.summary(values) for name, values in rules.items()}
        for kind, rules in samples.items()
    }
    measure.save("cold", result)
    report.write()
    print(report.cold_table())


def in_a_process(cache: str) -> dict[str, float]:
    """`first_steps` in a fresh interpreter, on the cache in this folder."""
    done = subprocess.run(
        [sys.executable, __file__, "--child"],
        stdout=subprocess.PIPE,
        check=True,
        env={**os.environ, "FUNCOPT_CACHE": cache},
    )
    return json.loads(done.stdout)


def first_steps() -> dict[str, float]:
    """Milliseconds of each rule's first step, AdamW first."""
    import torch

    from contestants.rules import RULES
    from workloads import sizes

    shapes = sizes.TREES["small MLP"]
    params, grads = sizes.tensors(shapes, seed=1), sizes.tensors(shapes, seed=2)
    times = {}
    for name in sorted(RULES, key=lambda name: name != "adamw"):
        rule = RULES[name]
        if not rule.elementwise or rule.data(params):
            continue
        opt = rule.optimizer
        state = opt.init(params)
        start = time.perf_counter()
        found, _ = opt.update(grads, state, params)
        times[name] = 1e3 * (time.perf_counter() - start)
        expected, _ = opt.update(grads, state, params, execution="reference")
        torch.testing.assert_close(found, expected)
    return times


if __name__ == "__main__":
    main()
