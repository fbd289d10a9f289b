"""The public surface: every name documented in full, and a light, silent import."""

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from row import Row
from table import ROWS

import funcopt as fo
from funcopt import optimizers
from funcopt.transforms.stage import GradientStage, ParameterStage

# Its classes are generated: they have torch.optim's arguments, and a page of the docs.
GENERATED = {"torch_optim"}
PUBLIC = {n: getattr(fo, n) for n in fo.__all__ if n not in GENERATED}
MODULES = {name: value for name, value in PUBLIC.items() if inspect.ismodule(value)}
NAMES = {name: value for name, value in PUBLIC.items() if name not in MODULES}
for prefix, module in MODULES.items():
    NAMES |= {f"{prefix}.{name}": getattr(module, name) for name in module.__all__}
ERRORS = {n: x for n, x in NAMES.items() if n.endswith("Error")}
# Results: their fields are documented where they stand.
RECORDS = {n: x for n, x in NAMES.items() if hasattr(x, "_fields")}
CALLABLES = {n: x for n, x in NAMES.items() if n not in ERRORS and n not in RECORDS}
CLASSES = {n: x for n, x in CALLABLES.items() if inspect.isclass(x)}

# A function says all of these, in this order; a class is what it returns.
SECTIONS = ("Args", "Returns", "Raises", "Source", "Example")


def doc(thing: Any) -> str:
    return inspect.getdoc(thing) or ""


def sections(thing: Any) -> dict[str, str]:
    """The docstring's sections, by their titles."""
    parts = re.split(r"^([A-Z][a-z]+):$", doc(thing), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def parameters(function: Callable[..., Any]) -> list[str]:
    return [p for p in inspect.signature(function).parameters if p != "self"]


def test_the_names_are_sorted_and_there():
    assert len(fo.__all__) == len(set(fo.__all__))
    for module in (fo.optimizers, fo.transforms, *MODULES.values()):
        assert list(module.__all__) == sorted(set(module.__all__))
    for package in (fo, fo.meta):
        public = {name for name in vars(package) if not name.startswith("_")}
        submodules = {n for n in public if inspect.ismodule(getattr(package, n))}
        assert public - submodules == set(package.__all__) - MODULES.keys() - GENERATED


@pytest.mark.parametrize("name", NAMES)
def test_a_docstring_begins_with_one_line_that_says_it(name: str):
    first, *rest = doc(NAMES[name]).splitlines()
    assert first.endswith(".") and len(first) <= 90
    assert not rest or rest[0] == ""


@pytest.mark.parametrize("name", CALLABLES)
def test_the_sections_are_there_and_in_order(name: str):
    spared = {"Returns"} if name in CLASSES else set()
    if not parameters(CALLABLES[name]):
        spared.add("Args")
    wanted = [s for s in SECTIONS if s not in spared]
    found = [s for s in sections(CALLABLES[name]) if s in SECTIONS]
    assert found == wanted
    assert all(sections(CALLABLES[name])[s].strip() for s in wanted)


@pytest.mark.parametrize("name", CALLABLES)
def test_every_argument_is_described_once(name: str):
    arguments = sections(CALLABLES[name]).get("Args", "")
    described = re.findall(r"^    (\w+): \S", arguments, re.M)
    assert described == parameters(CALLABLES[name])


SGD = fo.sgd(lr=0.1)
#: for arguments without a default, by their names
GIVEN: dict[str, Any] = {
    **dict.fromkeys(("opt", "optimizer"), SGD),
    **dict.fromkeys(("value", "init_value", "peak_value", "max_lr", "max_norm"), 1.0),
    **dict.fromkeys(("max_value", "threshold", "power", "ratio", "weight_decay"), 1.0),
    **dict.fromkeys(("end_value", "gamma", "decay_rate", "decay", "base_lr", "eta"), 0.5),
    **dict.fromkeys(("step_size", "total_steps", "transition_steps", "decay_steps"), 9),
    **dict.fromkeys(("total_iters", "T_max", "T_0", "warmup_steps", "k"), 3),
    "lr_lambda": float,
    "milestones": [3],
    "boundaries_and_scales": {3: 0.5},
}
MADE = [*optimizers.__all__, *fo.transforms.__all__]
MADE += [f"schedules.{name}" for name in fo.schedules.__all__]
OF_LISTS = ("milestones", "boundaries_and_scales")  # it is their elements' range
PHASED = ("schedules.linear_one_cycle", "transition_steps")  # one for each phase, too
#: an end or two: [0, 1), ≥ 0, > 0, 0 to 99
RANGE = re.compile(r"in \[(\d), (\d)([\])])|(≥|≤|>|over) (\d)\b|(\d) to (\d+)")


def ends(found: Any, whole: bool) -> tuple[list[float], list[float]]:
    """Of a documented range what is still in it, and what no longer is."""
    low, high, bracket, sign, only, least, most = found.groups()
    one = 1 if whole else 1e-9
    if sign == "≤":
        return [int(only)], [int(only) + one]
    odd = [] if whole else [float("nan")]
    if sign == "≥":
        return [int(only)], [int(only) - one, *odd, *([] if whole else [float("inf")])]
    if sign:
        return [int(only) + one], [int(only), *odd]
    low, high = int(low or least), int(high or most)
    if bracket == ")":
        return [low, high - one], [low - one, high, *odd]
    return [low, high], [low - one, high + one, *odd]


def described(maker: str) -> dict[str, str]:
    """What a docstring says of each argument, in one line."""
    text = sections(NAMES[maker]).get("Args", "")
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", text, re.M)
    return {name: " ".join(words.split()) for name, words in found}


@pytest.mark.parametrize("name", optimizers.__all__)
def test_an_optimizer_tells_the_range_of_every_number(name: str):
    for argument, words in described(name).items():
        default = inspect.signature(NAMES[name]).parameters[argument].default
        first = default[0] if isinstance(default, tuple) else default
        if isinstance(first, float | int) and not isinstance(first, bool):
            told = RANGE.search(words) or re.search("any number|negative| < ", words)
            assert told, (argument, words)


def ranges() -> dict[tuple[str, str], Any]:
    """Of makers' arguments, the ranges that their docstrings tell."""
    found = {}
    for maker in MADE:
        for name, words in described(maker).items():
            told = RANGE.search(words)
            if told and name not in OF_LISTS and (maker, name) != PHASED:
                found[maker, name] = told
    return found


def takes(maker: str, name: str, place: int | None, value: Any) -> bool:
    """Whether the maker takes the value (at a place of a tuple)."""
    known = inspect.signature(NAMES[maker]).parameters
    given = {n: GIVEN[n] for n in known if known[n].default is known[n].empty}
    if place is not None:
        default = known[name].default
        value = (*default[:place], value, *default[place + 1 :])
    try:
        made = NAMES[maker](**{**given, name: value})
        if isinstance(made, GradientStage | ParameterStage):  # a chain's optimizer looks
            fo.chain(*((made, SGD) if isinstance(made, GradientStage) else (SGD, made)))
    except fo.HyperparameterError:
        return False
    return True


def test_a_range_is_what_is_told():
    """Its ends are taken, and what is just beyond them is refused."""
    found = ranges()
    assert len(found) > 200
    for (maker, name), told in found.items():
        known = inspect.signature(NAMES[maker]).parameters[name]
        inside, outside = ends(told, whole="int" in str(known.annotation))
        several = isinstance(known.default, tuple)
        for place in range(len(known.default)) if several else [None]:
            for values, wanted in ((inside, True), (outside, False)):
                for x in values:
                    assert takes(maker, name, place, x) is wanted, (maker, name, place, x)


@pytest.mark.parametrize("name", CALLABLES)
def test_every_error_that_is_named_is_one_of_ours(name: str):
    text = sections(CALLABLES[name])["Raises"]
    named = re.findall(r"\b[A-Z]\w+Error\b", text)
    assert all(error in ERRORS for error in named)
    assert named or re.search(r"Nothing|[Ww]hatever", text)


@pytest.mark.parametrize("name", CALLABLES)
def test_every_argument_is_annotated(name: str):
    function = CALLABLES[name].__init__ if name in CLASSES else CALLABLES[name]
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name != "self":
            assert parameter.annotation is not inspect.Parameter.empty, parameter
    assert inspect.signature(function).return_annotation is not inspect.Signature.empty


@pytest.mark.parametrize("name", CALLABLES)
def test_an_example_runs_and_shows_what_comes_out(name: str):
    """The doctests run with the suite; here: each is whole, and calls what it is of."""
    example = sections(CALLABLES[name])["Example"]
    lines = [line.strip() for line in example.splitlines() if line.strip()]
    assert lines[0] == ">>> import torch, funcopt as fo"
    assert f"fo.{name}(" in example or name == "Optimizer"  # which a factory makes
    assert any(not line.startswith((">>>", "...")) for line in lines)
    assert "doctest: +" not in example


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_says_when_it_is_raised(name: str):
    assert len(doc(ERRORS[name]).splitlines()) == 1
    assert ERRORS[name].__doc__ != Exception.__doc__


@pytest.mark.parametrize("name", RECORDS)
def test_a_result_documents_its_fields(name: str):
    source = inspect.getsource(RECORDS[name])
    for field in RECORDS[name]._fields:
        assert re.search(rf"^    {field}: \S.*  #: \S", source, re.M), field


def in_torch(row: Row) -> bool:
    return row.twin is not None and row.twin.__module__.startswith("torch.optim")


def by_name(row: Row) -> str:
    return row.name


# What asks for the loss steps by no rule on a leaf: it has tests of its own instead of a
# row, in the file named here.
ASK_FOR_THE_LOSS = {"lbfgs": "test_lbfgs.py"}


def test_every_optimizer_has_a_row():
    names = [
        *(row.name for row in ROWS),
        *ASK_FOR_THE_LOSS,
        "sparse_adam",
    ]  # test_sparse.py
    assert sorted(names) == sorted(optimizers.__all__)
    for name, file in ASK_FOR_THE_LOSS.items():
        assert f"fo.{name}(" in Path(__file__).with_name(file).read_text()
        assert getattr(fo, name)().spec is None


IN_TORCH = [(row.factory, row.twin) for row in ROWS if in_torch(row)]
IN_TORCH += [(fo.lbfgs, torch.optim.LBFGS), (fo.sparse_adam, torch.optim.SparseAdam)]


@pytest.mark.parametrize("ours, theirs", IN_TORCH, ids=lambda x: x.__name__)
def test_a_factory_takes_what_torch_optim_takes(ours: Any, theirs: Any):
    execution = {"params", "foreach", "fused", "capturable", "differentiable"}
    wanted = {
        name: parameter.default
        for name, parameter in inspect.signature(theirs).parameters.items()
        if name not in execution
    }
    found = {n: p.default for n, p in inspect.signature(ours).parameters.items()}
    assert found == wanted and list(found) == list(wanted)


#: of the others the papers' and their authors', optax's, or customary ones
OTHERS: dict[str, dict[str, Any]] = {
    "adabelief": dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-16),
    "adam_atan2": dict(lr=1e-4, betas=(0.9, 0.99), a=1.27, b=1.0),
    "adan": dict(lr=1e-3, betas=(0.98, 0.92, 0.99), eps=1e-8),
    "ademamix": dict(lr=1e-3, betas=(0.9, 0.999, 0.9999), alpha=2.0, eps=1e-8),
    "adopt": dict(lr=1e-3, betas=(0.9, 0.9999), eps=1e-6, clip=True),
    "amsgrad": dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8),
    "dog": dict(lr=1.0, reps_rel=1e-6, eps=1e-8),
    "lamb": dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01),
    "lars": dict(lr=1.0, momentum=0.9, trust_coefficient=1e-3),
    "lion": dict(lr=1e-4, betas=(0.9, 0.99)),
    "madgrad": dict(lr=0.01, momentum=0.9, eps=1e-6),
    "mars_adamw": dict(lr=3e-3, betas=(0.95, 0.99), eps=1e-8, gamma=0.025),
    "muon": dict(lr=1e-3, weight_decay=0.1, momentum=0.95, nesterov=True, eps=1e-7)
    | dict(ns_coefficients=(3.4445, -4.775, 2.0315), ns_steps=5, ns_dtype=torch.bfloat16),
    "novograd": dict(lr=1e-3, betas=(0.95, 0.98), eps=1e-8),
    "prodigy": dict(lr=1.0, betas=(0.9, 0.999), eps=1e-8, d0=1e-6, d_coef=1.0)
    | dict(decoupled_weight_decay=True),
    "schedule_free_adamw": dict(lr=0.0025, betas=(0.9, 0.999), eps=1e-8)
    | dict(weight_lr_power=2.0),
    "schedule_free_sgd": dict(lr=1.0, momentum=0.9, weight_lr_power=2.0),
    "sgld": dict(lr=1e-3, temperature=1.0),
    "shampoo": dict(lr=0.1, eps=1e-4, precondition_frequency=1),
    "signsgd": dict(lr=1e-4),
    "signum": dict(lr=1e-4, beta=0.9),
    "soap": dict(lr=3e-3, betas=(0.95, 0.95), eps=1e-8, weight_decay=0.01)
    | dict(precondition_frequency=10, max_precond_dim=10000),
    "sophia_g": dict(lr=1e-4, betas=(0.965, 0.99), rho=0.04, eps=1e-12, weight_decay=0.1)
    | dict(hessian=-1.0),
    "yogi": dict(lr=0.01, betas=(0.9, 0.999), eps=1e-3, initial_accumulator_value=1e-6),
    "add_noise": dict(gamma=0.55),
    "clip_by_global_norm": dict(eps=1e-6),
    "ema": dict(debias=True),
    "lookahead": dict(k=5, alpha=0.5),
    "sam": dict(rho=0.05),
    "trust_region": dict(floor=1e-3),
    "schedules.cosine_decay": dict(exponent=1.0),
    "schedules.cosine_one_cycle": dict(pct_start=0.3, div_factor=25.0)
    | dict(final_div_factor=1e4),
    "schedules.linear_one_cycle": dict(pct_start=0.3, pct_final=0.85, div_factor=25.0)
    | dict(final_div_factor=1e4),
    "schedules.piecewise_interpolate": dict(interpolate_type="linear"),
    "schedules.warmup_cosine_decay": dict(exponent=1.0),
    **dict.fromkeys(
        ("meta.es", "meta.es_single", "meta.pes"), dict(sigma=0.1, particles=32)
    ),
    "meta.anil": dict(adapted="head*"),
    "meta.cavia": dict(adapted="context*"),
    "meta.imaml": dict(strength=2.0, iterations=5),
    "meta.implicit": dict(solver="cg", iterations=10, step_size=1.0),
    "meta.weight_update_implicit": dict(iterations=10),
    "meta.value_and_grad": dict(tasks="auto", randomness="error"),
}


def defaults(maker: str) -> dict[str, Any]:
    """Those that are not nothing: neither 0, False nor None."""
    known = inspect.signature(NAMES[maker]).parameters.items()
    return {n: p.default for n, p in known if p.default is not p.empty and p.default}


def test_other_defaults_are_the_sources():
    of_torch = {ours.__name__ for ours, _ in IN_TORCH}
    others = [*optimizers.__all__, *fo.transforms.__all__]
    found = {name: defaults(name) for name in others if name not in of_torch}
    found |= {name: defaults(name) for name in OTHERS}
    assert {name: told for name, told in found.items() if told} == OTHERS


# The import, in a process of its own ---------------------------------------------------

HEAVY = (
    "torch._dynamo",
    "torch._inductor",
    "torch.utils.tensorboard",
    "hypothesis",
    "higher",
    "matplotlib",
    "numpy.testing",
    "PIL",
    "pytest",
    "torchopt",
    "torchvision",
    "tqdm",
)
CHILD = """
import sys
import torch, optree
before = set(sys.modules)
state = torch.get_rng_state(), torch.is_grad_enabled(), torch.get_default_dtype()
import funcopt
after = torch.get_rng_state(), torch.is_grad_enabled(), torch.get_default_dtype()
assert torch.equal(state[0], after[0]) and state[1:] == after[1:]
sys.stderr.write("\\n".join(sorted(set(sys.modules) - before)))
"""


def test_the_import_is_light_silent_and_changes_no_setting():
    command = [sys.executable, "-W", "error", "-c", CHILD]
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert child.stdout == ""
    modules = child.stderr.splitlines()
    assert "funcopt.inner.unroll" in modules
    for module in modules:
        assert not module.startswith(HEAVY), module
        root = module.split(".")[0]
        assert root in {"funcopt", "torch", "optree"} | sys.stdlib_module_names, module
