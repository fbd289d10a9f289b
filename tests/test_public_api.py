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
