"""Files that are no result, cut off, or not what they seem: each is refused in words that say where and what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from import_files import DATA, FILES, edited
from smbench import importing
from smbench.errors import CorruptError, UsageError
from smbench.imported import ImportedRun


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "x.json: the file is empty"),
        (b"\n# a comment\n\n", "x.json: the file is empty"),
        (b"\xff\xfe{}", "x.json: not a text: byte 0 is not UTF-8"),
        (b"{}", r"x.json: 1 JSON object with the keys ; no known format; known: vllm bench serve .*guidellm"),
        (b'{"a": 1, "b": 2}', r"x.json: 1 JSON object with the keys a, b; no known format"),
        (b"[1, 2]", "x.json: a JSON list, and no tool"),
        (b'{"a": 1} 7', "x.json: object 2, line 1: 7 stands where a JSON object should"),
        (b'{"a": }', r"x.json: object 1, line 1: is not JSON: .*column 7"),
        (b"no table\nno object\n", "x.json: neither JSON objects nor a table with commas; it begins with no table no"),
        (b"name,time\na,1\n", "x.json: a table that begins with name,time; no known format"),
        (b"Metric,avg\nOthers,1\n", "x.json: a table of aiperf without any of Time to First Token"),
        (b'{"a": ' * 100_000, "x.json: object 1, line 1: is not JSON that can be read"),
        (b'{"a": ' + b"9" * 5000 + b"}", "x.json: object 1, line 1: is not JSON that can be read"),
    ],
)
def test_what_is_no_result_is_refused_in_words(data: bytes, message: str) -> None:
    with pytest.raises(CorruptError, match=message):
        importing.parse(data, "x.json")


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_off_is_refused_and_says_where(name: str) -> None:
    data = (DATA / name).read_bytes().rstrip()
    if name.endswith(".csv"):
        # a table cut off between two rows is a table; within its first it is none
        with pytest.raises(CorruptError):
            importing.parse(data[:10], name)
        return
    with pytest.raises(CorruptError, match=rf"{name}: object \d+, line \d+: .*\(line \d+, column \d+\)"):
        importing.parse(data[: len(data) - 5], name)
    with pytest.raises(CorruptError, match="cut off"):
        importing.parse(data[:-1], name)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("vllm-serve-detailed.json", {"duration": -1}, "duration: expected a number of at least 0, found -1"),
        ("vllm-serve-detailed.json", {"duration": True}, "duration: expected a number of at least 0, found True"),
        ("vllm-serve-detailed.json", {"completed": 5.5}, "completed: expected an integer"),
        ("vllm-serve-detailed.json", {"completed": 10**400}, "completed: expected a number"),
        ("vllm-serve-detailed.json", {"ttfts": [0.1]}, "ttfts: expected as many as itls"),
        ("vllm-serve-detailed.json", {"itls": 7}, "itls: expected a list of lists of numbers"),
        ("vllm-serve-detailed.json", {"errors": ["", ""]}, "errors: expected a list of 6 texts"),
        ("vllm-serve-detailed.json", {"completed": 5}, "output_lens: expected 5 requests without an error, not 6"),
        ("vllm-serve-detailed.json", {"model_id": 3}, "model_id: expected a text, found 3"),
        ("vllm-serve.json", {"latencies": [1.0]}, "latencies: expected one of each of 6 completed requests, not 1"),
        ("vllm-latency.json", {"latencies": []}, "latencies: expected at least one latency"),
        ("vllm-latency.json", {"percentiles": [1]}, "percentiles: expected a JSON object"),
        ("sglang-serving-details.jsonl", {"server_info": []}, "server_info: expected a JSON object"),
        ("aiperf-export.json", {"request_latency": {"unit": "weeks", "avg": 1}}, "unknown unit 'weeks'; known: ns"),
        ("aiperf-export.json", {"request_latency": {"unit": "ms"}}, "request_latency: avg: expected a statistic"),
        ("guidellm.json", {"metadata": {"version": 1}}, "report version 1 of guidellm; known: 2"),
        ("guidellm.json", {"benchmarks": []}, "a report of guidellm without a benchmark"),
    ],
)
def test_a_fault_names_file_key_and_what_was_found(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CorruptError, match=message) as caught:
        importing.parse(edited(name, lambda values: values.update(change)), name)
    assert str(caught.value).startswith(f"{name}:")


def test_a_file_of_two_tools_is_refused() -> None:
    text = (DATA / "vllm-serve.json").read_bytes() + b"\n" + (DATA / "sglang-serving.jsonl").read_bytes()
    with pytest.raises(CorruptError, match=r"object 1 is vllm bench serve .*, and object 2 is sglang bench_serving"):
        importing.parse(text, "x")


def test_what_is_no_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        importing.read(tmp_path / "none.json")
    with pytest.raises(UsageError, match="is no file; name the result file itself"):
        importing.read(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_file_with_anything_in_it_is_read_or_refused_in_one_line(data: st.DataObject) -> None:
    """Any value in place of any key of any real file, at any of the first two levels, and any cut of its bytes."""
    name = data.draw(
        st.sampled_from([name for name in FILES if name not in ("aiperf-export.csv", "sglang-one-batch.log")])
    )
    text = (DATA / name).read_text(encoding="utf-8")
    values = json.loads(text[text.index("{") :].splitlines()[-1] if name.endswith("jsonl") else text)
    place = values
    for _ in range(data.draw(st.integers(0, 3))):
        inner = [
            value for value in (place.values() if isinstance(place, dict) else place) if isinstance(value, dict | list)
        ]
        place = data.draw(st.sampled_from(inner)) if inner else place
    if isinstance(place, dict) and place:
        key = data.draw(st.sampled_from(sorted(place)))
        place[key] = data.draw(JSON)
    elif isinstance(place, list) and place:
        place[data.draw(st.integers(0, len(place) - 1))] = data.draw(JSON)
    written = json.dumps(values).encode("utf-8", "surrogatepass")
    for attempt in (written, written[: data.draw(st.integers(0, len(written)))]):
        try:
            for run in importing.parse(attempt, name):
                ImportedRun.model_validate_json(run.model_dump_json())
        except CorruptError as error:
            assert str(error).startswith(name)
            assert "\n" not in str(error)
            assert len(str(error)) < 700


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_in_words(data: bytes) -> None:
    with pytest.raises(CorruptError, match="x:"):
        importing.parse(data, "x")
