"""Checks a bundle against itself: hashes, completeness, schemas, identities, and that the report follows from all that.

Needs no GPU, torch, engine or matplotlib. That a bundle is whole and consistent is all it can show: whoever can run
smbench can also make up a bundle.
"""

from __future__ import annotations

import gc
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from smbench import bag, recipe, report, reproduce
from smbench.archive import Reader
from smbench.bagreader import BagReader
from smbench.errors import CorruptError, UsageError
from smbench.identity import files_sha256
from smbench.recipe import Recipe
from smbench.runfolder import Run, RunFile, parse_json
from smbench.sources import KERNELS, renderer_id

MOST_CELLS = 1_000_000


@dataclass(frozen=True, slots=True)
class Verified:
    """A bundle that holds what it says."""

    name: str
    packed_bytes: int
    unpacked_bytes: int
    payload_files: int
    run: Run
    """Without samples, unless they were asked for."""
    statuses: Mapping[str, int]
    """Stored statuses, before any guard."""
    packed_by: str
    """Version of smbench that packed it."""
    unconfirmed: tuple[str, ...]
    """Files that another version of smbench rendered and this one renders otherwise: neither right nor wrong."""
    kernels: str
    """What is known of the kernels' sources."""

    def lines(self) -> list[str]:
        """What was checked, for a terminal."""
        run, size = self.run, f"{self.unpacked_bytes / 1e6:.1f} MB, {self.packed_bytes / 1e6:.1f} MB packed"
        statuses = ", ".join(f"{count} {status}" for status, count in self.statuses.items()) or "none"
        rendered = "rendered again from the records, to the same bytes"
        if self.unconfirmed:
            rendered = (
                f"NOT CONFIRMED: {', '.join(self.unconfirmed)}: rendered by another build (smbench {self.packed_by}), "
                "and otherwise by this one; verify with that build, or render the data again (`smbench report`)"
            )
        missing = len(run.cells) - len(run.results)
        unfinished = f" ({missing} have none: the run is unfinished)" if missing else ""
        return [
            f"{self.name}: {'records verified, report not confirmed' if self.unconfirmed else 'verified'}",
            f"  archive  {size}; plain files only, each once",
            f"  hashes   {self.payload_files} payload files, {len(bag.TAG_FILES)} tag files, none missing, none added",
            f"  records  {len(run.results)} of {len(run.cells)} planned cells{unfinished}: {statuses}; "
            f"{len(run.environments)} environment{'s' if len(run.environments) != 1 else ''}",
            "  identity plan against recipe, every cell id, every environment id",
            f"  report   {rendered}",
            f"  kernels  sources {self.kernels}",
        ]

    def summary(self) -> dict[str, Any]:
        """The same for a program."""
        return {
            "verified": not self.unconfirmed,
            "name": self.name,
            "recipe": self.run.recipe.name,
            "profile": self.run.profile_name,
            "packed_by": self.packed_by,
            "packed_bytes": self.packed_bytes,
            "unpacked_bytes": self.unpacked_bytes,
            "payload_files": self.payload_files,
            "planned": len(self.run.cells),
            "statuses": dict(self.statuses),
            "unconfirmed": list(self.unconfirmed),
            "kernels": self.kernels,
        }


def verify(path: Path, keep_samples: bool = False, called: str = "") -> Verified:
    """Check a bundle. CorruptError names the file in it and what differs; UsageError where there is no such file.

    `called` is what errors call the bundle, where that is not its file's name.
    """
    try:
        with path.open("rb") as file, _uncollected():
            name = called or path.name
            reader = Reader(name, file)
            return _Verification(path, name, reader, BagReader(name, reader, keep_samples)).run()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the search for cycles: records are many objects and have none, and it takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Verification:
    """What is read, put together."""

    def __init__(self, path: Path, name: str, archive: Reader, reader: BagReader) -> None:
        self._path = path
        self._name = name
        self._archive = archive
        self._read = reader

    def run(self) -> Verified:
        read, corrupt = self._read, self._read.corrupt
        read.read()
        run = self._run()
        self._consistent(run)
        version = read.info["Bag-Software-Agent"].removeprefix(bag.AGENT)
        sizes, renderer = read.manifest.sizes, read.info["Smbench-Renderer"]
        if read.tags[1] != bag.info_of(run, sum(sizes.values()), len(sizes), version, renderer):
            corrupt("bag-info.txt", "it is not what the payload makes it")
        if read.root != bag.bundle_name(run, read.manifest.data):
            corrupt(read.root, f"the folder is not called {bag.bundle_name(run, read.manifest.data)}, as is due")
        return Verified(
            name=read.root,
            packed_bytes=self._archive.packed_bytes,
            unpacked_bytes=self._archive.unpacked_bytes,
            payload_files=len(sizes),
            run=run,
            statuses=Counter(result.status for result in run.results.values()),
            packed_by=version,
            unconfirmed=self._rendered(run, renderer),
            kernels=self._kernels(run),
        )

    def _run(self) -> Run:
        """The whole run, as a run folder would give it."""
        about = parse_json(self._read.kept["run.json"], RunFile, f"{self._name}: data/run.json")
        loaded = self._recipe()
        if (loaded.name, about.profile in loaded.profile) != (about.recipe, True):
            self._read.corrupt("data/run.json", "recipe.toml is another recipe, or has no such profile")
        found = self._read.records
        return Run(
            folder=self._path,
            recipe=loaded,
            recipe_text=self._read.kept["recipe.toml"],
            profile_name=about.profile,
            smbench_version=about.smbench_version,
            cells=list(self._read.plan.values()),
            results=found.results,
            environments=list(found.environments.values()),
            sessions=found.sessions,
            warnings=(),
        )

    def _recipe(self) -> Recipe:
        try:
            return recipe.parse(self._read.kept["recipe.toml"], "data/recipe.toml")
        except (UsageError, CorruptError) as error:
            raise CorruptError(f"{self._name}: {error}") from error
        # TOML has no limits of its own: numbers of any length, tables of any depth
        except (ValueError, RecursionError) as error:
            raise CorruptError(f"{self._name}: data/recipe.toml: {error}") from error

    def _consistent(self, run: Run) -> None:
        """Recipe, plan and results are of one experiment."""
        if run.recipe.size(run.profile_name) > MOST_CELLS:
            self._read.corrupt("data/recipe.toml", f"its profile has more than {MOST_CELLS} cells")
        chosen = {cell.provider for cell in run.cells}
        instead = run.recipe.instead(run.profile_name, run.cells)
        due = [cell for cell in run.recipe.cells(run.profile_name, instead) if cell.provider in chosen]
        if run.cells != due:
            wrong = next(i for i, pair in enumerate(zip_longest(run.cells, due)) if pair[0] != pair[1])
            self._read.corrupt("data/plan.json", f"cells.{wrong}: the recipe's profile has another cell there, or none")
        ways = {row.name: (row.method, row.l2) for row in run.recipe.profile[run.profile_name].measure}
        for result in run.results.values():
            for entry in result.measurements:
                if ways.get(entry.name) != (entry.method, entry.l2):
                    what = f"cell {result.cell_id}: the profile has no measure {entry.name!r} like its"
                    self._read.corrupt("data/results.jsonl", what)

    def _rendered(self, run: Run, renderer: str) -> tuple[str, ...]:
        """The places of what does not render to the same bytes, where another smbench rendered it.

        CorruptError where this very smbench did, and so the records must give these bytes.
        """
        rendered = self._render(run)
        folders = ("figures/", "records/")
        there = [place for place in self._read.manifest.digests if place in rendered or place.startswith(folders)]
        wrong = [
            place
            for place in dict.fromkeys(chain(rendered, there))
            if hashlib.sha256(rendered.get(place, b"")).hexdigest() != self._read.manifest.digests.get(place)
        ]
        if wrong and renderer == renderer_id():
            # the text is read by people, and says best what is wrong
            place = "report.md" if "report.md" in wrong else wrong[0]
            line = _first_difference(self._read.kept.get(place, b""), rendered.get(place, b""))
            self._read.corrupt(f"data/{place}", f"the records do not render to it{line}")
        return tuple(wrong)

    def _render(self, run: Run) -> dict[str, bytes]:
        """Every file that is rendered from the records, and the figures, which are taken as they are."""
        try:
            document = report.document_of(report.analysis_of(run, self._read.records.summaries))
            places = {f"figures/{plot.file}" for plot in document.plots()}
            if missing := sorted(places ^ self._read.figures.keys()):
                self._read.corrupt(f"data/{missing[0]}", "the report and the figures that are there do not agree")
            return {
                **self._read.figures,
                **report.written(document, run, self._read.figures),
                "REPRODUCE.md": reproduce.render(run),
            }
        # schemas cannot exclude every record that no report can be made of, such as a clock that is a word
        except (
            ArithmeticError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
            UsageError,
            TemplateError,
        ) as error:
            what = f"no report can be rendered from these records ({type(error).__name__}: {error})"
            raise CorruptError(f"{self._name}: data/report.md: {what[:400]}") from error

    def _kernels(self, run: Run) -> str:
        """Whether the sources are those that the records name. CorruptError where they are others."""
        recorded = {(entry.environment.get("smbench") or {}).get("kernels_sha256") for entry in run.environments}
        if not self._read.kernel_files:
            return "not included"
        found = files_sha256((place, self._read.kernel_files[place]) for place in sorted(self._read.kernel_files))
        if found not in recorded:
            self._read.corrupt(f"data/sources/{KERNELS}", "these are not the sources that the results were made with")
        return f"{len(self._read.kernel_files)} files, as recorded when they ran"


def _first_difference(there: bytes, due: bytes) -> str:
    """The first line that differs, where the text was kept."""
    pairs = zip_longest(there.decode("utf-8", "replace").splitlines(), due.decode().splitlines(), fillvalue="")
    for number, (line, wanted) in enumerate(pairs if there else (), start=1):
        if line != wanted:
            return f": line {number} is {line[:120]!r}, due is {wanted[:120]!r}"
    return ""
