"""From a run folder to report.md, report.html, figures and records. A pure render: owns no number and no sentence.

Equal folders give equal bytes, whenever and wherever they are rendered. Sentences are in `report_templates/`, numbers
come from `analysis` and the document's module, which also draws; looks are in `formats` and `figures`.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from smbench import arch, guards, published, resources, runfolder
from smbench.analysis import Analysis, Summaries, analyse
from smbench.arch import Device
from smbench.errors import UsageError
from smbench.formats import FILTERS, finalize
from smbench.machines import Machines
from smbench.page import render_page
from smbench.published import Published
from smbench.recipe import Recipe
from smbench.runfolder import Run
from smbench.views import Plot, View

DOCUMENTS: Mapping[str, str] = {
    "frameworks.md.j2": "smbench.document_frameworks:Frameworks",
    "gptq.md.j2": "smbench.document_gptq:Gptq",
    "hstu-inference.md.j2": "smbench.document_hstu_inference:HstuInference",
    "hstu-layer.md.j2": "smbench.document_hstu_layer:HstuLayer",
    "lora.md.j2": "smbench.document_lora:Lora",
    "lora-peers.md.j2": "smbench.document_lora_peers:Peers",
    "paged-attention.md.j2": "smbench.document_paged:Paged",
}
"""Template to `module:attribute` of its Document: called with a View and each file of published numbers, or None."""

FOLDERS = ("figures", "records")
"""Folders that belong to the report: files in them that it did not write are removed."""


class Document(Protocol):
    """What a template calls `doc`: it computes what the report claims, beyond what every View knows."""

    @property
    def view(self) -> View:
        """The run."""

    @property
    def published(self) -> Published | None:
        """The numbers of the document, where the recipe names them."""

    def plots(self) -> list[Plot]:
        """The figures of the report, in its order."""

    def draw(self, plot: Plot) -> bytes:
        """The PNG of one of them. Only here may matplotlib be imported: who checks a report draws nothing."""

    def records(self) -> Mapping[str, bytes]:
        """Files of numbers in the document's own form, by name; they go into `records/`."""


def render(folder: Path) -> Analysis:
    """Write the report of a run folder into it and return what it shows.

    Each file is replaced in one step, report.md last. UsageError and CorruptError as in `runfolder.load`.
    """
    run = runfolder.load(folder)
    analysis = analysis_of(run)
    document = document_of(analysis)
    drawn = draw(document)
    files = {**drawn, **written(document, run, drawn)}
    for name, content in files.items():
        replace_file(folder / name, content)
    for path in (path for name in FOLDERS for path in sorted((folder / name).glob("*"))):
        if path.relative_to(folder).as_posix() not in files:
            path.unlink()
    return analysis


def draw(document: Document) -> dict[str, bytes]:
    """The figures of a report by their places in the run folder."""
    return {f"figures/{plot.file}": document.draw(plot) for plot in document.plots()}


def written(document: Document, run: Run, figures: Mapping[str, bytes]) -> dict[str, bytes]:
    """Every file of a report that is no figure, by its place in the run folder, report.md last.

    `figures` are the figures by their places; the page holds them.
    """
    records = document.records()
    text = render_text(document, run, list(records))
    return {
        **{f"records/{name}": content for name, content in records.items()},
        "report.html": render_page(text, document.view.analysis.recipe.title, figures).encode(),
        "report.md": text.encode(),
    }


def analysis_of(run: Run, summaries: Summaries | None = None) -> Analysis:
    """The analysis of a run, against the physical peaks of the one device that it ran on.

    A run without its samples comes with their `summaries`.
    """
    cells, results, device = run.cells, run.results, device_of(run)
    return analyse(run.recipe, run.profile_name, cells, results, run.environments, run.sessions, device, summaries)


def device_of(run: Run) -> Device | None:
    """The row of the card that all results come from; None without a card, for two kinds of card or an unknown one."""
    names = Machines(run.environments).gpu_names()
    name = names.pop() if len(names) == 1 else None
    return arch.load(resources.archs_file()).device_named(name) if name else None


def document_of(analysis: Analysis) -> Document:
    """What the recipe's template calls `doc`. UsageError lists the templates that exist."""
    recipe, template = analysis.recipe, template_of(analysis)
    if template not in DOCUMENTS:
        raise UsageError(f"recipe {recipe.name}: unknown template {template!r}; known: {', '.join(DOCUMENTS)}")
    module, _, attribute = DOCUMENTS[template].partition(":")
    build = getattr(importlib.import_module(module), attribute)
    view = View(analysis)
    numbers: list[Published | None] = [*published_numbers(recipe)] or [None]
    try:
        inspect.signature(build).bind(view, *numbers)
    except TypeError:
        raise UsageError(
            f"recipe {recipe.name}: published: {len(recipe.published)} files, and {template} shows one at most"
        ) from None
    document: Document = build(view, *numbers)
    return document


def template_of(analysis: Analysis) -> str:
    """The template of a report: the profile's own, or the recipe's."""
    return analysis.profile.template or analysis.recipe.template


def published_numbers(recipe: Recipe) -> list[Published]:
    """The files of numbers that the recipe wants shown beside the measured ones, in its order."""
    folder = resources.recipes_dir() / "published"
    return [published.load(published.find(name, folder)) for name in recipe.published]


def render_text(document: Document, run: Run, record_files: Sequence[str]) -> str:
    """The Markdown of a report. `record_files` are the names that it gives of the files in `records/`."""
    view = document.view
    analysis = view.analysis
    template = markdown_templates().get_template(template_of(analysis))
    plots = document.plots()
    text = template.render(
        doc=document,
        view=view,
        analysis=analysis,
        recipe=analysis.recipe,
        profile=analysis.profile,
        published=document.published,
        plots=plots,
        records=record_files,
        warnings=run.warnings,
        smbench_version=run.smbench_version,
        guards=guards.names(analysis.recipe.kind, analysis.subjects()),
    )
    # a part that has nothing to say leaves its blank lines
    return re.sub(r"\n{3,}", "\n\n", text).rstrip("\n") + "\n"


def markdown_templates() -> Environment:
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


def replace_file(path: Path, content: bytes) -> None:
    """Write a file in one step, so that a reader sees the old one or the new one."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
