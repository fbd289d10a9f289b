"""What random loops have found in the adapter, each for itself; and what it refuses."""

import copy
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from test_torch_optim import assert_like
from test_torch_optim_properties import LIBRARIES, columns, normal, sparse
from torch import Tensor
from torch.nn import Parameter

import funcopt as fo
from funcopt import torch_optim, tree

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # torch warns of what is done here
    pytest.mark.usefixtures("float64_scalars"),
]


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


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_average_is_well_again_when_the_weights_are(bad: float):
    """ASGD's average is the weights themselves until ``t0``."""
    made = pairs("ASGD", t0=6.0)
    for opt, params, random in made:
        well = [p.detach().clone() for p in params]
        with torch.no_grad():
            params[0][1, 1] = bad
        step(opt, random)
        with torch.no_grad():
            for p, value in zip(params, well, strict=True):
                p.copy_(value)
        for _ in range(6):
            step(opt, random)
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


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_parameters_in_one_memory_are_stepped_one_by_one(name: str):
    """As weights that are tied by their data, or windows of one tensor."""
    found = []
    for library in LIBRARIES:
        tied = Parameter(torch.ones(3))
        base = torch.ones(5)
        windows = [base[:4].requires_grad_(), base[1:].requires_grad_()]
        params: list[Any] = [tied, Parameter(tied.data), *windows]
        opt = getattr(library, name)(params, lr=0.1)
        for _ in range(3):
            step(opt, Random(2))
        found.append((params, opt.state_dict()))
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


@pytest.mark.parametrize("library", LIBRARIES)
def test_state_that_is_made_before_a_first_step_goes_over_and_back(library: Any):
    """Adagrad's sums: torch begins all by the constructor's number, not a group's."""
    params = [Parameter(torch.full((2,), k, dtype=torch.float64)) for k in (1.0, 2.0)]
    groups: list[Any] = [{"params": params[:1]}, {"params": params[1:]}]
    groups[1]["initial_accumulator_value"] = 9.0
    running = library.Adagrad(groups, lr=0.1, initial_accumulator_value=0.5)
    params[0].grad = torch.ones(2, dtype=torch.float64)
    running.step()
    opt, tree_of, state = fo.from_torch(running)
    ours = torch_optim.Adagrad(copy.deepcopy(running.param_groups))
    ours.load(*opt.update([[None], [torch.ones_like(params[1])]], state, tree_of))
    own = [p for group in ours.param_groups for p in group["params"]]
    params[0].grad, params[1].grad = None, torch.ones_like(params[1])
    running.step()
    assert_like((own, ours.state_dict()), (params, running.state_dict()))
    ours.load(tree_of, state)  # before the second's first step
    assert [*ours.state[own[1]]] == ["step", "sum"]
    assert ours.state[own[1]]["sum"].tolist() == [0.5, 0.5]


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
    "name",
    ["ScheduleFreeSGD", "Shampoo", "SOAP"]
    + [pytest.param("Prodigy", marks=pytest.mark.slow)],
)
def test_state_of_a_checkpoint_is_not_rounded_as_parameters_are(name: str):
    random = Random(1)
    params = [Parameter(normal((3, 2), torch.bfloat16, random)) for _ in range(2)]
    one, other = (getattr(torch_optim, name)(params) for _ in range(2))
    for _ in range(3):
        step(one, random)
    other.load_state_dict(one.state_dict())
    assert_like(other.state_dict(), one.state_dict())
    step(other, random)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_every_step_draws_noise_of_its_own(dtype: torch.dtype):
    """A plan of the first step, which has no place for it, would go on without."""
    params = [Parameter(torch.zeros(3, dtype=dtype)) for _ in range(2)]
    split = [{"params": params[:1]}, {"params": params[1:], "noise": 0.5}]
    fixed = 0.5 + 0.5j if dtype.is_complex else 0.5  # both parts share it
    opt = torch_optim.SGLD(split, lr=0.5)  # at which the noise is all of a step
    generator, expected = torch.Generator().manual_seed(1), [p.clone() for p in params]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for _ in range(4):
            for p in params:
                p.grad = torch.zeros_like(p)
            opt.step()
            noise, _ = fo.normal_like(params, generator)
            expected = [expected[0] + noise, expected[1] + fixed]
            assert_like([p.detach() for p in params], [x.detach() for x in expected])


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


#: what is wrong with parameters or state that are to be loaded
UNFIT: list[tuple[str, Callable[[Any, Any], tuple[Any, Any]]]] = [
    (r"params at '0.1' has shape \(\)", lambda p, s: ([[p[0][0], torch.ones(())]], s)),
    ("params at '0.1' is NoneType", lambda p, s: ([[p[0][0], None]], s)),
    (
        r"state\['exp_avg'\] at '0.0' has shape \(7,\)",
        lambda p, s: (p, {**s, "exp_avg": [[torch.ones(7), p[0][1]]]}),
    ),
    (
        r"state\['step'\] has 1 numbers",
        lambda p, s: (p, {**s, "step": torch.ones(1, dtype=torch.int64)}),
    ),
    ("another optimizer's", lambda p, s: (p, {"0": s, "1": s})),
]


@pytest.mark.parametrize("words, change", UNFIT)
def test_what_does_not_fit_is_not_loaded(words: str, change: Any):
    params = [Parameter(torch.ones(2, 3)), Parameter(torch.ones(3))]
    opt = torch_optim.Adam(params)
    step(opt, Random(1))
    _, values, state = opt.functional()
    before = copy.deepcopy((params, opt.state_dict()))
    with pytest.raises(fo.StructureError, match=words):
        opt.load(*change(tree.map(torch.zeros_like, values), state))
    assert_like((params, opt.state_dict()), before)


def test_a_gradient_that_is_refused_leaves_no_state():
    params = [Parameter(torch.ones(3)) for _ in range(2)]
    opt = torch_optim.Adam(params)
    params[0].grad = torch.ones(3)
    params[1].grad = torch.ones(3).to_sparse()
    with pytest.raises(fo.ExecutionError, match="sparse"):
        opt.step()
    assert not opt.state and torch.equal(params[0], torch.ones(3))
