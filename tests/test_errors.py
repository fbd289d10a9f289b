"""Bad input: one table of what is refused, with which words, and nothing changed."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import funcopt as fo
from funcopt import tree
from funcopt.hyper import Hyper

NAN = float("nan")
ADAM = fo.adam(lr=0.1)
SGD = fo.sgd(lr=0.1)
HALVES = fo.partition({"a": SGD, "b": ADAM}, {"layer": "a", "scale": "b"})


def fading(g: Tensor, p: Tensor, rate: Any, *, step: Any, lr: Any) -> Any:
    return p - rate * g, rate * lr


CLIPPED = fo.chain(fo.clip_by_global_norm(1.0), SGD)
IN_TURN = fo.chain(fo.clip_by_global_norm(1.0), HALVES)
# One of its own, that needs a keyword.
NEEDY = fo.Optimizer(dict, lambda g, s, p, *, net: (p, s), "needy", {"net": None})
# One number for each leaf.
FADING = fo.elementwise(
    fading, name="fading", slots={"rate": 1.0}, hyper={"lr": Hyper(0.9)}
)


class Given(NamedTuple):
    """What every call gets, anew."""

    params: Any
    grads: Any
    state: Any


def given() -> Given:
    params = {
        "layer": {"weight": torch.ones(2, 3), "bias": torch.zeros(3)},
        "scale": torch.ones(4),
    }
    grads = tree.map(lambda p: torch.full_like(p, 0.5), params)
    return Given(params, grads, ADAM.init(params))


def step(x: Given, opt: fo.Optimizer = ADAM, state: Any = None, **hyper: Any) -> Any:
    state = opt.init(x.params) if state is None else state
    return opt.update(x.grads, state, x.params, **hyper)


def with_weight(values: Any, leaf: Any) -> Any:
    """The tree with another leaf for its weight."""
    return {**values, "layer": {**values["layer"], "weight": leaf}}


def grad_of(x: Given, weight: Any) -> Any:
    return ADAM.update(with_weight(x.grads, weight), x.state, x.params)


def nested() -> Tensor:
    """Of torch's first kind, whose layout is strided."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls them a prototype
        return torch.nested.nested_tensor([torch.ones(3), torch.ones(2)])


def init_with(x: Given, weight: Any) -> Any:
    return ADAM.init(with_weight(x.params, weight))


def loss(p: Any, _: Any) -> Tensor:
    return sum((leaf.square().sum() for leaf in tree.leaves(p)), torch.zeros(()))


def unroll(x: Given, loss_fn: Callable[..., Any] = loss, *batch: Any, **how: Any) -> Any:
    if "batches" not in how:
        how.setdefault("steps", 2)
    return fo.unroll(SGD, loss_fn, x.params, *batch, **how)


def first_order(x: Given, loss_fn: Callable[..., Any], *batch: Any, **how: Any) -> Any:
    return unroll(x, loss_fn, *batch, grad_mode="first_order", **how)


def given_a_name(use: Callable[[Given, Any], Any]) -> Callable[[Given], Any]:
    return lambda x: use(x, "sgd")


# What takes an Optimizer, by the name that its words bear.
TAKERS: dict[str, Callable[[Given, Any], Any]] = {
    "accumulate": lambda x, opt: fo.accumulate(opt, 2),
    "as_torchopt": lambda x, opt: fo.as_torchopt(opt),
    "cautious": lambda x, opt: fo.cautious(opt),
    "clip_adjoint": lambda x, opt: fo.meta.clip_adjoint(opt, 1.0),
    "freeze": lambda x, opt: fo.freeze(opt, False),
    "inner loop": lambda x, opt: fo.unroll(opt, loss, x.params, steps=1),
    "master_weights": lambda x, opt: fo.master_weights(opt),
    "partition's 'a'": lambda x, opt: fo.partition({"a": opt}, "a"),
    "plan": lambda x, opt: fo.plan(opt, x.params),
    "Problem": lambda x, opt: fo.meta.Problem(opt, loss, loss, 1, x.params),
    "sam": lambda x, opt: fo.sam(opt),
    "scheduled": lambda x, opt: fo.scheduled(opt, lr=0.1),
    "skip_nonfinite": lambda x, opt: fo.skip_nonfinite(opt),
    "step of": lambda x, opt: fo.meta.step_vjp(opt, loss, x.params, x.state),
    "to_torch": lambda x, opt: fo.to_torch(opt, x.params),
    "update_vjp": lambda x, opt: fo.meta.update_vjp(opt, x.grads, x.state, x.params),
}


def scaled(p: Any, by: Tensor, *more: Tensor, buffers: Any = 1.0) -> Tensor:
    """A loss that depends on whatever it is given."""
    for factor in (by, *more):
        buffers = buffers * (1.0 if factor is None else factor)
    return p["scale"].sum() * buffers


def learned() -> Tensor:
    return torch.tensor(2.0, requires_grad=True)


LEARNED = learned()
COMPLEX = torch.ones(2) * 1j


def tasks_of(x: Given, batch: Any, **how: Any) -> Any:
    return fo.meta.value_and_grad(loss, **how)(x.params, batch)


def over_tasks(x: Given, task_loss: Callable[..., Any], **how: Any) -> Any:
    return fo.meta.value_and_grad(task_loss, **how)(x.params, torch.ones(3))


def two_groups(**differing: Any) -> list[dict[str, Any]]:
    return [{"params": [torch.ones(1)]}, {"params": [torch.ones(1)], **differing}]


class Case(NamedTuple):
    what: str
    call: Callable[[Given], Any]
    error: type[Exception]
    builtin: type[Exception]
    words: tuple[str, ...]


def refuses(error: type[Exception], builtin: type[Exception], *rows: Any) -> list[Case]:
    """Rows of (what, call, words...) that raise the same error."""
    return [Case(row[0], row[1], error, builtin, row[2:]) for row in rows]


def total(p: Any) -> Tensor:
    return loss(p, None)


CASES = [
    *refuses(
        fo.HyperparameterError,
        ValueError,
        ("negative lr", lambda x: fo.sgd(lr=-0.1), "lr", "[0, inf)", "-0.1"),
        ("NaN lr", lambda x: fo.adam(lr=NAN), "lr", "[0, inf)", "nan"),
        ("infinite lr", lambda x: fo.adamw(lr=float("inf")), "lr", "[0, inf)"),
        ("negative int lr", lambda x: fo.sgd(lr=-1), "lr", "-1"),
        ("negative lr in update", lambda x: step(x, lr=-0.1), "lr", "-0.1"),
        ("NaN in a tree", lambda x: step(x, lr={"layer": 0.1, "scale": NAN}), "nan"),
        (
            "NaN in by_name",
            lambda x: fo.sgd(lr=fo.by_name({"*bias": NAN}, default=0.1)),
            "lr",
            "nan",
        ),
        ("beta1 of 1", lambda x: fo.adam(betas=(1.0, 0.9)), "betas[0]", "[0, 1)", "1.0"),
        ("beta2 of 1", lambda x: fo.adamw(betas=(0.9, 1.0)), "betas[1]", "[0, 1)"),
        ("negative beta", lambda x: step(x, betas=(0.9, -0.1)), "betas[1]", "-0.1"),
        ("no noise", lambda x: step(x, fo.sgld()), "sgld", "noise", "fo.normal_like"),
        (
            "noise of another shape",
            lambda x: step(x, fo.sgld(), noise=torch.ones(7)),
            "noise",
            "(7,)",
            "layer.bias",
        ),
        ("one beta", lambda x: fo.adam(betas=0.9), "2 values", "beta1, beta2", "0.9"),  # pyright: ignore[reportArgumentType]
        ("three betas", lambda x: step(x, betas=(0.9, 0.9, 0.9)), "2 values"),
        ("negative eps", lambda x: fo.adam(eps=-1e-8), "eps", "-1e-08"),
        ("negative decay", lambda x: fo.adamw(weight_decay=-1.0), "weight_decay", "-1"),
        ("negative momentum", lambda x: fo.sgd(momentum=-0.9), "momentum", "-0.9"),
        ("nesterov without momentum", lambda x: fo.sgd(nesterov=True), "momentum=0.0"),
        ("rho over 1", lambda x: fo.adadelta(rho=1.1), "rho", "[0, 1]", "1.1"),
        ("negative alpha", lambda x: fo.rmsprop(alpha=-0.1), "alpha", "-0.1"),
        (
            "negative momentum of rmsprop",
            lambda x: fo.rmsprop(momentum=-1.0),
            "momentum",
            "-1",
        ),
        ("negative lr_decay", lambda x: fo.adagrad(lr_decay=-0.5), "lr_decay", "-0.5"),
        (
            "negative sum of squares",
            lambda x: fo.adagrad(initial_accumulator_value=-0.1),
            "initial_accumulator_value",
            "-0.1",
        ),
        (
            "sum of squares that is a tensor",
            lambda x: fo.adagrad(initial_accumulator_value=torch.ones(())),  # pyright: ignore[reportArgumentType]
            "initial_accumulator_value",
            "tensor",
        ),
        (
            "sums of squares that differ",
            lambda x: fo.adagrad(initial_accumulator_value=[0.0, 0.1]),  # pyright: ignore[reportArgumentType]
            "one number",
            "[0.0, 0.1]",
            "partition",
        ),
        ("etas in the wrong order", lambda x: fo.rprop(etas=(1.2, 0.5)), "etaminus < 1"),
        ("etaplus of 1", lambda x: fo.rprop(etas=(0.5, 1.0)), "1 < etaplus", "1.0"),
        ("one eta", lambda x: fo.rprop(etas=0.5), "2 values", "etaminus"),  # pyright: ignore[reportArgumentType]
        ("negative step size", lambda x: fo.rprop(step_sizes=(-1, 1)), "step_sizes[0]"),
        (
            "rate for each weight, kept per leaf",
            lambda x: step(x, fo.asgd(lr={"layer": 0.1, "scale": torch.ones(4)})),
            "lr at 'scale'",
            "(4,)",
            "one number per leaf",
        ),
        (
            "nesterov with dampening",
            lambda x: fo.sgd(momentum=0.9, dampening=0.1, nesterov=True),
            "nesterov",
            "dampening=0.1",
        ),
        (
            "glob that fits nothing, in update",
            lambda x: step(x, lr=fo.by_name({"*.biass": 0.0}, default=0.1)),
            "lr",
            "'*.biass'",
            "'layer.bias', 'layer.weight', 'scale'",
        ),
        (
            "a tree for a glob",
            lambda x: step(x, lr=fo.by_name({"layer.*": [0.1]}, default=0.1)),
            "lr",
            "[0.1]",
        ),
        (
            "glob that fits nothing, from the factory",
            lambda x: step(x, fo.sgd(lr=fo.by_name({"Scale": 0.0}, default=0.1))),
            "lr",
            "'Scale'",
            "'scale'",
        ),
        (
            "tensor that does not broadcast",
            lambda x: step(x, lr={"layer": 0.1, "scale": torch.ones(3)}),
            "lr at 'scale'",
            "(3,)",
            "(4,)",
        ),
        (
            "tensor with more dimensions",
            lambda x: step(x, eps={"layer": 0.1, "scale": torch.ones(1, 4)}),
            "eps at 'scale'",
            "(1, 4)",
            "(4,)",
        ),
        (
            "tensor on another device",
            lambda x: step(x, lr={"layer": 0.1, "scale": torch.ones(4, device="meta")}),
            "lr at 'scale'",
            "meta",
            "cpu",
        ),
        (
            "complex number for a real leaf",
            lambda x: step(x, lr=torch.tensor(1j)),
            "lr at 'layer.bias'",
            "complex64",
            "real 0-d",
        ),
        (
            "tensor in a number per leaf",
            lambda x: step(x, FADING, lr={"layer": 0.9, "scale": torch.ones(4)}),
            "fading's 'rate'",
            "'scale'",
            "(4,)",
            "0-d",
        ),
        (
            "tensor in a number per leaf, in place",
            lambda x: step(x, FADING, lr=torch.ones(1), donate=True),
            "fading's 'rate'",
            "0-d",
        ),
        (
            "label without optimizer",
            lambda x: fo.partition({"a": SGD}, {"layer": "a", "scale": "z"}).init(
                x.params
            ),
            "'scale'",
            "'z'",
            "['a']",
        ),
        (
            "label without optimizer, in update",
            lambda x: fo.partition({"a": SGD}, {"layer": "a", "scale": "z"}).update(
                x.grads, {"a": x.state}, x.params
            ),
            "'scale'",
            "'z'",
        ),
        (
            "labels' glob that fits nothing",
            lambda x: fo.partition({"a": SGD}, fo.by_name({"z*": "a"}, default="a")).init(
                x.params
            ),
            "labels",
            "'z*'",
        ),
        (
            "freeze by a number",
            lambda x: fo.freeze(SGD, {"layer": 1, "scale": False}).init(x.params),
            "True or False",
            "'layer.bias'",
            "1",
        ),
        (
            "freeze by a number, in update",
            lambda x: step(x, fo.freeze(SGD, 0), state=SGD.init(x.params)),
            "True or False",
            "0",
        ),
        (
            "group without params",
            lambda x: fo.from_param_groups([{"lr": 0.1}]),
            "group 0",
            "'params'",
            "'lr'",
        ),
        (
            "group that lacks a value",
            lambda x: fo.from_param_groups(two_groups(lr=0.1)),
            "group 0",
            "'lr'",
        ),
        (
            "flag that differs",
            lambda x: fo.from_param_groups(two_groups(nesterov=True), nesterov=False),
            "'nesterov'",
            "[False, True]",
            "partition",
        ),
        (
            "pair of a group as a list",
            lambda x: fo.from_param_groups(
                two_groups(betas=[0.5, 0.6]), betas=[0.9, 0.99]
            ),
            "'betas'",
            "[[0.9, 0.99], [0.5, 0.6]]",
            "tuple",
        ),
        (
            "list that all groups share",
            lambda x: fo.from_param_groups(two_groups(lr=0.1), lr=0.1, betas=[0.9, 0.99]),
            "'betas'",
            "tuple",
        ),
        (
            "number beside a pair",
            lambda x: fo.from_param_groups(two_groups(betas=0.5), betas=(0.9, 0.99)),
            "'betas'",
            "[(0.9, 0.99), 0.5]",
        ),
        (
            "pair beside three",
            lambda x: fo.from_param_groups(
                two_groups(betas=(0.5,) * 3), betas=(0.9, 0.99)
            ),
            "'betas'",
            "(0.5, 0.5, 0.5)",
        ),
        (
            "name given twice in a group",
            lambda x: fo.from_param_groups(
                [{"params": [("a", torch.ones(1)), ("a", torch.ones(2))]}]
            ),
            "group 0",
            "'a'",
        ),
        ("negative steps", lambda x: unroll(x, steps=-1), "steps", "-1"),
        ("window of no step", lambda x: unroll(x, window=0), "window", "0"),
        ("window of half a step", lambda x: unroll(x, window=1.5), "window", "1.5"),
        ("unknown grad_mode", lambda x: unroll(x, grad_mode="exact"), "'exact'"),
        ("unknown path", lambda x: tasks_of(x, torch.ones(3), tasks="pmap"), "'pmap'"),
        ("empty chunks", lambda x: tasks_of(x, torch.ones(3), chunk_size=0), "0"),
        ("unknown compile", lambda x: tasks_of(x, x, compile="jit"), "'trace'", "'jit'"),
        (
            "unknown randomness",
            lambda x: tasks_of(x, torch.ones(3), randomness="some", tasks="loop"),
            "randomness",
            "'some'",
        ),
    ),
    *refuses(
        fo.UnknownHyperparameterError,
        TypeError,
        ("unknown name", lambda x: step(x, momentum=0.9), "adam", "'momentum'", "betas"),
        ("a rule's own name", lambda x: step(x, beta1=0.9), "'beta1'", "betas"),
        ("flag in update", lambda x: step(x, amsgrad=True), "'amsgrad'", "fixed"),
        (
            "momentum where there is no buffer",
            lambda x: step(x, SGD, momentum=0.9),
            "sgd",
            "'momentum'",
            "zero",
        ),
        (
            "name that no part has",
            lambda x: step(x, HALVES, momentum=0.9),
            "partition",
            "'momentum'",
        ),
        ("unknown name in unroll", lambda x: unroll(x, hyper={"beta": 0.9}), "'beta'"),
        (
            "unknown name through freeze",
            lambda x: step(x, fo.freeze(SGD, {"layer": True, "scale": False}), rho=1.0),
            "'rho'",
        ),
    ),
    *refuses(
        TypeError,  # Python's own, for a keyword that the factory does not have
        TypeError,
        ("unknown name in the factory", lambda x: fo.sgd(rate=0.1), "rate"),  # pyright: ignore[reportCallIssue]
    ),
    *refuses(
        fo.HyperparameterError,
        ValueError,
        ("step count that is no int", lambda x: unroll(x, steps=1.5), "steps", "1.5"),
    ),
    *refuses(
        fo.HyperparameterTypeError,
        TypeError,
        ("bare callable", lambda x: fo.sgd(lr=lambda t: 0.1), "lr", "fo.Schedule"),
        (
            "a loss that is no function",
            lambda x: fo.unroll(SGD, 1.5, x.params, steps=1),  # pyright: ignore[reportArgumentType]
            "loss_fn",
            "float",
        ),
        (
            "a family for its loss",
            lambda x: fo.meta.value_and_grad(fo.meta.maml(total, SGD, steps=1)),  # pyright: ignore[reportArgumentType]
            "family.task_loss",
            "Family",
        ),
        (
            "parameters for a rate",
            lambda x: fo.sgd(nn.Identity()),
            "opt.init",
            "Identity",
        ),
        (
            "a generator for a rate",
            lambda x: fo.sgd(nn.Identity().parameters()),
            "opt.init",
        ),
        (
            "the parameters for a rate",
            lambda x: fo.adamw(x.params).init(x.params),
            "adamw's lr",
            "opt.init",
        ),
        (
            "a number for all of hyper",
            lambda x: fo.meta.reverse(
                fo.meta.Problem(SGD, loss, loss, steps=2, params=x.params),
                {"hyper": torch.tensor(0.1)},
            ),
            "eta['hyper']",
            "Tensor",
        ),
        ("hyper that is a number", lambda x: unroll(x, hyper=0.1), "{'lr': 0.1}"),
        ("bare callable in update", lambda x: step(x, lr=lambda t: 0.1), "fo.Schedule"),
        (
            "plan without what update needs",
            lambda x: fo.plan(NEEDY, x.params),
            "needy's update",
            "no keyword",
            "'net'",
            "name=value",
        ),
        (
            "bare callable in a tree",
            lambda x: step(x, lr={"layer": 0.1, "scale": abs}),
            "lr",
            "fo.Schedule",
        ),
        (
            "bare callable in betas",
            lambda x: fo.adam(betas=(0.9, abs)),
            "betas[1]",
            "fo.Schedule",
        ),
        ("schedule of a number", lambda x: fo.Schedule(0.1), "function", "0.1"),  # pyright: ignore[reportArgumentType]
        (
            "schedule that gives a string",
            lambda x: step(x, lr=fo.Schedule(lambda t: "fast")),
            "lr",
            "'fast'",
        ),
        *(
            (f"no optimizer for {taker}", given_a_name(use), taker, "'sgd'")
            for taker, use in TAKERS.items()
        ),
        ("a factory", lambda x: fo.accumulate(fo.sgd, 2), "call it", "fo.sgd(...)"),  # pyright: ignore[reportArgumentType]
        (
            "torch's optimizer",
            lambda x: fo.skip_nonfinite(torch.optim.SGD([torch.ones(1)])),  # pyright: ignore[reportArgumentType]
            "skip_nonfinite",
            "fo.from_torch",
        ),
        (
            "a list of optimizers",
            lambda x: fo.partition([SGD], "a"),  # pyright: ignore[reportArgumentType]
            "partition",
            "label",
        ),
        ("string", lambda x: fo.sgd(lr="fast"), "lr", "'fast'"),
        ("bool", lambda x: fo.sgd(lr=True), "lr", "True"),
        ("complex", lambda x: fo.sgd(lr=1j), "lr", "1j"),
        ("None", lambda x: fo.sgd(lr=None), "lr", "None"),
        ("None in a tree", lambda x: step(x, lr={"layer": None, "scale": 1.0}), "None"),
        (
            "per_step in update",
            lambda x: step(x, lr=fo.per_step(torch.ones(3))),
            "unroll",
        ),
        (
            "per_step in the factory",
            lambda x: fo.sgd(lr=fo.per_step(torch.ones(3))),
            "lr",
            "per_step",
        ),
    ),
    *refuses(
        fo.StructureError,
        ValueError,
        (
            "value tree of other keys",
            lambda x: step(x, lr={"layer": 0.1, "scales": 0.1}),
            "lr",
            "params has 'scale'",
            "the values have 'scales'",
        ),
        (
            "value tree of other keys, deeper",
            lambda x: step(x, lr={"layer": {"weights": 0.1, "bias": 1.0}, "scale": 1.0}),
            "at 'layer'",
            "'layer.weight'",
            "'layer.weights'",
        ),
        (
            "value tree that lacks a branch",
            lambda x: step(x, fo.sgd(lr={"layer": 0.1})),
            "'<root>'",
            "'scale'",
        ),
        (
            "value tree deeper than params",
            lambda x: step(x, lr={"layer": 0.1, "scale": {"a": 0.1}}),
            "'scale.a'",
            "'scale'",
        ),
        (
            "value list for a dict",
            lambda x: step(x, lr=[0.1, 0.2]),
            "'layer', 'scale'",
            "'0', '1'",
        ),
        (
            "labels that do not fit",
            lambda x: fo.partition({"a": SGD}, {"layers": "a", "scale": "a"}).init(
                x.params
            ),
            "labels",
            "'layer'",
            "'layers'",
        ),
        (
            "frozen that does not fit",
            lambda x: fo.freeze(SGD, {"layers": True, "scale": True}).init(x.params),
            "frozen",
            "'layer'",
            "'layers'",
        ),
        (
            "gradient that lacks a leaf",
            lambda x: ADAM.update({"layer": x.grads["layer"]}, x.state, x.params),
            "grads",
            "missing 'scale'",
        ),
        (
            "gradient with one leaf more",
            lambda x: ADAM.update({**x.grads, "more": x.grads}, x.state, x.params),
            "grads",
            "'more.layer.bias'",
        ),
        (
            "gradient in another container",
            lambda x: ADAM.update((x.grads,), ADAM.init([x.params]), [x.params]),
            "grads",
            "containers differ",
        ),
        (
            "gradient of another shape",
            lambda x: grad_of(x, torch.ones(3, 2)),
            "grads at 'layer.weight'",
            "(3, 2)",
            "(2, 3)",
        ),
        (
            "gradient that would broadcast",
            lambda x: grad_of(x, torch.ones(3)),
            "(3,)",
            "(2, 3)",
        ),
        (
            "gradient where there is no parameter",
            lambda x: ADAM.update(x.grads, x.state, with_weight(x.params, None)),
            "grads at 'layer.weight'",
            "None",
        ),
        (
            "arguments in the wrong order",
            lambda x: ADAM.update(x.params, x.grads, x.state),
            "grads",
            "exp_avg",
        ),
        (
            "state of another optimizer",
            lambda x: ADAM.update(x.grads, SGD.init(x.params), x.params),
            "adam keeps",
            "exp_avg_sq",
            "['step']",
        ),
        (
            "state of other flags",
            lambda x: step(x, state=fo.adam(amsgrad=True).init(x.params)),
            "max_exp_avg_sq",
            "flags",
        ),
        ("no state", lambda x: ADAM.update(x.grads, None, x.params), "NoneType"),  # pyright: ignore[reportArgumentType]
        (
            "state of fewer leaves",
            lambda x: step(x, SGD, state=SGD.init(x.params["layer"])),
            "(2,)",
            "3 leaves",
            "another tree",
        ),
        (
            "number per leaf, for fewer leaves",
            lambda x: step(
                x, FADING, state={**FADING.init(x.params), "rate": torch.ones(2).double()}
            ),
            "state['rate']",
            "(2,)",
            "3 leaves",
        ),
        (
            "state of other names",
            lambda x: step(
                x, state=ADAM.init({**x.params["layer"], "s": x.params["scale"]})
            ),
            "state['exp_avg']",
            "missing 'layer.bias', 'layer.weight', 'scale'",
            "'s'",
        ),
        (
            "state of other shapes",
            lambda x: step(x, state=init_with(x, torch.ones(5))),
            "state['exp_avg'] at 'layer.weight'",
            "(5,)",
            "(2, 3)",
        ),
        (
            "state of no partition",
            lambda x: HALVES.update(x.grads, x.state, x.params),
            "['a', 'b']",
        ),
        *(
            (
                f"state of no {name}",
                lambda x, opt=opt: opt.update(x.grads, x.state, x.params),
                f"{name} keeps the state ['",
                "'optimizer'",
            )
            for name, opt in (
                ("accumulate", fo.accumulate(ADAM, 2)),
                ("skip_nonfinite", fo.skip_nonfinite(ADAM)),
                ("master_weights", fo.master_weights(ADAM)),
            )
        ),
        ("no number of steps", lambda x: fo.unroll(SGD, loss, x.params), "steps="),
        (
            "batch and batches",
            lambda x: unroll(x, loss, torch.ones(2), batches=torch.ones(2)),
            "batch",
            "batches",
        ),
        (
            "batches of another number",
            lambda x: unroll(x, batches=torch.ones(2), steps=3),
            "2 steps",
            "steps=3",
        ),
        (
            "batches of unequal number",
            lambda x: unroll(x, batches={"x": torch.ones(2), "y": torch.ones(3)}),
            "batches",
            "'x' has 2",
            "'y' has 3",
        ),
        (
            "a carry of no estimate",
            lambda x: fo.meta.reverse(
                fo.meta.Problem(SGD, loss, loss, steps=2, params=x.params),
                {"hyper": {"lr": torch.tensor(0.1)}},
                carry={"params": x.params},
            ),
            "estimate.carry",
            "dict",
        ),
        ("batches of nothing", lambda x: unroll(x, batches=()), "batches", "empty"),
        ("0-d batches", lambda x: unroll(x, batches=[torch.ones(())]), "batches['0']"),
        ("batches of numbers", lambda x: unroll(x, batches=[1, 2]), "batches['0']"),
        (
            "per_step of another number",
            lambda x: unroll(x, hyper={"lr": fo.per_step(torch.ones(3))}),
            "'lr'",
            "3 steps",
            "2",
        ),
        (
            "per_step of unequal number",
            lambda x: unroll(
                x,
                hyper={"lr": fo.per_step((torch.ones(2), torch.ones(3)))},
            ),
            "'0' has 2",
            "'1' has 3",
        ),
        (
            "per_step of floats",
            lambda x: unroll(x, hyper={"lr": fo.per_step([0.1, 0.2])}),
            "lr['0']",
        ),
        ("loss per row", lambda x: unroll(x, lambda p, _: p["scale"]), "0-d", "(4,)"),
        ("loss of a float", lambda x: unroll(x, lambda p, _: 1.0), "0-d", "float"),
        ("no loss", lambda x: unroll(x, lambda p, _: None), "0-d", "NoneType"),
        (
            "aux not announced",
            lambda x: unroll(x, lambda p, _: (loss(p, _), p)),
            "0-d",
            "has_aux",
        ),
        (
            "a list of uneven batches",
            lambda x: unroll(x, batches=[torch.ones(2), torch.ones(3)]),
            "stack",
        ),
        (
            "None for a branch of gradients",
            lambda x: ADAM.update({**x.grads, "layer": None}, x.state, x.params),
            "'layer.bias'",
            "None, for each of its leaves",
        ),
        ("aux announced, not given", lambda x: unroll(x, has_aux=True), "has_aux"),
        (
            "tasks of unequal number",
            lambda x: tasks_of(x, {"x": torch.ones(2), "y": [torch.ones(3)]}),
            "tasks",
            "'x' has 2",
            "'y.0' has 3",
        ),
        ("no task tensors", lambda x: tasks_of(x, {}), "tasks", "empty"),
        ("tasks without axis", lambda x: tasks_of(x, torch.ones(())), "leading axis"),
        ("no tasks", lambda x: tasks_of(x, torch.ones(0, 3)), "tasks"),
        ("no tasks, looped", lambda x: tasks_of(x, torch.ones(0), tasks="loop"), "tasks"),
    ),
    *refuses(
        fo.LeafError,
        TypeError,
        ("float leaf", lambda x: init_with(x, 1.0), "params['layer.weight']", "float"),
        *(
            (
                f"a number for a gradient of {opt.name}",
                lambda x, opt=opt: opt.update(
                    with_weight(x.grads, 0.5), opt.init(x.params), x.params
                ),
                "grads at 'layer.weight' is float, not a tensor",
            )
            for opt in (
                ADAM,
                fo.accumulate(ADAM, 2),
                fo.skip_nonfinite(ADAM),
                fo.master_weights(ADAM),
            )
        ),
        ("string leaf", lambda x: init_with(x, "w"), "params['layer.weight']", "str"),
        (
            "module for buffers",
            lambda x: unroll(x, buffers=nn.Identity()),
            "named_buffers",
            "Identity",
        ),
        (
            "module for params",
            lambda x: SGD.init(nn.Identity()),
            "Identity",
            "named_parameters",
        ),
        (
            "iterator for params",
            lambda x: SGD.init(iter([torch.ones(1)])),
            "iterator",
            "list",
        ),
        (
            "integer leaf",
            lambda x: init_with(x, torch.ones(2, 3).long()),
            "params['layer.weight']",
            "torch.int64",
        ),
        ("bool leaf", lambda x: init_with(x, torch.ones(2) > 0), "torch.bool"),
        (
            "complex leaf, of a rule that needs it whole",
            lambda x: fo.lamb().init(with_weight(x.params, COMPLEX)),
            "params['layer.weight']",
            "torch.complex64",
            "lamb takes real leaves",
        ),
        (
            "complex leaf, of a rule that needs it whole, in update",
            lambda x: fo.lars().update(
                COMPLEX,
                {**fo.lars().init(torch.ones(2)), "momentum_buffer": COMPLEX},
                COMPLEX,
            ),
            "params['<root>']",
            "torch.complex64",
        ),
        (
            "complex matrix",
            lambda x: fo.muon().init(COMPLEX.reshape(1, 2)),
            "muon takes real leaves",
        ),
        (
            "real gradient of a complex leaf",
            lambda x: SGD.update(torch.ones(2), SGD.init(COMPLEX), COMPLEX),
            "grads at '<root>'",
            "torch.float32",
            "torch.complex64",
        ),
        (
            "complex gradient of a real leaf",
            lambda x: grad_of(x, torch.ones(2, 3) * 1j),
            "grads at 'layer.weight'",
            "torch.complex64",
        ),
        (
            "another optimizer's slot, real for complex",
            lambda x: ADAM.update(
                COMPLEX, {**ADAM.init(COMPLEX), "exp_avg": torch.ones(2)}, COMPLEX
            ),
            "state['exp_avg']",
            "torch.float32",
        ),
        ("a nested leaf", lambda x: init_with(x, nested()), "layer.weight", "nested"),
        (
            "a leaf of 8 bits",
            lambda x: init_with(x, torch.ones(2, 3).to(torch.float8_e4m3fn)),
            "layer.weight",
            "float8_e4m3fn",
            "16 bits",
        ),
        ("a nested gradient", lambda x: grad_of(x, nested()), "grads", "is nested"),
        (
            "sparse leaf",
            lambda x: init_with(x, torch.ones(2, 3).to_sparse()),
            "params['layer.weight']",
            "sparse",
        ),
        (
            "integer leaf in update",
            lambda x: SGD.update(
                torch.ones(2).long(), SGD.init(torch.ones(2)), torch.ones(2).long()
            ),
            "params['<root>']",
            "torch.int64",
        ),
        (
            "sparse leaf in update",
            lambda x: SGD.update(
                torch.ones(2).to_sparse(),
                SGD.init(torch.ones(2)),
                torch.ones(2).to_sparse(),
            ),
            "params['<root>']",
            "sparse",
        ),
        (
            "gradient of another dtype",
            lambda x: grad_of(x, torch.ones(2, 3).double()),
            "grads at 'layer.weight'",
            "torch.float64",
            "torch.float32",
        ),
        (
            "gradient on another device",
            lambda x: grad_of(x, torch.ones(2, 3, device="meta")),
            "grads at 'layer.weight'",
            "meta",
            "cpu",
        ),
        (
            "sparse gradient",
            lambda x: grad_of(x, torch.ones(2, 3).to_sparse()),
            "grads at 'layer.weight'",
            "sparse",
            "to_dense",
        ),
        ("gradient of a branch", lambda x: grad_of(x, [1.0]), "'layer.weight'", "list"),
        ("gradient of a float", lambda x: grad_of(x, 1.0), "'layer.weight'", "float"),
        (
            "state of another dtype",
            lambda x: step(x, state=init_with(x, torch.ones(2, 3).double())),
            "state['exp_avg'] at 'layer.weight'",
            "torch.float64",
            "torch.float32",
        ),
        (
            "state on another device",
            lambda x: step(x, state=init_with(x, torch.ones(2, 3, device="meta"))),
            "state['exp_avg'] at 'layer.weight'",
            "meta",
            "cpu",
        ),
        (
            "state of when the leaf was frozen",
            lambda x: step(
                x, state=fo.freeze(ADAM, {"layer": True, "scale": False}).init(x.params)
            ),
            "state['exp_avg'] at 'layer.bias'",
        ),
        (
            "count of steps that is a number",
            lambda x: step(x, state={**x.state, "step": 3}),
            "state['step']",
            "int",
        ),
        (
            "count of steps in floats",
            lambda x: step(x, state={**x.state, "step": torch.zeros(3)}),
            "state['step']",
            "torch.float32",
            "int64",
        ),
        (
            "number per leaf in float32",
            lambda x: step(
                x, FADING, state={**FADING.init(x.params), "rate": torch.ones(3)}
            ),
            "state['rate']",
            "torch.float32",
            "torch.float64",
        ),
        (
            "number per leaf as a tree",
            lambda x: step(x, FADING, state={**FADING.init(x.params), "rate": x.params}),
            "state['rate']",
            "dict",
        ),
        (
            "group of numbers",
            lambda x: fo.from_param_groups([{"params": [1.0]}]),
            "group 0",
            "float",
        ),
        (
            "unroll of numbers",
            lambda x: fo.unroll(SGD, loss, {"w": 1.0}, steps=1),
            "params['w']",
            "float",
        ),
        (
            "integer theta",
            lambda x: fo.meta.value_and_grad(loss)({"n": torch.arange(3)}, torch.ones(2)),
            "theta['n']",
            "torch.int64",
        ),
        (
            "number in theta",
            lambda x: fo.meta.value_and_grad(loss)({"lr": 0.1}, torch.ones(2)),
            "theta['lr']",
            "float",
        ),
    ),
    *refuses(
        fo.FuncoptError,
        TypeError,
        (
            "parameters where groups are wanted",
            lambda x: fo.from_param_groups([x.params["scale"]]),
            "group 0",
            "params",
        ),
    ),
    *refuses(
        fo.GradientLostError,
        RuntimeError,
        ("lost: batch", lambda x: first_order(x, scaled, learned()), "batch", "detach"),
        (
            "lost: batches",
            lambda x: first_order(x, scaled, batches=learned().expand(2)),
            "first_order",
        ),
        (
            "lost: meta",
            lambda x: first_order(x, scaled, meta=learned()),
            "meta",
            "reverse",
        ),
        (
            "lost: closed over",
            lambda x: first_order(x, lambda p, _: scaled(p, LEARNED)),
            "closed-over",
            "fo.detach",
        ),
        (
            "lost: buffers",
            lambda x: first_order(x, scaled, buffers=learned()),
            "first_order",
        ),
        (
            "lost: closed over, in func.grad",
            lambda x: torch.func.grad(
                lambda by: first_order(x, lambda p, _: scaled(p, by)).losses.sum()
            )(torch.ones(())),
            "closed-over",
        ),
        (
            "lost: a tangent",
            lambda x: torch.func.jvp(
                lambda by: first_order(x, scaled, by).losses,
                (torch.ones(()),),
                (torch.ones(()),),
            ),
            "batch",
        ),
        (
            "lost: closed over, in the tasks",
            lambda x: over_tasks(
                x,
                lambda theta, task: first_order(
                    x, lambda p, _: scaled(p, theta["scale"].sum())
                ).losses.sum(),
            ),
            "closed-over",
        ),
    ),
    *refuses(
        fo.StructureError,
        ValueError,
        (
            "loss per row of a task",
            lambda x: over_tasks(x, lambda t, _: t["scale"]),
            "task_loss must return a 0-d tensor",
            "(4,)",
        ),
        ("loss that is a number", lambda x: over_tasks(x, lambda t, _: 1.0), "float"),
        (
            "loss without a derivative",
            lambda x: over_tasks(x, lambda t, _: torch.tensor(1)),
            "task_loss must return a real number, got torch.int64",
        ),
        (
            "aux that nobody asked for",
            lambda x: over_tasks(x, lambda t, _: (t["scale"].sum(), t["scale"])),
            "tuple",
            "has_aux=True",
        ),
        (
            "no aux where it was asked for",
            lambda x: over_tasks(x, lambda t, _: t["scale"].sum(), has_aux=True),
            "(loss, aux)",
            "shape ()",
        ),
        (
            "theta without a tensor",
            lambda x: fo.meta.value_and_grad(loss)({"lr": None}, torch.ones(2)),
            "theta has no tensor",
        ),
    ),
    *refuses(
        fo.LeafError,
        TypeError,
        (
            "aux that is a number",
            lambda x: over_tasks(x, lambda t, _: (total(t), {"n": 1}), has_aux=True),
            "aux['n'] of task_loss is int",
        ),
        (
            "aux of a step that is a number",
            lambda x: fo.unroll(
                SGD, lambda p, _: (total(p), [1.0]), x.params, steps=1, has_aux=True
            ),
            "aux['0'] of loss_fn is float",
        ),
    ),
]


#: of optimizers made of optimizers, and of stages
COMPOSED = [
    *refuses(
        fo.HyperparameterError,
        ValueError,
        ("negative norm", lambda x: fo.chain(fo.clip_by_global_norm(-1.0), SGD),
         "max_norm", "-1"),
        ("negative norm in update", lambda x: step(x, CLIPPED, max_norm=-2.0),
         "max_norm", "-2"),
        ("no threshold", lambda x: fo.chain(fo.clip_by_block_rms(-1.0), SGD),
         "threshold", "-1"),
        ("ema of all", lambda x: fo.chain(SGD, fo.ema(1.0)), "decay", "[0, 1)"),
        ("lookahead of 0", lambda x: fo.lookahead(0), "k", "0"),
        ("lookahead of half", lambda x: fo.lookahead(0.5), "k", "0.5"),  # pyright: ignore[reportArgumentType]
        ("alpha of 2", lambda x: fo.chain(SGD, fo.lookahead(2, 2.0)), "alpha", "[0, 1]"),
        ("a debiased average of elements",
         lambda x: step(x, fo.chain(SGD, fo.ema(
             {"layer": 0.5, "scale": torch.full((4,), 0.5)}))),
         "decay at 'scale'", "(4,)", "one number per leaf"),
        ("shampoo from nothing", lambda x: fo.shampoo(eps=0.0), "eps > 0", "0.0"),
        ("moves clipped below 1", lambda x: fo.adafactor(d=0.5), "d must be", "[1, inf)"),
        ("no calls", lambda x: fo.accumulate(SGD, 0), "k", "0"),
        ("True calls", lambda x: fo.accumulate(SGD, True), "k", "True"),
        ("rates of elements, of which few have a gradient",
         lambda x: SGD.update(
             {**x.grads, "scale": torch.ones(4).to_sparse()}, SGD.init(x.params),
             x.params, lr={"layer": 0.1, "scale": torch.ones(4)}),
         "lr", "each element", "to_dense"),
        ("negative rho", lambda x: fo.sam(SGD, rho=-1.0), "rho", "-1"),
        ("no iterations", lambda x: fo.lbfgs(max_iter=0), "max_iter", "≥ 1", "0"),
        ("half an iteration", lambda x: fo.lbfgs(max_iter=0.5), "max_iter", "0.5"),  # pyright: ignore[reportArgumentType]
        ("no evaluations", lambda x: fo.lbfgs(max_eval=0), "max_eval", "≥ 1", "0"),
        ("no history", lambda x: fo.lbfgs(history_size=0), "history_size", "0"),
        ("True rows", lambda x: fo.lbfgs(history_size=True), "history_size", "True"),
        ("unknown search", lambda x: fo.lbfgs(line_search_fn="wolfe"), "'strong_wolfe'",
         "'wolfe'"),
        ("negative lr of lbfgs", lambda x: fo.lbfgs(lr=-1.0), "lr", "-1"),
        ("negative tolerance", lambda x: fo.lbfgs(tolerance_grad=-1.0), "tolerance_grad"),
        ("rates of groups", lambda x: fo.lbfgs(lr={"layer": 0.1, "scale": 1.0}), "lr",
         "as one", "'layer'"),
        ("rates of elements",
         lambda x: step(x, fo.lbfgs(), lr=torch.ones(4), loss_fn=total), "lr", "(4,)"),
    ),
    *refuses(
        fo.HyperparameterTypeError,
        TypeError,
        ("chain of nothing", lambda x: fo.chain(), "exactly one", "0"),
        ("chain of stages", lambda x: fo.chain(fo.zero_nans()), "exactly one", "0"),
        ("two optimizers", lambda x: fo.chain(SGD, ADAM), "exactly one", "2",
         "partition"),
        ("clip after", lambda x: fo.chain(SGD, fo.zero_nans()), "zero_nans", "before"),
        ("ema before", lambda x: fo.chain(fo.ema(0.9), SGD), "ema(decay=0.9)", "after"),
        ("a stage not made", lambda x: fo.chain(fo.normalize, SGD), "link 0", "calling"),  # pyright: ignore[reportArgumentType]
        ("project onto a word", lambda x: fo.project("box"), "'box'"),  # pyright: ignore[reportArgumentType]
        ("a cautious partition", lambda x: fo.cautious(HALVES), "one rule", "partition"),
        (
            "a cautious average",
            lambda x: fo.cautious(fo.chain(SGD, fo.ema(0.9))),
            "chain(sgd, ema) averages",
            "fo.chain(fo.cautious(",
        ),
        ("a cautious asgd", lambda x: fo.cautious(fo.asgd()), "asgd averages"),
        ("lbfgs without a loss", lambda x: step(x, fo.lbfgs()), "loss_fn", "None"),
        ("a value for each leaf", lambda x: step(x, fo.lbfgs(), loss_fn=total,
         value=torch.ones(2)), "value", "(2,)"),
        ("a value that is a number", lambda x: step(x, fo.lbfgs(), loss_fn=total,
         value=0.5), "value", "0.5"),
        ("a loss that is a number", lambda x: step(x, fo.lbfgs(), loss_fn=1.0), "1.0"),
        ("sam without a loss", lambda x: step(x, fo.sam(SGD)), "loss_fn", "None"),
        ("rounding without a generator",
         lambda x: step(x, fo.master_weights(SGD, stochastic=True)), "generator"),
    ),
    *refuses(
        fo.UnknownHyperparameterError,
        TypeError,
        ("unknown to a chain", lambda x: step(x, CLIPPED, momentun=0.9), "momentun",
         "max_norm"),
        ("unknown to lbfgs", lambda x: step(x, fo.lbfgs(), momentum=0.9, loss_fn=total),
         "momentum", "tolerance_grad"),
        ("unknown to links", lambda x: step(x, IN_TURN, momentun=0.9), "momentun"),
    ),
    *refuses(
        fo.StructureError,
        ValueError,
        (
            "history of another length",
            lambda x: step(x, fo.lbfgs(), fo.lbfgs(history_size=3).init(x.params),
                           loss_fn=total),
            "old_dirs", "(3, 13)", "(100, 13)",
        ),
        ("state of another chain", lambda x: step(x, CLIPPED, x.state), "exp_avg"),
        ("state of no links", lambda x: step(x, IN_TURN, x.state), "gradient_stages"),
    ),
    *refuses(
        fo.LeafError,
        TypeError,
        (
            "history of another dtype",
            lambda x: step(x, fo.lbfgs(), loss_fn=total, state=fo.lbfgs().init(
                tree.map(Tensor.double, x.params))),
            "lbfgs's state['d']", "float64", "float32",
        ),
        (
            "history that is no tensor",
            lambda x: step(x, fo.lbfgs(), loss_fn=total, state={
                **fo.lbfgs().init(x.params), "d": 1.0}),
            "lbfgs's state['d']", "float,", "float32",
        ),
        (
            "leaves on two devices",
            lambda x: fo.lbfgs().init(
                with_weight(x.params, torch.ones(2, device="meta"))),
            "one device", "cpu, meta",
        ),
        ("float16 rounded at random",
         lambda x: fo.master_weights(SGD, stochastic=True).init(
             tree.map(lambda p: p.half(), x.params)), "float16", "bfloat16"),
    ),
    *refuses(
        fo.ExecutionError,
        RuntimeError,
        (
            "lbfgs by kernels",
            lambda x: step(x, fo.lbfgs(), loss_fn=total, execution="native"),
            "reference", "'native'",
        ),
        (
            "lbfgs donated with a learned rate",
            lambda x: step(x, fo.lbfgs(), loss_fn=total, donate=True, lr=LEARNED),
            "donate",
        ),
        *(
            (f"{what} donated under grad",
             lambda x, opt=opt: torch.func.grad(
                 lambda p: loss(opt.update(x.grads, opt.init(p), p, donate=True)[0], 0)
             )(x.params), "donate")
            for what, opt in {
                "chain": CLIPPED, "links": IN_TURN, "parts": HALVES,
                "accumulate": fo.accumulate(SGD, 2),
                "skip_nonfinite": fo.skip_nonfinite(SGD),
                "master_weights": fo.master_weights(SGD),
            }.items()
        ),
        ("a part donated in the other's memory",
         lambda x: HALVES.update(
             {**x.grads, "scale": x.params["scale"]}, HALVES.init(x.params), x.params,
             donate=True), "share memory"),
    ),
]  # fmt: skip
CASES += COMPOSED


@pytest.mark.parametrize("case", CASES, ids=[case.what for case in CASES])
def test_bad_input_is_refused_and_nothing_changes(case: Case):
    x = given()
    leaves = tree.leaves(x)
    before = [(leaf.clone(), leaf._version, leaf.data_ptr()) for leaf in leaves]
    expected = tree.leaves(step(given()))
    grad_enabled, noise = torch.is_grad_enabled(), torch.get_rng_state()
    with pytest.raises(case.error) as caught:
        case.call(x)
    assert isinstance(caught.value, case.builtin)
    message = str(caught.value)
    for word in case.words:
        assert word in message, message
    for leaf, (value, version, pointer) in zip(tree.leaves(x), before, strict=True):
        assert torch.equal(leaf, value)
        assert (leaf._version, leaf.data_ptr()) == (version, pointer)
        assert leaf.grad is None and not leaf.requires_grad
    assert torch.is_grad_enabled() == grad_enabled
    assert torch.equal(torch.get_rng_state(), noise)
    found = tree.leaves(step(x))  # and the optimizer works as before
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_no_case_is_there_twice():
    assert len({case.what for case in CASES}) == len(CASES)


@pytest.mark.parametrize(
    "error, builtin",
    [
        (fo.HyperparameterError, ValueError),
        (fo.UnknownHyperparameterError, TypeError),
        (fo.HyperparameterTypeError, TypeError),
        (fo.StructureError, ValueError),
        (fo.LeafError, TypeError),
        (fo.GradientLostError, RuntimeError),
    ],
)
def test_an_error_is_funcopts_and_the_builtin_one(error: type, builtin: type):
    assert issubclass(error, fo.FuncoptError) and issubclass(error, builtin)
    assert any(case.error is error for case in CASES)


def test_detach_says_that_the_loss_of_a_gradient_is_meant():
    x = given()
    for how in ({"meta": fo.detach(learned())}, {"buffers": fo.detach(learned())}):
        first_order(x, scaled, **how)
    run = first_order(x, lambda p, _: scaled(p, LEARNED.detach()))
    assert not run.losses.requires_grad
    with torch.no_grad():
        first_order(x, scaled, learned())  # nobody follows a gradient here
