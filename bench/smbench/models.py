"""Models that engines load: found by name, checked, named so that a cell says which weights they are.

Owns what `MODEL=` means and how a checkpoint comes to be on this machine. Does not own loading it, what it must be
(`checkpointfiles`), nor what is in a synthetic one (`worker.checkpoint`).
"""

from __future__ import annotations

import difflib
import os
import re
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from smbench import checkpointfiles
from smbench.errors import UsageError
from smbench.shapes import HUB, SHAPES
from smbench.workloads import ModelFacts

SYNTHETIC = "synthetic:"
SEED = 0
FORMAT = 2
"""Of synthetic checkpoints: `worker.checkpoint.FORMAT`, which the host does not import. A test compares them."""

FORMS = f"NAME@REVISION of the Hugging Face hub, the folder of a checkpoint, or {SYNTHETIC}SHAPE with SHAPE one of "
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
REVISION = re.compile(r"[0-9a-f]{40}")
LAST_WORDS = 600
"""Characters of a failed command's output that an error quotes."""
_DOWNLOAD = (
    "import sys; from huggingface_hub import snapshot_download; snapshot_download(sys.argv[1], revision=sys.argv[2])"
)


@dataclass(frozen=True, slots=True)
class Model:
    """A model that a cell can name."""

    name: str
    """In cells and reports: `synthetic:SHAPE`, `NAME@REVISION`, or `folder:NAME@HASH`; never a path."""
    source: Literal["synthetic", "hub", "folder"]
    path: Path
    """Where its checkpoint is, or will be once it is prepared."""
    facts: ModelFacts
    config: Mapping[str, Any]
    """Its `config.json`."""

    @property
    def size_bytes(self) -> int:
        """Of its files, near enough to say whether they fit somewhere."""
        return self.facts.resident_bytes("float16")


def find(spec: str, *, plain: bool = False) -> Model:
    """The model that a recipe or `MODEL=` names. UsageError says what is wrong with it and what to do.

    Weights have to be GPTQ; `plain` takes those that are not quantized too. A folder that exists is meant before a name
    of the hub. Nothing is downloaded: of a hub model that is not here the configuration must be known (`shapes.HUB`).
    """
    if spec.startswith(SYNTHETIC):
        return _synthetic(spec, plain)
    if spec.startswith("folder:"):
        raise UsageError(
            f"model {spec!r} was a folder on the machine that measured it; give its place here with MODEL="
        )
    if Path(spec).expanduser().is_dir() or spec.startswith(("/", "./", "../", "~")):
        return _folder(Path(spec).expanduser(), plain)
    return _hub(spec, plain)


def prepare(model: Model, python: Path) -> str | None:
    """Make the checkpoint be there; a line about what was done, None where it was there. UsageError where it cannot be.

    `python` has torch and safetensors, for synthetic checkpoints, and huggingface_hub for downloads, which happen only
    if the environment variable SMBENCH_DOWNLOAD is 1.
    """
    if model.source == "synthetic":
        return _write_synthetic(model, python)
    missing = checkpointfiles.faults(model.path) if model.path.is_dir() else [f"{model.path}: does not exist"]
    if not missing:
        return None
    if model.source == "folder":
        raise UsageError(missing[0])
    return _download(model, python, missing)


def _synthetic(spec: str, plain: bool) -> Model:
    shape = spec.removeprefix(SYNTHETIC)
    if shape not in SHAPES:
        known = _shapes(plain)
        raise UsageError(f"unknown shape {shape!r} in model {spec!r}; known: {', '.join(known)}{_hint(shape, known)}")
    config = SHAPES[shape].config
    path = _cache() / "models" / f"{shape}-seed{SEED}-format{FORMAT}"
    return Model(spec, "synthetic", path, checkpointfiles.checked_facts(config, spec, plain), config)


def _shapes(plain: bool) -> list[str]:
    """The shapes that fit what is asked for."""
    return [name for name, shape in SHAPES.items() if plain or shape.weights == "gptq"]


def _folder(path: Path, plain: bool) -> Model:
    config = checkpointfiles.read_config(path)
    facts = checkpointfiles.checked_facts(config, str(path), plain)
    if wrong := checkpointfiles.faults(path):
        raise UsageError(wrong[0])
    # a cell must not say where somebody keeps models
    base = re.sub(r"[^\w.+-]", "_", path.resolve().name) or "model"
    name = f"folder:{base}@{checkpointfiles.content_hash(path)[:12]}"
    return Model(name, "folder", path.resolve(), facts, config)


def _hub(spec: str, plain: bool) -> Model:
    name, _, revision = spec.partition("@")
    known = [pinned for pinned in HUB if pinned.partition("@")[0] == name]
    shapes = _shapes(plain)
    if not HUB_NAME.fullmatch(name):
        shape = difflib.get_close_matches(spec.rpartition(":")[2], shapes, n=1)
        hint = f"; did you mean '{SYNTHETIC}{shape[0]}'?" if shape else ""
        raise UsageError(f"model {spec!r} is none of: {FORMS}{', '.join(shapes)}{hint}")
    if not REVISION.fullmatch(revision):
        what = (
            f"revision {revision!r} is not the 40 hexadecimal digits of a commit" if revision else "it has no revision"
        )
        pin = (
            f"MODEL={known[0]}"
            if known
            else f"MODEL={name}@COMMIT, the commit from its page on the hub (Files, History)"
        )
        raise UsageError(
            f"model {spec!r}: {what}, and weights that can change prove nothing: pin it with {pin}"
            f"{'' if known else _not_a_folder(spec, shapes)}"
        )
    path = _hub_cache() / f"models--{name.replace('/', '--')}" / "snapshots" / revision
    if (path / checkpointfiles.CONFIG).is_file():
        config = checkpointfiles.read_config(path)
    elif spec in HUB:
        config = SHAPES[HUB[spec]].config
    else:
        raise UsageError(
            f"model {spec!r} is not in the hub's cache on this machine ({_hub_cache()}); fetch it first: "
            f"hf download {name} --revision {revision}{_hint(spec, HUB)}"
        )
    return Model(spec, "hub", path, checkpointfiles.checked_facts(config, spec, plain), config)


def _not_a_folder(spec: str, shapes: Iterable[str]) -> str:
    if shape := difflib.get_close_matches(spec.rpartition(":")[2], list(shapes), n=1):
        return f"; did you mean '{SYNTHETIC}{shape[0]}'?"
    return f"; nor is there a folder of this name{_hint(spec, HUB)}"


def _hint(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def _write_synthetic(model: Model, python: Path) -> str | None:
    """Build a synthetic checkpoint in the cache, one process at a time; others wait and find it."""
    model.path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(model.path.with_name(f"{model.path.name}.lock")):
        if model.path.exists():
            if wrong := checkpointfiles.faults(model.path):
                raise UsageError(f"{wrong[0]}; remove {model.path}, and it is written anew")
            return None
        began = time.monotonic()
        shape = model.name.removeprefix(SYNTHETIC)
        command = [str(python), "-m", "smbench.worker.checkpoint", shape, "--seed", str(SEED), "--out", str(model.path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise UsageError(f"model {model.name}: cannot be written: {_last_words(done.stderr)}")
        seconds = time.monotonic() - began
        return f"wrote {model.name} in {seconds:.0f} s: {int(done.stdout) / 1e9:.3g} GB"


def _download(model: Model, python: Path, missing: list[str]) -> str:
    name, _, revision = model.name.partition("@")
    if os.environ.get("SMBENCH_DOWNLOAD") != "1":
        raise UsageError(
            f"model {model.name} is not here ({missing[0]}); it has about {model.size_bytes / 1e9:.0f} GB. "
            f"SMBENCH_DOWNLOAD=1 lets smbench fetch it, or fetch it with: hf download {name} --revision {revision}; "
            f"with no network take MODEL={SYNTHETIC}{HUB.get(model.name, 'qwen2.5-32b')}"
        )
    began = time.monotonic()
    done = subprocess.run(
        [str(python), "-c", _DOWNLOAD, name, revision], stderr=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        raise UsageError(f"model {model.name}: the download failed: {_last_words(done.stderr)}")
    if wrong := checkpointfiles.faults(model.path):
        raise UsageError(wrong[0])
    checkpointfiles.checked_facts(checkpointfiles.read_config(model.path), model.name, model.facts.bits is None)
    return f"fetched {model.name} in {time.monotonic() - began:.0f} s"


def _last_words(text: str) -> str:
    return " ".join(text.split())[-LAST_WORDS:] or "it said nothing"


def _cache() -> Path:
    return Path(os.environ.get("SMBENCH_CACHE") or Path.home() / ".cache" / "smbench").expanduser()


def _hub_cache() -> Path:
    """Where huggingface_hub keeps repositories: its own variables, in its own order."""
    if named := os.environ.get("HF_HUB_CACHE"):
        return Path(named).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(home).expanduser() / "hub"
