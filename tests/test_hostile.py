"""A bundle is somebody else's file: whatever is in it, nothing is written, nothing runs, and errors name the member."""

from __future__ import annotations

import gzip
import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

import bundles
import fake_run
from bundles import Files
from smbench import archive, verify
from smbench.archive import Reader, Writer, unsafe
from smbench.errors import CorruptError


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sound bundle."""
    return bundles.packed(bundles.run_folder(tmp_path_factory.mktemp("runs") / "run"))


@pytest.fixture(autouse=True)
def nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Fails a test in which anything but the test itself writes: no file is opened for writing while verifying."""
    real = verify.verify

    def watched(*arguments: Any, **options: Any) -> Any:
        before = sorted(str(path) for path in tmp_path.rglob("*"))
        with monkeypatch.context() as patch:
            for name in ("mkdir", "makedirs", "symlink", "link", "rename", "replace", "mkfifo", "mknod", "chmod"):
                patch.setattr(os, name, refused)
            patch.setattr(os, "system", refused)
            try:
                return real(*arguments, **options)
            finally:
                assert sorted(str(path) for path in tmp_path.rglob("*")) == before

    monkeypatch.setattr(verify, "verify", watched)
    return None


def refused(*_: object, **__: object) -> None:
    raise AssertionError("verifying touches nothing")


def fails(path: Path, due: str) -> None:
    with pytest.raises(CorruptError, match=due):
        verify.verify(path)


def info(name: str, kind: bytes = tarfile.REGTYPE, **fields: Any) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.mtime = kind, archive.TIME
    for field, value in fields.items():
        setattr(made, field, value)
    return made


MEMBERS: dict[str, tuple[tarfile.TarInfo, str]] = {
    "path traversal": (info("x/../../evil"), r"member 'x/\.\./\.\./evil': its name is leaving"),
    "up": (info("../evil"), r"\.\./evil.*leaving"),
    "absolute": (info("/etc/passwd"), r"'/etc/passwd': its name is absolute"),
    "windows absolute": (info("C:/evil"), "C:/evil.*character"),
    "backslashes": (info("x\\..\\evil"), "character"),
    "dot": (info("x/./evil"), "leaving or repeating"),
    "empty part": (info("x//evil"), "leaving or repeating"),
    "hidden": (info("x/.ssh"), "character"),
    "option": (info("x/-rf"), "character"),
    "control character": (info("x/a\nb"), "character"),
    "reserved": (info("x/nul.txt"), "reserved"),
    "trailing dot": (info("x/a."), "character"),
    "symbolic link": (info("x/link", tarfile.SYMTYPE, linkname="/etc/passwd"), r"x/link.*a symbolic link"),
    "hard link": (info("x/link", tarfile.LNKTYPE, linkname="/etc/passwd"), "a hard link"),
    "character device": (info("x/dev", tarfile.CHRTYPE, devmajor=1), "a character device"),
    "block device": (info("x/dev", tarfile.BLKTYPE, devmajor=8), "a block device"),
    "fifo": (info("x/pipe", tarfile.FIFOTYPE), "a fifo"),
    "folder": (info("x", tarfile.DIRTYPE), "a folder"),
    "contiguous": (info("x/a", tarfile.CONTTYPE), "a contiguous file"),
    "sparse": (info("x/a", tarfile.GNUTYPE_SPARSE), "a sparse file"),
    "old": (info("x/a", tarfile.AREGTYPE), "old tar format"),
    "unknown": (info("x/a", b"Z"), "unknown kind"),
    "owner": (info("x/a", uid=1000), "its header is not in the form .*owner"),
    "mode": (info("x/a", mode=0o4755), "header is not in the form .*mode"),
    "time": (info("x/a", mtime=5), "header is not in the form .*time"),
    "user": (info("x/a", uname="root"), "header is not in the form .*owner name"),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_a_member_that_no_bundle_has(tmp_path: Path, name: str) -> None:
    member, due = MEMBERS[name]
    fails(bundles.raw(tmp_path / "bad.tar.gz", [bundles.tar_of([(member, b"")])]), due)


def test_pax_and_gnu_extensions_are_refused(tmp_path: Path) -> None:
    long = "x/" + "a" * 200
    for form, due in ((tarfile.PAX_FORMAT, "a pax record"), (tarfile.GNU_FORMAT, "a GNU long name")):
        fails(bundles.raw(tmp_path / "long.tar.gz", [bundles.tar_of([(info(long), b"")], form)]), due)
    records = info("x/a", pax_headers={"GNU.sparse.major": "1", "path": "../../evil", "size": "9" * 30})
    fails(bundles.raw(tmp_path / "pax.tar.gz", [bundles.tar_of([(records, b"")], tarfile.PAX_FORMAT)]), "a pax record")
    oversized = info("x/a", pax_headers={"comment": "c" * (1 << 20)})
    data = bundles.tar_of([(oversized, b"")], tarfile.PAX_FORMAT)
    fails(bundles.raw(tmp_path / "large.tar.gz", [data]), "a pax record")
    everywhere = info("x/a", tarfile.XGLTYPE)
    fails(bundles.raw(tmp_path / "global.tar.gz", [bundles.tar_of([(everywhere, b"")])]), "a global pax record")


def test_a_size_that_is_no_octal_number_is_refused(tmp_path: Path) -> None:
    sound = bundles.tar_of([(info("x/a"), b"hello")])
    for size in (b"\x80" + b"\xff" * 11, b"-0000000005\0", b"           5", b"\0" * 12):
        block = sound[:124] + size + sound[136:512]
        fails(bundles.raw(tmp_path / "size.tar.gz", [block, sound[512:]]), "x/a.*(octal|header)")
    huge = archive._header("x/a", 8 << 30 - 1)
    fails(bundles.raw(tmp_path / "huge.tar.gz", [huge]), "more than 4 GiB")


@pytest.mark.parametrize(
    ("second", "due"),
    [
        ("x/a", "x/a: it is there twice"),
        ("x/A", "x/A: it differs from x/a in case"),
        ("X/a", "differs from x/a in case"),
    ],
)
def test_members_that_collide_are_refused(tmp_path: Path, second: str, due: str) -> None:
    path = tmp_path / "twice.tar.gz"
    with path.open("wb") as file, Writer(file) as writer:
        writer.add("x/a", 1, [b"1"])
        writer.add(second, 1, [b"2"])
    with path.open("rb") as written, pytest.raises(CorruptError, match=due):
        list(Reader(path.name, written))


def test_names_that_collide_once_normalized_are_refused(tmp_path: Path) -> None:
    for name in ("x/\u00e9", "x/e\u0301", "x/\ufb01le", "x/a\u200b", "x/\u202egnp.exe", "x/\uff0e\uff0e/evil"):
        fails(bundles.raw(tmp_path / "unicode.tar.gz", [bundles.tar_of([(info(name), b"")])]), "its name is not ASCII")
    block = bytearray(bundles.tar_of([(info("x/aa"), b"")]))
    block[2:4] = b"\xff\xfe"
    fails(bundles.raw(tmp_path / "bytes.tar.gz", [bytes(block)]), "its name is not ASCII")


def test_a_decompression_bomb_is_stopped_by_its_ratio_long_before_its_size(tmp_path: Path) -> None:
    path = tmp_path / "bomb.tar.gz"
    # 2 GiB of zeros in 2 MB
    member = archive._header("x/bagit.txt", 2 << 30)
    deflate = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    with path.open("wb") as file:
        parts = [deflate.compress(member), *(deflate.compress(bytes(1 << 20)) for _ in range(200)), deflate.flush()]
        data = b"".join(parts)
        file.write(archive.GZIP_HEADER + data[10:])
    with path.open("rb") as file, pytest.raises(CorruptError, match="a decompression bomb"):
        for _ in Reader(path.name, file):
            pass
    fails(path, r"bagit\.txt: 2147483648 bytes, more than")


def test_gzip_of_another_making_is_refused(packed: Path, tmp_path: Path) -> None:
    data = packed.read_bytes()
    tar = gzip.decompress(data)
    named = tmp_path / "named.tar.gz"
    with named.open("wb") as file, gzip.GzipFile("name.tar", "wb", fileobj=file) as stream:
        stream.write(tar)
    fails(named, "first bytes are not in the form that smbench writes")
    for name, changed, due in (
        ("plain.tar.gz", tar, "not gzip"),
        ("empty.tar.gz", b"", "not gzip"),
        ("trailing.tar.gz", data + b"x", "something follows the compressed data"),
        ("two.tar.gz", data + data, "something follows the compressed data"),
        ("checksum.tar.gz", data[:-8] + b"\0\0\0\0" + data[-4:], "damaged"),
        ("short.tar.gz", data[:-8], "something follows|cut short|damaged"),
    ):
        (tmp_path / name).write_bytes(changed)
        fails(tmp_path / name, due)
    fails(bundles.raw(tmp_path / "long.tar.gz", [tar, bytes(512)]), "something follows it")
    fails(bundles.raw(tmp_path / "cut.tar.gz", [tar[:-512]]), "cut short")


def test_the_canonical_form_is_read_by_every_tar(packed: Path) -> None:
    """What is refused is only what smbench does not write: the standard library reads what it does."""
    with tarfile.open(packed) as tar:
        for member in tar:
            assert unsafe(member.name) is None
    long = "top/" + "folder_name_of_some_length/" * 5 + "f" * 90
    with (packed.parent / "long.tar").open("wb") as file, Writer(file) as writer:
        writer.add(long, 3, [b"abc"])
    with tarfile.open(packed.parent / "long.tar") as tar:
        assert tar.getnames() == [long]
    with (packed.parent / "long.tar").open("rb") as written:
        assert [member.name for member in Reader("long", written)] == [long]


def json_forgery(text: str) -> Callable[[Files], None]:
    """A forgery whose first result has this as the value of a key of its telemetry."""

    def change(files: Files) -> None:
        assert files["data/results.jsonl"].count(b'"telemetry": {}')
        changed = files["data/results.jsonl"].replace(b'"telemetry": {}', b'"telemetry": {"x": %s}' % text.encode(), 1)
        files["data/results.jsonl"] = changed

    return change


@pytest.mark.parametrize(
    "text",
    [
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "9" * 30,
        "9" * 5000,
        "[" * 40 + "]" * 40,
        "[" * 100_000 + "]" * 100_000,
        '{"a":' * 40 + "1" + "}" * 40,
        '{"a":' * 100_000 + "1" + "}" * 100_000,
        '"\\ud800"',
        "'single'",
        "{,}",
    ],
    ids=lambda text: text[:12],
)
def test_json_that_not_every_reader_takes_alike_is_refused(packed: Path, tmp_path: Path, text: str) -> None:
    fails(bundles.forged(tmp_path / "json.tar.gz", packed, json_forgery(text)), r"data/results\.jsonl: line \d+: ")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-1e-6", "0", "1e999", '"1"', "null", "true"])
def test_a_sample_that_is_no_duration_is_refused(packed: Path, tmp_path: Path, number: str) -> None:
    def change(files: Files) -> None:
        text = files["data/results.jsonl"].decode()
        files["data/results.jsonl"] = re.sub(r'("samples_s": \[)[^,]*', rf"\g<1>{number}", text, count=1).encode()

    fails(bundles.forged(tmp_path / "sample.tar.gz", packed, change), r"data/results\.jsonl: line \d+: .*samples_s")


@pytest.mark.parametrize(
    "name", ["data/run.json", "data/plan.json", "data/recipe.toml", "data/results.jsonl", "bag-info.txt"]
)
def test_text_that_is_not_utf8_is_refused(packed: Path, tmp_path: Path, name: str) -> None:
    def change(files: Files) -> None:
        files[name] = files[name].replace(b"lora", b"lo\xff\xfe")

    if name == "bag-info.txt":
        top, files = bundles.files_of(packed)
        change(files)
        path = bundles.write(tmp_path / "utf8.tar.gz", top, files)
    else:
        path = bundles.forged(tmp_path / "utf8.tar.gz", packed, change)
    fails(path, r"utf8\.tar\.gz: ")


@pytest.mark.parametrize(
    "data",
    [b"[" * 100_000, b'{"format": ' * 50_000, b'{"format": ' + b"9" * 5000 + b"}", b"", b"\0" * 100, b"null", b"[]"],
    ids=lambda data: repr(data[:12]),
)
@pytest.mark.parametrize("name", ["run", "plan"])
def test_run_and_plan_that_are_no_such_file_are_refused(packed: Path, tmp_path: Path, name: str, data: bytes) -> None:
    forgery = bundles.forged(tmp_path / "x.tar.gz", packed, lambda files: files.update({f"data/{name}.json": data}))
    fails(forgery, rf"data/{name}\.json: ")


@pytest.mark.parametrize(
    ("old", "new", "due"),
    [
        (b"seed = 0", b"seed = " + b"9" * 5000, "data/recipe.toml"),
        (b"seed = 0", b"seed = " + b"[" * 10_000 + b"]" * 10_000, "data/recipe.toml"),
        (b"seed = 0", b"a" + b".a" * 5000 + b" = 1\nseed = 0", "data/recipe.toml"),
        (b'name = "lora"', b'name = "lora; rm -rf ~"', "data/recipe.toml.*name"),
        (b'template = "lora.md.j2"', b'template = "../../etc/passwd"', "unknown template"),
        (b'published = ["lora-rtx3090"]', b'published = ["../../../etc/passwd"]', "no published numbers"),
        (b"sizes = [128, 4096, 15360]", b"sizes = [" + b"1, " * 9_999 + b"1]\n", "REPRODUCE"),
    ],
    ids=lambda value: repr(value[:24]) if isinstance(value, bytes) else None,
)
def test_a_recipe_that_asks_for_too_much_is_refused(
    packed: Path, tmp_path: Path, old: bytes, new: bytes, due: str
) -> None:
    def change(files: Files) -> None:
        assert old in files["data/recipe.toml"]
        files["data/recipe.toml"] = files["data/recipe.toml"].replace(old, new)

    path = bundles.forged(tmp_path / "recipe.tar.gz", packed, change)
    # the sizes are of a profile that did not run, so it is the recipe's hash in the text that differs
    fails(path, due)


def test_a_product_of_axes_is_counted_before_it_is_made(packed: Path, tmp_path: Path) -> None:
    def change(files: Files) -> None:
        many = ", ".join(f"a{i} = [{', '.join(map(str, range(1000)))}]" for i in range(20))
        text = files["data/recipe.toml"].decode()
        head, _, tail = text.rpartition("hidden_size = [128, 256]")
        files["data/recipe.toml"] = f"{head}{many}, hidden_size = [128, 256]{tail}".encode()

    fails(
        bundles.forged(tmp_path / "many.tar.gz", packed, change),
        r"data/recipe\.toml: its profile has more than 1000000",
    )


def test_markup_in_strings_stays_text_from_pack_to_page(tmp_path: Path) -> None:
    recipe = fake_run.RECIPE.replace(b'title = "Performance', f"title = {json.dumps(fake_run.HOSTILE)} # ".encode(), 1)
    environment = {
        **fake_run.CPU,
        "cpu": {"model": fake_run.HOSTILE},
        "libraries": {"torch": f"{fake_run.HOSTILE} </script><script>alert(2)</script>"},
    }
    made = bundles.run_folder(tmp_path / "run", fake_run.all_failed, recipe=recipe, environment=environment)
    path = bundles.packed(made)
    verify.verify(path)
    _, files = bundles.files_of(path)
    lenient = MarkdownIt("commonmark", {"html": True}).enable("table")
    for name in ("data/report.md", "data/REPRODUCE.md"):
        tokens = [child for token in lenient.parse(files[name].decode()) for child in token.children or [token]]
        assert not [token for token in tokens if token.type in ("html_inline", "html_block")], name
        links = [str(token.attrs.get("href", token.attrs.get("src"))) for token in tokens if token.attrs]
        assert not [link for link in links if "javascript" in link or link.startswith("http://x")], name
    page = files["data/report.html"].decode()
    assert page.count("<script") == page.count("</script>") == 1
    assert "<b>" not in page and 'src="http' not in page and 'href="javascript' not in page


def test_errors_show_hostile_names_harmlessly(tmp_path: Path) -> None:
    for name in ("x/\x1b[31mred", "x/" + "a" * 90 + "\r\n"):
        path = bundles.raw(tmp_path / "name.tar.gz", [bundles.tar_of([(info(name), b"")])])
        with pytest.raises(CorruptError) as raised:
            verify.verify(path)
        assert str(raised.value).isprintable()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest bundle there is, for the fuzzers: nothing was measured, so it has no figure."""
    made = bundles.run_folder(tmp_path_factory.mktemp("tiny") / "run", lambda cell, profile: None)
    return bundles.packed(made)


CAMPAIGN = int(os.environ.get("SMBENCH_FUZZ", "1"))
"""Times the usual number of inputs."""


def fuzz(examples: int) -> settings:
    return settings(max_examples=CAMPAIGN * examples, deadline=None, suppress_health_check=list(HealthCheck))


@fuzz(1000)
@given(data=st.data())
def test_fuzzed_files_are_refused(tiny: Path, data: st.DataObject) -> None:
    """Flipped bits, cut and doubled stretches of the compressed file: what changes the content is an error of ours."""
    original = tiny.read_bytes()
    at = data.draw(st.integers(0, len(original) - 1))
    length = data.draw(st.integers(1, 64))
    changed = data.draw(
        st.sampled_from(
            [
                original[:at] + bytes([original[at] ^ (1 << length % 8)]) + original[at + 1 :],
                original[:at],
                original[:at] + original[at + length :],
                original[:at] + original[at : at + length] + original[at:],
                original[:at] + data.draw(st.binary(min_size=1, max_size=64)) + original[at + length :],
            ]
        )
    )
    outcome(tiny, changed, original)


@fuzz(80)
@given(data=st.data())
def test_fuzzed_tars_are_refused(tiny: Path, data: st.DataObject) -> None:
    """The same inside the compression, where headers and contents are; and blocks in another order."""
    tar = gzip.decompress(tiny.read_bytes())
    blocks = [tar[i : i + 512] for i in range(0, len(tar), 512)]
    headers = [i for i, block in enumerate(blocks) if block[257:262] == b"ustar"]
    match data.draw(st.sampled_from(["flip", "header", "cut", "swap", "double", "field"])):
        case "flip":
            at = data.draw(st.integers(0, len(tar) - 1))
            changed = tar[:at] + bytes([tar[at] ^ (1 << data.draw(st.integers(0, 7)))]) + tar[at + 1 :]
        case "header":
            i, at = data.draw(st.sampled_from(headers)), data.draw(st.integers(0, 511))
            block = bytearray(blocks[i])
            block[at] = data.draw(st.integers(0, 255))
            changed = b"".join([*blocks[:i], checksummed(block), *blocks[i + 1 :]])
        case "field":
            i = data.draw(st.sampled_from(headers))
            start, end = data.draw(st.sampled_from(sorted(archive._FIELDS.values())))
            block = bytearray(blocks[i])
            block[start:end] = data.draw(st.binary(max_size=end - start)).ljust(end - start, b"\0")
            changed = b"".join([*blocks[:i], checksummed(block), *blocks[i + 1 :]])
        case "cut":
            changed = tar[: data.draw(st.integers(0, len(tar) - 1))]
        case "swap":
            i, j = data.draw(st.sampled_from(headers)), data.draw(st.sampled_from(headers))
            blocks[i], blocks[j] = blocks[j], blocks[i]
            changed = b"".join(blocks)
        case _:
            i = data.draw(st.sampled_from(headers))
            changed = b"".join([*blocks[: i + 1], *blocks[i:]])
    path = bundles.raw(tiny.with_name("again.tar.gz"), [changed])
    outcome(tiny, path.read_bytes(), bundles.raw(tiny.with_name("same.tar.gz"), [tar]).read_bytes())


@fuzz(60)
@given(data=st.data())
def test_fuzzed_contents_with_fitting_hashes_are_refused_or_sound(tiny: Path, data: st.DataObject) -> None:
    """Members changed, dropped, doubled or added, with manifests that fit: all checks behind the hashes."""
    _, files = bundles.files_of(tiny)
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(
            st.sampled_from([name for name in files if name.startswith("data/") or name == "bag-info.txt"])
        )
        content = files[name]
        at = data.draw(st.integers(0, max(0, len(content) - 1)))
        match data.draw(st.sampled_from(["bytes", "token", "cut", "empty", "drop", "add"])):
            case "bytes":
                files[name] = content[:at] + data.draw(st.binary(max_size=8)) + content[at + 3 :]
            case "token":
                words = [
                    b"null",
                    b"1e999",
                    b"-1",
                    b'""',
                    b"[]",
                    b"{}",
                    b"NaN",
                    b"[[[[",
                    b"\xff",
                    b"\0",
                    b"2",
                    b"true",
                    b"\n",
                ]
                tokens = list(re.finditer(rb'"[^"\n]*"|\d+|true|false|null', content))
                if tokens:
                    found = data.draw(st.sampled_from(tokens))
                    files[name] = content[: found.start()] + data.draw(st.sampled_from(words)) + content[found.end() :]
            case "cut":
                files[name] = content[:at]
            case "empty":
                files[name] = b""
            case "drop" if name != "bag-info.txt":
                del files[name]
            case _:
                extra = data.draw(
                    st.sampled_from(["logs/x.log", "figures/x.png", "records/x.json", "native/a/b", "evil.sh"])
                )
                files[f"data/{extra}"] = data.draw(st.binary(max_size=20))
    try:
        path = bundles.write(tiny.with_name("fuzzed.tar.gz"), *bundles.honest(files))
    except (KeyError, ValueError):
        # bag-info.txt is past reading, so there is nothing to make fit
        return
    try:
        verify.verify(path)
    except CorruptError as error:
        assert "fuzzed.tar.gz" in str(error)


def outcome(tiny: Path, changed: bytes, original: bytes) -> None:
    """What verify makes of changed bytes: an error that names the file, or the content is the same."""
    path = tiny.with_name("fuzzed.tar.gz")
    path.write_bytes(changed)
    try:
        verify.verify(path)
    except CorruptError as error:
        assert "fuzzed.tar.gz" in str(error)
    else:
        # the same bytes can be compressed in more ways than one
        assert gzip.decompress(changed) == gzip.decompress(original)


def checksummed(block: bytearray) -> bytes:
    """A header with the checksum that fits it."""
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)
