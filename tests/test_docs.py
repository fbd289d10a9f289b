"""The words: every snippet runs, every link leads on, no public name is missing."""

import doctest
import importlib
import inspect
import re
import runpy
from importlib.metadata import requires
from pathlib import Path

import pytest

import funcopt as fo
from funcopt import errors, optimizers, schedules

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (ROOT, ROOT / "docs", ROOT / "benchmarks")
PAGES = [page for folder in FOLDERS for page in sorted(folder.glob("*.md"))]
FENCE = "```python"
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


def read(path: str) -> str:
    return (ROOT / path).read_text()


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def code_only(text: str) -> str:
    """The page with every line blank but those in its python fences, which stay put."""
    inside, kept = False, []
    for line in text.split("\n"):
        fence = line.startswith("```")
        kept.append(line if inside and not fence else "")
        if fence:
            inside = line == FENCE
    return "\n".join(kept)


@pytest.mark.parametrize("page", [p for p in PAGES if FENCE in p.read_text()], ids=name)
def test_every_snippet_of_a_page_runs(page: Path) -> None:
    code = code_only(page.read_text())
    test = doctest.DocTestParser().get_doctest(code, {}, name(page), str(page), 0)
    parsed = sum(e.source.count("\n") + e.want.count("\n") for e in test.examples)
    assert parsed == len(re.findall(r"^.*\S", code, re.M)), "a line has no >>> or ..."
    assert not doctest.DocTestRunner().run(test).failed


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        assert "://" in link or (page.parent / link).exists(), link


def test_the_readme_leads_to_every_page() -> None:
    pages = {*(ROOT / "docs").glob("*.md")} - {ROOT / "docs/index.md"}
    assert {name(page) for page in pages} <= {*LINK.findall(read("README.md"))}


def test_tables_of_measurements_are_those_of_the_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for page, text in importlib.import_module("report").filled().items():
        assert page.read_text() == text, name(page)


def test_every_public_name_is_on_the_api_page() -> None:
    page = read("docs/api.md")
    shown = {full.split(".")[-1] for full in re.findall(r"auto\w+:: ([\w.]+)", page)}
    for mark in (
        ".. every-optimizer::",
        ".. every-schedule::",
        "module:: funcopt.errors",
    ):
        assert mark in page
    shown |= {*optimizers.__all__, *schedules.__all__, *vars(errors)}
    shown |= {*re.findall(r"`(\w+)`", read("docs/torch-optim.md"))} | {"Adapter"}
    modules = {n for n in fo.__all__ if inspect.ismodule(getattr(fo, n))}
    inner = {name for n in modules for name in getattr(fo, n).__all__}
    assert {*fo.__all__, *inner} - modules <= shown


def test_every_schedule_is_drawn() -> None:
    drawn = set(re.findall(r">(\w+)(?:, \w+)?</text>", read("docs/schedules.svg")))
    assert {*schedules.__all__} - {"Plateau"} <= drawn


def test_every_optimizer_is_listed() -> None:
    table = runpy.run_path(str(ROOT / "docs/draw_optimizers.py"))["table"]()
    assert f"\n{table}\n" in read("docs/optimizers.md")


def test_the_changelog_has_the_version() -> None:
    found = re.search(r'^version = "(.+)"$', read("pyproject.toml"), re.M)
    assert found and f"\n## {found[1]} - " in read("CHANGELOG.md")


def test_ci_and_the_readme_run_targets_that_make_has() -> None:
    targets = re.findall(r"^([a-z-]+):", read("Makefile"), re.M)
    assert read(".ci/run").rstrip().endswith("\nmake test")
    for page in ("README.md", "CONTRIBUTING.md"):
        asked = re.findall(r"^make ([a-z-]+)", read(page), re.M)
        assert asked and set(asked) <= set(targets)


def test_every_direct_requirement_is_pinned() -> None:
    pinned = re.findall(r"^([\w-]+)==", read("constraints.txt"), re.M)
    for requirement in requires("funcopt") or []:
        found = re.match(r"[\w-]+", requirement)
        assert found and found[0] in {"funcopt", *pinned}, requirement
