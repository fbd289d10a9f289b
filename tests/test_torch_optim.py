"""funcopt.torch_optim: the numbers, the state and the groups of torch.optim."""

import copy
import functools
import inspect
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from row import Case
from table import ENDS
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from trees import assert_close, random_like

import funcopt as fo
from funcopt import torch_optim
from funcopt import tree as tree_of

#: each of torch's classes, and what is not its default
MIXES: list[tuple[str, dict[str, Any]]] = [
    ("ASGD", {"t0": 3.0}),
    ("Adadelta", {"weight_decay": 0.1}),
    ("Adafactor", {}),
    ("Adagrad", {"lr_decay": 0.1, "initial_accumulator_value": 0.1}),
    ("Adam", {"amsgrad": True, "weight_decay": 0.1}),
    ("AdamW", {}),
    ("Adamax", {}),
    ("Muon", {}),
    ("NAdam", {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    ("RAdam", {}),
    ("RMSprop", {"centered": True, "momentum": 0.9}),
    ("Rprop", {}),
    ("SGD", {}),
    ("SGD", {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}),
]
each = pytest.mark.parametrize("name, kwargs", MIXES)
#: the same, most of them for the slow run
each_slow = pytest.mark.parametrize(
    "name, kwargs",
    [
        pytest.param(*mix, marks=[] if i in (4, 9, 13) else [pytest.mark.slow])
        for i, mix in enumerate(MIXES)
    ],
)
QUICK = ("Lion", "DoG", "SGLD", "Shampoo")
OWN = [name for name in torch_optim.FACTORIES if not hasattr(torch.optim, name)]
SHAPES = [(3, 4), (5,), (), (2, 3, 4)]
STEPS = 12


def parameters(name: str = "", dtype: torch.dtype = torch.float64) -> list[Parameter]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(3, 4), (2, 2), (4, 2)] if name == "Muon" else SHAPES
    return [
        Parameter(torch.randn(shape, generator=generator, dtype=dtype))
        for shape in shapes
    ]


def make(library: Any, name: str, **kwargs: Any) -> Any:
    return getattr(library, name)(groups(parameters(name)), **kwargs)


def values(opt: torch.optim.Optimizer) -> list[Tensor]:
    return [p.detach().clone() for group in opt.param_groups for p in group["params"]]


def groups(params: list[Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:2]}, {"params": params[2:], "lr": 0.02}]


def train(opt: torch.optim.Optimizer, steps: int = STEPS, seed: int = 2) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        opt.step()


def assert_like(found: Any, expected: Any, where: str = "state_dict") -> None:
    """The same keys in the same order, tensors of one form and nearly one value."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key, value in expected.items():
            assert_like(found[key], value, f"{where}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for i, value in enumerate(expected):
            assert_like(found[i], value, f"{where}[{i}]")
    elif isinstance(expected, Tensor):
        assert found.dtype is expected.dtype and found.device == expected.device, where
        assert found.shape == expected.shape, where
        limits = {torch.float64: 1e-12, torch.float32: 2e-6}
        limit = limits.get(found.dtype, 2e-2)
        torch.testing.assert_close(found, expected, rtol=limit, atol=limit, msg=where)
    else:
        assert found == expected, where


@each
def test_numbers_state_and_groups(name: str, kwargs: Any, float64_scalars: None):
    ours, theirs = make(torch_optim, name, **kwargs), make(torch.optim, name, **kwargs)
    for opt in (ours, theirs):
        train(opt)
    assert_like(values(ours), values(theirs))
    assert_like(ours.state_dict(), theirs.state_dict())
    assert repr(ours) == repr(theirs)
    wanted = inspect.signature(type(theirs))
    assert inspect.signature(type(ours)) == wanted and isinstance(ours, type(theirs))


@each_slow
@pytest.mark.parametrize("direction", [(0, 1), (1, 0)], ids=["from torch", "to torch"])
def test_either_goes_on_from_the_others_checkpoint(
    name: str, kwargs: Any, direction: tuple[int, int], float64_scalars: None
):
    libraries = torch.optim, torch_optim
    first, second = (libraries[i] for i in direction)
    one, straight = make(first, name, **kwargs), make(first, name, **kwargs)
    train(one)
    train(straight)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other = make(second, name, **kwargs)
    for p, value in zip(leaves(other), values(one)):
        p.data.copy_(value)
    other.load_state_dict(torch.load(file, weights_only=True))
    train(other, seed=3)
    train(straight, seed=3)
    assert_like(values(other), values(straight))
    assert_like(other.state_dict(), straight.state_dict())


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_step_after_a_checkpoint_is_torchs_to_its_last_place(
    name: str, kwargs: Any, dtype: torch.dtype
):
    """By the place of what is added: a difference of two like numbers has fewer."""
    one, other, ours = (
        getattr(library, name)(groups(parameters(name, dtype)), **kwargs)
        for library in (torch.optim, torch.optim, torch_optim)
    )
    train(one)
    before = values(one)
    for opt in (other, ours):
        for p, value in zip(leaves(opt), before):
            p.data.copy_(value)
        opt.load_state_dict(copy.deepcopy(one.state_dict()))  # which torch would share
        train(opt, steps=1, seed=3)
    places = 2 if name == "Adafactor" else 1  # its means are sums in another order
    for old, found, expected in zip(before, values(ours), values(other)):
        size = expected.abs() + (expected - old).abs()
        assert ((found - expected).abs() <= places * torch.finfo(dtype).eps * size).all()


def leaves(opt: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in opt.param_groups for p in group["params"]]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name in OWN
    ],
)
def test_every_other_rule_steps_as_its_function_does(name: str):
    factory = getattr(fo, torch_optim.FACTORIES[name])
    params = parameters(dtype=torch.float64)[:2]
    cls = getattr(torch_optim, name)
    quiet = {"temperature": 0.0} if name == "SGLD" else {}
    opt = cls(params, **quiet)
    given = {"noise": [p.detach() for p in params]} if name == "SGLD" else {}
    rule, tree = factory(**quiet), [p.detach().clone() for p in params]
    state = rule.init(tree)
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        grads = [torch.randn(p.shape, generator=generator).double() for p in params]
        for p, g in zip(params, grads):
            p.grad = g
        opt.step()
        tree, state = rule.update(grads, state, tree, **given)
    for p, expected in zip(params, tree):
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)
    copy = cls(params)
    copy.load_state_dict(opt.state_dict())
    assert_like(copy.state_dict(), opt.state_dict())


def test_a_number_of_a_step_is_given_to_it():
    (p,) = params = parameters()[:1]
    opt: Any = torch_optim.SophiaG(params, lr=0.1)
    hessian = torch.rand_like(p)
    p.grad = torch.ones_like(p)
    expected, _ = (rule := fo.sophia_g(lr=0.1)).update(
        p.grad, rule.init(p.detach()), p.detach(), hessian=hessian
    )
    opt.step(hessian=[hessian])
    torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.complex64])
def test_a_number_of_a_step_may_be_of_another_dtype(dtype: torch.dtype):
    """Kernels read memory: it has to be cast, also where a state's dtype is wider."""
    hessian = torch.tensor([0.5, 0.25, 1.0], dtype=torch.float64)
    for wider in (False, True):
        p = Parameter(torch.ones(3, dtype=dtype))
        opt: Any = torch_optim.SophiaG([p], betas=(0.5, 0.5))
        p.grad = torch.ones_like(p)
        if wider:
            opt.step(hessian=[-1.0])
            wide = torch.promote_types(dtype, torch.float32)
            for key, slot in opt.state[p].items():
                opt.state[p][key] = slot.to(wide) if slot.ndim else slot
        opt.step(hessian=[hessian])
        found = torch.view_as_real(opt.state[p]["exp_avg_hessian"].to(torch.complex64))
        assert torch.equal(found[:, 0], hessian.float() / 2)


def test_hooks_fire_once_and_in_torchs_order():
    calls: list[str] = []

    def note(what: str) -> Any:
        return lambda *args: calls.append(what)

    opt = make(torch_optim, "AdamW")
    opt.register_step_pre_hook(note("pre"))
    opt.register_step_post_hook(note("post"))
    opt.register_state_dict_pre_hook(note("saving"))
    opt.register_state_dict_post_hook(note("saved"))
    opt.register_load_state_dict_pre_hook(note("loading"))
    opt.register_load_state_dict_post_hook(note("loaded"))
    everywhere = [
        register_optimizer_step_pre_hook(note("all pre")),
        register_optimizer_step_post_hook(note("all post")),
    ]
    try:
        train(opt, 1)
        opt.load_state_dict(opt.state_dict())
    finally:
        for handle in everywhere:
            handle.remove()
    assert calls[:4] == ["all pre", "pre", "post", "all post"]
    assert calls[4:] == ["saving", "saved", "loading", "loaded"]


def test_a_pre_hook_may_change_the_arguments():
    opt = make(torch_optim, "SGD")
    opt.register_step_pre_hook(lambda opt, args, kwargs: (args, {"closure": lambda: 7}))
    assert opt.step() == 7
    opt.register_step_pre_hook(lambda opt, args, kwargs: 3)
    with pytest.raises(RuntimeError, match="Adapter.step .*but got 3"):
        opt.step()


@pytest.mark.filterwarnings("ignore")
def test_the_profiler_sees_the_name():
    opt = make(torch_optim, "AdamW")
    with torch.profiler.profile() as profile:
        train(opt, 1)
    assert "Optimizer.step#AdamW.step" in {e.key for e in profile.key_averages()}


@pytest.mark.parametrize("name", ["AdamW", "SGD", "LBFGS", "Lion"])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_copies_are_whole_and_apart(name: str, copied: Any):
    params = parameters()
    opt = getattr(torch_optim, name)(params)
    opt.mine = 3

    def closure(of: Any) -> Any:
        def loss() -> Tensor:
            of.zero_grad()
            total = torch.stack([p.square().sum() for p in leaves(of)]).sum()
            total.backward()
            return total

        return loss

    opt.step(closure(opt))
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1)  # wraps the step of the first
    other = copied(opt)
    assert other.mine == 3
    assert_like(values(other), values(opt))
    assert_like(other.state_dict(), opt.state_dict())
    before = values(opt), copy.deepcopy(opt.state_dict())
    other.step(closure(other))
    assert_like(values(opt), before[0])
    assert_like(opt.state_dict(), before[1])
    opt.step(closure(opt))
    assert_like(values(other), values(opt))
    del scheduler


def test_the_same_parameters_and_what_has_no_gradient():
    params = parameters()
    opt = torch_optim.AdamW(params, lr=0.1)
    start, addresses = values(opt), [p.data_ptr() for p in params]
    versions = [p._version for p in params]
    for _ in range(3):
        for p in params[:2]:
            p.grad = torch.ones_like(p)
        opt.step()
    assert [p.data_ptr() for p in params] == addresses
    assert leaves(opt)[0] is params[0] and params[0]._version > versions[0]
    assert_like(values(opt)[2:], start[2:])
    assert params[2] not in opt.state and len(opt.state) == 2
    params[2].grad = torch.ones_like(params[2])  # it may come late
    opt.step()
    assert [opt.state[p]["step"].item() for p in params[:3]] == [4, 4, 1]
    opt.zero_grad(set_to_none=False)
    assert not params[0].grad.any()  # pyright: ignore[reportOptionalMemberAccess]
    opt.zero_grad()
    assert params[0].grad is None


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop"])
def test_views_and_parameters_that_a_group_names_twice(name: str, float64_scalars: None):
    both = []
    for library in (torch_optim, torch.optim):
        base = torch.arange(12.0).reshape(3, 4).double()
        views = [base[:, i].requires_grad_() for i in range(3)]  # between each other
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opt = getattr(library, name)([*views, views[0]])
        for _ in range(3):
            for i, view in enumerate(views):
                view.grad = torch.full_like(view, i + 1.0)
            opt.step()
        both.append((base, opt.state_dict()))
    assert_like(both[0][0].detach(), both[1][0].detach())
    assert_like(both[0][1], both[1][1])


def test_what_changes_between_steps_is_seen(float64_scalars: None):
    """A step like the last one is short; these are not like it."""
    ours, theirs = make(torch_optim, "AdamW"), make(torch.optim, "AdamW")
    extra = [Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2)]

    def changes(opt: Any, new: Parameter) -> Iterator[None]:
        group, p = opt.param_groups[0], leaves(opt)[0]
        yield
        group["lr"] = 0.3
        yield
        group["lr"] = torch.tensor(0.2, dtype=torch.float64)
        yield
        group["lr"].fill_(0.1)  # in place, as schedulers do
        yield
        group["weight_decay"] = 0.0  # another formula
        yield
        group["maximize"] = True
        yield
        opt.add_param_group({"params": [new]})
        yield
        opt.state[p]["exp_avg"] = torch.ones_like(p)
        yield
        opt.state[p]["step"].fill_(30)
        yield
        del opt.state[leaves(opt)[1]]
        yield
        p.data = p.data.t().contiguous().t()  # lies otherwise
        yield
        opt.state.clear()
        yield
        opt.state.pop(opt.param_groups[1]["params"].pop())
        yield

    both = zip(changes(ours, extra[0]), changes(theirs, extra[1]))
    for i, _ in enumerate(both):
        for opt in (ours, theirs):
            train(opt, 2, seed=i)
        assert_like(values(ours), values(theirs), f"after change {i}")
        assert_like(ours.state_dict(), theirs.state_dict(), f"after change {i}")


def test_a_step_like_the_last_is_not_looked_at_anew(monkeypatch: pytest.MonkeyPatch):
    opt = make(torch_optim, "AdamW")
    train(opt, 2)
    monkeypatch.setattr(torch_optim.adapter.batch, "gather", None)
    train(opt, 2)
    assert opt.state[leaves(opt)[0]]["step"] == 4


# Checkpoints ---------------------------------------------------------------------------


def named(order: str, **kwargs: Any) -> Any:
    params = dict(zip("abcd", parameters()))
    return torch_optim.AdamW([(name, params[name]) for name in order], **kwargs)


def test_names_decide_where_state_goes():
    one, other = named("abcd"), named("dbca")
    train(one)
    for state in (one.state_dict(), one.named_state_dict()):
        other.load_state_dict(state)
        assert other.param_groups[0]["param_names"] == ["d", "b", "c", "a"]
        for name, p in zip("dbca", leaves(other)):
            assert_like(other.state[p], one.state[leaves(one)["abcd".index(name)]])
    assert list(one.named_state_dict()["state"]) == ["a", "b", "c", "d"]


def test_a_loaded_state_is_its_own():
    one, other = make(torch_optim, "AdamW"), make(torch_optim, "AdamW")
    train(one)
    other.load_state_dict(one.state_dict())
    before = copy.deepcopy(one.state_dict())
    train(other)
    assert_like(one.state_dict(), before)


def test_state_is_cast_as_torch_casts_it():
    one = make(torch_optim, "AdamW")
    train(one)
    both = []
    for library in (torch_optim, torch.optim):
        params = parameters(dtype=torch.bfloat16)
        opt = library.AdamW(groups(params))
        opt.load_state_dict(one.state_dict())
        both.append(opt.state_dict())
    assert_like(*both)


def test_a_checkpoint_that_is_cut_off_is_seen(tmp_path: Path):
    one = make(torch_optim, "AdamW")
    train(one, 1)
    torch.save(one.state_dict(), whole := tmp_path / "whole.pt")
    data = whole.read_bytes()
    for length in (*range(1, len(data), 50), len(data) - 1):
        (cut := tmp_path / "cut.pt").write_bytes(data[:length])
        with pytest.raises((RuntimeError, OSError, pickle.UnpicklingError)):
            torch.load(cut, weights_only=True)


@pytest.mark.parametrize("name", [*dict(MIXES), "LBFGS", "SparseAdam"])
def test_a_checkpoint_of_another_optimizer(name: str):
    """Whatever torch.optim cannot step by, it refuses, and that when it is loaded."""
    refused = []
    for other in (*dict(MIXES), "LBFGS"):
        if other == name:
            continue
        kwargs = {"momentum": 0.9} if other in ("SGD", "RMSprop") else {}
        one = getattr(torch.optim, other)(parameters("Muon"), **kwargs)
        closure = backward_of(one)
        one.step(closure)
        saved = one.state_dict()
        theirs, ours = (
            getattr(library, name)(parameters("Muon"))
            for library in (torch.optim, torch_optim)
        )
        try:
            theirs.load_state_dict(copy.deepcopy(saved))
            theirs.step(backward_of(theirs, name == "SparseAdam"))
        except Exception:
            refused.append(other)
            with pytest.raises(fo.CheckpointError, match="another optimizer's") as found:
                ours.load_state_dict(saved)
            assert isinstance(found.value, KeyError)  # what torch raises, later
            assert str(found.value)[0] != "'"
    assert len(refused) > 8


def backward_of(opt: Any, sparse: bool = False) -> Callable[[], Tensor]:
    """A closure of Σp⁴."""

    def closure() -> Tensor:
        opt.zero_grad()
        total = torch.stack([p.pow(4).sum() for p in leaves(opt)]).sum()
        total.backward()
        for p in leaves(opt) if sparse else ():
            assert p.grad is not None
            p.grad = p.grad.to_sparse(1)
        return total

    return closure


def lbfgs_of(order: str, dtype: torch.dtype = torch.float64) -> Any:
    params = {"a": torch.ones(2, dtype=dtype), "b": torch.zeros(3, dtype=dtype)}
    named = [(name, Parameter(params[name])) for name in order]
    opt = torch_optim.LBFGS(named, max_iter=3)

    def closure() -> Tensor:
        opt.zero_grad()
        total = torch.stack([(p - 2).abs().pow(4).sum() for _, p in named]).sum()
        total.backward()
        return total

    opt.step(closure)
    return opt


@pytest.mark.parametrize(
    "words, state",
    [
        ("has 'state'", lambda: {}),
        ("another optimizer's", lambda: named("abcd").state_dict()),
        ("checkpoint's order, 'b', 'a'", lambda: lbfgs_of("ba").state_dict()),
        (
            "of 4 numbers.* this LBFGS are 5",
            lambda: lbfgs_of("a", torch.complex128).state_dict(),
        ),
    ],
)
def test_lbfgs_takes_its_own_checkpoints_alone(words: str, state: Any):
    """Its state is of all parameters together, one after the other."""
    one, found = lbfgs_of("ab"), state()
    for group in found.get("param_groups", []) if "numbers" in words else []:
        group["params"], group["param_names"] = [0, 1], ["a", "b"]
    with pytest.raises(fo.CheckpointError, match=words):
        one.load_state_dict(found)
    for dtype in (torch.float64, torch.complex128):
        one, other = (lbfgs_of("ab", dtype) for _ in range(2))
        for good in (one.state_dict(), one.named_state_dict()):
            other.load_state_dict(good)
            assert_like(other.state_dict(), one.state_dict())


def loading(change: Any) -> Any:
    def act() -> None:
        one = named("abcd")
        train(one, 1)
        state = one.state_dict()
        change(state)
        named("abcd").load_state_dict(state)

    return act


def of_shape(state: Any) -> None:
    state["state"][1]["exp_avg"] = torch.zeros(2, dtype=torch.float64)


def renamed(state: Any) -> None:
    state["param_groups"][0]["param_names"] = ["a", "b", "c", "x"]


def stepping(grad: Any, name: str = "AdamW") -> Any:
    def act() -> None:
        p: Any = Parameter(torch.ones(2, 2))
        p.grad = grad(p) if callable(grad) else grad
        getattr(torch_optim, name)([p]).step()

    return act


def sparse(p: Tensor) -> Tensor:
    del p
    return torch.ones(2, 2).to_sparse(1)


def with_a_number(value: Any, name: str = "SGD", key: str = "lr") -> Any:
    def act() -> None:
        p = Parameter(torch.ones(2))
        opt = getattr(torch_optim, name)([p])
        p.grad = torch.ones(2)
        opt.step()
        opt.param_groups[0][key] = value
        opt.step()

    return act


def hessian_of(value: Any) -> Any:
    def act() -> None:
        p = Parameter(torch.ones(2))
        p.grad = torch.ones(2)
        opt: Any = torch_optim.SophiaG([p])
        opt.step(hessian=[value])

    return act


def of_integers(name: str) -> Any:
    def act() -> None:
        p = Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)
        p.grad = torch.ones_like(p)
        getattr(torch_optim, name)([p]).step()

    return act


P = Parameter(torch.ones(2))
#: what is done, torch's type of error, words
BAD: list[tuple[Any, type[Exception], str]] = [
    (lambda: torch_optim.Adam([]), ValueError, "empty parameter list"),
    (lambda: torch_optim.Lion([]), ValueError, "empty parameter list"),
    (lambda: torch_optim.Adam(P), TypeError, "should be an iterable of Tensors"),
    (lambda: torch_optim.Adam([P * 2]), ValueError, "non-leaf"),
    (lambda: torch_optim.Adam([3]), TypeError, "can only optimize Tensors"),
    (lambda: torch_optim.Adam([P], rho=1), TypeError, "rho"),
    (lambda: torch_optim.Lion([P], rho=1), TypeError, "rho"),
    (lambda: torch_optim.Lion([P], lr=-1.0), ValueError, "lr must be in"),
    (lambda: torch_optim.Lion([P], fused=True, foreach=True), RuntimeError, "cannot be"),
    (
        lambda: torch_optim.Adam([{"params": [P]}, {"params": [P]}]),
        ValueError,
        "more than one parameter group",
    ),
    (
        lambda: torch_optim.Muon([Parameter(torch.ones(2))]),
        ValueError,
        "only supports 2D",
    ),
    (
        lambda: torch_optim.Muon([Parameter(torch.ones(2, 2))]).add_param_group(
            {"params": [P]}
        ),
        ValueError,
        "only supports 2D",
    ),
    (loading(renamed), ValueError, "lacks 'd', and has besides 'x'"),
    (loading(of_shape), ValueError, r"shape \(2,\), and for a parameter of shape \(5,\)"),
    (loading(lambda state: state.pop("state")), ValueError, "has 'state'"),
    (
        loading(lambda state: state["param_groups"].append({"params": []})),
        ValueError,
        "different number of parameter groups|another optimizer",
    ),
    (lambda: named("abcd").load_state_dict(named("ab").state_dict()), ValueError, "'c'"),
    (lambda: torch_optim.AdamW([P]).step(hessian=[P]), TypeError, "AdamW.step has no"),
    (
        lambda: torch_optim.SophiaG([P]).step(hessian=[P, P]),
        ValueError,
        "hessian for each of its 1 parameters, and was given 2",
    ),
    (lambda: torch_optim.Lion([P], lr=[0.1]), TypeError, r"lr is .*not \[0.1\]"),
    (with_a_number(None), TypeError, "group's lr is to be .*not None"),
    (with_a_number("0.1"), TypeError, "not '0.1'"),
    (with_a_number(torch.ones(2)), ValueError, r"lr has shape \(2,\); it is"),
    (with_a_number((0.9, None), "Adam", "betas"), TypeError, r"betas\[1\] .*not None"),
    (of_integers("SGD"), RuntimeError, "SGD steps floating-point .* not torch.int64"),
    (of_integers("RMSprop"), RuntimeError, "not torch.int64"),
    (hessian_of(torch.ones(3)), ValueError, r"hessian .* shape \(3,\).* \(2,\)"),
    (hessian_of(None), TypeError, "hessian is None at '0'"),
    (
        lambda: torch_optim.SophiaG([P]).step(hessian={"w": P}),
        TypeError,
        "step takes a list of hessian, .*not dict",
    ),
    (stepping(sparse), RuntimeError, "does not support sparse gradients"),
    (stepping(sparse, "Lion"), RuntimeError, "Lion does not support sparse"),
    (stepping(torch.ones(2, 2), "SparseAdam"), RuntimeError, "consider Adam instead"),
    (
        lambda: make(torch_optim, "Adam").named_state_dict(),
        ValueError,
        "named_parameters",
    ),
]


@pytest.mark.parametrize("act, kind, words", BAD)
def test_bad_input(act: Any, kind: type[Exception], words: str):
    with pytest.raises(kind, match=words):
        act()


def test_unknown_keys_of_a_group_are_kept():
    """As in torch: schedulers and users write keys of their own."""
    opt = torch_optim.AdamW([{"params": parameters(), "mine": 3}])
    train(opt, 2)
    assert opt.state_dict()["param_groups"][0]["mine"] == 3


def test_no_step_is_captured_by_a_cuda_graph(monkeypatch: pytest.MonkeyPatch):
    """The graph would hold this step's number, which is the host's."""
    p = Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = torch_optim.Adam([p], capturable=True)
    for name in ("is_initialized", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    with pytest.raises(fo.ExecutionError, match="Adam.*outside of the graph"):
        optimizer.step()
    assert torch.equal(p, torch.ones(2)) and not optimizer.state
    monkeypatch.undo()
    optimizer.step()
    assert not torch.equal(p, torch.ones(2))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_gradients_that_hold_a_graph_are_numbers():
    """As in torch: without ``differentiable`` a step is no part of a graph."""
    (p,) = params = parameters()[:1]
    opt = torch_optim.AdamW(params)
    for _ in range(3):
        (p**3).sum().backward(create_graph=True, inputs=[p])
        opt.step()
        assert p.is_leaf and not opt.state[p]["exp_avg"].requires_grad
        p.grad = None


def test_differentiable_steps_have_the_derivative_that_torchs_lack():
    """With momentum, of which torch detaches the first buffer."""

    def final(start: Tensor) -> Tensor:
        p = start.clone()
        opt = torch_optim.SGD([p], lr=0.1, momentum=0.9, differentiable=True)
        for _ in range(3):
            held = p.clone()  # the loss saves what the step writes over
            (p.grad,) = torch.autograd.grad((held**3).sum(), held, create_graph=True)
            opt.step()
        return p.sum()

    start = torch.tensor([0.5, -0.3], dtype=torch.float64, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.autograd.gradcheck(final, start)


# Bridges -------------------------------------------------------------------------------


@each_slow
def test_from_torch_goes_on_as_torch_does(name: str, kwargs: Any, float64_scalars: None):
    running = make(torch.optim, name, **kwargs)
    train(running)
    opt, params, state = fo.from_torch(running)
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):
        grads = [
            [torch.randn(p.shape, generator=generator).double() for p in group["params"]]
            for group in running.param_groups
        ]
        for group, column in zip(running.param_groups, grads):
            for p, g in zip(group["params"], column):
                p.grad = g
        running.step()
        params, state = opt.update(grads, state, params)
    assert_like([p for group in params for p in group], values(running))


@each_slow
def test_functional_and_back(name: str, kwargs: Any, float64_scalars: None):
    one, other = (make(torch_optim, name, **kwargs) for _ in range(2))
    train(one)
    opt, params, state = one.functional()
    grads = tree_of.map(torch.ones_like, params)
    other.load(*opt.update(grads, state, params))
    for p in leaves(one):
        p.grad = torch.ones_like(p)
    one.step()
    assert_like(values(other), values(one))
    assert_like(other.state_dict()["state"], one.state_dict()["state"])
    train(one)
    train(other)
    assert_like(values(other), values(one))


def test_groups_that_differ_in_flags_are_a_partition():
    params = parameters()
    split = [{"params": params[:2]}, {"params": params[2:], "amsgrad": True}]
    one = torch_optim.AdamW(split, lr=0.1)
    train(one)
    opt, tree, state = fo.from_torch(one)
    assert sorted(state["1"]) == ["exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"]
    new = opt.update(tree_of.map(torch.ones_like, tree), state, tree)
    for p in params:
        p.grad = torch.ones_like(p)
    one.step()
    assert_like([p for group in new[0] for p in group], values(one))
    before = values(one)
    one.load(*new)
    assert_like(values(one), before)


def test_the_next_steps_of_a_running_optimizer_are_differentiated():
    running = make(torch.optim, "Adam")
    train(running)
    opt, params, state = fo.from_torch(running)

    def after(lr: Tensor) -> Tensor:
        p, s = params, state
        for _ in range(3):
            p, s = opt.update(tree_of.map(torch.sin, p), s, p, lr=lr)
        return sum(x.square().sum() for x in tree_of.leaves(p))  # pyright: ignore

    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(after, lr)


def test_lbfgs_goes_over_and_back():
    def closure(opt: Any) -> Any:
        def loss() -> Tensor:
            opt.zero_grad()
            total = torch.stack([((p - 1) ** 4).sum() for p in leaves(opt)]).sum()
            total.backward()
            return total

        return loss

    one, other = (torch_optim.LBFGS(parameters(), max_iter=3) for _ in range(2))
    for _ in range(2):
        one.step(closure(one))
    opt, params, state = one.functional()
    assert not any(x.requires_grad for x in tree_of.leaves((params, state)))

    def loss_fn(params: Any) -> Tensor:
        return sum(((p - 1) ** 4).sum() for p in params[0])  # pyright: ignore

    grads = torch.func.grad(loss_fn)(params)
    given = opt.update(grads, state, params, loss_fn=loss_fn)
    other.load(*given)
    for x in tree_of.leaves(given):
        x.zero_()  # no more of what was loaded, and is written over
    one.step(closure(one))
    torch.testing.assert_close(values(other), values(one), rtol=1e-9, atol=1e-9)
    for opt in (one, other):
        opt.step(closure(opt))
    torch.testing.assert_close(values(other), values(one), rtol=1e-8, atol=1e-8)


def test_to_torch_has_the_groups_the_flags_and_the_state():
    rule = fo.adamw(
        lr=fo.by_name({"*bias": 0.2}, default=0.1), amsgrad=True, maximize=True
    )
    tree: Any = {"layer": {"weight": torch.ones(2, 2), "bias": torch.ones(2)}}
    state = rule.init(tree)
    tree, state = rule.update(tree, state, tree)
    optimizer, params = fo.to_torch(rule, tree, state)
    assert type(optimizer) is torch_optim.AdamW
    found = {g["lr"]: g["param_names"] for g in optimizer.param_groups}
    assert found == {0.2: ["layer.bias"], 0.1: ["layer.weight"]}
    assert optimizer.defaults["amsgrad"] and optimizer.defaults["maximize"]
    for p in leaves(optimizer):
        p.grad = torch.ones_like(p)
    optimizer.step()
    tree, state = rule.update(tree_of.map(torch.ones_like, tree), state, tree)
    torch.testing.assert_close(tree_of.map(Tensor.detach, params), tree)


@pytest.mark.parametrize("case", ENDS, ids=str)
@pytest.mark.usefixtures("float64_scalars")
def test_any_of_the_registry_goes_on_as_a_class(case: Case):
    rule, params = case.optimizer(), case.mixed()
    if case.row.name == "muon":  # of which torch's has no other dtype, and no maximize
        with pytest.raises(fo.HyperparameterTypeError, match="no argument .*ns_dtype="):
            fo.to_torch(rule, params)
        rule = case.row.factory(lr=0.1, weight_decay=0.1)
    assert rule.spec is not None
    data = [name for name, hyper in rule.spec.hyper.items() if hyper.wanted]
    given = {name: random_like(params, 9) for name in data}
    state = rule.init(params)
    for seed in range(2):
        params, state = rule.update(random_like(params, seed), state, params, **given)
    optimizer, held = fo.to_torch(rule, params, state)
    grads = random_like(params, 2)
    params, _ = rule.update(grads, state, params, **given)
    for p, g in zip(tree_of.leaves(held), tree_of.leaves(grads)):
        p.grad = g
    step: Any = optimizer.step
    step(**{name: tree_of.leaves(x) for name, x in given.items()})
    assert_close(tree_of.map(Tensor.detach, held), params, 1e-12)


def test_noise_that_no_one_has_set_goes_over_as_that():
    optimizer, _ = fo.to_torch(fo.sgld(lr=0.1), [torch.ones(2)])
    assert optimizer.param_groups[0]["noise"] is None
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_what_has_no_class_is_refused():
    chained = fo.chain(fo.clip_by_global_norm(1.0), fo.sgd())
    for opt in (chained, fo.partition({"a": fo.sgd()}, "a"), fo.lbfgs()):
        with pytest.raises(TypeError, match="no class of funcopt.torch_optim"):
            fo.to_torch(opt, [torch.ones(2)])
    with pytest.raises(fo.ExecutionError, match="'0' has a number for each element"):
        fo.to_torch(fo.sgd(lr=torch.tensor([0.1, 0.2])), [torch.ones(2)])
    with pytest.raises(TypeError, match="from_torch takes"):
        fo.from_torch(torch.optim.lr_scheduler)  # pyright: ignore[reportArgumentType]


def test_torchopts_transforms_both_ways():
    torchopt = pytest.importorskip("torchopt")
    p = {"w": torch.randn(3, dtype=torch.float64)}
    g = {"w": torch.randn(3, dtype=torch.float64)}
    theirs, ours = torchopt.adam(0.1), fo.adam(lr=0.1)
    init, update = fo.as_torchopt(ours)
    pairs = [
        (fo.from_transform(theirs), theirs.init, theirs.update),
        (ours, init, update),
    ]
    for opt, start, transform in pairs:
        params, state = p, opt.init(p)
        moved, their_state = p, start(p)
        for _ in range(3):
            params, state = opt.update(g, state, params)
            moves, their_state = transform(g, their_state, params=moved, inplace=False)
            moved = torchopt.apply_updates(moved, moves, inplace=False)
        torch.testing.assert_close(params, moved, rtol=1e-12, atol=1e-12)
    with pytest.raises(TypeError, match="needs the parameters"):
        update(g, init(p))
    with pytest.raises(TypeError, match="init and update"):
        fo.from_transform(3)


def test_torchopts_own_classes_step_by_ours():
    """They ask for a class of TorchOpt's; one writes in place, one is differentiated."""
    torchopt = pytest.importorskip("torchopt")
    x = torch.linspace(-1.0, 2.0, 6, dtype=torch.float64).view(2, 3)
    rule = fo.adamw(lr=0.1, weight_decay=0.1)
    tx = fo.as_torchopt(rule)

    def network() -> torch.nn.Module:
        torch.manual_seed(1)
        return torch.nn.Linear(3, 2).double()

    module = network()

    def loss(params: Any, *unused: Any) -> Tensor:
        return torch.func.functional_call(module, params, (x,)).pow(4).mean()

    first = {name: p.detach() for name, p in network().named_parameters()}
    after = functools.partial(fo.unroll, rule, loss, steps=3, batch=x)
    expected = after(first).params
    net = network()
    running = torchopt.Optimizer(net.parameters(), tx)
    by_function = torchopt.FuncOptimizer(tx)
    params = {name: p.clone().requires_grad_() for name, p in first.items()}
    for _ in range(3):
        running.zero_grad()
        net(x).pow(4).mean().backward()
        running.step()
        params = by_function.step(loss(params), params)
    torch.testing.assert_close(dict(net.named_parameters()), expected)
    torch.testing.assert_close(params, expected)
    assert not any(s.requires_grad for s in tree_of.leaves(running.state_dict()))
    net = network()
    start = [*net.parameters()]
    meta = torchopt.MetaOptimizer(net, tx)
    for _ in range(3):
        meta.step(net(x).pow(4).mean())
    found = torch.autograd.grad(net(x).pow(4).mean(), start)
    wanted = torch.func.grad(lambda first: loss(after(first).params))(first)
    torch.testing.assert_close([*found], [wanted[n] for n in ("weight", "bias")])


def test_gradients_of_a_transform_may_lie_in_other_containers():
    """In a tuple beside a list of parameters, as `posteriors` has them."""
    init, update = fo.as_torchopt(fo.sgd(lr=0.5))
    params = [{"w": torch.ones(2)}, torch.ones(3)]
    updates, _ = update((params[0], params[1]), init(params), params=params)
    assert type(updates) is tuple and updates[0]["w"].tolist() == [-0.5, -0.5]
    for other in ((params[0],), ({"v": torch.ones(2)}, params[1])):
        with pytest.raises(fo.StructureError, match="grads"):
            update(other, init(params), params=params)


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize(
    "around",
    [
        lambda opt: fo.partition({"a": opt, "b": fo.sgd()}, {"w": "a", "b": "b"}),
        lambda opt: fo.freeze(opt, {"w": False, "b": True}),
        lambda opt: fo.accumulate(opt, 1),
        fo.skip_nonfinite,
        fo.master_weights,
        lambda opt: fo.chain(fo.clip_by_value(0.5), opt),
    ],
)
def test_a_transform_of_ones_own_goes_into_all_that_takes_optimizers(
    around: Callable[..., fo.Optimizer], donate: bool
):
    """It knows nothing of what those hand on."""

    def half(updates: Any, state: Any, params: Any) -> Any:
        return tree_of.map(lambda g: -0.5 * g, updates), state

    own = fo.from_transform(SimpleNamespace(init=lambda params: {}, update=half))
    found, expected = [], []
    for opt, results in ((own, found), (fo.sgd(lr=0.5), expected)):
        params = {"w": torch.ones(3), "b": torch.ones(2)}
        whole = around(opt)
        grads, state = tree_of.map(torch.clone, params), whole.init(params)
        params, _ = whole.update(grads, state, params, donate=donate)
        results += params.values()
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", ["Adafactor", "Muon", "AdamW"])
def test_a_step_like_the_last_one_is_not_gathered_anew(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    """Also by rules that need a leaf whole, and where a leaf has no use for a slot."""
    shapes = [(4, 3), (4, 3), (3, 3)] + ([] if name == "Muon" else [(5,), (5,)])
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    ours = getattr(torch_optim, name)(params, lr=0.1)
    theirs = getattr(torch.optim, name)(twins, lr=0.1)
    for step in range(4):
        for p, twin in zip(params, twins):
            p.grad = torch.randn_like(p)
            twin.grad = p.grad.clone()
        ours.step()
        theirs.step()
        if step == 1:
            monkeypatch.setattr(torch_optim.adapter.batch, "gather", None)
    for p, twin in zip(params, twins):
        torch.testing.assert_close(p, twin)


def test_a_scheduled_rate_is_no_other_step(monkeypatch: pytest.MonkeyPatch):
    """Its number alone is read; where it may be another formula, the group anew."""
    pair = [
        make(library, "AdamW", weight_decay=0.1) for library in (torch_optim, torch.optim)
    ]
    read: list[Any] = []
    original = torch_optim.cached_step.flags.row
    monkeypatch.setattr(
        torch_optim.cached_step.flags, "row", lambda *a: read.append(a) or original(*a)
    )
    changes: list[tuple[int, str, Any]] = [
        (3, "lr", 0.03), (4, "lr", 0.01), (5, "weight_decay", 0.2), (6, "lr", 0.0),
        (7, "lr", 0.02), (8, "betas", (0.8, 0.9)), (9, "eps", 0.1), (10, "lr", 1),
        (11, "lr", torch.tensor(0.05).double()), (12, "lr", Tensor.mul_),
        (13, "lr", 0.01), (14, "weight_decay", 0.0),
    ]  # fmt: skip
    quiet = {3, 4, 5, 7, 9, 12}
    for step, name, value in changes:
        for opt in pair:
            train(opt, 2, seed=step)
            group = opt.param_groups[1]
            if callable(value):  # written over, as torch's schedulers do
                value(group[name], 0.5)
            else:
                group[name] = copy.deepcopy(value)
        read.clear()
        for opt in pair:
            train(opt, 1, seed=step)
        assert bool(read) is (step not in quiet), step
        assert_like(values(pair[0]), values(pair[1]), f"{name} in step {step}")
    assert_like(pair[0].state_dict(), pair[1].state_dict())


@pytest.mark.parametrize("name", ["AdamW", "NAdam", "ASGD"])
def test_parameters_that_have_gradients_in_turn(
    name: str, monkeypatch: pytest.MonkeyPatch, float64_scalars: None
):
    """Each set has a plan of its own; all count by the same numbers."""
    pair = [make(library, name) for library in (torch_optim, torch.optim)]
    patterns = [{0, 1}, {2, 3}, {1, 2}, {0, 1, 2, 3}]

    def rounds(count: int, start: int) -> None:
        for k in range(count):
            for opt in pair:
                generator = torch.Generator().manual_seed(start + k)
                for i, p in enumerate(leaves(opt)):
                    there = i in patterns[k % len(patterns)]
                    g = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                    p.grad = g if there else None
                opt.step()

    rounds(8, 0)
    gather = torch_optim.adapter.batch.gather
    monkeypatch.setattr(torch_optim.adapter.batch, "gather", None)
    rounds(8, 100)
    monkeypatch.setattr(torch_optim.adapter.batch, "gather", gather)
    assert_like(values(pair[0]), values(pair[1]))
    assert_like(pair[0].state_dict(), pair[1].state_dict())
    assert len(pair[0]._cached) == len(patterns)
    for opt in pair:  # other tensors: no plan may keep the old ones
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    rounds(1, 200)
    assert len(pair[0]._cached) == 1
    rounds(7, 201)
    assert_like(pair[0].state_dict(), pair[1].state_dict())
