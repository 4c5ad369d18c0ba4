"""Imports as sides of a comparison: same numbers for the same run, nothing compared that is not alike, and why."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fake_frameworks_run as fake
import fake_run
from smbench import alignment, comparison, imports, onebatch, runfolder, sides
from smbench.cell import Cell
from smbench.cli import app
from smbench.compare import Comparison, compare
from smbench.errors import CorruptError, UsageError
from smbench.recipe import Profile
from smbench.result import Load, Result
from smbench.verdicts import Row
from smbench.worker import loadresult

DATA = Path(__file__).with_name("data") / "imports"
DETAILED = DATA / "vllm-serve-detailed.json"
LOAD = b"""num_prompts = [24]
input_len = [64]
output_len = [9]
request_rate = ["4"]
max_concurrency = [0]"""
SAME_LOAD = b"""num_prompts = [6]
input_len = [24]
output_len = [8]
request_rate = ["8"]
max_concurrency = [4]"""


def of_the_client(cell: Cell, profile: Profile) -> Result | None:
    """Our own run of the load that vLLM's client wrote its file of, by the worker's own reading of that file."""
    if cell.subject != "online":
        return fake.ok(cell, profile)
    answers = loadresult.read(DETAILED, 6)
    stored = loadresult.load(answers, "vllm bench serve 0.32.0", cell.cell_id, hashlib.sha256(b"").hexdigest())
    return fake.ok(cell, profile, load=Load.model_validate(stored))


@pytest.fixture(name="ours")
def our_run(tmp_path: Path) -> Path:
    assert LOAD in fake.RECIPE
    text = fake.RECIPE.replace(LOAD, SAME_LOAD)
    return fake.build(tmp_path / "ours", "cpu", of_the_client, [fake.CPU], text)


def imported(tmp_path: Path, *files: Path, name: str = "theirs", **told: Any) -> Path:
    path = tmp_path / f"{name}.import.json"
    imports.write(imports.make(files, name, **told), path)
    return path


def against(*arguments: object) -> Comparison:
    a, b = sides.load([str(argument) for argument in arguments], {})
    return compare(a, b)


def rows(found: Comparison, provider: str | None = None) -> Mapping[str, Row]:
    return {row.measurement: row for row in found.rows if provider in (None, row.cell.provider)}


def apart(found: Comparison) -> set[tuple[str, str, str]]:
    return {(entry.field, entry.a, entry.b) for entry in found.incomparable}


def test_the_file_of_our_own_client_has_our_numbers(tmp_path: Path, ours: Path) -> None:
    """The worker stores what the client wrote, and the importer reads it: two readings of one file, to a nanosecond."""
    theirs = imported(tmp_path, DETAILED, model="tiny-bf16", engine="vllm")
    for found in (against(ours, theirs), against(theirs, ours)):
        by_name = rows(found)
        assert by_name.keys() == {
            "ttft", "tpot", "itl", "e2e_latency", "duration", "request_throughput", "output_throughput",
            "total_token_throughput",
        }  # fmt: skip
        for name, row in by_name.items():
            assert row.ratio == pytest.approx(1.0, abs=1e-6), name
            assert row.a == pytest.approx(row.b, rel=1e-6), name
        assert {by_name[name].samples_a for name in ("ttft", "tpot", "e2e_latency")} == {6}
        assert by_name["itl"].samples_a == by_name["itl"].samples_b == 42
        # of samples there is an interval, of a single figure there is none
        assert by_name["ttft"].ci_low is not None
        assert (by_name["duration"].ci_low, by_name["duration"].basis) == (None, "stated figures")
        assert by_name["duration"].verdict == "unclear"


def test_statistics_without_samples_are_shown_and_not_judged(tmp_path: Path, ours: Path) -> None:
    def only_statistics(values: dict[str, Any]) -> dict[str, Any]:
        lists = ("ttfts", "itls", "input_lens", "output_lens", "latencies", "errors")
        return {key: value for key, value in values.items() if key not in lists} | {"median_ttft_ms": 1e4}

    file = tmp_path / "summary.json"
    file.write_text(json.dumps(only_statistics(json.loads(DETAILED.read_text(encoding="utf-8")))), encoding="utf-8")
    found = against(ours, imported(tmp_path, file, model="tiny-bf16"))
    ttft = rows(found)["ttft"]
    # 500 times as long, and still nobody knows how far that number would move
    assert (ttft.verdict, ttft.ci_low, ttft.ci_high) == ("unclear", None, None)
    assert ttft.b == pytest.approx(10.0)
    assert ttft.ratio > 400
    assert found.slower_than(0.0) == []
    text = comparison.render([found])
    assert "| – |" in text
    assert "has no interval and no verdict" in text
    comparison.write([found], tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))["comparisons"][0]
    assert {"ci_low": None, "ci_high": None, "basis": "stated figures", "verdict": "unclear"}.items() <= next(
        cell for cell in stored["cells"] if cell["measurement"] == "ttft"
    ).items()


@pytest.mark.parametrize(
    ("told", "change", "expected"),
    [
        ({"model": "another"}, {}, ("model", "tiny-bf16", "another")),
        ({"model": "tiny-bf16"}, {"request_rate": "inf"}, ("request_rate", "8", "inf")),
        ({"model": "tiny-bf16"}, {"max_concurrency": None}, ("max_concurrency", "4", "0")),
        ({"model": "tiny-bf16"}, {"input_lens": [25] * 6}, ("input_len", "24", "25")),
        ({"model": "tiny-bf16", "axes": {"tensor_parallel": 2}}, {}, ("tensor_parallel", "1", "2")),
        ({"model": "tiny-bf16", "axes": {"dataset": "sharegpt"}}, {}, ("dataset", "random", "sharegpt")),
        ({"model": "tiny-bf16", "engine": "sglang"}, {}, ("engine", "vllm", "sglang")),
    ],
)
def test_another_workload_is_named_and_not_compared(
    tmp_path: Path, ours: Path, told: dict[str, Any], change: dict[str, Any], expected: tuple[str, str, str]
) -> None:
    file = tmp_path / "file.json"
    file.write_text(json.dumps(json.loads(DETAILED.read_text(encoding="utf-8")) | change), encoding="utf-8")
    theirs = imported(tmp_path, file, **told)
    back = against(theirs, ours)
    assert back.rows == []
    assert apart(back) == {(expected[0], expected[2], expected[1])}
    found = against(ours, theirs)
    assert found.rows == []
    assert apart(found) == {expected}
    assert f"| {expected[0]} |" in comparison.render([found])


def test_what_counts_otherwise_is_named_and_not_compared(tmp_path: Path) -> None:
    a = imported(tmp_path, DATA / "vllm-serve-detailed.json", name="vllm", model="m")
    file = tmp_path / "guidellm.json"
    text = (DATA / "guidellm.json").read_text(encoding="utf-8")
    file.write_text(text.replace('"max_concurrency": 2', '"max_concurrency": 4, "rate": 8'), encoding="utf-8")
    found = against(a, imported(tmp_path, file, name="guidellm", model="m"))
    assert rows(found).keys() == {"ttft", "tpot", "e2e_latency"}
    # a tool that counts in two ways is compared in both with itself
    own = against(tmp_path / "guidellm.import.json", tmp_path / "guidellm.import.json")
    assert {"tpot", "tpot, all tokens"} < rows(own).keys()
    assert (apart(own), {row.ratio for row in own.rows}) == (set(), {1.0})
    assert apart(found) == {
        ("definition of duration", "load", "window"),
        ("definition of request_throughput", "of the load", "rate over time"),
        ("definition of output_throughput", "of the load", "rate over time"),
        ("definition of total_token_throughput", "of the load", "rate over time"),
    }


def test_the_document_s_log_beside_our_static_batches(tmp_path: Path) -> None:
    ours = fake.build(tmp_path / "ours", "full", fake.on_eight_gpus)
    log = imported(tmp_path, DATA / "sglang-one-batch.log", model="qwen2.5-7b-bf16", axes={"tensor_parallel": 8})
    found = against(ours, log)
    # the log is sglang's, so it stands beside no other engine of ours
    assert {row.cell.provider for row in found.rows} == {"sglang"}
    assert {(row.cell.axes["batch"], row.cell.axes["output_len"]) for row in found.rows} == {
        (4, 1), (4, 1024), (8, 1), (8, 1024),
    }  # fmt: skip
    at = [row for row in found.rows if (row.cell.axes["batch"], row.cell.axes["output_len"]) == (4, 1024)]
    numbers = {row.measurement: row.b for row in at}
    assert numbers == pytest.approx(
        {
            "prefill_latency": 3.58247447013855,
            "prefill_throughput": 1143.3438072320973,
            "decode_latency": 0.018887758255004883,
            "decode_throughput": 211.77738225975435,
            "e2e_latency": 22.969415187835693,
            "overall_throughput": 356.64817467091535,
        }
    )
    # ours by the same definitions: 4 prompts of 1024 tokens on eight GPUs
    own = {row.measurement: row.a for row in at}
    prefill, step = fake.PREFILL_S["sglang"] / 4, fake.STEP_S["sglang"] / 4
    assert own["overall_throughput"] == pytest.approx(4 * 2048 / (prefill + 1023 * step))
    assert {row.verdict for row in found.rows} == {"unclear"}


def test_the_log_that_we_write_of_our_static_batches_has_our_numbers(tmp_path: Path) -> None:
    ours = fake.build(tmp_path / "ours", "cpu", fake.on_a_processor, [fake.CPU])
    results = [result for result in runfolder.load(ours).results.values() if result.cell.provider == "vllm-cpu"]
    log = tmp_path / "log.jsonl"
    log.write_bytes(onebatch.dump(onebatch.lines(results, warmup=1)))
    # the form is sglang's, the engine is not, and its lines say everything else
    theirs = imports.make([log], "log")
    assert {(run.tool, run.engine, run.axes["tensor_parallel"]) for run in theirs.runs} == {
        ("sglang-one-batch", None, 1)
    }
    found = against(ours, imported(tmp_path, log, engine="vllm"))
    assert {row.cell.provider for row in found.rows} == {"vllm-cpu"}
    assert {row.measurement for row in found.rows} == {
        "prefill_latency", "prefill_throughput", "decode_latency", "decode_throughput", "e2e_latency",
        "overall_throughput",
    }  # fmt: skip
    assert all(row.ratio == pytest.approx(1.0) for row in found.rows)


def test_a_batch_s_wall_clock_is_not_the_sum_of_its_phases(tmp_path: Path) -> None:
    ours = fake.build(tmp_path / "ours", "cpu", fake.on_a_processor, [fake.CPU])
    axes = {"batch": 4, "input_len": 64, "output_len": 16}
    found = against(ours, imported(tmp_path, DATA / "vllm-latency.json", model="tiny-bf16", axes=axes))
    assert found.rows == []
    assert apart(found) == {("definition of e2e_latency", "sum of phases", "batch")}


def test_an_engine_that_shows_no_phases_is_not_put_beside_their_sum(tmp_path: Path) -> None:
    def without_phases(cell: Cell, profile: Profile) -> Result | None:
        batches = [
            batch.model_copy(update={"prefill_s": None, "step_s": ()})
            for batch in (fake.batches(cell) if cell.subject == "static_batch" else ())
        ]
        return fake.ok(cell, profile, **({"batches": batches, "step_clock": "none"} if batches else {}))

    ours = fake.build(tmp_path / "ours", "cpu", without_phases, [fake.CPU])
    log = tmp_path / "log.jsonl"
    line = {"run_name": "x, tiny-bf16, tp 1", "batch_size": 4, "input_len": 64, "output_len": 16}
    times = {"prefill_latency": 0.1, "prefill_throughput": 2560.0, "total_latency": 0.2, "overall_throughput": 1600.0}
    log.write_text(json.dumps(line | times), encoding="utf-8")
    for sides_ in ((ours, imported(tmp_path, log, engine="vllm")), (imported(tmp_path, log, engine="vllm"), ours)):
        found = against(*sides_)
        assert found.rows == []
        assert {entry.field for entry in found.incomparable} == {"definition of e2e_latency"}


def test_failed_requests_leave_no_number(tmp_path: Path, ours: Path) -> None:
    found = against(ours, imported(tmp_path, DATA / "vllm-serve-all-failed.json", model="tiny-bf16", engine="vllm"))
    assert found.rows == []
    (lost,) = found.one_sided
    assert (lost.a, lost.b, lost.reason) == ("ok", "incorrect", "6 of 6 requests failed")


def test_repeats_of_one_load_are_repeats(tmp_path: Path) -> None:
    files = []
    for i in range(3):
        values = json.loads(DETAILED.read_text(encoding="utf-8")) | {"duration": 0.8 + 0.01 * i}
        files.append(tmp_path / f"{i}.json")
        files[-1].write_text(json.dumps(values), encoding="utf-8")
    repeated = imported(tmp_path, *files, name="repeats", model="tiny-bf16")
    found = against(repeated, repeated)
    assert {row.runs_a for row in found.rows} == {3}
    assert (found.a.runs, found.b.runs) == (3, 3)
    # with repeats a single figure of each has an interval
    assert rows(found)["duration"].basis == "restarts"


def test_two_workloads_that_could_be_meant_are_refused(tmp_path: Path) -> None:
    def on_both(cell: Cell, profile: Profile) -> Result | None:
        return fake.ok(cell, profile)

    two = fake.build(tmp_path / "two", "cpu", on_both, [fake.CPU])
    axes = {"batch": 4, "input_len": 64, "output_len": 16}
    theirs = imported(tmp_path, DATA / "vllm-latency.json", model="tiny-bf16", axes=axes)
    values = json.loads(theirs.read_text(encoding="utf-8"))
    values["runs"][0]["engine"] = None
    theirs.write_text(json.dumps(values), encoding="utf-8")
    # beside each of ours it may stand, but not both of ours beside it
    assert {row.field for row in against(two, theirs).incomparable} == {"definition of e2e_latency"}
    with pytest.raises(
        UsageError, match=r"both static_batch/transformers .* and static_batch/vllm-cpu .*\(--engine, --axis"
    ):
        against(theirs, two)


def test_what_a_user_says_has_to_fit(tmp_path: Path) -> None:
    def make(**told: Any) -> object:
        return imports.make([DETAILED], "x", **told)

    with pytest.raises(UsageError, match="--axis batch: online has no such axis; known: dtype, dataset, num_prompts"):
        make(axes={"batch": 4})
    with pytest.raises(UsageError, match=r"--axis input_len=25: vllm-serve-detailed.json says 24"):
        make(axes={"input_len": 25})
    with pytest.raises(UsageError, match="--axis: tensor_parallel = 0 is no integer"):
        make(axes={"tensor_parallel": 0})
    with pytest.raises(UsageError, match=r"--engine vllm: sglang-one-batch.log says sglang"):
        imports.make([DATA / "sglang-one-batch.log"], "x", engine="vllm")
    run = imports.make([DETAILED], "x", model="org/Real-7B").runs[0]
    assert (run.model, run.notes[-1]) == ("org/Real-7B", "the file calls the model tiny-llama")


def test_an_import_file_reads_again_and_a_damaged_one_is_refused(tmp_path: Path, ours: Path) -> None:
    path = imported(tmp_path, *sorted(DATA.glob("vllm-*.json")), device="A card")
    assert imports.load(path) == imports.make(sorted(DATA.glob("vllm-*.json")), "theirs", device="A card")
    assert imports.is_import(path)
    assert not imports.is_import(DETAILED)
    assert not imports.is_import(tmp_path)
    (side,) = sides.load([str(path)], {})
    assert side.devices == {"A card"}
    text = path.read_text(encoding="utf-8")
    for damaged, message in (
        (text[:-20], "is not JSON"),
        (text.replace('"format": 1', '"format": 2'), "format 2 is newer than this smbench reads"),
        (text.replace('"label"', '"lable"'), "label: Field required; import again"),
        (text.replace('"metric": "ttft"', '"metric": "tttf"', 1), "unknown metric 'tttf'; known: duration"),
        (text.replace('"definition": "first token"', '"definition": "x"', 1), "ttft has no definition 'x'; known"),
    ):
        path.write_text(damaged, encoding="utf-8")
        with pytest.raises(CorruptError, match=message):
            sides.load([str(ours), str(path)], {})


def test_an_import_is_no_run_and_no_partner_of_published_numbers(tmp_path: Path, ours: Path) -> None:
    path = imported(tmp_path, DETAILED)
    with pytest.raises(UsageError, match="is an import: it is a side of `smbench compare`, and no run"):
        sides.read(path)
    with pytest.raises(UsageError, match="an import and published numbers share no cell"):
        sides.load([str(path), "published:sglang-one-batch"], {})
    with pytest.raises(UsageError, match="--match is for published numbers"):
        sides.load([str(ours), str(path)], {"a": "b"})


def test_a_run_beside_a_run_is_as_ever_with_an_import_for_a_third(tmp_path: Path, ours: Path) -> None:
    theirs = imported(tmp_path, DETAILED, model="tiny-bf16", engine="vllm")
    a, again, third = sides.load([str(ours), str(ours), str(theirs)], {})
    assert compare(a, again).rows == against(ours, ours).rows
    assert len(compare(a, third).rows) == 8
    # operations have nothing that an import could have, and lose nothing
    kernels = fake_run.build(tmp_path / "lora", fake_run.RECIPE, "cpu", fake_run.on_a_processor, [fake_run.CPU])
    a, again, third = sides.load([str(kernels), str(kernels), str(theirs)], {})
    assert compare(a, again).rows == against(kernels, kernels).rows != []
    assert compare(a, third).rows == []


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command(tmp_path: Path, ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = command("import", DETAILED, "--model", "tiny-bf16", "--engine", "vllm", "--device", "A processor")
    assert done.exit_code == 0, done.output
    assert "# Import vllm-serve-detailed.json" in done.stdout
    assert "| itl | per chunk | \\*\\_itl_ms, itls | s | 42 | 0.00475768 | 0.00557643 | 0.0102525 |" in done.stdout
    path = tmp_path / "vllm-serve-detailed.import.json"
    assert path.is_file()
    compared = command("compare", ours, path, "--json")
    assert compared.exit_code == 0
    stored = json.loads(compared.stdout)["comparisons"][0]
    assert len(stored["cells"]) == 8
    assert stored["b"]["kind"] == "import"
    assert stored["b"]["devices"] == ["A processor"]
    silent = next(entry for entry in stored["environment"] if entry["fact"] == "import.unstated")
    assert silent["b"] == ["dtype, dataset, tensor_parallel, graphs"]
    batch = command(
        "import", DATA / "vllm-latency.json", "--axis", "batch=4", "--tensor-parallel", 2, "-o", "b.json", "--json"
    )
    assert json.loads(batch.stdout)["runs"][0]["axes"] == {"batch": 4, "tensor_parallel": 2}
    assert imports.is_import(tmp_path / "b.json")


def test_the_command_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.json").write_text("{}", encoding="utf-8")
    assert isinstance(command("import", "x.json").exception, CorruptError)
    assert isinstance(command("import", "none.json").exception, UsageError)
    assert command("import", DETAILED, "--axis", "batch").exit_code == 2
    assert command("import", DETAILED, "-o", DETAILED).exit_code == 2
    assert command("import", DETAILED, "-o", tmp_path / "no" / "such" / "place.json").exit_code != 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json"]


def test_foreign_strings_stay_words(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script> | [a](http://b) `c`"
    file = tmp_path / "a|b.json"
    values = json.loads(DETAILED.read_text(encoding="utf-8")) | {"model_id": hostile.replace("/", "")}
    file.write_text(json.dumps(values | {"label": hostile}), encoding="utf-8")
    path = imported(tmp_path, file, name=hostile.replace("/", ""))
    text = imports.render(imports.load(path)) + comparison.render([against(path, path)])
    assert "<script>" not in text
    assert not re.search(r"(?<!\\)\]\(", text)


def test_a_zero_among_the_samples_is_no_interval() -> None:
    """A tool that writes 0 for a request of one token must not make a logarithm of it."""
    from smbench.imported import Measure

    timings = alignment._timings(
        "online", [Measure(metric="tpot", definition="after first token", samples=(0.0, 0.2, 0.4))]
    )
    assert (timings["tpot"].runs, timings["tpot"].stated) == (((0.2,),), True)
    assert "tpot" not in alignment._timings(
        "online", [Measure(metric="tpot", definition="after first token", samples=(0.0, 0.0, 0.4))]
    )
