"""How Sphinx builds these pages: Markdown by MyST, the reference from docstrings."""

from importlib.metadata import version as version_of

from sphinx.application import Sphinx

from funcopt import optimizers, schedules

project = "funcopt"
author = "the funcopt authors"
version = release = version_of("funcopt")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3

nitpicky = True  # a reference that leads nowhere is a warning, and so an error
nitpick_ignore_regex = [("py:exc", r".*\.|Nothing")]  # a sentence, and not a class
default_role = "any"  # `adam` in a docstring is a link, and must be one
napoleon_custom_sections = ["Source"]
autodoc_typehints = "none"  # the arguments' own words say what they take

html_theme = "furo"
html_title = f"funcopt {version}"
html_show_copyright = False


def list_all(app: Sphinx, page: str, source: list[str]) -> None:
    """Fill the marked places, so that a new optimizer or schedule needs no edit."""
    for mark, package in (
        (".. every-optimizer::", optimizers),
        (".. every-schedule::", schedules),
    ):
        functions = [name for name in package.__all__ if name.islower()]
        entries = [f".. autofunction:: {name}" for name in functions]
        source[0] = source[0].replace(mark, "\n".join(entries))


def setup(app: Sphinx) -> None:
    app.connect("source-read", list_all)
