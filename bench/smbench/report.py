"""From a run folder to report.md, report.html, figures and records. A pure render: owns no number and no sentence.

Equal folders give equal bytes, whenever and wherever they are rendered. Sentences are in `report_templates/`, numbers
come from `analysis` and the document's module, looks are in `formats` and `figures`.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt

from smbench import arch, published, records, resources, runfolder
from smbench.analysis import Analysis, analyse
from smbench.arch import Device
from smbench.errors import UsageError
from smbench.formats import FILTERS, finalize
from smbench.guards import GUARDS
from smbench.machines import Machines
from smbench.published import Published
from smbench.recipe import Recipe
from smbench.runfolder import Run
from smbench.views import Plot, View

DOCUMENTS: Mapping[str, str] = {
    "lora.md.j2": "smbench.document_lora:Lora",
}
"""Template to `module:attribute` of what computes its claims: called with a View and the published numbers."""

PAGE = "page.html.j2"
FOLDERS = ("figures", "records")
"""Folders that belong to the report: files in them that it did not write are removed."""


def render(folder: Path) -> Analysis:
    """Write the report of a run folder into it and return what it shows.

    Each file is replaced in one step, report.md last. UsageError and CorruptError as in `runfolder.load`.
    """
    # matplotlib takes most of a second to import, so only here
    from smbench import figures

    run = runfolder.load(folder)
    analysis = analysis_of(run)
    document = document_of(analysis)
    text = render_text(document, run)
    files: dict[str, Callable[[], bytes]] = {}
    for plot in document.plots():
        files[f"figures/{plot.file}"] = partial(figures.draw, plot, document)
    for name, series in records.records(analysis).items():
        files[f"records/{name}"] = partial(records.dump, series)
    files["report.html"] = lambda: render_page(text, analysis.recipe.title).encode()
    files["report.md"] = lambda: text.encode()
    for name, content in files.items():
        _replace(folder / name, content())
    for path in (path for name in FOLDERS for path in sorted((folder / name).glob("*"))):
        if path.relative_to(folder).as_posix() not in files:
            path.unlink()
    return analysis


def analysis_of(run: Run) -> Analysis:
    """The analysis of a run, against the physical peaks of the one device that it ran on."""
    device = device_of(run)
    return analyse(run.recipe, run.profile_name, run.cells, run.results, run.environments, run.sessions, device)


def device_of(run: Run) -> Device | None:
    """The row of the card that all results come from; None without a card, for two kinds of card or an unknown one."""
    names = Machines(run.environments).gpu_names()
    name = names.pop() if len(names) == 1 else None
    return arch.load(resources.archs_file()).device_named(name) if name else None


def document_of(analysis: Analysis) -> Any:
    """What the recipe's template calls `doc`. UsageError lists the templates that exist."""
    recipe = analysis.recipe
    if recipe.template not in DOCUMENTS:
        raise UsageError(f"recipe {recipe.name}: unknown template {recipe.template!r}; known: {', '.join(DOCUMENTS)}")
    module, _, attribute = DOCUMENTS[recipe.template].partition(":")
    build = getattr(importlib.import_module(module), attribute)
    return build(View(analysis), published_numbers(recipe))


def published_numbers(recipe: Recipe) -> Published | None:
    """The numbers that the recipe wants shown beside the measured ones. UsageError for more than one file."""
    if len(recipe.published) > 1:
        raise UsageError(f"recipe {recipe.name}: published: one file at most, not {len(recipe.published)}")
    folder = resources.recipes_dir() / "published"
    return next((published.load(published.find(name, folder)) for name in recipe.published), None)


def render_text(document: Any, run: Run) -> str:
    """The Markdown of a report."""
    view = cast(View, document.view)
    analysis = view.analysis
    template = _markdown_templates().get_template(analysis.recipe.template)
    plots: list[Plot] = document.plots()
    text = template.render(
        doc=document,
        view=view,
        analysis=analysis,
        recipe=analysis.recipe,
        profile=analysis.profile,
        published=document.published,
        plots=plots,
        records=list(records.records(analysis)),
        warnings=run.warnings,
        smbench_version=run.smbench_version,
        guards=list(GUARDS),
    )
    # a part that has nothing to say leaves its blank lines
    return re.sub(r"\n{3,}", "\n\n", text).rstrip("\n") + "\n"


def render_page(markdown: str, title: str) -> str:
    """A self-contained page of the Markdown; its figures are files beside it. HTML in the Markdown shows as text."""
    parser = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    parser.add_render_rule("table_open", lambda *_: '<div class="table"><table>\n')
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    loader = FileSystemLoader(resources.templates_dir())
    environment = Environment(loader=loader, undefined=StrictUndefined, autoescape=True, keep_trailing_newline=True)
    return environment.get_template(PAGE).render(title=title, body=parser.render(markdown))


def _markdown_templates() -> Environment:
    """Templates whose every expression is escaped: autoescape keeps what filters and macros made, finalize the rest."""
    environment = Environment(
        loader=FileSystemLoader(resources.templates_dir()),
        undefined=StrictUndefined,
        autoescape=True,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(FILTERS)
    return environment


def _replace(path: Path, content: bytes) -> None:
    """Write a file in one step, so that a reader sees the old one or the new one."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
