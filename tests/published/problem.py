"""Where the published trajectories start, and the gradients that they follow."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

Shape = tuple[int, ...]
Arrays = list[np.ndarray]

#: the leaves, where an optimizer takes any
SHAPES: Sequence[Shape] = ((3, 2), (4,), ())
#: the steps after which parameters are kept
KEPT = (1, 2, 3, 5, 8, 13, 21, 34, 50)


def start(shapes: Sequence[Shape] = SHAPES) -> Arrays:
    """The first parameters, float64: of both signs, none near zero."""
    return [np.copysign(1.0 + 0.3 * wave, wave) for wave in _waves(shapes, 0)]


def gradient(step: int, shapes: Sequence[Shape] = SHAPES) -> Arrays:
    """Of the update number ``step``, from 1: smaller and of other signs as they go on."""
    size = 1.0 if step <= 10 else 0.05
    return [size * (wave + 0.2) for wave in _waves(shapes, step)]


def noise(step: int, shapes: Sequence[Shape] = SHAPES) -> Arrays:
    """For what is given standard normals: of their size, and of no pattern in time."""
    return [2.0 * wave for wave in _waves(shapes, 1000 + step)]


def hessian(step: int, shapes: Sequence[Shape] = SHAPES) -> Arrays | None:
    """An estimate of the Hessian's diagonal, at every third step."""
    if step % 3 != 1:
        return None
    return [wave * wave + 0.1 for wave in _waves(shapes, 2000 + step)]


#: hyperparameters that are data; where there is none a step has the default
GIVEN: Mapping[str, Callable[[int, Sequence[Shape]], Arrays | None]] = {
    "noise": noise,
    "hessian": hessian,
}


def _waves(shapes: Sequence[Shape], step: int) -> Arrays:
    first, waves = 0, []
    for shape in shapes:
        count = int(np.prod(shape))
        place = np.arange(first, first + count, dtype=np.float64).reshape(shape)
        waves.append(np.cos(1.7 * place * place + 0.37 * step * (1 + place)))
        first += 31
    return waves
