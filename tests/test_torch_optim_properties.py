"""Whatever happens in a loop, and in whatever order: it ends where torch.optim's does."""

import copy
import io
import pickle
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_torch_optim import assert_like
from torch import Tensor
from torch.nn import Parameter

from funcopt import torch_optim

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # torch warns of what is done here
    pytest.mark.usefixtures("float64_scalars"),
]

#: what of each class is drawn: numbers, and flags
NUMBERS: dict[str, dict[str, list[Any]]] = {
    "ASGD": {"lr": [0.01, 0.1], "lambd": [0.0, 0.1], "t0": [1e6, 2.0]},
    "Adadelta": {"lr": [0.1, 1.0], "rho": [0.5, 0.9], "weight_decay": [0, 0.1]},
    "Adafactor": {"lr": [0.01, 0.1], "d": [1.0, 2.0], "weight_decay": [0.0, 0.1]},
    "Adagrad": {"lr": [0.01, 0.1], "lr_decay": [0, 0.1]},
    "Adam": {"lr": [0.01, 0.1], "betas": [(0.9, 0.99), [0.5, 0.9]]},
    "AdamW": {"lr": [0.01, 0.1], "weight_decay": [0.0, 0.1], "eps": [1e-8, 1e-3]},
    "Adamax": {"lr": [0.01, 0.1], "betas": [(0.9, 0.99), (0.5, 0.9)]},
    "Muon": {"lr": [0.01, 0.1], "momentum": [0.5, 0.95]},
    "NAdam": {"lr": [0.01, 0.1], "momentum_decay": [4e-3, 0.1]},
    "RAdam": {"lr": [0.01, 0.1], "betas": [(0.9, 0.999), (0.5, 0.9)]},
    "RMSprop": {"lr": [0.01, 0.1], "alpha": [0.5, 0.99], "weight_decay": [0, 0.1]},
    "Rprop": {"lr": [0.01, 0.1], "etas": [(0.5, 1.2), (0.3, 1.5)]},
    "SGD": {"lr": [0.01, 0.1], "weight_decay": [0, 0.1]},
    "SparseAdam": {"lr": [0.01, 0.1], "betas": [(0.9, 0.99), (0.5, 0.9)]},
}
FLAGS: dict[str, list[dict[str, Any]]] = {
    "Adam": [{}, {"amsgrad": True}],
    "AdamW": [{}, {"maximize": True}],
    "RMSprop": [{}, {"centered": True, "momentum": 0.9}],
    "SGD": [{}, {"momentum": 0.9}, {"momentum": 0.5, "nesterov": True}],
}
DTYPES = [[torch.float64], [torch.float32], [torch.float64, torch.float32]]
MATRICES = [(3, 4), (2, 2), (4, 2)]
SHAPES = [*MATRICES, (5,), (), (0, 3), (2, 3, 2, 2)]
LIBRARIES = torch_optim, torch.optim


class Program(NamedTuple):
    name: str
    seed: int
    dtypes: list[torch.dtype]
    changes: list[str]


class Loop:
    """One library's side of a program."""

    def __init__(self, library: Any, program: Program) -> None:
        self.library, self.name = library, program.name
        self.dtypes = program.dtypes
        random = Random(program.seed)
        flags = random.choice(FLAGS.get(self.name, [{}]))
        self.given = {**drawn(self.name, random), **flags}
        params = [self.parameter(random) for _ in range(random.randint(2, 6))]
        if self.name not in ("Muon", "SparseAdam") and random.random() < 0.2:
            params += columns(normal((3, 4), self.dtypes[0], random))
        cut = random.randint(1, len(params) - 1)
        second = {"params": params[cut:], **drawn(self.name, random)}
        groups = [{"params": params[:cut]}, second]
        self.opt = getattr(library, self.name)(groups, **self.given)

    def parameter(self, random: Random) -> Parameter:
        # torch's Adafactor divides by the count of an empty tensor
        matrices = self.name in ("Adafactor", "Muon", "SparseAdam")
        value = normal(
            random.choice(MATRICES if matrices else SHAPES),
            random.choice(self.dtypes),
            random,
        )
        return Parameter(lying(value, random))

    def params(self) -> list[Tensor]:
        return [p for group in self.opt.param_groups for p in group["params"]]

    def draw_gradients(self, random: Random) -> None:
        for p in self.params():
            p.grad = None
            if random.random() < 0.85:
                g = normal(p.shape, p.dtype, random)
                p.grad = sparse(g) if self.name == "SparseAdam" else lying(g, random)

    def step(self, random: Random) -> None:
        self.draw_gradients(random)
        self.opt.step()


def drawn(name: str, random: Random) -> dict[str, Any]:
    return {key: random.choice(choices) for key, choices in NUMBERS[name].items()}


def normal(shape: Any, dtype: torch.dtype, random: Random) -> Tensor:
    generator = torch.Generator().manual_seed(random.randrange(2**31))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def columns(x: Tensor) -> list[Any]:
    """Parameters that lie between each other."""
    return [x[:, i].requires_grad_() for i in range(x.shape[1])]


def sparse(g: Tensor) -> Tensor:
    return (g * (torch.arange(len(g)) % 2).unsqueeze(1)).to_sparse(1)


def lying(x: Tensor, random: Random) -> Tensor:
    """The same values, perhaps in another order of memory, or with gaps."""
    kind = random.choice(["", "", "transposed", "with gaps", "channels last"])
    if kind == "transposed" and x.ndim > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "with gaps" and x.ndim:
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
        wide[..., ::2] = x
        return wide[..., ::2]
    if kind == "channels last" and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x


# Changes ------------------------------------------------------------------------------


def several_steps(loop: Loop, random: Random) -> None:
    for _ in range(3):
        loop.step(random)


def other_numbers(loop: Loop, random: Random) -> None:
    random.choice(loop.opt.param_groups).update(drawn(loop.name, random))


def a_rate_of_zero(loop: Loop, random: Random) -> None:
    random.choice(loop.opt.param_groups)["lr"] = 0.0


def a_scheduler(loop: Loop, random: Random) -> None:
    scheduler = torch.optim.lr_scheduler.ExponentialLR(loop.opt, 0.9)
    for _ in range(2):
        loop.step(random)
        scheduler.step()


def a_closure(loop: Loop, random: Random) -> None:
    def closure() -> float:
        loop.draw_gradients(random)
        return 3.5

    assert loop.opt.step(closure) == 3.5


def another_group(loop: Loop, random: Random) -> None:
    loop.opt.add_param_group({"params": [loop.parameter(random)], "lr": 0.05})


def a_parameter_moves_to_another_group(loop: Loop, random: Random) -> None:
    first, second = loop.opt.param_groups[:2]
    if len(second["params"]) > 1:
        first["params"].append(second["params"].pop())


def groups_made_anew(loop: Loop, random: Random) -> None:
    loop.opt.param_groups = [dict(group) for group in loop.opt.param_groups]
    other_numbers(loop, random)


def saved_and_loaded(loop: Loop, random: Random) -> None:
    torch.save(loop.opt.state_dict(), file := io.BytesIO())
    file.seek(0)
    groups = [{"params": [*group["params"]]} for group in loop.opt.param_groups]
    loop.opt = getattr(loop.library, loop.name)(groups, **loop.given)
    loop.opt.load_state_dict(torch.load(file, weights_only=True))


def copied(loop: Loop, random: Random) -> None:
    loop.opt = copy.deepcopy(loop.opt)


def pickled(loop: Loop, random: Random) -> None:
    loop.opt.zero_grad()
    loop.opt = pickle.loads(pickle.dumps(loop.opt))


def forgotten(loop: Loop, random: Random) -> None:
    loop.opt.state.clear()


def one_forgotten(loop: Loop, random: Random) -> None:
    loop.opt.state.pop(random.choice(loop.params()), None)


def other_memory(loop: Loop, random: Random) -> None:
    p = random.choice(loop.params())
    p.data = lying(normal(p.shape, p.dtype, random), random)


def written_over(loop: Loop, random: Random) -> None:
    with torch.no_grad():
        random.choice(loop.params()).mul_(2)


def other_state(loop: Loop, random: Random) -> None:
    p = random.choice(loop.params())
    for key, value in loop.opt.state.get(p, {}).items():
        if isinstance(value, Tensor):
            loop.opt.state[p][key] = lying(value / 2, random) if value.ndim else +value


def frozen(loop: Loop, random: Random) -> None:
    p = random.choice(loop.params())
    p.requires_grad_(not p.requires_grad)


def inference_mode(loop: Loop, random: Random) -> None:
    several_steps(loop, random)  # what state there is was made outside of it
    live = [p for p in loop.params() if p in loop.opt.state]
    loop.draw_gradients(random)
    for p in loop.params():
        p.grad = p.grad if any(p is q for q in live) else None
    with torch.inference_mode():
        loop.opt.step()


CHANGES: dict[str, Callable[[Loop, Random], None]] = {
    change.__name__: change
    for change in (
        several_steps,
        other_numbers,
        a_rate_of_zero,
        a_scheduler,
        a_closure,
        another_group,
        a_parameter_moves_to_another_group,
        groups_made_anew,
        saved_and_loaded,
        copied,
        pickled,
        forgotten,
        one_forgotten,
        other_memory,
        written_over,
        other_state,
        frozen,
        inference_mode,
    )
}


def programs(
    names: list[str], dtypes: list[list[torch.dtype]]
) -> st.SearchStrategy[Program]:
    changes = st.lists(st.sampled_from([*CHANGES]), min_size=2, max_size=6)
    seeds = st.integers(0, 2**16)
    drawn = (st.sampled_from(names), seeds, st.sampled_from(dtypes), changes)
    return st.builds(Program, *drawn)


def examples(count: int) -> Any:
    unwanted = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    return settings(max_examples=count, suppress_health_check=unwanted)


def check_program(program: Program) -> None:
    loops = [Loop(library, program) for library in LIBRARIES]
    for i, change in enumerate(["several_steps", *program.changes]):
        found = []
        for loop in loops:
            random = Random(program.seed + i)
            CHANGES[change](loop, random)
            loop.step(random)
            found.append(([p.detach() for p in loop.params()], loop.opt.state_dict()))
        assert_like(*found, where=change)


@examples(4)
@given(programs(["AdamW"], DTYPES[:1]))
def test_some_loops_end_where_torchs_do(program: Program):
    check_program(program)


@pytest.mark.slow
@examples(200)
@given(programs([*NUMBERS], DTYPES))
def test_loops_end_where_torchs_do(program: Program):
    check_program(program)
