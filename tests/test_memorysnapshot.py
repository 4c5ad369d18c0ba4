"""Memory snapshots of PyTorch: read without trusting them, kept in a bundle as they are, redacted where need be."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bundles
from smbench import bundle
from smbench.errors import CorruptError
from smbench.memorysnapshot import LARGEST_BYTES, Timeline, parse, read, rewritten

ADDRESS = int.from_bytes(b"/usr/lib", "little")
"""In the bytes of a pickle it looks like a path, as some addresses do."""


def snapshot(*entries: tuple[str, int], said: str = "N/A") -> bytes:
    """As PyTorch 2.11 writes one, with more that nobody reads."""
    trace = [
        {"action": action, "addr": ADDRESS, "size": size, "stream": 0, "time_us": 7, "compile_context": said}
        for action, size in entries
    ]
    settings = {"max_split_size": -1, "roundup_power2_divisions": {"1": 0}}
    segments = [{"device": 0, "segment_pool_id": (0, 0), "is_expandable": False, "frames": []}]
    return pickle.dumps({"segments": segments, "device_traces": [trace], "allocator_settings": settings})


def test_a_memory_snapshot_becomes_a_course() -> None:
    data = snapshot(
        *(("segment_alloc", 1 << 20), ("alloc", 512), ("alloc", 1024), ("free_requested", 512), ("snapshot", 1536)),
        *(("free_completed", 512), ("alloc", 256), ("segment_free", 1 << 20)),
    )
    assert read(data, "a.pickle") == Timeline(bytes=(512, 1536, 1024, 1280), snapshots=(2,))


class Runs:
    """What a pickle of a stranger could do."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return print, ("this must not run",)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (pickle.dumps(Runs()), "it names builtins.print"),
        (b"not a pickle", "no memory snapshot of PyTorch"),
        (pickle.dumps([1, 2]), "no device_traces"),
        (pickle.dumps({"device_traces": [[{"action": "alloc"}]]}), "no device_traces"),
        (snapshot(("alloc", -5)), "size -5"),
        (pickle.dumps({"device_traces": [], 3: 4}), "a key is no word"),
        (pickle.dumps({"device_traces": [b"bytes"]}), "it holds a bytes"),
        (pickle.dumps(7), "no device_traces"),
        (bytes(LARGEST_BYTES + 1), "bytes are more than"),
    ],
    ids=["runs", "no pickle", "a list", "no size", "negative", "key", "bytes", "number", "large"],
)
def test_what_is_no_snapshot_is_refused_and_not_run(data: bytes, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CorruptError, match=r"^a\.pickle: ") as raised:
        read(data, "a.pickle")
    assert told in str(raised.value)
    assert capsys.readouterr().out == ""


def test_a_snapshot_of_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(CorruptError, match="device 3"):
        read(snapshot(("alloc", 1)), "a.pickle", device=3)


def test_what_holds_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(CorruptError, match="no memory snapshot"):
        parse(pickle.dumps({"device_traces": endless}), "a.pickle")


def test_a_change_is_written_in_the_form_that_the_viewer_reads() -> None:
    data = snapshot(("alloc", 1), said="/home/alice/model.py")
    assert rewritten(data, "a", lambda found: found) == data
    changed = rewritten(data, "a", lambda found: {**found, "segments": []})
    assert parse(changed, "a") == {**parse(data, "a"), "segments": []}
    assert changed[:2] == b"\x80\x04"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = bundles.run_folder(tmp_path / "run")
    (made / "native").mkdir()
    return made


def kept(folder: Path) -> tuple[dict[str, bytes], list[str]]:
    """What of `native/` is in the bundle of a folder, and what its packer was told."""
    done = bundle.pack(folder, None, bundles.NOBODY)
    assert done is not None
    files = bundles.files_of(done.path)[1]
    return {name: data for name, data in files.items() if name.startswith("data/native/")}, list(done.notes)


def test_a_bundle_keeps_a_snapshot_byte_for_byte_though_its_addresses_look_like_paths(folder: Path) -> None:
    data = snapshot(("alloc", 512), ("free_completed", 512))
    (folder / "native" / "0123.memory.pickle").write_bytes(data)
    files, notes = kept(folder)
    assert files == {"data/native/0123.memory.pickle": data}
    assert not any("0123" in note for note in notes)


def test_a_bundle_redacts_a_snapshots_words_and_nothing_else(folder: Path) -> None:
    (folder / "native" / "0123.memory.pickle").write_bytes(snapshot(("alloc", 512), said="/home/alice/model.py"))
    files, _ = kept(folder)
    found = parse(files["data/native/0123.memory.pickle"], "a")
    (entry,) = found["device_traces"][0]
    assert "alice" not in entry["compile_context"] and entry["addr"] == ADDRESS and entry["size"] == 512


def test_a_bundle_takes_no_pickle_that_is_no_snapshot(folder: Path) -> None:
    (folder / "native" / "0123.memory.pickle").write_bytes(pickle.dumps(Runs()))
    files, notes = kept(folder)
    assert files == {} and any("0123.memory.pickle" in note and "stays out" in note for note in notes)
