"""The document's record JSON: what it holds, and that files of its form are read."""

from __future__ import annotations

from pathlib import Path

import pytest

import fake_run
from smbench import records, report, runfolder
from smbench.errors import CorruptError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fake_run.build(tmp_path / "run", fake_run.RECIPE, "full", fake_run.every_status)


def test_one_file_for_each_family_length_and_measure(folder: Path) -> None:
    report.render(folder)
    assert sorted(path.name for path in (folder / "records").iterdir()) == [
        "record_bgmv_seqlen1_cold.json",
        "record_bgmv_seqlen1_document.json",
        "record_sgmv_seqlen128_cold.json",
        "record_sgmv_seqlen128_document.json",
    ]


def test_entries_are_the_medians_under_the_documents_keys(folder: Path) -> None:
    analysis = report.analysis_of(runfolder.load(folder))
    report.render(folder)
    read = records.load(folder / "records" / "record_bgmv_seqlen1_document.json")
    row = analysis.row(
        "bgmv_shrink", "vllm", seq_len=1, rank=16, num_loras=8, dtype="float16", hidden_size=4096, batch=8
    )
    assert row
    summary = row.summary("document")
    assert summary
    entry = next(entry for entry in read["vllm_bgmv_shrink"] if (entry.batchs, entry.hidden_size) == (8, 4096))
    assert entry.model_dump() == {
        "dur_ms": summary.median * 1e3,
        "batchs": 8,
        "hidden_size": 4096,
        "dtype": "torch.float16",
        "seed": 0,
    }


def test_cells_without_a_number_have_no_entry(folder: Path) -> None:
    report.render(folder)
    read = records.load(folder / "records" / "record_bgmv_seqlen1_cold.json")
    sizes = {(entry.hidden_size, entry.batchs) for entry in read["sglang_bgmv_shrink"]}
    assert sizes == {(128, 1), (128, 8), (4096, 1), (4096, 8)}
    # refuted by the selection guard
    assert 128 not in {entry.hidden_size for entry in read["smbench-tuned_bgmv_expand"]}


def test_the_documents_own_form_is_read(tmp_path: Path) -> None:
    path = tmp_path / "record_bgmv_lee_cudagraph.json"
    entry = '{"dur_ms": 0.00226, "batchs": 1, "hidden_size": 128, "dtype": "torch.float16", "seed": 0}'
    path.write_text(f'{{"jee_bgmv_shrink": [{entry}]}}')
    assert records.load(path)["jee_bgmv_shrink"][0].dur_ms == 0.00226


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('{"a": [{"dur_ms": NaN, "batchs": 1, "hidden_size": 1, "dtype": "x", "seed": 0}]}', "a.0.dur_ms"),
        ('{"a": [{"dur_ms": 1.0, "batch": 1, "hidden_size": 1, "dtype": "x", "seed": 0}]}', "a.0.batchs"),
        ("[1", "record.json"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, text: str, where: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(CorruptError, match=where):
        records.load(path)
