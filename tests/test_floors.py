"""Import floors: a file of funcopt imports only from floors below its own."""

import ast
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

import funcopt

PACKAGE = Path(funcopt.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# The first row that fits a file gives its floor. A package's __init__ is the top of it.
FLOORS = {
    "funcopt.errors": 0,
    "funcopt.types": 0,
    "funcopt.bits": 0.5,
    "funcopt.traced_tree": 0.5,
    "funcopt.tree": 1,
    "funcopt.checks": 2,
    "funcopt.normal": 2.1,
    "funcopt.func.norms": 1.1,
    "funcopt.func.tree_vmap": 4.1,
    "funcopt.func": 4.2,
    "funcopt.conditions": 4,
    "funcopt.flat_function": 4,
    "funcopt.list_vmap": 2,
    "funcopt.derivatives": 2,
    "funcopt.select": 2,
    "funcopt.schedules.schedule": 2,
    "funcopt.schedules._parts": 2.1,
    "funcopt.schedules.warmup": 2.3,
    "funcopt.schedules": 2.4,
    "funcopt.schedules.*": 2.2,
    "funcopt.hyper": 3,
    "funcopt.execution.autocast": 1,
    "funcopt.execution.pullback": 1.1,
    "funcopt.execution.own_dtype": 1.2,
    "funcopt.execution.program": 1,
    "funcopt.execution.trace": 1.1,
    "funcopt.execution.shapeless": 1.2,
    "funcopt.execution.rule_derivatives": 1.1,
    "funcopt.execution.levels": 1,
    "funcopt.execution.outside": 1.05,
    "funcopt.execution.concrete": 1.05,
    "funcopt.execution.layout": 1,
    "funcopt.execution.donation": 1.1,
    "funcopt.execution.guarded_cache": 1.3,
    "funcopt.execution.scalars": 1.1,
    "funcopt.execution.executor": 1.1,
    "funcopt.execution.recycle": 1.3,
    "funcopt.execution.sweeping": 1.2,
    "funcopt.execution.foreach": 1.3,
    "funcopt.execution.native.source": 1.2,
    "funcopt.execution.native.build": 1.2,
    "funcopt.execution.native.self_check": 1.2,
    "funcopt.execution.native.objects": 1.25,
    "funcopt.execution.native.objects_in_python": 1.2,
    "funcopt.execution.native.driver": 1.25,
    "funcopt.execution.native.kernels": 1.3,
    "funcopt.execution.native": 1.4,
    "funcopt.execution.triton.arithmetic": 1,
    "funcopt.execution.triton.expressions": 1.2,
    "funcopt.execution.triton.tables": 1.2,
    "funcopt.execution.triton.source": 1.3,
    "funcopt.execution.triton.kernels": 1.4,
    "funcopt.execution.triton": 1.5,
    "funcopt.execution.rule": 1.6,
    "funcopt.execution.leaves": 1.7,
    "funcopt.execution.launch_cache": 1.7,
    "funcopt.execution.reference": 2,
    "funcopt.execution.stacked": 2.1,
    "funcopt.execution.call_signature": 2.1,
    "funcopt.execution.rule_call": 2.2,
    "funcopt.execution.batched": 2.3,
    "funcopt.execution.fused_autograd": 2.4,
    "funcopt.execution.executor_choice": 2.5,
    "funcopt.execution.fast_path": 2.5,
    "funcopt.execution.executor_path": 2.55,
    "funcopt.execution.group_paths": 2.6,
    "funcopt.execution.dispatch": 3,
    "funcopt.execution": 3.5,
    "funcopt.spec": 3.5,
    "funcopt.stepping.complex_leaves": 1,
    "funcopt.stepping.per_leaf": 3.5,
    "funcopt.stepping.vectors": 2,
    "funcopt.stepping.one_vector": 1.1,
    "funcopt.stepping.pages": 1.1,
    "funcopt.stepping.live": 1.8,
    "funcopt.stepping.totals": 3.9,
    "funcopt.stepping.step_cache": 3.95,
    "funcopt.stepping.sparse_rows": 3.9,
    "funcopt.stepping.vmapped": 3.97,
    "funcopt.stepping.stepper": 4,
    "funcopt.stepping": 4.1,
    "funcopt.optimizer": 4.5,
    "funcopt.gradient_transformation": 4.7,
    "funcopt.flat": 4.7,
    "funcopt.optimizers._line_search": 5,
    "funcopt.optimizers._pairs": 5,
    "funcopt.optimizers._parts": 5,
    "funcopt.optimizers._bases": 5,
    "funcopt.optimizers._matrices": 5.1,
    "funcopt.optimizers": 5.9,
    "funcopt.optimizers.*": 5.5,
    "funcopt.projections": 5.1,
    "funcopt.transforms": 6.5,
    "funcopt.transforms._conditional": 5.9,
    "funcopt.transforms.stage": 5.9,
    "funcopt.transforms.*": 6,
    "funcopt.plan": 7,
    "funcopt.inner.per_step": 2.1,
    "funcopt.inner.custom_vjp": 2,
    "funcopt.inner.rng_state": 2,
    "funcopt.inner.loss": 4.6,
    "funcopt.inner.mixed": 4.7,
    "funcopt.inner.step": 4.75,
    "funcopt.inner.curvature": 4.7,
    "funcopt.inner.step_derivatives": 4.8,
    "funcopt.inner.loop": 4.8,
    "funcopt.inner.remat": 4.85,
    "funcopt.inner.unroll": 4.9,
    "funcopt.inner": 4.95,
    "funcopt.meta.families.family": 8,
    "funcopt.meta.families.rates": 8,
    "funcopt.meta.families.anil": 8.1,
    "funcopt.meta.families": 8.4,
    "funcopt.meta.families.*": 8.3,
    "funcopt.torch_optim.layout": 6,
    "funcopt.torch_optim.flags": 6,
    "funcopt.torch_optim.shards": 6,
    "funcopt.torch_optim.entries": 6,
    "funcopt.torch_optim.batch": 6.1,
    "funcopt.torch_optim.checkpoint": 6.1,
    "funcopt.torch_optim.functional": 6.2,
    "funcopt.torch_optim.lbfgs": 6.4,
    "funcopt.torch_optim.cached_step": 6.2,
    "funcopt.torch_optim.adapter": 6.3,
    "funcopt.torch_optim.generated": 6.5,
    "funcopt.torch_optim.bridges": 6.8,
    "funcopt.torch_optim": 7,
    "funcopt.meta": 8.5,
    "funcopt.meta.flat_graph": 7.7,
    "funcopt.meta.inductor": 7.8,
    "funcopt.meta.compiled": 7.9,
    "funcopt.meta.ranks": 7.9,
    "funcopt.meta.linear": 7.9,
    "funcopt.meta.problem": 8,
    "funcopt.meta.estimate": 8.02,
    "funcopt.meta.rollout": 8.05,
    "funcopt.meta.antithetic_pairs": 8.15,
    "funcopt.meta.dependence": 8.15,
    "funcopt.meta.constraints": 8.1,
    "funcopt.meta.windows": 8.25,
    "funcopt.meta.*": 8.2,
    "funcopt": 9,
}


def module_name(file: Path) -> str:
    parts = (PACKAGE.name, *file.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}


def floor(module: str) -> float:
    return next(level for name, level in FLOORS.items() if fnmatch(module, name))


def imports(source: str) -> Iterator[str]:
    """Each module that the source imports, wherever in the file it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from _targets(node)


def _targets(node: ast.ImportFrom) -> Iterator[str]:
    """``from funcopt import tree`` imports the module funcopt.tree, not the package."""
    base = "." * node.level + (node.module or "")
    for alias in node.names:
        submodule = f"{base}.{alias.name}"
        yield submodule if submodule in MODULES else base


def misplaced(module: str, source: str) -> list[str]:
    """What ``module`` may not import."""
    wrong, allowed = [], {"torch", "optree"} | sys.stdlib_module_names
    if module.startswith("funcopt.execution.triton."):
        allowed |= {"triton"}
    for target in imports(source):
        if target.startswith("."):
            wrong.append(f"{target} (write the whole path)")
        elif target.split(".")[0] != "funcopt":
            if target.split(".")[0] not in allowed:
                wrong.append(f"{target} (not torch, optree or the standard library)")
        elif target not in MODULES:
            wrong.append(f"{target} (no such module)")
        elif floor(target) >= floor(module):
            wrong.append(f"{target} (floor {floor(target)}, here {floor(module)})")
    return wrong


@pytest.mark.parametrize("module", MODULES)
def test_a_file_imports_from_below(module: str):
    assert misplaced(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize("module", [m for m in MODULES if "optimizers." in m])
def test_an_optimizer_knows_no_executor(module: str):
    # what is asked of a tensor, and of a step, and no executor
    known = "concrete", "donation", "levels", "own_dtype"
    allowed = {f"funcopt.execution.{name}" for name in known}
    targets = {*imports(MODULES[module].read_text())} - allowed
    assert not any(target.startswith("funcopt.execution") for target in targets)


def test_every_file_has_a_floor_and_every_row_a_file():
    rows = [{module for module in MODULES if fnmatch(module, name)} for name in FLOORS]
    assert all(rows) and set.union(*rows) == set(MODULES)


@pytest.mark.parametrize(
    "module, source",
    [
        ("funcopt.tree", "from funcopt import select"),
        ("funcopt.tree", "from funcopt.select import by_name"),
        ("funcopt.tree", "import funcopt.select"),
        ("funcopt.select", "import funcopt"),
        ("funcopt.select", "from funcopt import by_name"),
        ("funcopt.errors", "from funcopt.types import Tree"),
        ("funcopt.hyper", "def f():\n    from funcopt.optimizer import Optimizer"),
        ("funcopt.optimizers.adam", "from funcopt.optimizers.sgd import sgd"),
        ("funcopt.optimizers.adam", "from funcopt.optimizers import sgd"),
        ("funcopt.optimizers.adam", "from . import sgd"),
        ("funcopt.transforms.groups", "from funcopt.transforms.partition import freeze"),
        ("funcopt.inner.unroll", "from funcopt.meta import tasks"),
        ("funcopt.inner.unroll", "import numpy as np"),
        ("funcopt.inner.unroll", "from higher.patch import monkeypatch"),
    ],
)
def test_a_misplaced_import_is_found(module: str, source: str):
    assert len(misplaced(module, source)) == 1
