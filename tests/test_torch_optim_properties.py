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

import funcopt as fo
from funcopt import torch_optim, tree

pytestmark = pytest.mark.filterwarnings("ignore")  # torch warns of what is done here

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


def programs(names: list[str]) -> st.SearchStrategy[Program]:
    changes = st.lists(st.sampled_from([*CHANGES]), min_size=2, max_size=6)
    seeds = st.integers(0, 2**16)
    return st.builds(
        Program, st.sampled_from(names), seeds, st.sampled_from(DTYPES), changes
    )


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


@settings(max_examples=3, suppress_health_check=[HealthCheck.too_slow])
@given(programs(["AdamW"]))
def test_some_loops_end_where_torchs_do(program: Program):
    check_program(program)


@pytest.mark.slow
@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(programs([*NUMBERS]))
def test_loops_end_where_torchs_do(program: Program):
    check_program(program)


@pytest.fixture(autouse=True)
def float64_scalars():
    """torch keeps the scalars of its state in the default dtype."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


# What such programs found -------------------------------------------------------------


def pairs(name: str, count: int = 2, **kwargs: Any) -> list[Any]:
    """Either library's, of parameters that are alike, after two steps."""
    made = []
    for library in LIBRARIES:
        random = Random(1)
        params = [Parameter(normal((3, 4), torch.float64, random)) for _ in range(count)]
        opt = getattr(library, name)(params, **kwargs)
        for _ in range(2):
            step(opt, random)
        made.append((opt, params, random))
    return made


def step(opt: Any, random: Random) -> None:
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = normal(p.shape, p.dtype, random)
    opt.step()


def assert_both_alike(made: list[Any]) -> None:
    (ours, params, _), (theirs, others, _) = made
    assert_like(params, others)
    assert_like(ours.state_dict(), theirs.state_dict())


def test_a_momentum_may_become_zero_and_come_back():
    """Nesterov's form says nothing then, and a new optimizer would refuse it."""
    made = pairs("SGD", momentum=0.9, nesterov=True)
    for momentum in (0.0, 0.5):
        for opt, _, random in made:
            opt.param_groups[0]["momentum"] = momentum
            step(opt, random)
        assert_both_alike(made)


def test_numbers_of_several_dtypes_stay_so():
    """A loaded ``eta`` is of the parameter's dtype; one that is made anew is not."""
    made = []
    for library in LIBRARIES:
        random = Random(1)
        params = [Parameter(normal((3,), torch.float32, random)) for _ in range(2)]
        first, opt = (library.ASGD(params, lr=0.1) for _ in range(2))
        step(first, random)
        opt.load_state_dict(first.state_dict())
        opt.state.pop(params[0])
        for _ in range(3):
            step(opt, random)
        made.append((opt, params, random))
    assert_both_alike(made)


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_sparse_gradients_beside_dense_ones_with_decay(name: str):
    """And of parameters that lie between each other, as columns of one tensor do."""
    found = []
    for library in LIBRARIES:
        random = Random(1)
        base = normal((4, 3), torch.float64, random)
        plain = [Parameter(normal((4, 3), torch.float64, random))]
        others = [*columns(base), *plain]
        groups: list[Any] = [{"params": others, "weight_decay": 0.1}]
        groups += [{"params": [Parameter(normal((4, 3), torch.float64, random))]}]
        opt = getattr(library, name)(groups, lr=0.1)
        for _ in range(3):
            for p in others:
                p.grad = normal(p.shape, p.dtype, random)
            last = groups[1]["params"][0]
            last.grad = sparse(normal(last.shape, last.dtype, random))
            opt.step()
        found.append([base.detach(), *plain, last])
    assert_like(*found)


def test_a_momentum_of_torchs_that_is_sparse_goes_over():
    p = Parameter(torch.ones(4, 3))
    running = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    p.grad = sparse(torch.ones(4, 3))
    running.step()
    assert running.state[p]["momentum_buffer"].is_sparse
    opt, params, state = fo.from_torch(running)
    loaded = torch_optim.SGD([q := Parameter(p.detach().clone())], lr=0.1, momentum=0.9)
    loaded.load_state_dict(running.state_dict())
    g = sparse(torch.full((4, 3), 2.0))
    p.grad, q.grad = g, g
    running.step()
    loaded.step()
    params, _ = opt.update([[g.to_dense()]], state, params)
    assert_like([q, params[0][0]], [p, p.detach()])


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adadelta", "RMSprop", "Adam"])
def test_a_model_may_be_cast_between_steps(name: str):
    """Of which torch's Adam alone makes nothing: its lerp takes one dtype."""
    kwargs: dict[str, Any] = {"momentum": 0.9} if name == "SGD" else {}
    made = pairs(name, lr=0.1, **kwargs)
    for opt, params, random in made:
        for p in params:
            p.grad = None
            p.data = p.data.float()
        for _ in range(3):
            if name != "Adam" or opt is made[0][0]:
                step(opt, random)
    (ours, params, _), (theirs, others, _) = made
    for p, q in zip(params, others):
        kept = [x.dtype for x in ours.state[p].values() if x.ndim]
        assert {*kept} == {torch.float64} and p.dtype is torch.float32
        if name != "Adam":
            torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)
    assert name == "Adam" or [*ours.state[params[0]]] == [*theirs.state[others[0]]]


def test_steps_in_inference_mode_leave_an_optimizer_that_goes_on():
    made = pairs("NAdam", lr=0.1)
    for opt, _, random in made:
        for _ in range(3):
            with torch.inference_mode():
                step(opt, random)
        step(opt, random)
    assert_both_alike(made)
    p = Parameter(torch.ones(2))
    opt = torch_optim.NAdam([p])  # nor is state of the kind that is made there
    p.grad = torch.ones(2)
    with torch.inference_mode():
        opt.step()
    opt.step()
    assert opt.state[p]["step"] == 2


@pytest.mark.parametrize("name", ["AdamW", "Adafactor"])
def test_rates_of_tensors_that_share_memory_may_change(name: str):
    """Such a step goes a way of its own: of parameters in one, or of one gradient."""
    found = []
    for library in LIBRARIES:
        random = Random(1)
        params: list[Any] = columns(torch.ones(3, 4))
        if name == "AdamW":
            params = [Parameter(torch.ones(3)) for _ in range(2)]
        opt = getattr(library, name)(params, lr=0.1)
        for i in range(5):
            opt.param_groups[0]["lr"] = 0.1 if i < 3 else 0.01
            g = normal(params[0].shape, params[0].dtype, random)
            for p in params:
                p.grad = g[:]
            opt.step()
        found.append(params)
    assert_like(*found)


def test_groups_that_differ_in_formula_go_over_and_back():
    """Momentum beside none, and an epsilon of the dtype's beside a number."""
    cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("RMSprop", {"momentum": 0.9}, {"momentum": 0.0}),
        ("SGD", {"momentum": 0.9, "nesterov": True}, {"momentum": 0.0}),
        ("Adafactor", {"eps": (None, 1e-3)}, {"eps": (1e-20, 1e-2)}),
    ]
    for name, first, second in cases:
        random = Random(1)
        params = [Parameter(normal((3, 4), torch.float64, random)) for _ in range(2)]
        groups = [{"params": params[:1], **first}, {"params": params[1:], **second}]
        running = getattr(torch.optim, name)(groups, **first)
        step(running, random)
        opt, values, state = fo.from_torch(running)
        grads = tree.map(torch.ones_like, values)
        own = [Parameter(p.detach().clone()) for p in params]
        groups = [{"params": own[:1], **first}, {"params": own[1:], **second}]
        ours = getattr(torch_optim, name)(groups, **first)
        ours.load(*opt.update(grads, state, values))
        for p in params:
            p.grad = torch.ones_like(p)
        running.step()
        for optimizer in (running, ours):
            step(optimizer, Random(2))
        assert_like((own, ours.state_dict()), (params, running.state_dict()))


def test_groups_that_are_made_anew_are_read():
    """As wrappers do that share theirs with the optimizer inside."""
    made = pairs("AdamW", lr=0.1)
    for opt, _, random in made:
        opt.param_groups = [dict(opt.param_groups[0])]
        opt.param_groups[0]["lr"] = 0.01
        step(opt, random)
    assert_both_alike(made)


@pytest.mark.parametrize("kind", ["a vector", "shared"])
def test_steps_that_a_user_has_made(kind: str):
    """Of one element, or counted on by processes together, as Hogwild training has it."""
    made = []
    for library in LIBRARIES:
        random = Random(1)
        params = [Parameter(normal((3,), torch.float64, random)) for _ in range(2)]
        opt = library.Adam(params, lr=0.1)
        for p in params:
            count = torch.zeros(1) if kind == "a vector" else torch.zeros(())
            count = count.share_memory_() if kind == "shared" else count
            moments = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
            opt.state[p] = {"step": count, **moments}
        held = opt.state[params[0]]["step"]
        for _ in range(3):
            step(opt, random)
        assert opt.state[params[0]]["step"] is held and held == 3
        made.append((opt, params, random))
    assert_both_alike(made)


def test_a_sparse_gradient_that_two_parameters_share():
    found = []
    for library in LIBRARIES:
        params = [Parameter(torch.ones(4, 3)) for _ in range(2)]
        opt = library.Adagrad(params, lr=0.1)
        g = sparse(torch.ones(4, 3))
        for _ in range(2):
            for p in params:
                p.grad = g
            opt.step()
        found.append(params)
    assert_like(*found)


@pytest.mark.parametrize(
    "name", ["ScheduleFreeSGD", pytest.param("Prodigy", marks=pytest.mark.slow)]
)
def test_numbers_of_a_checkpoint_are_not_rounded_as_parameters_are(name: str):
    random = Random(1)
    params = [Parameter(normal((3,), torch.bfloat16, random)) for _ in range(2)]
    one, other = (getattr(torch_optim, name)(params) for _ in range(2))
    for _ in range(3):
        step(one, random)
    other.load_state_dict(one.state_dict())
    assert_like(other.state_dict(), one.state_dict())


def differentiable() -> list[Any]:
    """The classes that take the flag, most of them for the slow run."""
    apart = ("Adafactor", "Muon", "SparseAdam", "SGLD", "SophiaG")
    names = [name for name in torch_optim.FACTORIES if name not in apart]
    return [
        pytest.param(name, marks=[] if name == "AdamW" else [pytest.mark.slow])
        for name in names
    ]


@pytest.mark.parametrize("name", differentiable())
def test_differentiable_steps_have_the_derivative_of_the_functions(name: str):
    """Parameters are written over, and the graph needs what they were."""
    random = Random(1)
    start = [
        normal(s, torch.float64, random).requires_grad_() for s in ((3, 4), (), (2,))
    ]
    rate = torch.tensor(0.1, requires_grad=True)

    def slopes(params: list[Tensor]) -> Any:
        held = [p.clone() for p in params]
        loss = torch.stack([torch.exp(p / 3).sum() for p in held]).sum() ** 2
        return [*torch.autograd.grad(loss, held, create_graph=True)]

    ends = []
    for stateful in (True, False):
        params = [p.clone() for p in start]
        groups: Any = [{"params": params, "lr": rate}]
        opt = getattr(torch_optim, name)(groups, differentiable=True)
        function, _, state = opt.functional()
        for _ in range(3):
            grads = slopes(params)
            if not stateful:
                (params,), state = function.update([grads], state, [params], lr=rate)
                continue
            for p, g in zip(params, grads):
                p.grad = g
            opt.step()
        ends.append(torch.stack([torch.sin(p).sum() for p in params]).sum())
    found, expected = (torch.autograd.grad(end, [*start, rate]) for end in ends)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# What is refused ----------------------------------------------------------------------


def with_decay_and_a_sparse_gradient(opt: Any, p: Parameter) -> None:
    opt.param_groups[0]["weight_decay"] = 0.1
    p.grad = sparse(torch.ones_like(p))


def of_inference_mode(opt: Any, p: Parameter) -> None:
    with torch.inference_mode():
        opt.state[p]["sum"] = torch.ones_like(p)


def of_another_shape(opt: Any, p: Parameter) -> None:
    p.grad = None
    p.data = torch.ones(2, 2)
    p.grad = torch.ones(2, 2)


def of_another_shape_than_the_gradient(opt: Any, p: Parameter) -> None:
    p.data = torch.ones(2, 2)


@pytest.mark.parametrize(
    "change",
    [
        with_decay_and_a_sparse_gradient,
        of_inference_mode,
        of_another_shape,
        of_another_shape_than_the_gradient,
    ],
)
def test_what_torch_refuses_changes_nothing(change: Any):
    """The first parameter is right and has no state yet; the second is not right."""
    for library in LIBRARIES:
        first, second = (Parameter(torch.ones(4, 3)) for _ in range(2))
        opt = library.Adagrad([first, second])
        second.grad = torch.ones(4, 3)
        opt.step()
        change(opt, second)
        first.grad = torch.ones(4, 3)
        before = first.detach().clone(), copy.deepcopy(opt.state[first])
        with pytest.raises(RuntimeError) as found:
            opt.step()
        if library is torch_optim:
            assert isinstance(found.value, fo.ExecutionError)
            assert "Adagrad" in str(found.value)
            assert_like((first.detach(), opt.state[first]), before)


def test_a_gradient_that_is_refused_leaves_no_state():
    params = [Parameter(torch.ones(3)) for _ in range(2)]
    opt = torch_optim.Adam(params)
    params[0].grad = torch.ones(3)
    params[1].grad = torch.ones(3).to_sparse()
    with pytest.raises(fo.ExecutionError, match="sparse"):
        opt.step()
    assert not opt.state and torch.equal(params[0], torch.ones(3))
