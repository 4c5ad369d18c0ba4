"""Nothing that names a person, a machine or a secret leaves in a bundle, and what is cut does not break it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bundles
import fake_run
from smbench import bundle, report
from smbench.cell import Cell
from smbench.errors import UsageError
from smbench.recipe import Profile
from smbench.redaction import Personal, Redactor
from smbench.result import Result, Session
from smbench.verify import verify

ENVIRON = {
    "USER": "grmblfritz",
    "HOME": "/home/grmblfritz",
    "HOSTNAME": "zorkbox-17.corp.example",
    "HF_TOKEN": "not+shaped/like a token 99",
    "MY_SERVICE_PASSWORD": "correct-horse",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIbPxRfiCYEXAMPLEKEY",
    "TOKENIZERS_PARALLELISM": "false",
}
PERSONAL = Personal.of_this_process(ENVIRON)
SECRETS = (
    "grmblfritz",
    "GRMBLFRITZ",
    "/home/grmblfritz",
    "zorkbox-17",
    "zorkbox-17.corp.example",
    "not+shaped/like a token 99",
    "correct-horse",
    "wJalrXUtnFEMIbPxRfiCYEXAMPLEKEY",
    "hf_QWERTYUIOPasdfghjkl",
    "sk-proj-QWERTYUIOPasdfgh",
    "ghp_QWERTYUIOPasdfghjklzxcvbnm12",
    "AKIAIOSFODNN7EXAMPLE",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0",
    "QWERTYbearervalue",
    "hunter2-hunter2",
    "/scratch/private project/model.bin",
    "/mnt/secretplace/weights",
    "10.11.12.13",
    "fe80::1ff:fe23:4567:890a",
    "00:1a:2b:3c:4d:5e",
    "someone@mailhost.example",
    "GPU-12345678-1234-1234-1234-123456789abc",
)
IN_CONTEXT = ("QWERTYbearervalue", "hunter2-hunter2", "/scratch/private project/model.bin", "/mnt/secretplace/weights")
"""What only the words or signs around it tell: it cannot be told in a file's name."""
PLANTED = (
    "grmblfritz@zorkbox-17 and GRMBLFRITZ on zorkbox-17.corp.example opened "
    "'/scratch/private project/model.bin' and /mnt/secretplace/weights under /home/grmblfritz/x from 10.11.12.13 "
    "via fe80::1ff:fe23:4567:890a (00:1a:2b:3c:4d:5e) with not+shaped/like a token 99, correct-horse, "
    "wJalrXUtnFEMIbPxRfiCYEXAMPLEKEY, hf_QWERTYUIOPasdfghjkl, sk-proj-QWERTYUIOPasdfgh, "
    "ghp_QWERTYUIOPasdfghjklzxcvbnm12, AKIAIOSFODNN7EXAMPLE, eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0; "
    "Authorization: Bearer QWERTYbearervalue password=hunter2-hunter2 for someone@mailhost.example on "
    "GPU-12345678-1234-1234-1234-123456789abc"
)


def planted(cell: Cell, profile: Profile) -> Result | None:
    """Results that carry secrets in every free text that they have."""
    result = fake_run.on_a_processor(cell, profile)
    assert result is not None
    changes: dict[str, Any] = {"telemetry": {**result.telemetry, PLANTED: PLANTED, "missing": {"gpu": [PLANTED]}}}
    if result.reason:
        changes["reason"] = f"{result.reason}: {PLANTED}"
    if result.selection:
        source = f"{result.selection.source}: {PLANTED}"
        changes["selection"] = result.selection.model_copy(
            update={"source": source, "kernels": {PLANTED: {"registers": 3}}}
        )
    return result.model_copy(update=changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rendered run that has secrets wherever a string can be."""
    quoted = json.dumps(PLANTED)
    recipe = fake_run.RECIPE.replace(b'title = "vLLM"', f"title = {quoted} # {PLANTED}".encode())
    recipe = recipe.replace(b'title = "Performance testing of', f'# {PLANTED}\ntitle = "{PLANTED} '.encode(), 1)
    environment = {
        **fake_run.CPU,
        "cpu": {"model": f"A processor of {PLANTED}"},
        "image": {"digest": "sha256:00", "labels": [PLANTED]},
        "missing": [f"gpu: {PLANTED}"],
        "libraries": {"torch": "2.13.0", "nvidia-cublas": "13.1.0.3", "private": PLANTED},
        PLANTED: 1,
    }
    made = bundles.run_folder(tmp_path_factory.mktemp("runs") / "run", planted, recipe=recipe, environment=environment)
    session = Session(
        started_at=fake_run.STARTED_AT,
        wall_s=1.0,
        worker_start_s=0.1,
        workers=1,
        results=1,
        ended="finished",
        timer_checks=({"method": PLANTED, "expected_s": 1e-3, "measured_s": 2e-3},),
    )
    with (made / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(session.model_dump_json() + "\n")
    for kind in ("logs", "native"):
        (made / kind).mkdir()
        (made / kind / "plain.txt").write_text(f"{PLANTED}\n{PLANTED}\n", encoding="utf-8")
        for secret in (secret for secret in SECRETS if secret not in IN_CONTEXT):
            name = secret.replace("/", "_")
            (made / kind / f"{name}.log").write_text(f"x {secret} y", encoding="utf-8")
    (made / "native" / "binary.bin").write_bytes(b"\xff\xfe\x00" + PLANTED.encode() + b"\x80")
    (made / "native" / "weights.bin").write_bytes(b"\xff\xfe\x00\x80 nothing private")
    (made / "native" / "grmblfritz").mkdir()
    (made / "native" / "grmblfritz" / "out.json").write_text(json.dumps({PLANTED: [PLANTED]}), encoding="utf-8")
    report.render(made)
    return made


@pytest.fixture(scope="module")
def packed(folder: Path) -> Iterator[bundle.Packed]:
    done = bundle.pack(folder, None, PERSONAL)
    assert done is not None
    yield done
    done.path.unlink()


def test_no_planted_secret_is_in_any_byte_of_the_bundle(folder: Path, packed: bundle.Packed) -> None:
    text = gzip.decompress(packed.path.read_bytes())
    lowered = text.lower()
    for secret in SECRETS:
        for form in (secret, json.dumps(secret)[1:-1], secret.replace("/", "_")):
            assert form.encode() not in text, secret
            assert form.lower().encode() not in lowered, secret
    original = (folder / "results.jsonl").read_bytes() + (folder / "report.md").read_bytes()
    # the test would prove nothing if they had not been there
    assert all(json.dumps(secret)[1:-1].encode() in original for secret in SECRETS)
    assert b"<HOME>" in text and b"<PATH>" in text and b"<SECRET>" in text and b"<USER>" in text and b"<HOST>" in text


def test_the_redacted_bundle_verifies_and_its_cells_are_the_same(folder: Path, packed: bundle.Packed) -> None:
    found = verify(packed.path)
    plan = json.loads((folder / "plan.json").read_bytes())["cells"]
    assert [cell.model_dump() for cell in found.run.cells] == plan
    originals = [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    ids = {record["cell_id"] for record in originals if record["record"] == "result"}
    assert found.run.results.keys() == ids


def test_originals_stay_untouched(folder: Path, packed: bundle.Packed) -> None:
    assert PLANTED in (folder / "logs" / "plain.txt").read_text(encoding="utf-8")
    assert json.dumps(PLANTED, ensure_ascii=False)[1:-1] in (folder / "results.jsonl").read_text(encoding="utf-8")


def test_a_review_counts_what_was_redacted_in_each_file(packed: bundle.Packed) -> None:
    redacted = {entry.name: entry.redacted for entry in packed.contents.entries}
    for name in ("results.jsonl", "recipe.toml", "logs/plain.txt", "native/plain.txt"):
        assert redacted[name]["<SECRET>"] >= 8, name
        assert redacted[name]["<USER>"] >= 1
        assert redacted[name]["<PATH>"] >= 2
    assert redacted["plan.json"] == redacted["run.json"] == {}
    assert any("binary.bin" in note and "stays out" in note for note in packed.notes)
    assert "native/weights.bin" in redacted


def test_versions_that_look_like_addresses_stay(packed: bundle.Packed) -> None:
    assert "13.1.0.3" in bundles.files_of(packed.path)[1]["data/report.md"].decode()


def test_a_name_that_is_a_word_of_the_experiment_stays_and_is_told(tmp_path: Path) -> None:
    made = bundles.run_folder(tmp_path / "run")
    personal = Personal.of_this_process({"USER": "torch", "HOME": "/home/torch", "HOSTNAME": "verified"})
    done = bundle.pack(made, None, personal)
    assert done
    assert any("'torch' is a word of this recipe" in note for note in done.notes)
    assert verify(done.path).statuses["verified"]


def test_a_plan_that_names_something_private_is_refused(tmp_path: Path) -> None:
    for secret in ("hf_QWERTYUIOPasdfghjkl", "/home/someone/llama"):
        recipe = fake_run.RECIPE.replace(b'dtype = ["float16"]', f'dtype = ["float16", "{secret}"]'.encode())
        made = bundles.run_folder(tmp_path / str(len(secret)), lambda cell, profile: None, recipe=recipe)
        with pytest.raises(UsageError, match=r"plan\.json holds something private") as raised:
            bundles.packed(made)
        assert secret not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "due"),
    [
        (
            'File "/home/grmblfritz/my dir/bench/smbench/worker/op.py", line 3',
            'File "<HOME>/smbench/worker/op.py", line 3',
        ),
        ("in /usr/lib/python3/dist-packages/torch/nn/functional.py:33", "in <PATH>/torch/nn/functional.py:33"),
        ("No such file: /data/models/llama.", "No such file: <PATH>."),
        ("-I/usr/include --model=/mnt/x C:\\Users\\me\\x ~/notes", "-I<PATH> --model=<PATH> <PATH> <HOME>"),
        ("https://user:pass@host.example/x", "https://<SECRET>@host.example/x"),
        ("HF_TOKEN=abcdefgh api_key: 'abcdefgh'", "HF_TOKEN=<SECRET> api_key: '<SECRET>'"),
        ("grmblfritz_h200 run", "<USER>_h200 run"),
    ],
)
def test_what_is_private_becomes_a_placeholder(text: str, due: str) -> None:
    assert Redactor(PERSONAL).text(text) == due


@pytest.mark.parametrize(
    "text",
    [
        "2.13 GB/s and 3 / 4, and/or, at 12:30:45, x[::2], std::vector",
        "see https://github.com/vllm-project/vllm/pull/5036",
        "per_token=128000, max_tokens: 500000, by_token = indices",
        "127.0.0.1 and 0.0.0.0",
        "the root mean square of the user's default",
        "CUDA error: an illegal memory access was encountered (sm_90, 0x7f)",
        "relative/path/of/a/file.py and ./here and ../there",
    ],
)
def test_what_is_not_private_stays(text: str) -> None:
    redactor = Redactor(Personal.of_this_process({**ENVIRON, "SUDO_USER": "root"}))
    assert redactor.text(text) == text
    assert not redactor.counts


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
def test_redacting_twice_changes_nothing_more(text: str) -> None:
    once = Redactor(PERSONAL).text(text)
    assert Redactor(PERSONAL).text(once) == once


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="/.~:@-_ ab01<>='\"", max_size=400))
def test_no_text_takes_long(text: str) -> None:
    Redactor(PERSONAL).text(text * 20)
