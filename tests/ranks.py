"""What each process does in test_ranks.py, and a line of JSON for what came of it.

python tests/ranks.py RANK WORLD FILE CASE CASE ...
torchrun --nproc-per-node 2 tests/ranks.py CASE CASE ...
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import funcopt as fo
from funcopt import tree


def f64(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def theta() -> dict[str, Any]:
    return {"w": f64(3, 2, seed=1), "gap": None, "lr": torch.tensor(0.1)}  # two dtypes


TASKS = {"x": f64(5, 4, 3, seed=3), "y": f64(5, 4, 2, seed=4)}


def task_loss(theta: Any, task: Any) -> Any:
    def loss(w: Tensor, batch: Any) -> Tensor:
        return (torch.tanh(batch["x"] @ w) - batch["y"]).square().mean()

    hyper = {"lr": theta["lr"]}
    end = fo.unroll(fo.adam(), loss, theta["w"], task, steps=2, hyper=hyper)
    return loss(end.params, task), end.losses


def meta(part: slice, theta: Any, group: Any, task_loss: Any = task_loss) -> Any:
    f = fo.meta.value_and_grad(task_loss, has_aux=True, process_group=group)
    return f(theta, tree.map(lambda x: x[part], TASKS))


def mine(rank: int) -> slice:
    return slice(0, 3) if rank == 0 else slice(3, 5)


# The cases: each is given its rank and the group, and returns what JSON can hold. -------


def numbers(rank: int, group: Any) -> Any:
    (loss, aux), grads = meta(mine(rank), theta(), group)
    return {
        "loss": loss.item(),
        "w": grads["w"].tolist(),
        "lr": [grads["lr"].item(), str(grads["lr"].dtype)],
        "aux": aux.tolist(),
        "gap": grads["gap"],
    }


def failing(rank: int, group: Any) -> Any:
    def fails(theta: Any, task: Any) -> Any:
        raise KeyError("no such task")

    def call() -> Any:
        meta(mine(rank), theta(), group, fails if rank else task_loss)

    # The next meta-step works: nobody is left waiting for the last one.
    return {**raised(call), "loss": numbers(rank, group)["loss"]}


def without_tasks(rank: int, group: Any) -> Any:
    return raised(lambda: meta(slice(0, 3 * (1 - rank)), theta(), group))


def another_theta(rank: int, group: Any) -> Any:
    given = {**theta(), **({"v": f64(2, seed=9)} if rank else {})}
    return raised(lambda: meta(mine(rank), given, group))


def another_precision(rank: int, group: Any) -> Any:
    """Half precision is summed as float32: sums alone do not tell it from that."""
    kind = torch.bfloat16 if rank else torch.float32

    def of_weights(theta: Any, task: Any) -> Any:
        return (task["x"] @ theta["w"].double()).square().mean(), task["x"]

    given = {"w": f64(3, 2, seed=1).to(kind)}
    return raised(lambda: meta(mine(rank), given, group, of_weights))


def within_grad(rank: int, group: Any) -> Any:
    """One rank asks for a derivative of the sums; the other is told."""

    def value(w: Tensor) -> Tensor:
        return meta(mine(rank), {**theta(), "w": w}, group)[0][0]

    call = value if rank else torch.func.grad(value)
    return raised(lambda: call(theta()["w"]))


def with_a_graph(rank: int, group: Any) -> Any:
    given = {**theta(), "w": f64(3, 2, seed=1).requires_grad_()}
    return raised(lambda: meta(mine(rank), given, group))


def ended(rank: int, group: Any) -> Any:
    if rank:
        return {}  # without a word; the other waits no longer than the timeout
    return raised(lambda: meta(mine(rank), theta(), group))


def silent(rank: int, group: Any) -> Any:
    """A process that lives, and does not come while its group's timeout lasts."""
    short = dist.new_group(timeout=timedelta(seconds=2))
    meta(mine(rank), theta(), short)  # which works: all are there
    found = {} if rank else raised(lambda: meta(mine(rank), theta(), short))
    dist.barrier(group)  # where it waits until the other has given up
    return found


def raised(call: Callable[[], Any]) -> dict[str, str]:
    try:
        call()
    except Exception as error:
        return {"error": type(error).__name__, "words": str(error)}
    return {"error": "none"}


def elementwise(rank: int, group: Any) -> Any:
    """How far steps on DTensors are from those on plain tensors, and where they lie."""
    from table import QUICK, slots_of
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    places: dict[str, Any] = {"sharded": [Shard(0)], "replicated": [Replicate()]}
    whole = {name: f64(4, 3, seed=i) for i, name in enumerate(places)}
    gradient = {name: f64(4, 3, seed=9 + i) for i, name in enumerate(places)}

    def spread(values: Any) -> Any:
        return {n: distribute_tensor(x, mesh, places[n]) for n, x in values.items()}

    found = {}
    for case in (case for case in QUICK if case.row.elementwise):
        opt, outcomes = case.optimizer(), []
        for params, grads in ((whole, gradient), (spread(whole), spread(gradient))):
            state = opt.init(params)
            for _ in range(2):
                params, state = opt.update(grads, state, params)
            outcomes.append((params, state))
        distance = 0.0
        for a, b in zip(*map(tree.leaves, outcomes)):
            b = b.full_tensor() if isinstance(b, DTensor) else b
            distance = max(distance, (a - b).abs().max().item())
        params, state = outcomes[1]
        spread_out = tree.leaves([params, *(state[name] for name in slots_of(state))])
        lie = [str(getattr(x, "placements", None)) for x in spread_out]
        found[str(case)] = {"distance": distance, "placements": lie}
    return found


# To start two processes, and to be one. -------------------------------------------------

WORLD = 2


def outcomes(script: str, cases: Sequence[str], folder: Path) -> dict[str, Any]:
    """What each rank says of each case, by the script's `main` in this folder."""
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(WORLD), folder / "store", *cases],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            cwd=folder,
        )
        for rank in range(WORLD)
    ]
    try:
        said = [process.communicate(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    lines = [[json.loads(line) for line in out.splitlines()] for out, _ in said]
    assert all(len(each) == len(cases) for each in lines), [error for _, error in said]
    return {name: [each[i][name] for each in lines] for i, name in enumerate(cases)}


def by_torchrun(script: str, cases: Sequence[str], folder: Path) -> dict[str, Any]:
    """The same of processes that torchrun starts."""
    how = ["--standalone", f"--nproc-per-node={WORLD}", "--redirects=3"]
    call = [sys.executable, "-m", "torch.distributed.run", *how, "--log-dir", folder]
    run = subprocess.run(
        [*call, script, *cases], capture_output=True, text=True, env=environment()
    )
    logs = sorted(folder.glob("**/stdout.log"), key=lambda log: log.parent.name)
    lines = [[*map(json.loads, log.read_text().splitlines())] for log in logs]
    assert [len(each) for each in lines] == [len(cases)] * WORLD, run.stderr
    return {name: [each[i][name] for each in lines] for i, name in enumerate(cases)}


def environment() -> dict[str, str]:
    found = {**os.environ, "PYTHONPATH": str(Path(fo.__file__).parents[1])}
    return found | ({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {})


def main(cases: Mapping[str, Callable[[int, Any], Any]]) -> None:
    """Print a line of JSON for each case that the command line names."""
    names, how = sys.argv[1:], {}
    if not dist.is_torchelastic_launched():
        rank, world, file, *names = names
        how = {"init_method": f"file://{file}", "rank": int(rank)}
        how["world_size"] = int(world)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=30), **how)
    for name in names:  # one after another: to start takes seconds
        outcome = cases[name](dist.get_rank(), dist.group.WORLD)
        print(json.dumps({name: outcome}), flush=True)
    sys.stdout.flush()
    os._exit(0)  # where the other has ended, there is no orderly end


if __name__ == "__main__":
    main(globals())
