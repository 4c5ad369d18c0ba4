"""MODEL= finds weights by name, refuses what engines would not load, and never lets a path into a cell."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from checkpoints import TENSORS, quantized, safetensors_bytes, tiny_config, write_checkpoint
from smbench import checkpointfiles, models
from smbench.errors import UsageError
from smbench.models import Model
from smbench.shapes import SHAPES

PYTHON = Path(sys.executable)
PINNED = "Qwen/Qwen2.5-32B-Instruct-GPTQ-Int4@c83e67dfb2664f5039fd4cd99e206799e27dd800"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Caches of our own: nothing of this machine is found, nothing is written to its home."""
    for name in ("HF_HUB_CACHE", "SMBENCH_DOWNLOAD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("SMBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path


def refusal(spec: str) -> str:
    with pytest.raises(UsageError) as caught:
        models.find(spec)
    return str(caught.value)


def snapshot(caches: Path, name: str = "org/model", commit: str = COMMIT) -> Path:
    return caches / "hf" / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / commit


@pytest.mark.parametrize("shape", SHAPES)
def test_a_synthetic_model_is_known_before_it_is_written(shape: str, caches: Path) -> None:
    model = models.find(f"synthetic:{shape}", plain=True)
    assert (model.name, model.source) == (f"synthetic:{shape}", "synthetic")
    assert model.path == caches / "cache" / "models" / f"{shape}-seed0-format2"
    assert (model.facts.bits, model.facts.group) == ((None, None) if shape.endswith("-bf16") else (4, 128))
    assert not model.path.exists()


def test_the_facts_of_the_document_s_model() -> None:
    facts = models.find(PINNED).facts
    assert facts == models.find("synthetic:qwen2.5-32b").facts
    # 31.2e9 weights of 4 bits and their scales are what a decode step reads, besides a head of 1.56 GB
    assert facts.linear_parameters == 31_205_621_760
    assert facts.weight_bytes("float16") == pytest.approx(16.2e9, rel=0.01)
    assert facts.head_bytes("float16") == pytest.approx(1.56e9, rel=0.01)
    assert facts.kv_token_bytes("float16") == 262_144


def test_a_wrong_shape_lists_those_that_exist_and_suggests() -> None:
    assert refusal("synthetic:qwen2.5-23b") == (
        "unknown shape 'qwen2.5-23b' in model 'synthetic:qwen2.5-23b'; known: tiny, qwen2.5-0.5b, qwen2.5-7b, "
        "qwen2.5-32b; did you mean 'qwen2.5-32b'?"
    )
    assert refusal("syntetic:tiny").endswith("; did you mean 'synthetic:tiny'?")
    assert refusal("tiny").endswith("; did you mean 'synthetic:tiny'?")


def test_weights_that_are_not_quantized_are_taken_only_where_they_are_meant(caches: Path) -> None:
    assert "not a GPTQ checkpoint" in refusal("synthetic:tiny-bf16")
    folder = write_checkpoint(
        caches / "model", tiny_config(quantization_config=None), {"model.safetensors": ["model.norm.weight"]}
    )
    assert "not a GPTQ checkpoint" in refusal(str(folder))
    assert models.find(str(folder), plain=True).facts.bits is None
    with pytest.raises(UsageError, match="quant_method is 'awq'"):
        models.find(str(write_checkpoint(caches / "awq", quantized(quant_method="awq"))), plain=True)


def test_packed_weights_that_the_configuration_does_not_mention_are_refused(caches: Path) -> None:
    folder = write_checkpoint(caches / "model", tiny_config(quantization_config=None))
    with pytest.raises(UsageError, match=r"holds packed weights \(tensors named \*\.qweight\), and config.json"):
        models.find(str(folder), plain=True)


def test_the_facts_of_the_frameworks_document_s_models() -> None:
    """Their checkpoints on the hub have 65.53 and 29.54 GB."""
    for name, total in (
        ("Qwen/Qwen2.5-32B-Instruct@5ede1c97bbab6ce5cda5812749b4c0bdf79b18dd", 65.53e9),
        ("Qwen/Qwen2.5-14B-Instruct@cf98f3b3bbb457ad9e2bb7baf9a0125b6b88caa8", 29.54e9),
    ):
        assert models.find(name, plain=True).facts.resident_bytes("bfloat16") == pytest.approx(total, rel=1e-3)


def test_a_model_of_the_hub_must_be_pinned() -> None:
    assert refusal(PINNED.partition("@")[0]) == (
        f"model '{PINNED.partition('@')[0]}': it has no revision, and weights that can change prove nothing: "
        f"pin it with MODEL={PINNED}"
    )
    assert "revision 'main' is not the 40 hexadecimal digits of a commit" in refusal("org/model@main")
    assert "MODEL=org/model@COMMIT" in refusal("org/model")
    assert f"did you mean '{PINNED}'?" in refusal("Qwen/Qwen2.5-32B-Instruct-GTPQ-Int4")


def test_what_is_no_name_lists_the_forms() -> None:
    assert "is none of: NAME@REVISION of the Hugging Face hub, the folder of a checkpoint, or synthetic:SHAPE" in (
        refusal("two words")
    )


def test_the_name_of_a_folder_in_a_cell_asks_for_the_folder() -> None:
    assert refusal("folder:mine@0123456789ab") == (
        "model 'folder:mine@0123456789ab' was a folder on the machine that measured it; give its place here with MODEL="
    )


def test_a_model_in_the_hub_s_cache_is_found_by_its_commit(caches: Path) -> None:
    write_checkpoint(snapshot(caches), tiny_config(num_hidden_layers=7))
    model = models.find(f"org/model@{COMMIT}")
    assert (model.name, model.source, model.path) == (f"org/model@{COMMIT}", "hub", snapshot(caches))
    assert model.facts.layers == 7
    assert models.prepare(model, PYTHON) is None


def test_the_hub_s_own_variable_for_its_cache_comes_first(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(caches / "elsewhere" / "models--org--model" / "snapshots" / COMMIT, tiny_config())
    monkeypatch.setenv("HF_HUB_CACHE", str(caches / "elsewhere"))
    assert models.find(f"org/model@{COMMIT}").path.is_relative_to(caches / "elsewhere")


def test_an_unknown_model_that_is_not_here_says_how_to_fetch_it() -> None:
    assert f"fetch it first: hf download org/model --revision {COMMIT}" in refusal(f"org/model@{COMMIT}")


def test_nothing_is_downloaded_unless_it_was_asked_for(caches: Path) -> None:
    with pytest.raises(UsageError) as caught:
        models.prepare(models.find(PINNED), caches / "no-python")
    name, _, commit = PINNED.partition("@")
    assert "it has about 19 GB. SMBENCH_DOWNLOAD=1 lets smbench fetch it" in str(caught.value)
    assert f"hf download {name} --revision {commit}" in str(caught.value)
    assert "MODEL=synthetic:qwen2.5-32b" in str(caught.value)


FAKE_HUB = """
import json, os, pathlib
def snapshot_download(name, revision):
    {body}
"""


def fake_hub(caches: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """A `huggingface_hub` for the stack's Python."""
    (caches / "lib").mkdir()
    (caches / "lib" / "huggingface_hub.py").write_text(FAKE_HUB.format(body=body), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(caches / "lib"))
    monkeypatch.setenv("SMBENCH_DOWNLOAD", "1")


def test_a_download_that_was_asked_for_gets_that_commit(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, _, commit = PINNED.partition("@")
    whole = write_checkpoint(caches / "whole", tiny_config())
    place = snapshot(caches, name, commit)
    copying = f"import shutil; shutil.copytree({str(whole)!r}, {str(place)!r})"
    fake_hub(caches, monkeypatch, f"assert (name, revision) == ({name!r}, {commit!r}); {copying}")
    said = models.prepare(models.find(PINNED), PYTHON)
    assert said is not None
    assert said.startswith(f"fetched {PINNED} in ")
    assert models.prepare(models.find(PINNED), PYTHON) is None


def test_a_download_that_fails_says_why(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(caches, monkeypatch, "raise OSError('no route to the hub')")
    with pytest.raises(UsageError, match=r"the download failed: .*no route to the hub"):
        models.prepare(models.find(PINNED), PYTHON)


def test_a_download_that_was_cut_short_is_not_taken_for_whole(caches: Path) -> None:
    place = write_checkpoint(
        snapshot(caches), tiny_config(), {"a.safetensors": TENSORS[:1], "b.safetensors": TENSORS[1:]}
    )
    (place / "b.safetensors").unlink()
    with pytest.raises(UsageError, match=r"1 of 2 files of weights are missing: b\.safetensors"):
        models.prepare(models.find(f"org/model@{COMMIT}"), PYTHON)


def test_a_folder_is_named_by_its_content_and_not_by_its_place(caches: Path) -> None:
    first = models.find(str(write_checkpoint(caches / "secret place" / "my model", tiny_config())))
    assert first.source == "folder"
    assert first.name.startswith("folder:my_model@")
    assert "secret" not in first.name
    moved = models.find(str(write_checkpoint(caches / "moved" / "my model", tiny_config())))
    assert moved.name == first.name
    others = [
        write_checkpoint(caches / "weights" / "my model", tiny_config(), fill=b"\2"),
        write_checkpoint(caches / "config" / "my model", tiny_config(rope_theta=5.0)),
    ]
    assert len({first.name, *(models.find(str(folder)).name for folder in others)}) == 3
    assert models.prepare(first, PYTHON) is None


def test_a_folder_may_be_given_from_here_and_from_home(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(caches / "org" / "model", tiny_config())
    monkeypatch.chdir(caches)
    monkeypatch.setenv("HOME", str(caches))
    assert {models.find(spec).path for spec in ("org/model", "./org/model", "~/org/model")} == {
        caches / "org" / "model"
    }


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "not quantized": (tiny_config(quantization_config=None), "not a GPTQ checkpoint: config.json has no"),
    "another method": (quantized(quant_method="awq"), "not a GPTQ checkpoint: quant_method is 'awq'"),
    "another width": (quantized(bits=8), "bits is 8, and the kernels compared here are for 4 bits"),
    "order of activation": (quantized(desc_act=True), "desc_act is true"),
    "not symmetric": (quantized(sym=False), "sym is false"),
    "one group": (quantized(group_size=-1), "group_size is -1, and Exllama needs groups of rows"),
    "another format": (quantized(checkpoint_format="gptq_v2"), "checkpoint_format is 'gptq_v2'"),
    "quantized head": (quantized(lm_head=True), "lm_head is quantized"),
    "layers apart": (quantized(dynamic={"-:.*mlp.*": {}}), "dynamic gives layers settings of their own"),
    "unknown architecture": (
        tiny_config(architectures=["MambaForCausalLM"]),
        "architecture MambaForCausalLM is not supported; supported: LlamaForCausalLM, ",
    ),
    "missing key": (tiny_config(hidden_size=None), "config.json lacks 'hidden_size'"),
    "experts": (tiny_config(num_experts=8), "config.json: mixtures of experts are not described"),
}


@pytest.mark.parametrize(("config", "message"), CONFIGS.values(), ids=CONFIGS)
def test_a_checkpoint_that_engines_would_not_take_is_refused_before_anything_loads(
    caches: Path, config: dict[str, Any], message: str
) -> None:
    folder = write_checkpoint(caches / "model", config)
    found = refusal(str(folder))
    assert found.startswith(f"{folder}: {message}")
    assert "\n" not in found


def test_a_checkpoint_of_another_supported_family_is_taken(caches: Path) -> None:
    folder = write_checkpoint(
        caches / "model", tiny_config(architectures=["LlamaForCausalLM"], model_type="llama", num_key_value_heads=None)
    )
    assert models.find(str(folder)).facts.kv_heads == 4


def test_a_folder_that_is_none_or_empty_is_refused(caches: Path) -> None:
    (caches / "empty").mkdir()
    (caches / "file").touch()
    for spec, message in {
        "missing": "does not exist; MODEL= takes the folder of a checkpoint, with config.json in it",
        "file": "is no folder",
        "empty": "holds no config.json, so it is no checkpoint in the format of Hugging Face",
    }.items():
        assert f"{caches / spec}: {message}" in refusal(str(caches / spec))


def test_weights_that_are_missing_or_cut_short_are_named(caches: Path) -> None:
    two = {"a.safetensors": TENSORS[:1], "b.safetensors": TENSORS[1:]}
    folder = write_checkpoint(caches / "model", tiny_config(), two)
    (folder / "b.safetensors").unlink()
    assert refusal(str(folder)) == f"{folder}: 1 of 2 files of weights are missing: b.safetensors"
    whole = safetensors_bytes(TENSORS[1:])
    (folder / "b.safetensors").write_bytes(whole[:-1])
    assert refusal(str(folder)) == (
        f"{folder / 'b.safetensors'}: has {len(whole) - 1} bytes, and its header promises {len(whole)}: "
        "it did not arrive whole"
    )
    for rest in (b"", whole[:20], b"\xff" * 64, (2).to_bytes(8, "little") + b"[]"):
        (folder / "b.safetensors").write_bytes(rest)
        assert refusal(str(folder)).startswith(f"{folder / 'b.safetensors'}: has no header of the safetensors format")
    (folder / "b.safetensors").write_bytes(whole)
    assert models.find(str(folder)).name.startswith("folder:model@")


def test_a_folder_without_weights_or_without_packed_ones_is_refused(caches: Path) -> None:
    empty = write_checkpoint(caches / "empty", tiny_config(), {})
    assert "holds neither model.safetensors.index.json nor model.safetensors" in refusal(str(empty))
    plain = write_checkpoint(
        caches / "plain", tiny_config(), {"model.safetensors": ["model.layers.0.mlp.up_proj.weight"]}
    )
    assert f"{plain}: holds no packed weights (tensors named *.qweight)" in refusal(str(plain))


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "{}"])
def test_an_index_that_says_nothing_is_refused(caches: Path, text: str) -> None:
    folder = write_checkpoint(caches / "model", tiny_config())
    (folder / checkpointfiles.INDEX).write_text(text, encoding="utf-8")
    assert refusal(str(folder)).startswith(f"{folder / checkpointfiles.INDEX}: ")


def test_a_configuration_that_is_no_json_is_refused(caches: Path) -> None:
    folder = write_checkpoint(caches / "model", tiny_config())
    (folder / "config.json").write_text("{'hidden_size': 1}", encoding="utf-8")
    assert refusal(str(folder)).startswith(f"{folder / 'config.json'}: not valid JSON: ")


# stands for the stack's Python: writes what a checkpoint needs to be found whole, and counts how often it was called
BUILDER = """#!{python}
import json, pathlib, sys, time
sys.path[:0] = [{tests!r}]
from checkpoints import tiny_config, write_checkpoint
assert sys.argv[1:4] == ["-m", "smbench.worker.checkpoint", "tiny"], sys.argv
with open({calls!r}, "a") as calls:
    calls.write("called\\n")
time.sleep(0.2)
write_checkpoint(pathlib.Path(sys.argv[sys.argv.index("--out") + 1]), tiny_config())
print(1234)
"""


def builder(caches: Path, text: str = BUILDER) -> Path:
    python = caches / "python"
    tests = str(Path(__file__).parent)
    python.write_text(text.format(python=sys.executable, tests=tests, calls=str(caches / "calls")), encoding="utf-8")
    python.chmod(0o755)
    return python


def test_a_synthetic_checkpoint_is_written_once_however_many_ask(caches: Path) -> None:
    model, python = models.find("synthetic:tiny"), builder(caches)
    said: list[str | None] = []
    threads = [threading.Thread(target=lambda: said.append(models.prepare(model, python))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (caches / "calls").read_text(encoding="utf-8").splitlines() == ["called"]
    assert sorted(line is not None for line in said) == [False, False, True]
    assert next(line for line in said if line).startswith("wrote synthetic:tiny in ")


def test_a_synthetic_checkpoint_that_cannot_be_written_says_why(caches: Path) -> None:
    python = builder(caches, "#!{python}\nimport sys\nsys.exit('no module named torch {tests} {calls}'[:26])\n")
    with pytest.raises(UsageError, match="model synthetic:tiny: cannot be written: no module named torch"):
        models.prepare(models.find("synthetic:tiny"), python)


def test_a_synthetic_checkpoint_that_was_damaged_is_not_used(caches: Path) -> None:
    model, python = models.find("synthetic:tiny"), builder(caches)
    models.prepare(model, python)
    (model.path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match=f"remove {model.path}, and it is written anew"):
        models.prepare(model, python)


def test_a_folder_that_vanished_after_planning_is_named(caches: Path) -> None:
    folder = write_checkpoint(caches / "model", tiny_config())
    model = models.find(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="holds neither"):
        models.prepare(model, PYTHON)


def test_the_engine_stack_writes_a_checkpoint_that_is_found_whole(caches: Path) -> None:
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    model: Model = models.find("synthetic:tiny")
    assert models.prepare(model, PYTHON) is not None
    assert models.prepare(model, PYTHON) is None
    assert json.loads((model.path / "config.json").read_text(encoding="utf-8")) == dict(model.config)
