"""Device code is taken out of shared objects without harm: what a device loads is left, all else is as it was."""

from __future__ import annotations

import base64
import ctypes
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fatbins import FAMILY, LTO, ONLY_THIS, PTX, SASS, ZSTD, Image, SharedObject, container
from smbench.fatbin import container as structure
from smbench.fatbin import survey
from smbench.fatbin.__main__ import main
from smbench.fatbin.selection import PLACEHOLDER_BYTES, loadable, reduced
from smbench.fatbin.sharedobject import rewritable
from smbench.fatbin.strip import strip_file
from smbench.fatbin.tree import held

SM90 = Image(SASS, 90, payload=b"ninety" * 300)
SM90A = Image(SASS, 90, ONLY_THIS, payload=b"ninety-a" * 300)
SM86 = Image(SASS, 86, payload=b"eightysix" * 300)
SM80 = Image(SASS, 80, payload=b"eighty" * 300)
SM100F = Image(SASS, 100, FAMILY, payload=b"hundred" * 300)
PTX80 = Image(PTX, 80, 0x11 | ZSTD, payload=b"ptx-eighty" * 100, options=bytes(16))
PTX90 = Image(PTX, 90, payload=b"ptx-ninety" * 100)
PTX90A = Image(PTX, 90, ONLY_THIS, payload=b"ptx-ninety-a" * 100)


def written(path: Path, *containers: bytes, **more: bytes) -> Path:
    path.write_bytes(SharedObject(containers, {f".{name}": content for name, content in more.items()}).pack())
    return path


def left(path: Path) -> list[list[str]]:
    """Targets of each container of a file."""
    raw = path.read_bytes()
    return [[entry.target for entry in found.entries] for found in rewritable(raw)]


def entries(*images: Image) -> tuple[structure.Entry, ...]:
    raw = container(images)
    return structure.parse(raw, 0, len(raw)).entries


@pytest.mark.parametrize(
    ("images", "capability", "expected"),
    [
        ((SM80, SM86, SM90, PTX90), 80, ["sm_80"]),
        ((SM80, SM86, SM90, PTX90), 86, ["sm_86"]),
        # a 4090 runs the code of a 3090 where there is none of its own
        ((SM80, SM86, SM90, PTX90), 89, ["sm_86"]),
        # code for a later minor never runs on an earlier one
        ((SM86, PTX80), 80, ["compute_80"]),
        ((SM80, PTX80), 90, ["compute_80"]),
        ((SM90, SM90A, SM80), 90, ["sm_90", "sm_90a"]),
        ((SM90A, PTX80), 90, ["sm_90a"]),
        ((SM80, PTX90A), 90, ["compute_90a"]),
        ((SM80, PTX90A), 120, []),
        ((SM80, PTX90), 120, ["compute_90"]),
        ((SM100F, SM90), 103, ["sm_100f"]),
        ((SM100F,), 90, []),
        # code of an integrated part is for that part alone
        ((Image(SASS, 87), SM80), 89, ["sm_80"]),
        ((Image(SASS, 87), SM80), 87, ["sm_87"]),
        # nobody says outright which of these two is taken, so both stay
        ((SM80, Image(PTX, 86)), 86, ["sm_80", "compute_86"]),
        # a kind of image that we do not know: hands off
        ((Image(LTO, 75), SM80, SM90), 90, ["kind8_75", "sm_80", "sm_90"]),
    ],
)
def test_a_device_keeps_what_it_loads(images: tuple[Image, ...], capability: int, expected: list[str]) -> None:
    assert [entry.target for entry in loadable(entries(*images), capability)] == expected


def test_stripping_leaves_one_target_and_the_rest_of_the_file(tmp_path: Path) -> None:
    path = written(
        tmp_path / "engine.so", container([SM80, SM90], padding=24), container([SM80, PTX80]), data=b"x" * 999
    )
    before = path.read_bytes()
    path.chmod(0o755)
    os.utime(path, ns=(10**18, 10**18))

    done = strip_file(path, 90)

    after = path.read_bytes()
    assert left(path) == [["sm_90"], ["compute_80"]]
    assert done is not None
    assert (done.kept, done.removed) == ({"compute_80": 1, "sm_90": 1}, {"sm_80": 2})
    assert done.unstripped_sha256 == hashlib.sha256(before).hexdigest()
    assert done.stripped_sha256 == hashlib.sha256(after).hexdigest()
    assert done.freed_bytes == 2 * len(SM80.pack())
    assert len(after) == len(before)
    assert after.count(SM90.payload) == 1
    assert after.count(SM80.payload) == 0
    status = path.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_mtime_ns) == (0o755, 10**18)
    assert list(tmp_path.iterdir()) == [path]


def test_a_container_without_anything_loadable_keeps_an_image_without_code(tmp_path: Path) -> None:
    path = written(tmp_path / "fa3.so", container([SM90A]), container([SM80]))
    done = strip_file(path, 80)
    raw = path.read_bytes()
    # the device must still find "no image for me" and not a container that looks damaged
    assert left(path) == [["sm_90a"], ["sm_80"]]
    assert done is not None
    assert (done.placeholders, done.kept) == (1, {"sm_80": 1})
    assert SM90A.payload not in raw
    first = rewritable(raw)[0]
    assert first.end - first.offset == 16 + PLACEHOLDER_BYTES


def test_a_failure_on_the_way_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "engine.so", container([SM80, SM90]))
    before = path.read_bytes()

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        strip_file(path, 90)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_image_smaller_than_a_placeholder_stays(tmp_path: Path) -> None:
    path = written(tmp_path / "tiny.so", container([Image(PTX, 121, payload=b"x" * 40)]))
    before = path.read_bytes()
    assert strip_file(path, 80) is None
    assert path.read_bytes() == before


images = st.lists(
    st.builds(
        Image,
        kind=st.sampled_from([PTX, SASS, SASS, SASS]),
        capability=st.sampled_from([75, 80, 86, 87, 89, 90, 100, 103, 120]),
        flags=st.sampled_from([0x11, 0x11, ONLY_THIS, FAMILY, 0x11 | ZSTD, ONLY_THIS | ZSTD]),
        payload=st.binary(min_size=1, max_size=600),
        options=st.sampled_from([b"", bytes(16), b"name.cu\0"]),
    ),
    max_size=5,
)
files = st.lists(st.tuples(images, st.sampled_from([0, 8, 64])), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(content=files, capability=st.sampled_from([80, 86, 89, 90]), other=st.binary(max_size=64))
def test_any_file_is_reduced_to_what_its_device_loads(
    tmp_path_factory: pytest.TempPathFactory, content: list[tuple[list[Image], int]], capability: int, other: bytes
) -> None:
    path = tmp_path_factory.mktemp("any") / "any.so"
    written(path, *(container(group, padding) for group, padding in content), data=other)
    before = path.read_bytes()
    old = rewritable(before)

    done = strip_file(path, capability)

    after = path.read_bytes()
    new = rewritable(after)
    assert [found.offset for found in new] == [found.offset for found in old]
    position = 0
    for was, now in zip(old, new, strict=True):
        assert after[position : was.offset] == before[position : was.offset]
        assert not after[now.end : was.end].strip(b"\0")
        wanted = loadable(was.entries, capability)
        if wanted:
            # the very images, in their order, and no other
            assert after[now.offset + 16 : now.end] == b"".join(before[e.offset : e.end] for e in wanted)
            assert loadable(now.entries, capability) == now.entries
        else:
            assert loadable(now.entries, capability) == ()
            assert now.end - now.offset <= 16 + PLACEHOLDER_BYTES
        position = was.end
    assert after[position:] == before[position:]
    assert (done is None) == (after == before)
    # a second time there is nothing to do
    assert strip_file(path, capability) is None
    assert path.read_bytes() == after
    assert all(reduced(after, found, capability) == after[found.offset + 16 : found.end] for found in new)


def broken(raw: bytes, at: int, new: bytes) -> bytes:
    return raw[:at] + new + raw[at + len(new) :]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (broken(container([SM80]), 0, b"XXXX"), "begins with 58585858"),
        (broken(container([SM80]), 4, b"\x02"), "version 2"),
        (broken(container([SM80]), 8, b"\xff\xff\xff"), "do not fit"),
        (broken(container([SM80]), 8, b"\x08"), "do not fit"),
        (broken(container([SM80]), 16 + 2, b"\x05"), "version 0x105"),
        (broken(container([SM80]), 16 + 4, b"\x20"), "do not fit"),
        (broken(container([SM80]), 16 + 8, b"\xf9\xff"), "do not fit"),
        (broken(container([SM80]), 16 + 28, b"\x01\x00"), "compute capability 1"),
        (broken(container([SM80]), 16 + 40, b"\x11\x80"), "compressed bytes"),
        (container([SM80]) + b"\0\0\0\0rest", "neither a container nor padding"),
    ],
)
def test_odd_input_is_refused_and_not_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    path = written(tmp_path / "odd.so", content + bytes(-len(content) % 8))
    good = written(tmp_path / "good.so", container([SM80, SM90]))
    before = path.read_bytes()
    assert main(["strip", "--sm", "90", "--manifest", str(tmp_path / "m.json"), str(tmp_path)]) == 3
    error = capsys.readouterr().err
    assert message in error and "odd.so" in error and "--leave" in error
    assert path.read_bytes() == before
    # one odd file does not keep the others, nor what was done to them, from being recorded
    assert left(good) == [["sm_90"]]
    record = json.loads((tmp_path / "m.json").read_text())
    assert [file["path"] for file in record["files"]] == [str(good)]

    arguments = ["strip", "--sm", "90", "--manifest", str(tmp_path / "m.json"), "--leave", "odd.so", str(tmp_path)]
    assert main(arguments) == 0
    assert main(["verify", "--sm", "90", "--manifest", str(tmp_path / "m.json"), str(tmp_path)]) == 0


def test_a_wrapper_that_points_between_containers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "shifted.so"
    path.write_bytes(SharedObject([container([SM80, SM90])], wrapper_shift=8).pack())
    with pytest.raises(structure.OddContainer, match="where no container begins"):
        strip_file(path, 90)


def test_a_whole_tree_is_stripped_recorded_and_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = tmp_path / "site-packages"
    (site / "engine").mkdir(parents=True)
    (site / "engine-1.2.dist-info").mkdir()
    library = written(site / "engine" / "lib.so", container([SM80, SM90]))
    published = library.read_bytes()
    digest = base64.urlsafe_b64encode(hashlib.sha256(published).digest()).decode().rstrip("=")
    (site / "engine-1.2.dist-info" / "RECORD").write_text(f"engine/lib.so,sha256={digest},{len(published)}\n")
    twin = site / "engine" / "twin.so"
    twin.hardlink_to(library)
    (site / "engine" / "link.so").symlink_to(library)
    compiler = written(site / "engine" / "libnvrtc.so.13", container([SM80, SM90]))
    compiler_bytes = compiler.read_bytes()
    (site / "engine" / "readme.txt").write_text("not a shared object")
    (site / "engine" / "empty.so").write_bytes(b"")
    manifest = tmp_path / "manifest.json"
    verify = ["verify", "--sm", "90", "--manifest", str(manifest), str(site)]

    assert main(["verify", "--sm", "90", str(site)]) == 1
    assert "1 × sm_80" in capsys.readouterr().err
    assert main(["strip", "--sm", "sm90", "--manifest", str(manifest), str(site)]) == 0
    assert main(verify) == 0

    record = json.loads(manifest.read_text())
    assert [(file["path"], file["freed_bytes"]) for file in record["files"]] == [
        (str(library), len(SM80.pack())),
        (str(twin), 0),
    ]
    assert record["files"][0]["unstripped_sha256"] == hashlib.sha256(published).hexdigest()
    assert (record["files"][0]["package"], record["files"][0]["as_published"]) == ("engine-1.2", True)
    assert [file["path"] for file in record["left"]] == [str(compiler)]
    assert compiler.read_bytes() == compiler_bytes
    # names of one file stay names of one file, and a link stays a link
    assert library.samefile(twin) and library.stat().st_nlink == 2
    assert (site / "engine" / "link.so").is_symlink()

    # stripping again keeps what is known of the unstripped files
    first = manifest.read_text()
    assert main(["strip", "--sm", "90", "--manifest", str(manifest), str(site)]) == 0
    assert manifest.read_text() == first

    library.write_bytes(published)
    capsys.readouterr()
    assert main(verify) == 1
    assert "sha256 is not the one in the manifest" in capsys.readouterr().err


def test_mistakes_of_the_caller_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / "a.so", container([SM80, SM90]))
    manifest = str(tmp_path / "m.json")
    assert main(["strip", "--sm", "90", "--manifest", manifest, str(tmp_path / "absent")]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    assert main(["verify", "--sm", "90", "--manifest", manifest, str(tmp_path)]) == 2
    assert "no such manifest" in capsys.readouterr().err
    assert main(["strip", "--sm", "90", "--manifest", manifest, str(tmp_path)]) == 0
    assert main(["strip", "--sm", "80", "--manifest", manifest, str(tmp_path)]) == 2
    assert "cannot be stripped again" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["strip", "--sm", "hopper", "--manifest", manifest, str(tmp_path)])
    (tmp_path / "m.json").write_text("{}")
    assert main(["verify", "--sm", "90", "--manifest", manifest, str(tmp_path)]) == 3


def test_containers_that_the_driver_does_not_choose_from_stay(tmp_path: Path) -> None:
    for section in ("__nv_relfatbin", ".cask_resource", ".ldata", ".rodata"):
        path = tmp_path / f"lib{section}.so"
        inside = container([SM80, SM90])
        path.write_bytes(SharedObject([container([SM80, SM90])], {section: inside}).pack())
        strip_file(path, 90)
        report = held(path)
        assert report is not None
        assert (report.images, report.elsewhere_bytes) == ({"sm_90": 1}, {section: len(inside)})
        assert inside in path.read_bytes()


def test_a_survey_says_what_a_wheel_executes(tmp_path: Path) -> None:
    raw = SharedObject([container([SM80, SM90]), container([SM80, PTX80]), container([SM90A])]).pack()
    wheel = tmp_path / "engine-1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("engine/lib.so", raw)
        archive.writestr("engine/__init__.py", "x = 1\n" * 100)
    table = tomllib.loads(survey.render([survey.wheel(wheel, [86, 90])], "2026-01-31"))
    (found,) = table["wheel"]
    assert (found["name"], found["version"]) == ("engine", "1.2")
    assert found["sha256"] == hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert found["installed_bytes"] == len(raw) + 600
    (file,) = found["file"]
    assert file["executes"] == {
        "sm86": {"nothing": 1, "sm_80": 2},
        "sm90": {"compute_80": 1, "sm_90": 1, "sm_90a": 1},
    }
    assert file["targets"]["sm_80"] == 2 * len(SM80.pack())
    # what is promised is what stripping does
    stripped = written(tmp_path / "lib.so", container([SM80, SM90]), container([SM80, PTX80]), container([SM90A]))
    done = strip_file(stripped, 86)
    assert done is not None
    assert found["freed_bytes"]["sm86"] == done.freed_bytes
    assert 0 < found["saved_layer_bytes"]["sm86"] < found["layer_bytes"]


def test_the_package_needs_the_standard_library_alone(tmp_path: Path) -> None:
    """It runs in a build stage that has nothing but Python."""
    path = written(tmp_path / "a.so", container([SM80, SM90]))
    root = Path(structure.__file__).parents[2]
    command = [sys.executable, "-I", "-S", "-c"]
    program = (
        f"import sys; sys.path.insert(0, {str(root)!r}); sys.argv = ['fatbin', 'list', {str(path)!r}];"
        "import runpy; runpy.run_module('smbench.fatbin', run_name='__main__')"
    )
    done = subprocess.run([*command, program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "sm_80" in done.stdout


def test_a_stripped_shared_object_still_loads(tmp_path: Path) -> None:
    """The dynamic linker and the host's code see nothing of it."""
    cc = shutil.which("cc")
    if cc is None:
        pytest.skip("needs a C compiler to make a real shared object")
    (tmp_path / "fat.bin").write_bytes(container([SM80, SM90], padding=8) + container([SM90A]))
    (tmp_path / "host.c").write_text(
        f'__asm__(".section .nv_fatbin,\\"a\\"\\n.incbin \\"{tmp_path / "fat.bin"}\\"\\n.previous");\n'
        "int answer(void) { return 42; }\n"
    )
    path = tmp_path / "host.so"
    subprocess.run([cc, "-shared", "-fPIC", "-o", str(path), str(tmp_path / "host.c")], check=True)
    done = strip_file(path, 80)
    assert done is not None and (done.kept, done.placeholders) == ({"sm_80": 1}, 1)
    assert ctypes.CDLL(str(path)).answer() == 42
