"""A bundle holds what a run left, in a form that anybody can check, and its bytes do not depend on who packs it."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import bagit
import pytest
from typer.testing import CliRunner

import bundles
import fake_run
from smbench import bundle, recipe, report, runfolder
from smbench.archive import TIME
from smbench.bag import REQUIRED
from smbench.cli import app
from smbench.errors import CorruptError, UsageError
from smbench.sources import kernel_files, kernels_sha256
from smbench.verify import verify

ENVIRONMENT = {**fake_run.CPU, "smbench": {"kernels_sha256": kernels_sha256()}, "image": {"digest": "sha256:00"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished and rendered cpu run with logs and an engine's own output."""
    made = bundles.run_folder(tmp_path_factory.mktemp("runs") / "run", environment=ENVIRONMENT)
    (made / "logs").mkdir()
    (made / "logs" / "worker-001.log").write_text("a warning\n", encoding="utf-8")
    (made / "native" / "vllm").mkdir(parents=True)
    (made / "native" / "vllm" / "out.json").write_text('{"total": 1}', encoding="utf-8")
    report.render(made)
    return made


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.packed(folder, tmp_path_factory.mktemp("bundles"))


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_holds_the_run_and_what_made_it(folder: Path, packed: Path) -> None:
    top, files = bundles.files_of(packed)
    assert packed.name == f"{top}.tar.gz"
    payload = {name.removeprefix("data/"): data for name, data in files.items() if name.startswith("data/")}
    assert set(REQUIRED) < payload.keys()
    for name in ("run.json", "plan.json", "recipe.toml", "results.jsonl", "logs/worker-001.log"):
        assert payload[name] == (folder / name).read_bytes()
    assert payload["native/vllm/out.json"] == b'{"total": 1}'
    assert any(name.startswith("figures/") for name in payload)
    assert any(name.startswith("records/") for name in payload)
    assert json.loads(payload["image/image.json"]) == {"digest": "sha256:00"}
    sources = {
        name.removeprefix("sources/smbench_kernels/"): data for name, data in payload.items() if "sources/" in name
    }
    assert sources == kernel_files()
    assert {Path(name).suffix for name in sources} <= {".py", ".json"}


def test_its_recipe_loads_again_and_gives_the_same_cells(packed: Path) -> None:
    _, files = bundles.files_of(packed)
    again = recipe.parse(files["data/recipe.toml"], "recipe.toml").cells("cpu")
    assert list(verify(packed).run.cells) == again


def test_its_commands_name_what_ran(packed: Path) -> None:
    text = bundles.files_of(packed)[1]["data/REPRODUCE.md"].decode()
    for part in ("make run RECIPE=lora PROFILE=cpu", "smbench verify", "2.13.0", "3.7.1", "A processor"):
        assert part in text


def test_it_says_neither_when_nor_by_whom_it_was_packed(packed: Path) -> None:
    with tarfile.open(packed) as tar:
        members = tar.getmembers()
    assert all(m.isreg() and (m.uid, m.gid, m.uname, m.gname) == (0, 0, "", "") for m in members)
    assert {(m.mode, m.mtime, len(m.pax_headers)) for m in members} == {(0o644, TIME, 0)}
    assert [m.name for m in members[4:]] == sorted(m.name for m in members[4:])
    data = packed.read_bytes()
    # flags, time, extra flags and system of the gzip header
    assert data[3:10] == b"\0\0\0\0\0\0\xff"
    assert len(gzip.decompress(data)) % 512 == 0


def test_another_copy_umask_clock_and_place_give_the_same_bytes(folder: Path, packed: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(folder, copy)
    for path in copy.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
        os.utime(path, (1, 1))
    program = (
        "import os, sys; os.umask(0o077); from pathlib import Path; import bundles;"
        "sys.stdout.write(str(bundles.packed(Path(sys.argv[1]), Path(sys.argv[2]))))"
    )
    tests = str(Path(__file__).parent)
    environ = {**os.environ, "TZ": "Asia/Tokyo", "LC_ALL": "C", "PYTHONHASHSEED": "7"}
    environ["PYTHONPATH"] = os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])
    out = tmp_path / "other.tar.gz"
    done = subprocess.run(
        [sys.executable, "-c", program, str(copy), str(out)],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, str(out)), done.stderr
    assert out.read_bytes() == packed.read_bytes()


def test_packing_changes_nothing_in_the_run_folder_but_for_the_bundle(tmp_path: Path) -> None:
    made = bundles.run_folder(tmp_path / "run", fake_run.all_failed)
    before = tree(made)
    path = bundles.packed(made)
    after = tree(made)
    assert after.pop(path.relative_to(made).as_posix())
    assert after == before


def test_the_figures_of_a_report_that_is_current_are_taken_and_those_of_a_stale_one_are_not(
    folder: Path, packed: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    figure = next(iter(sorted((copy / "figures").glob("*.png"))))
    # a figure that nobody would draw shows whose it is
    figure.write_bytes(b"\x89PNG\r\n\x1a\n taken")
    taken = bundle.pack(copy, tmp_path / "taken.tar.gz", bundles.NOBODY)
    assert taken and not taken.notes
    assert b" taken" in bundles.files_of(taken.path)[1][f"data/figures/{figure.name}"]
    (copy / "report.md").write_text("of an earlier state\n", encoding="utf-8")
    drawn = bundle.pack(copy, tmp_path / "drawn.tar.gz", bundles.NOBODY)
    assert drawn and drawn.notes == ["the report was rendered again for the bundle"]
    assert drawn.path.read_bytes() == packed.read_bytes()


def test_what_is_no_result_stays_out(folder: Path, packed: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    secret = tmp_path / "outside.txt"
    secret.write_text("outside", encoding="utf-8")
    (copy / "logs" / "link.log").symlink_to(secret)
    (copy / "native" / "folder").symlink_to(tmp_path)
    os.mkfifo(copy / "native" / "pipe")
    for name in (".lock", "results.torn-12.txt", "request.json", "run.json.tmp", "notes.txt", "logs/worker-2.log.tmp"):
        (copy / name).write_text("no result", encoding="utf-8")
    done = bundle.pack(copy, tmp_path / "out.tar.gz", bundles.NOBODY)
    assert done
    assert done.path.read_bytes() == packed.read_bytes()
    assert sum("no plain file" in note for note in done.notes) == 3
    assert any("results.torn-12.txt" in note for note in done.notes)


def test_sources_that_are_not_those_that_ran_stay_out(tmp_path: Path) -> None:
    environment = {**ENVIRONMENT, "smbench": {"kernels_sha256": "0" * 64}}
    made = bundles.run_folder(tmp_path / "run", fake_run.all_failed, environment=environment)
    done = bundle.pack(made, tmp_path, bundles.NOBODY)
    assert done
    assert any("not those that ran" in note for note in done.notes)
    assert not any("sources/" in name for name in bundles.files_of(done.path)[1])


def test_an_unfinished_run_packs_and_says_how_far_it_is(tmp_path: Path) -> None:
    made = bundles.run_folder(tmp_path / "run", fake_run.unfinished, profile="full", environment=fake_run.GPU)
    with (made / "results.jsonl").open("ab") as file:
        file.write(b'{"record":"resu')
    done = bundle.pack(made, tmp_path, bundles.NOBODY)
    assert done
    assert done.path.name.startswith("lora-h200-")
    assert any("planned cells have no result yet" in note for note in done.notes), done.notes
    found = verify(done.path)
    assert len(found.run.results) == 30
    assert "unfinished" in "\n".join(found.lines())


def test_a_run_that_measured_nothing_yet_packs(tmp_path: Path) -> None:
    cells = recipe.parse(fake_run.RECIPE, "lora.toml").cells("cpu")
    runfolder.create(tmp_path / "run", fake_run.RECIPE, "lora", "cpu", cells)
    path = bundles.packed(tmp_path / "run")
    assert path.name.startswith("lora-unmeasured-")
    assert not verify(path).run.results


def test_records_that_do_not_hold_together_are_not_packed(tmp_path: Path) -> None:
    made = fake_run.build(tmp_path / "run", fake_run.RECIPE, "cpu", fake_run.all_failed, [fake_run.CPU])
    with pytest.raises(CorruptError, match=r"results\.jsonl: line 1: environment_id"):
        bundles.packed(made, tmp_path)
    assert not list(tmp_path.glob("*.gz*"))


def test_sha256sum_validates_an_unpacked_bundle(packed: Path, tmp_path: Path) -> None:
    top = unpacked(packed, tmp_path)
    for manifest in ("manifest-sha256.txt", "tagmanifest-sha256.txt"):
        done = subprocess.run(["sha256sum", "--strict", "-c", manifest], cwd=top, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout
    (top / "data" / "run.json").write_text("{}", encoding="utf-8")
    done = subprocess.run(["sha256sum", "-c", "manifest-sha256.txt"], cwd=top, capture_output=True, check=False)
    assert done.returncode == 1
    assert b"data/run.json: FAILED" in done.stdout


# bagit finds its own version through pkg_resources, and formats log lines by an old interface
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_the_bagit_tool_validates_an_unpacked_bundle(packed: Path, tmp_path: Path) -> None:
    top = unpacked(packed, tmp_path)
    bag = bagit.Bag(str(top))
    assert bag.validate()
    assert bag.version == "1.0"
    (top / "data" / "added.txt").write_text("added", encoding="utf-8")
    assert not bagit.Bag(str(top)).is_valid()


def unpacked(packed: Path, folder: Path) -> Path:
    """What `tar xzf` makes of a bundle."""
    subprocess.run(["tar", "xzf", str(packed), "-C", str(folder)], check=True)
    return folder / packed.name.removesuffix(".tar.gz")


def test_out_is_a_file_or_a_folder_and_a_bundle_is_replaced_in_one_step(
    folder: Path, packed: Path, tmp_path: Path
) -> None:
    assert bundles.packed(folder, tmp_path) == tmp_path / packed.name
    named = bundles.packed(folder, tmp_path / "mine.tar.gz")
    assert named.read_bytes() == packed.read_bytes()
    assert stat.S_IMODE(named.stat().st_mode) & 0o600 == 0o600
    with pytest.raises(UsageError, match=r"a bundle is a \.tar\.gz"):
        bundles.packed(folder, tmp_path / "mine.zip")
    with pytest.raises(UsageError, match="cannot be written"):
        bundles.packed(folder, tmp_path / "nowhere" / "mine.tar.gz")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([packed.name, "mine.tar.gz"])


def test_a_review_lists_what_goes_in_and_what_was_redacted_and_asks(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "logs" / "worker-001.log").write_text("token hf_abcdefghijklmnop in /data/x/y.bin\n", encoding="utf-8")
    runner = CliRunner()
    asked = runner.invoke(app, ["pack", str(copy), "--review"])
    assert isinstance(asked.exception, UsageError)
    assert "--yes" in str(asked.exception)
    done = runner.invoke(app, ["pack", str(copy), "--review", "--yes"])
    assert done.exit_code == 0
    log = next(line for line in done.output.splitlines() if "worker-001.log" in line)
    assert "(redacted: 1 <SECRET>, 1 <PATH>)" in log
    assert all(name in done.output for name in REQUIRED)
    shown = runner.invoke(app, ["pack", str(copy), "-o", str(tmp_path), "--json"])
    files = {row["name"]: row for row in json.loads(shown.stdout)["files"]}
    assert files["logs/worker-001.log"]["redacted"] == {"<SECRET>": 1, "<PATH>": 1}
    refused = bundle.pack(copy, tmp_path / "refused.tar.gz", bundles.NOBODY, approve=lambda contents: False)
    assert refused is None
    assert not (tmp_path / "refused.tar.gz").exists()


def test_packing_a_large_run_takes_seconds(tmp_path: Path) -> None:
    """The writer compresses 20 MB a second or more; more would be a rental's time."""
    began = time.process_time()
    bundles.write(tmp_path / "x.tar.gz", "top", {f"data/{i}": os.urandom(1 << 20) for i in range(8)})
    assert time.process_time() - began < 4
