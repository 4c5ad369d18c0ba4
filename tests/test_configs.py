"""Tuned configurations: what is written is read back, what is wrong is named, what is nearest is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from smbench_kernels import configs
from smbench_kernels.configs import ConfigFileError, Entry, Tuned
from smbench_kernels.op import Point, UnsupportedPoint

CPU = torch.device("cpu")


def point_of(batch: int, hidden: int, dtype: str = "float16") -> Point:
    return {"batch": batch, "hidden_size": hidden, "dtype": dtype}


def tuned_of(*entries: Entry) -> Tuned:
    return Tuned("bgmv_shrink", "NVIDIA H200", "3.6.0", "graph of 100 calls, median of 40", entries)


SMALL = Entry(point_of(1, 1024), {"BLOCK_K": 128}, 2.5e-6, 96)
LARGE = Entry(point_of(16, 16384), {"BLOCK_K": 1024}, 7.25e-6, 96)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return configs.path_of("NVIDIA H200", "bgmv_shrink", tmp_path)


def test_the_folder_is_named_after_the_device(path: Path, tmp_path: Path) -> None:
    assert path == tmp_path / "NVIDIA_H200" / "bgmv_shrink.json"
    assert configs.folder_name("NVIDIA RTX 6000 Ada-Generation") == "NVIDIA_RTX_6000_Ada_Generation"


def test_what_is_saved_is_loaded(path: Path) -> None:
    configs.save(path, tuned_of(LARGE, SMALL))
    assert configs.load(path) == tuned_of(SMALL, LARGE)
    assert [file.name for file in path.parent.iterdir()] == ["bgmv_shrink.json"]


def test_a_file_without_entries_is_valid(path: Path) -> None:
    configs.save(path, tuned_of())
    assert configs.load(path) == tuned_of()


def test_an_entry_is_one_line(path: Path) -> None:
    configs.save(path, tuned_of(SMALL, LARGE))
    assert sum('"point"' in line and '"config"' in line for line in path.read_text().splitlines()) == 2


def test_a_changed_file_is_read_again(path: Path) -> None:
    configs.save(path, tuned_of(SMALL))
    configs.load(path)
    configs.save(path, tuned_of(SMALL, LARGE))
    assert len(configs.load(path).entries) == 2


def test_the_point_itself_is_exact() -> None:
    assert configs.lookup(tuned_of(SMALL, LARGE), point_of(16, 16384)) == (LARGE.config, "tuned-exact")


def test_the_nearest_entry_says_what_differs() -> None:
    """4 lies between 1 and 16 by ratio; the hidden size decides."""
    config, source = configs.lookup(tuned_of(SMALL, LARGE), point_of(4, 8192))
    assert config == LARGE.config
    assert source == "tuned-nearest: batch 16, hidden_size 16384"


def test_another_dtype_has_no_nearest_entry() -> None:
    with pytest.raises(UnsupportedPoint, match=r"no tuned entry for dtype bfloat16: `make tune` with the recipe"):
        configs.lookup(tuned_of(SMALL, LARGE), point_of(1, 1024, "bfloat16"))


def test_parameters_of_a_library_hold_for_one_version_of_it(tmp_path: Path) -> None:
    library = "vllm 0.26.0+cu130"
    path = configs.path_of("cpu", "bgmv_shrink", tmp_path, library)
    assert path.name == "bgmv_shrink.vllm-0.26.0+cu130.json"
    saved = replace(tuned_of(SMALL), device="cpu", library=library)
    configs.save(path, saved)
    assert configs.load(path) == saved
    found = configs.tuned_config("bgmv_shrink", point_of(1, 1024), CPU, tmp_path, library)
    assert found == (SMALL.config, "tuned-exact")
    for other in ("vllm 0.33.0", None):
        with pytest.raises(UnsupportedPoint, match=r"is not tuned for cpu: `make tune`"):
            configs.tuned_config("bgmv_shrink", point_of(1, 1024), CPU, tmp_path, other)


def test_a_file_of_the_first_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "bgmv_shrink.json"
    path.write_text(json.dumps(GOOD))
    found = configs.load(path)
    assert found.library is None and found.entries[0].config == {"BLOCK_K": 128, "STAGES": 0}


def test_a_device_without_a_file_is_unsupported_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedPoint, match=r"bgmv_shrink is not tuned for cpu: `make tune` with the recipe"):
        configs.tuned_config("bgmv_shrink", point_of(1, 1024), CPU, tmp_path)


def test_a_device_with_a_file_gets_its_configuration(tmp_path: Path) -> None:
    configs.save(configs.path_of("cpu", "bgmv_shrink", tmp_path), tuned_of(SMALL))
    assert configs.tuned_config("bgmv_shrink", point_of(1, 1024), CPU, tmp_path) == (SMALL.config, "tuned-exact")


GOOD: dict[str, Any] = {
    "format": 1,
    "op": "bgmv_shrink",
    "device": "NVIDIA H200",
    "triton": "3.6.0",
    "method": "graph",
    "entries": [{"point": {"batch": 1}, "config": {"BLOCK_K": 128, "STAGES": 0}, "time_s": 1e-6, "candidates": 3}],
}
ENTRY = GOOD["entries"][0]
WRONG = {
    "newer format": ({**GOOD, "format": 3}, "format is 3; this version reads formats 1 and 2"),
    "no library": ({**GOOD, "format": 2}, "library is missing"),
    "a library before its time": ({**GOOD, "library": "vllm 0.26.0"}, "unknown key library; known: format, op,"),
    "unknown key": ({**GOOD, "speed": 1}, "unknown key speed; known: format, op,"),
    "missing key": ({key: value for key, value in GOOD.items() if key != "method"}, "method is missing"),
    "wrong type": ({**GOOD, "triton": 3.6}, "triton is 3.6; expected str"),
    "no object": ([], "expected an object"),
    "entries no list": ({**GOOD, "entries": {}}, r"entries is \{\}; expected list"),
    "unknown key in an entry": (
        {**GOOD, "entries": [{**ENTRY, "us": 1}]},
        r"unknown key entries\[0\].us; known: point, config",
    ),
    "a word as parameter": (
        {**GOOD, "entries": [{**ENTRY, "config": {"BLOCK_K": "128"}}]},
        r"entries\[0\].config.BLOCK_K is '128'; expected an integer from 0",
    ),
    "a parameter below zero": (
        {**GOOD, "entries": [{**ENTRY, "config": {"STAGES": -1}}]},
        r"entries\[0\].config.STAGES is -1; expected an integer from 0",
    ),
    "a truth value as parameter": (
        {**GOOD, "entries": [{**ENTRY, "config": {"BLOCK_K": True}}]},
        r"entries\[0\].config.BLOCK_K is True",
    ),
    "an axis of zero": ({**GOOD, "entries": [{**ENTRY, "point": {"batch": 0}}]}, r"entries\[0\].point.batch is 0"),
    "no time": (
        {**GOOD, "entries": [{**ENTRY, "time_s": 0}]},
        r"entries\[0\].time_s is 0; expected seconds above zero",
    ),
}


@pytest.mark.parametrize(("content", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_refused_by_name(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bgmv_shrink.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigFileError, match=rf"bgmv_shrink\.json: {message}"):
        configs.load(path)


def test_a_torn_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bgmv_shrink.json"
    path.write_text(json.dumps(GOOD)[:-5])
    with pytest.raises(ConfigFileError, match="not JSON"):
        configs.load(path)


def test_shipped_files_are_where_their_device_looks() -> None:
    for path in configs.ROOT.glob("*/*.json"):
        tuned = configs.load(path)
        assert configs.path_of(tuned.device, tuned.op, library=tuned.library) == path
        assert tuned.entries
