"""Run a published implementation on the problem, and keep what it makes of it."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from published.problem import KEPT, SHAPES, Arrays, Shape, gradient, start

HERE = Path(__file__).parent

#: parameters of the next step, from the gradients of this one; arrays of float64
Stepper = Callable[[Arrays], Arrays]


def trajectory(stepper: Stepper, shapes: Sequence[Shape] = SHAPES) -> list[Any]:
    """The parameters after each step that is kept."""
    kept = []
    for step in range(1, max(KEPT) + 1):
        params = stepper(gradient(step, shapes))
        if step in KEPT:
            kept.append([p.tolist() for p in params])
    return kept


def optax_stepper(transform: Any, shapes: Sequence[Shape] = SHAPES) -> Stepper:
    """Of an optax transformation, in float64."""
    import jax
    import optax

    jax.config.update("jax_enable_x64", True)
    params: Any = [jax.numpy.asarray(p) for p in start(shapes)]
    state = transform.init(params)

    def step(grads: Arrays) -> Arrays:
        nonlocal params, state
        given = [jax.numpy.asarray(g) for g in grads]  # a 0-d one is a number to NumPy
        updates, state = transform.update(given, state, params)
        params = optax.apply_updates(params, updates)
        return params

    return step


def torch_stepper(
    make: Callable[[Any], Any], shapes: Sequence[Shape] = SHAPES
) -> Stepper:
    """Of a torch.optim.Optimizer that ``make`` makes of parameters, in float64."""
    import torch

    params = [torch.tensor(p, requires_grad=True) for p in start(shapes)]
    optimizer = make(params)

    def step(grads: Arrays) -> Arrays:
        for p, g in zip(params, grads):
            p.grad = torch.tensor(g)
        optimizer.step()
        return [p.detach().numpy() for p in params]

    return step


def schedule_free_stepper(make: Callable[[Any], Any]) -> Stepper:
    """Of an optimizer of the package schedulefree: parameters y, then averages x."""
    import torch

    params = [torch.tensor(p, requires_grad=True) for p in start()]
    optimizer = make(params)
    optimizer.train()

    def held() -> Arrays:
        return [p.detach().numpy().copy() for p in params]

    def step(grads: Arrays) -> Arrays:
        for p, g in zip(params, grads):
            p.grad = torch.tensor(g)
        optimizer.step()
        y = held()
        optimizer.eval()
        x = held()
        optimizer.train()
        for p, value in zip(params, y):  # which the way there and back has rounded
            p.detach().copy_(torch.tensor(value))
        return [*y, *x]

    return step


def ascending(stepper: Stepper) -> Stepper:
    """The same on the negative gradients, where a package has no flag for it."""
    return lambda grads: stepper([-g for g in grads])


def write(
    optimizer: str,
    source: str,
    runs: Iterable[tuple[Mapping[str, Any], Stepper]],
    shapes: Sequence[Shape] = SHAPES,
    given: Sequence[str] = (),
    evaluated: bool = False,
) -> None:
    """The trajectories of several settings, as ``<optimizer>.json``.

    ``given`` names what the problem has for a hyperparameter that is data. What a model
    is ``evaluated`` with stands after the parameters.
    """
    found = {
        "optimizer": optimizer,
        "source": source,
        "shapes": shapes,
        "steps": KEPT,
        "given": given,
        "evaluated": evaluated,
        "runs": [
            {"arguments": dict(arguments), "params": trajectory(stepper, shapes)}
            for arguments, stepper in runs
        ],
    }
    path = HERE / f"{optimizer}.json"
    path.write_text(json.dumps(found) + "\n")
