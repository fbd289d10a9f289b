"""A rule as a program: what is written down, what is refused, and in which words."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from row import Case
from table import ELEMENTWISE, ELEMENTWISE_ENDS, rule_of
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.overrides import TorchFunctionMode

import funcopt as fo
from funcopt.bits import INTEGERS
from funcopt.execution import executor_choice, scalars
from funcopt.execution.program import Program
from funcopt.execution.rule import Rule
from funcopt.execution.rule_derivatives import vjp
from funcopt.execution.shapeless import shapeless
from funcopt.execution.trace import UntraceableError, trace
from funcopt.hyper import Hyper

G_P_LR = (True, True, False)  # two streams and a scalar
OUTSIDE = torch.ones(3)


def program_of(function: Callable[..., Any], inputs: Sequence[bool] = G_P_LR) -> Program:
    return trace(shapeless(function), inputs, torch.float32)


def names(program: Program) -> list[str]:
    return [op.name for op in program.ops]


def kinds_of(case: Case) -> tuple[str, ...]:
    return ("scalar",) * len(rule_of(case.optimizer()).hyper)


# --- refusals


def integer(x: Tensor, bits: bool = False) -> Tensor:
    """x rounded, or its bits."""
    return x.view(INTEGERS[x.dtype]) if bits else x.to(INTEGERS[x.dtype])


def writes_to_own_alias(g: Tensor, p: Tensor, lr: Tensor) -> tuple[Tensor]:
    doubled = g * 2
    seen = doubled.view_as(doubled)
    doubled.mul_(3)
    return (p - lr * seen,)


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "in place": (lambda g, p, lr: (p.sub_(lr * g),), "sub_.* writes into an argument"),
    "in place on a view": (
        lambda g, p, lr: (p.view(-1).sub_(lr * g),),
        "sub_.* writes into an argument",
    ),
    "in place on a detached": (
        lambda g, p, lr: (p.detach().mul_(2), g.mul(2)),
        "mul_.* writes into an argument",
    ),
    "out=": (lambda g, p, lr: (torch.mul(p, lr, out=p),), "writes into a tensor that"),
    "item": (lambda g, p, lr: (p - g.sum().item(),), "it reads a tensor's value"),
    "if": (lambda g, p, lr: (p if g.sum() > 0 else g,), "it reads a tensor's value"),
    "tolist": (lambda g, p, lr: (p - g.tolist()[0],), "."),
    "numpy": (lambda g, p, lr: (p - float(g.numpy()[0]),), "."),
    "closed over": (
        lambda g, p, lr: (p - OUTSIDE * g,),
        "it uses a tensor that is no argument of the rule",
    ),
    "made of a list": (
        lambda g, p, lr: (p - torch.tensor(2.0) * g,),
        "a tensor that is no argument|not among the operations",
    ),
    "returns a closed over": (lambda g, p, lr: (OUTSIDE,), "no argument of the rule"),
    "unknown": (lambda g, p, lr: (p - torch.erf(g),), "aten.erf is not among the"),
    "NaN left out": (lambda g, p, lr: (torch.fmax(g, p),), "aten.fmax is not among"),
    "random": (lambda g, p, lr: (p - torch.rand_like(g),), "aten.rand.* is not among"),
    "along the leaf": (lambda g, p, lr: (p - g.cumsum(0),), "cumsum is not among"),
    "mean": (lambda g, p, lr: (p - g.mean(),), "aten.mean is not among"),
    "two results": (lambda g, p, lr: (p - torch.max(g, 0)[0],), "aten.max is not among"),
    "cut": (lambda g, p, lr: (p - lr * g[:2].sum(),), "aten.slice is not among"),
    "longer": (lambda g, p, lr: (torch.cat([p, g]),), "aten.cat is not among"),
    "matrix": (lambda g, p, lr: (p - g[:, None] * p,), "changes the leaf's shape"),
    "rounded division": (
        lambda g, p, lr: (torch.div(p, g, rounding_mode="floor"),),
        "a rounded division is not among",
    ),
    "norm of order 3": (
        lambda g, p, lr: (p / torch.linalg.vector_norm(g, 3),),
        "a norm of order 3 is not among",
    ),
    "to another float": (
        lambda g, p, lr: (p - lr * g.to(torch.bfloat16).to(g.dtype),),
        "bfloat16",
    ),
    "to an integer": (lambda g, p, lr: (p - lr * g.to(torch.int64),), "int64"),
    "rounded": (
        lambda g, p, lr: (p - integer(g).to(g.dtype),),
        "a rounded number is not",
    ),
    "bits moved": (
        lambda g, p, lr: (p - (integer(g, bits=True) + 1).view(g.dtype),),
        "no operations on torch.int",
    ),
    "bits given away": (lambda g, p, lr: (integer(g, bits=True),), "torch.int"),
    "count": (lambda g, p, lr: (p - g / g.numel(),), "looks at the shape"),
    "length": (lambda g, p, lr: (p - g / len(g),), "looks at the shape"),
    "shape": (lambda g, p, lr: (p - g * p.shape[0] ** 0.5,), "looks at the shape"),
    "size": (lambda g, p, lr: (p - g * p.size(0),), "looks at the shape"),
    "axes": (lambda g, p, lr: (p - lr * g if p.ndim == 2 else p,), "looks at the shape"),
    "axes, as a method": (lambda g, p, lr: (p - g * (p.dim() > 1),), "looks at the sh"),
    "axes of what is made": (lambda g, p, lr: (p - (g * g).ndim * g,), "."),
    "a sum along an axis": (lambda g, p, lr: (p - g.sum(0),), "sums along some"),
    "a norm along an axis": (
        lambda g, p, lr: (p / torch.linalg.vector_norm(g, dim=0),),
        "sums along some",
    ),
    "not tensors": (lambda g, p, lr: (p - math.exp(g),), "."),
    "wrong arguments": (lambda g, p: (p,), "it cannot be called on tensors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_a_sentence(name: str):
    function, sentence = REFUSED[name]
    with pytest.raises(UntraceableError, match=sentence):
        program_of(function)


SHAPED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "count": lambda g, p: g / p.numel(),
    "axes": lambda g, p: g if p.ndim == 2 else 2 * g,
    "rows": lambda g, p: g * p.shape[0] ** 0.5,
}


@pytest.mark.parametrize("name", SHAPED)
def test_rules_that_look_at_shapes(name: str):
    """Of each leaf its own, that of a task also where all tasks step at once."""

    def rule(g: Tensor, p: Tensor, *, step: Any, lr: Any) -> Any:
        return (p - lr * SHAPED[name](g, p),)

    opt = fo.elementwise(rule, name="odd", slots={}, hyper={"lr": Hyper(0.5)})
    params = [torch.ones(4), torch.ones(4, 5), torch.ones(2, 4, 3)]
    state, expected = opt.init(params), [p - 0.5 * SHAPED[name](p, p) for p in params]
    for _ in range(3):
        found, _ = opt.update(params, state, params)
        assert all(map(torch.equal, found, expected))
        given = [torch.stack([p, p]) for p in params]
        grads = [*map(torch.ones_like, given)]
        opt.update(grads, opt.init(given), given)  # alike in memory
        tasks, _ = vmap(lambda g, p: opt.update(g, state, p))(grads, given)
        assert all(torch.equal(x[1], y) for x, y in zip(tasks, expected))


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_still_runs(name: str):
    """By the reference, unless the rule itself is no rule: never by a wrong kernel."""
    function, _ = REFUSED[name]

    def rule(g: Tensor, p: Tensor, *, step: Any, lr: Any) -> Any:
        return function(g.clone(), p.clone(), lr)[:1]

    opt = fo.elementwise(rule, name="odd", slots={}, hyper={"lr": Hyper(0.5)})
    p, g = torch.tensor([1.5, -0.7, 0.3]), torch.tensor([0.3, 1.2, 2.7])

    def result(execution: AbstractContextManager[Any]) -> Any:
        torch.manual_seed(0)
        try:
            with execution:
                return opt.update(g, opt.init(p), p)[0]
        except Exception as error:
            return type(error)

    expected, found = (
        result(executor_choice.execution("reference")),
        result(nullcontext()),
    )
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    else:
        assert found is expected


OF_TRUTHS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "a product": lambda g, lr: (g > 0) * lr,
    "a product of a literal": lambda g, lr: ((g > 0) * 0.1) * g,
    "a sum": lambda g, lr: (g > 0) + 0.1,
    "a choice": lambda g, lr: torch.where(g > 0, 0.1, 0.2),
    "a choice of a rate": lambda g, lr: torch.where(g > 0, lr, 0.2) * g,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OF_TRUTHS)
def test_numbers_of_truths_have_the_digits_that_torch_gives_them(
    name: str, dtype: torch.dtype
):
    def rule(g: Tensor, p: Tensor, *, step: Any, lr: Any) -> tuple[Tensor]:
        return (p - OF_TRUTHS[name](g, lr),)

    opt = fo.elementwise(rule, name="truths", slots={}, hyper={"lr": Hyper(0.1)})
    g, p = torch.linspace(-1, 1, 8, dtype=dtype), torch.linspace(0.1, 1, 8, dtype=dtype)
    expected, _ = opt.update(g, opt.init(p), p, execution="reference")
    found, _ = opt.update(g, opt.init(p), p)
    assert torch.equal(found, expected)
    assert ("truths alone" in str(fo.plan(opt, p, g))) == (dtype is torch.float64)


def test_a_rule_that_needs_its_leaf_whole_is_refused():
    def rule(g: Tensor, p: Tensor, *, step: Any, lr: Any) -> Any:
        return (p - lr * g,)

    opt = fo.per_tensor(rule, name="whole", slots={}, hyper={"lr": Hyper(0.5)})
    p = torch.ones(3)
    for name in ("native", "foreach"):
        with (
            executor_choice.execution(name),
            pytest.raises(RuntimeError, match=f"'{name}' .* whole needs each leaf whole"),
        ):
            opt.update(p, opt.init(p), p)
    assert torch.equal(opt.update(p, opt.init(p), p)[0], p / 2)


# --- what is written down


def test_equal_operations_are_one():
    def function(g: Tensor, p: Tensor, lr: Tensor) -> Any:
        return p - lr * (g * g) / torch.sqrt(g * g), g * g

    assert names(program_of(function)) == ["mul", "mul", "sqrt", "div", "sub"]


def test_what_no_output_needs_is_left_out():
    def function(g: Tensor, p: Tensor, lr: Tensor) -> Any:
        _ = torch.exp(g) + torch.tanh(p)
        return (p - lr * g,)

    program = program_of(function)
    assert names(program) == ["mul", "sub"]
    assert program.outputs == (4,)


def test_a_negative_zero_is_another_number():
    program = program_of(lambda g, p, lr: (torch.where(g > p, 0.0 * p, -0.0 * p),))
    literals = [op.literal for op in program.ops if op.name == "const"]
    assert sorted(math.copysign(1, x) for x in literals) == [-1, 1]


def test_own_temporaries_may_be_written_over():
    def function(g: Tensor, p: Tensor, lr: Tensor) -> Any:
        made = g * 2
        made.add_(1).mul_(lr)
        return (p - made,)

    assert names(program_of(function)) == ["const", "mul", "const", "add", "mul", "sub"]


def test_what_shares_memory_with_a_temporary_changes_with_it():
    """Or is refused; anything but the value from before."""
    try:
        program = program_of(writes_to_own_alias)
    except UntraceableError:
        return
    assert names(program).count("mul") == 3


def test_scalars_are_told_from_streams():
    def function(g: Tensor, p: Tensor, lr: Tensor, step: Tensor) -> Any:
        return (p - lr / (1 - 0.9**step) * g,)

    program = program_of(function, (True, True, False, False))
    streams = [op.name for op in program.ops if op.stream]
    assert streams == ["mul", "sub"]
    assert [op.name for op in program.ops if not op.stream and op.name != "const"] == [
        "pow",
        "sub",
        "div",
    ]


@pytest.mark.parametrize("case", ELEMENTWISE, ids=str)
def test_every_rule_is_one_sweep(case: Case):
    rule = rule_of(case.optimizer())
    program = rule.program(kinds_of(case), torch.float32)
    (sweep,) = program.passes
    assert not sweep.sums
    written = [o for o in program.outputs if program.is_stream(o)]
    assert list(sweep.outputs) == written and len(written) == sum(rule.outputs)
    assert not [v for v in sweep.streams if program.op(v).name in ("const", "pow")]


@pytest.mark.parametrize("case", ELEMENTWISE_ENDS, ids=str)
def test_a_zero_leaves_its_term_out(case: Case):
    rule, kinds = rule_of(case.optimizer()), kinds_of(case)
    if "weight_decay" not in rule.hyper:
        pytest.skip("no weight_decay")
    at = rule.hyper.index("weight_decay")
    without = rule.program((*kinds[:at], "zero", *kinds[at + 1 :]), torch.float32)
    with_it = rule.program(kinds, torch.float32)
    assert len(without.inputs) == len(with_it.inputs) - 1
    assert len(without.ops) < len(with_it.ops)


@pytest.mark.parametrize("case", ELEMENTWISE_ENDS, ids=str)
def test_a_program_is_traced_once(case: Case):
    rule, kinds = rule_of(case.optimizer()), kinds_of(case)
    wanted = (True,) * len(rule.inputs(kinds))
    for make in (
        lambda: rule.program(kinds, torch.float32),
        lambda: rule.vjp(kinds, torch.float32, wanted),
        lambda: rule.jvp(kinds, torch.float64, wanted),
    ):
        assert make() is make()
    assert rule.program(kinds, torch.float32) is not rule.program(kinds, torch.float64)


# --- sums


def clipped(g: Tensor, p: Tensor, lr: Tensor) -> Any:
    scaled = 3 * g
    norm = torch.linalg.vector_norm(scaled)
    return p - lr * scaled / norm, norm


def test_a_norm_makes_two_sweeps():
    program = program_of(clipped)
    first, second = program.passes
    assert [program.op(s).name for s in first.sums] == ["sum"]
    assert not first.outputs and not second.sums
    assert list(second.outputs) == [program.outputs[0]]
    root = program.outputs[1]
    assert not program.is_stream(root) and root in second.before
    again = set(first.streams) & set(second.streams)
    assert [program.op(v).name for v in again] == ["mul"]  # made twice, never stored


def test_norm_of_norms_takes_three():
    def function(g: Tensor, p: Tensor, lr: Tensor) -> Any:
        g = g / torch.linalg.vector_norm(g)
        return (p - g / torch.linalg.vector_norm(g - p, 1),)

    assert len(program_of(function).passes) == 3


def test_gradients_of_scalars_are_sums():
    program = program_of(
        vjp(lambda g, p, lr: (p - lr * g,), (True, True, True)), (*G_P_LR, True)
    )
    assert [program.is_stream(o) for o in program.outputs] == [True, True, False]
    assert len(program.passes[0].sums) == 1


# --- scalars


def evaluate(function: Callable[..., Any], *values: Any) -> Any:
    """The scalar that ``function`` of scalars gives, by the evaluator of programs."""
    inputs = (True, *[False] * len(values))
    program = program_of(lambda g, *v: (g * function(*v),), inputs)
    (sweep,) = program.passes
    place: list[Any] = [None] * (len(inputs) + len(program.ops))
    place[1 : 1 + len(values)] = values
    scalars.evaluator(program, sweep)(place)
    (product,) = sweep.streams
    return place[next(a for a in program.op(product).args if a)]


def guarded(step: Tensor) -> Tensor:
    return torch.where(step > 5, 1 / (step - 5), step)


FORMULAS: dict[str, tuple[Callable[..., Any], tuple[float, ...], float]] = {
    "bias correction": (lambda b, t: 1 - b**t, (0.999, 3.0), 1 - 0.999**3),
    "near one": (lambda b, t: 1 - b**t, (1 - 1e-9, 1.0), 1 - (1 - 1e-9)),
    "a step beyond 2**24": (lambda t: t + 1, (2.0**24 + 1,), 2.0**24 + 2),
    "root": (lambda x: torch.sqrt(1 - x), (0.3,), math.sqrt(1 - 0.3)),
    "a discarded division by 0": (guarded, (5.0,), 5.0),
    "a division by 0": (lambda x: 1 / x, (0.0,), math.inf),
    "overflow": (lambda x, t: 1 / x**t, (10.0, 400.0), 0.0),
    "log of 0": (torch.log, (0.0,), -math.inf),
    "root of a negative": (torch.sqrt, (-1.0,), math.nan),
    "power of a negative": (lambda x: x**0.5, (-1.0,), math.nan),
    "0/0": (lambda x: x / x, (0.0,), math.nan),
    "larger of NaN": (lambda x: torch.maximum(x, x / x), (0.0,), math.nan),
    "clamp": (lambda x: x.clamp(1.0, 2.0), (3.0,), 2.0),
    "sign": (torch.sign, (-3.0,), -1.0),
    "lerp": (lambda a, b: torch.lerp(a, b, 0.25), (2.0, 4.0), 2.5),
    "addcmul": (lambda a, b: torch.addcmul(a, a, b, value=0.5), (2.0, 4.0), 6.0),
    "both": (lambda x: torch.where((x > 1) & (x < 3), x, -x), (2.0,), 2.0),
    "not": (lambda x: torch.where(torch.logical_not(x > 1), x, -x), (2.0,), -2.0),
    "sigmoid far out": (torch.sigmoid, (-800.0,), 0.0),
}


@pytest.mark.parametrize("kind", ["float", "0d", "tasks"])
@pytest.mark.parametrize("name", FORMULAS)
def test_scalars_are_float64(name: str, kind: str):
    function, values, expected = FORMULAS[name]
    if kind == "float":
        found = evaluate(function, *values)
        assert isinstance(found, (float, bool))
    else:
        shape = (2,) if kind == "tasks" else ()
        found = evaluate(
            function, *[torch.full(shape, v, dtype=torch.float64) for v in values]
        )
        assert (found.dtype, found.shape) == (torch.float64, shape)
    found = torch.as_tensor(found, dtype=torch.float64)
    wanted = torch.tensor(expected, dtype=torch.float64).expand(found.shape)
    assert torch.allclose(found, wanted, rtol=1e-15, atol=0, equal_nan=True)


# --- where a first call may happen


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def dual_level() -> Iterator[None]:
    with forward_ad.dual_level():
        yield


def inside(transform: Callable[..., Any], *arguments: Any) -> Callable[[Any], None]:
    def call(action: Callable[[], Any]) -> None:
        def function(x: Tensor) -> Tensor:
            action()
            return x.sum()

        transform(function)(*arguments)

    return call


def within(context: Callable[[], AbstractContextManager[Any]]) -> Callable[[Any], None]:
    def call(action: Callable[[], Any]) -> None:
        with context():
            action()

    return call


def pushed(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x: jvp(function, (x,), (x,))


class Doubling(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **kwargs or {})
        return out + out if isinstance(out, Tensor) and out.is_floating_point() else out


@contextmanager
def looked_on() -> Iterator[None]:
    """By all that may look on; and it still does afterwards."""
    x, seen = torch.ones(3, requires_grad=True), []
    hooks = torch.autograd.graph.saved_tensors_hooks(seen.append, lambda _: 2 * x)
    with torch.autograd.set_detect_anomaly(True, check_nan=True), hooks:
        yield
        assert torch.is_anomaly_enabled() and torch.is_anomaly_check_nan_enabled()
        assert not seen and x.square().sum().requires_grad and len(seen) == 1


SITUATIONS: dict[str, Callable[[Any], None]] = {
    "vmap": inside(vmap, torch.ones(2, 3)),
    "grad": inside(grad, torch.ones(3)),
    "jvp": inside(pushed, torch.ones(3)),
    "grad of vmap": inside(lambda f: grad(lambda x: vmap(f)(x).sum()), torch.ones(2, 3)),
    "vmap of grad": inside(lambda f: vmap(grad(f)), torch.ones(2, 3)),
    "no_grad": within(torch.no_grad),
    "inference_mode": within(torch.inference_mode),
    "dual level": within(dual_level),
    "default dtype": within(default_dtype),
    "default device": within(lambda: torch.device("meta")),
    "autocast": within(lambda: torch.autocast("cpu", torch.bfloat16)),
    "saved tensors hooks": within(
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    ),
    "hooks that change what is saved, and a search for NaN": within(looked_on),
    "a mode that changes what functions give": within(Doubling),
}


@pytest.mark.costly
@pytest.mark.parametrize("case", ELEMENTWISE_ENDS[1::2], ids=str)
@pytest.mark.parametrize("name", SITUATIONS)
def test_traced_alike_everywhere(name: str, case: Case):
    kinds = kinds_of(case)

    rule = rule_of(case.optimizer())
    made: list[Program] = []

    def action() -> None:
        fresh = Rule(rule.function, rule.name, rule.scalar, rule.hyper)
        wanted = (True,) * len(fresh.inputs(kinds))
        made.append(fresh.program(kinds, torch.float32))
        made.append(fresh.vjp(kinds, torch.float32, wanted))
        made.append(fresh.jvp(kinds, torch.float64, wanted))

    SITUATIONS[name](action)
    found = made[:3]  # vmap's function may run more than once
    action()
    assert found == made[-3:]
