"""The run folder loses nothing: not to a kill, not to a full disk, not to a second run, not to a newer smbench."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from small_runs import cpu_plan, environment, session, timed, untimed
from smbench import runfolder
from smbench.errors import CorruptError, UsageError
from smbench.plan import Plan
from smbench.result import Environment, Result, Session
from smbench.runfolder import Appender

PLAN = cpu_plan([100, 200, 300])
CELLS = [entry.cell for entry in PLAN.entries]
RECORDS: list[Result | Environment | Session] = [
    environment(gpu={"name": "Karte Ü"}),
    timed(CELLS[0]),
    untimed(CELLS[1], "crashed", "two\nlines and a \u2028 separator"),
    timed(CELLS[2], (3e-6,)),
    session(),
]


def create(folder: Path, plan: Plan = PLAN) -> Path:
    cells = [entry.cell for entry in plan.entries]
    runfolder.create(folder, plan.recipe_text, plan.recipe.name, plan.profile_name, cells)
    return folder


def fill(folder: Path) -> bytes:
    """All records in a folder; the bytes of its results."""
    with Appender(create(folder)) as appender:
        for record in RECORDS:
            appender.append(record)
    return (folder / "results.jsonl").read_bytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return create(tmp_path / "run")


def test_what_is_appended_is_read_back_in_full(tmp_path: Path) -> None:
    fill(tmp_path / "run")
    run = runfolder.load(tmp_path / "run")
    assert [*run.environments, *run.results.values(), *run.sessions] == RECORDS
    assert (run.recipe, run.profile_name, list(run.cells), run.warnings) == (PLAN.recipe, "cpu", CELLS, [])


def test_of_several_results_of_a_cell_the_last_counts(folder: Path) -> None:
    with Appender(folder) as appender:
        appender.append(untimed(CELLS[0], "timeout"))
        appender.append(timed(CELLS[0]))
    assert runfolder.load(folder).results == {CELLS[0].cell_id: timed(CELLS[0])}


def test_the_same_run_is_accepted_again_and_changes_no_file(folder: Path) -> None:
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    create(folder)
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_a_different_run_is_refused_and_says_what_differs(folder: Path) -> None:
    text = PLAN.recipe_text
    for expected, arguments in {
        "recipe 'small', not 'gptq'": (text, "gptq", "cpu", CELLS),
        "profile 'cpu', not 'full'": (text, "small", "full", CELLS),
        "a different recipe.toml": (text + b"\n", "small", "cpu", CELLS),
        "a different plan.json": (text, "small", "cpu", CELLS[:2]),
    }.items():
        with pytest.raises(UsageError) as caught:
            runfolder.create(folder, *arguments)
        assert str(caught.value) == (
            f"{folder} holds a run with {expected}; choose another folder with OUT=, or remove that one"
        )


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("my life's work", encoding="utf-8")
    with pytest.raises(UsageError, match=r"is not empty and not a run folder \(no run.json\); choose another"):
        create(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_somebody_elses_recipe_in_a_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match="not a run folder"):
        create(tmp_path)
    assert (tmp_path / "recipe.toml").read_text(encoding="utf-8") == "mine"


def test_a_run_killed_while_it_made_the_folder_goes_on(tmp_path: Path) -> None:
    whole = create(tmp_path / "whole")
    for killed_after in range(4):
        folder = tmp_path / str(killed_after)
        folder.mkdir()
        (folder / ".lock").touch()
        for name in ("recipe.toml", "plan.json", "run.json")[:killed_after]:
            (folder / name).write_bytes((whole / name).read_bytes())
        for name in ("recipe.toml", "plan.json", "run.json")[killed_after : killed_after + 1]:
            (folder / f"{name}.tmp").write_bytes(b"ha")
        create(folder)
        assert runfolder.load(folder).cells == runfolder.load(whole).cells


def test_a_folder_without_a_run_is_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is not a run folder: it has no run\.json"):
        runfolder.load(tmp_path)


@pytest.mark.parametrize("name", ["run.json", "plan.json"])
def test_a_newer_format_is_refused(folder: Path, name: str) -> None:
    content = json.loads((folder / name).read_bytes())
    (folder / name).write_text(json.dumps(content | {"format": 2, "new": 1}), encoding="utf-8")
    for use in (runfolder.load, create):
        with pytest.raises(CorruptError) as caught:
            use(folder)
        assert str(caught.value) == (f"{folder / name}: format 2 is newer than this smbench reads (1); update smbench")


@pytest.mark.parametrize("name", ["run.json", "plan.json", "recipe.toml"])
def test_a_missing_or_damaged_file_is_named(folder: Path, name: str) -> None:
    path = folder / name
    for damage in (b"", b"[1]", b'{"format": 1}', b"\xff"):
        path.write_bytes(damage)
        with pytest.raises((CorruptError, UsageError), match=name):
            runfolder.load(folder)
    path.unlink()
    with pytest.raises((CorruptError, UsageError), match=name):
        runfolder.load(folder)


def test_a_damaged_line_in_the_middle_is_an_error_with_its_number(tmp_path: Path) -> None:
    lines = fill(tmp_path / "run").splitlines(keepends=True)
    changed = json.loads(lines[1])
    changed["cell"]["axes"]["hidden_size"] = 101
    for damage, told in {
        lines[1][:40] + b"\n": "line 2: : Invalid JSON",
        b"\n": "line 2: : Invalid JSON",
        b'{"record": "resutl"}\n': "line 2: : Input tag 'resutl'",
        json.dumps(changed).encode() + b"\n": "line 2: result: Value error, cell_id",
    }.items():
        (tmp_path / "run/results.jsonl").write_bytes(b"".join([lines[0], damage, *lines[2:]]))
        with pytest.raises(CorruptError) as caught:
            runfolder.load(tmp_path / "run")
        assert f"results.jsonl: {told}" in str(caught.value)


def test_a_record_with_a_key_nobody_declared_is_damaged(tmp_path: Path) -> None:
    lines = fill(tmp_path / "run").splitlines(keepends=True)
    (tmp_path / "run/results.jsonl").write_bytes(lines[0].replace(b'{"record', b'{"extra": 1, "record'))
    with pytest.raises(CorruptError, match=r"line 1: environment.extra: Extra inputs are not permitted"):
        runfolder.load(tmp_path / "run")


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, bytes]]:
    folder = tmp_path_factory.mktemp("cut") / "run"
    yield folder, fill(folder)


@given(data=st.data())
@settings(deadline=None)
def test_cut_at_any_byte_every_whole_record_survives_and_the_rest_is_set_aside(
    cut: tuple[Path, bytes], data: st.DataObject
) -> None:
    folder, whole = cut
    at = data.draw(st.integers(0, len(whole)))
    survivors = whole[:at].count(b"\n")
    torn = whole[:at].rpartition(b"\n")[2]
    for old in folder.glob("results.torn-*"):
        old.unlink()
    (folder / "results.jsonl").write_bytes(whole[:at])

    # a reader only warns
    run = runfolder.load(folder)
    assert [*run.environments, *run.results.values(), *run.sessions] == RECORDS[:survivors]
    assert len(run.warnings) == bool(torn)
    assert (folder / "results.jsonl").read_bytes() == whole[:at]

    # the next run repairs, keeps what it cut off, and goes on
    with Appender(folder) as appender:
        assert (appender.set_aside is not None) == bool(torn)
        for record in RECORDS[survivors:]:
            appender.append(record)
    assert [path.read_bytes() for path in folder.glob("results.torn-*")] == ([torn] if torn else [])
    assert (folder / "results.jsonl").read_bytes() == whole
    assert runfolder.load(folder).warnings == []


def test_a_torn_line_is_told_with_its_size_and_where_it_went(folder: Path) -> None:
    (folder / "results.jsonl").write_bytes(b'{"record": "resu')
    assert runfolder.load(folder).warnings == [
        "results.jsonl: line 1 is torn and was not read; the next run sets it aside"
    ]
    with Appender(folder) as appender:
        assert appender.set_aside == (
            "results.jsonl: the last line was torn (16 bytes); it was set aside as results.torn-0.txt"
        )


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    program = (
        "import sys, pathlib; from smbench import runfolder\n"
        "with runfolder.locked(pathlib.Path(sys.argv[1])):\n print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        told = r"another run is using .*; wait for it, or choose another"
        with pytest.raises(UsageError, match=told), runfolder.locked(folder):
            pass
        # the lock of a killed holder is nobody's
        holder.kill()
    with runfolder.locked(folder):
        pass


def test_a_place_that_cannot_hold_a_run_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "report.md"
    file.touch()
    for place in (file, file / "below"):
        told = r"report\.md.* cannot hold a run: .*; choose another folder with OUT="
        with pytest.raises(UsageError, match=told), runfolder.locked(place):
            pass


FILL_THE_DISK = """
import pathlib, resource, signal, sys
sys.path.insert(0, sys.argv[1])
from small_runs import timed
from test_runfolder import CELLS
from smbench.runfolder import Appender
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
written = 0
with Appender(pathlib.Path(sys.argv[2])) as appender:
    try:
        while True:
            appender.append(timed(CELLS[written % 3]))
            written += 1
    except OSError as error:
        print(written, error.errno)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits file sizes as Linux does")
def test_a_full_disk_leaves_whole_lines_and_the_next_run_goes_on(folder: Path) -> None:
    line = len(timed(CELLS[0]).model_dump_json()) + 1
    # room for three lines and a half
    command = [sys.executable, "-c", FILL_THE_DISK, str(Path(__file__).parent), str(folder), str(7 * line // 2)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", str(errno.EFBIG)]
    content = (folder / "results.jsonl").read_bytes()
    assert content.count(b"\n") == 3
    assert content.endswith(b"\n")
    assert runfolder.load(folder).warnings == []
    with Appender(folder) as appender:
        assert appender.set_aside is None
        appender.append(timed(CELLS[0]))
    assert (folder / "results.jsonl").read_bytes().count(b"\n") == 4


class Interrupted(io.FileIO):
    """A file whose second write stops half-way, by an error or a Ctrl-C."""

    def __init__(self, path: Path, error: BaseException) -> None:
        super().__init__(path, "ab")
        self.error = error
        self.writes = 0

    def write(self, data: object, /) -> int:
        self.writes += 1
        if self.writes == 2:
            assert isinstance(data, bytes)
            return super().write(data[: len(data) // 2])
        if self.writes == 3:
            raise self.error
        assert isinstance(data, bytes)
        return super().write(data)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_write_that_stops_half_way_is_taken_back(
    folder: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Appender(folder) as appender:
        path = folder / "results.jsonl"
        file = Interrupted(path, error)
        assert appender._file is not None
        appender._file.close()
        monkeypatch.setattr(appender, "_file", file)
        appender.append(RECORDS[0])
        with pytest.raises(type(error)):
            appender.append(RECORDS[1])
        assert path.read_bytes().count(b"\n") == 1
        assert path.read_bytes().endswith(b"\n")
        # room again
        appender.append(RECORDS[1])
    assert runfolder.load(folder).results == {CELLS[0].cell_id: RECORDS[1]}


def test_every_append_is_synced_before_it_returns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []

    def fsync(descriptor: int) -> None:
        synced.append((folder / "results.jsonl").read_bytes())

    with Appender(folder) as appender:
        monkeypatch.setattr(os, "fsync", fsync)
        appender.append(RECORDS[0])
        appender.append(RECORDS[1])
    assert [content.count(b"\n") for content in synced] == [1, 2]
