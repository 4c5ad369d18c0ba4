"""Each rule of the audit finds what is planted for it, with its arithmetic; none finds anything in honest numbers."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clean_published import CARD, KINDS, honest
from smbench import audit
from smbench.arch import Device
from smbench.guards import Finding
from smbench.observations import of_published
from smbench.published import Published


def examine(data: dict[str, Any], device: Device | None = CARD) -> list[Finding]:
    return audit.examine(of_published("made up", Published.model_validate(data), device))


def the_finding(data: dict[str, Any], rule: str, device: Device | None = CARD) -> Finding:
    """The one finding of a file, which the rule made."""
    (finding,) = examine(data, device)
    assert finding.guard == rule
    assert finding.remedy
    return finding


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=15, deadline=None)
def test_honest_numbers_give_no_finding(kind: str, seed: int) -> None:
    assert examine(honest(kind, seed)) == []


def test_too_fast_a_request_is_refuted_with_its_arithmetic() -> None:
    data = honest("requests")
    data["table"][1]["rows"][1] = ["graphs", 9.0]
    finding = the_finding(data, "physics")
    assert finding.severity == "refuted"
    # 16 GB of weights and 16 G * 8 * 8000 operations on a card of 1 TB/s and 100 TFLOP/s; the L2 may hold 50 MB
    assert (
        "decoding: method=graphs: 9 s is impossible on Test card: at least 18.42 s = prefill 10.24 s "
        "(1024 TFLOP / 100 TFLOP/s) + 511 × decode step 16 ms (16 GB / 1 TB/s)"
    ) in finding.message


def test_an_inferred_device_refutes_nothing() -> None:
    data = honest("requests") | {"device_basis": "inferred"}
    data["table"][1]["rows"][1] = ["graphs", 9.0]
    severities = {finding.guard: finding.severity for finding in examine(data)}
    assert severities == {"physics": "warning", "unstated": "note"}


def test_a_bound_needs_the_peak_of_the_very_precision() -> None:
    data = honest("requests")
    data["table"][1]["rows"][1] = ["graphs", 9.0]
    data["work"][0]["accumulate"] = "float16"
    # 511 steps of 16 GB alone are less than 9 s, and the card's float16 peak is unknown
    assert examine(data) == []


def test_an_unknown_device_is_a_note() -> None:
    finding = the_finding(honest("requests"), "physics", None)
    assert (finding.severity, "held against no bound" in finding.message) == ("note", True)


def test_a_copied_column_is_found_with_its_chance() -> None:
    data = honest("requests")
    prefills, decoding = data["table"]
    decoding["rows"] = [[f"method {i}", row[2]] for i, row in enumerate(prefills["rows"][:4])]
    decoding |= {"effective": {}, "at": {**decoding["at"], "output_len": 16}}
    finding = the_finding(data, "copied")
    assert finding.severity == "warning"
    assert "4 numbers in a row" in finding.message
    assert re.search(r"36 places × \S+\^4 = \S+ such runs", finding.message)


def test_a_copy_that_chance_explains_is_not_called_one() -> None:
    data = honest("requests")
    prefills, decoding = data["table"]
    # one digit: the numbers of any two engines agree often
    for table in (prefills, decoding):
        for column in table["columns"]:
            column["digits"] = 0
    prefills["rows"] = [[chunk, 20, 20, 21] for chunk in (1024, 512, 256, 128)]
    prefills["rows"] += [[64, 22, 22, 22], [32, 24, 24, 24]]
    decoding["rows"] = [["eager", 50], ["graphs", 40], ["other kernel", 45]]
    assert "copied" not in {finding.guard for finding in examine(data)}


@given(seed=st.integers(0, 2**32))
@settings(max_examples=10, deadline=None)
def test_equal_systems_and_a_coarse_timer_are_no_copy(seed: int) -> None:
    """Two providers that are one kernel, timed in steps of 0.3 %: ties are common, and chance explains them."""
    rng = random.Random(seed)
    data = honest("kernels", seed)
    data["work"] = []
    for table in data["table"]:
        for i, row in enumerate(table["rows"]):
            value = 1.2 ** (i % 24)
            row[2:] = [round(value * (1 + rng.gauss(0, 0.002)) / 0.003 / value) * 0.003 * value for _ in range(2)]
    assert "copied" not in {finding.guard for finding in examine(data)}


def test_a_column_copied_in_place_is_found() -> None:
    data = honest("requests")
    for row in data["table"][0]["rows"]:
        row[2] = row[3]
    finding = the_finding(data, "copied")
    assert "6 numbers in a row" in finding.message


def test_two_labels_of_one_configuration_are_found() -> None:
    data = honest("requests")
    decoding = data["table"][1]
    decoding["rows"][2][1] = decoding["rows"][0][1]
    decoding["effective"]["other kernel"] = decoding["effective"]["eager"]
    finding = the_finding(data, "one_configuration")
    assert finding.severity == "warning"
    assert "'eager' and 'other kernel' are one configuration (mode=eager), and both read" in finding.message


def test_equal_numbers_of_labels_with_unknown_settings_are_a_note() -> None:
    data = honest("requests")
    decoding = data["table"][1]
    decoding["effective"] = {}
    decoding["rows"][2][1] = decoding["rows"][0][1]
    finding = the_finding(data, "one_configuration")
    assert (finding.severity, "by chance one expects" in finding.message) == ("note", True)


def ignore_cached(data: dict[str, Any]) -> None:
    for table in data["table"]:
        first: dict[int, float] = {}
        for row in table["rows"]:
            row[2] = first.setdefault(row[1], row[2])


def test_a_time_that_ignores_the_cached_tokens_is_refuted() -> None:
    data = honest("histories")
    for table in data["table"]:
        # slow enough for the largest total, so that no bound is broken
        table["rows"] = [[total, new, 10 * value] for total, new, value in sorted(table["rows"])]
    ignore_cached(data)
    data["work"][0]["phases"][0]["flops"] = "batch * 2e6 * (new * 200 + new * total)"
    found = [finding for finding in examine(data) if finding.guard == "sensitivity"]
    assert [finding.severity for finding in found] == ["refuted", "refuted"]
    assert "b1: the time does not depend on total: at new=" in found[0].message


def test_without_a_device_ignored_input_is_a_warning() -> None:
    data = honest("histories")
    ignore_cached(data)
    found = {finding.guard: finding.severity for finding in examine(data, None)}
    assert found == {"physics": "note", "sensitivity": "warning"}


def test_a_load_that_stays_below_the_limit_exercises_nothing() -> None:
    data = honest("histories")
    data["facts"]["users"] = 16
    finding = the_finding(data, "exercised")
    assert finding.severity == "warning"
    assert "users * 2048 = 32768 tokens does not exceed pool_tokens = 32768 tokens (it fills)" in finding.message


def test_a_false_claim_is_refuted_and_a_partly_false_one_is_a_warning() -> None:
    data = honest("histories")
    data["expectation"][0]["low"] = 200.0
    assert [(f.guard, f.severity) for f in examine(data)] == [("expectations", "refuted")] * 2
    data = honest("blocks")
    data["table"][1]["rows"][0][1] *= 1.5
    data["table"][1]["rows"][0][1] = round(data["table"][1]["rows"][0][1], 6)
    finding = the_finding(data, "expectations")
    assert (finding.severity, "fails at 1 of 12 points" in finding.message) == ("note", True)
    data["expectation"][0]["stated"] = True
    assert the_finding(data, "expectations").severity == "warning"


def test_a_wrong_definition_is_refuted_and_an_unstated_one_named() -> None:
    data = honest("log")
    overall = data["table"][0]["columns"][1]
    overall["definition"] = "output tokens"
    finding = the_finding(data, "conventions")
    assert finding.severity == "refuted"
    assert (
        "all 6 figures are input and output tokens = (input_len + output_len) * batch / e2e_latency" in finding.message
    )
    assert "the document says output tokens" in finding.message
    del overall["definition"]
    assert the_finding(data, "conventions").severity == "warning"


def test_a_rate_that_nothing_reproduces_is_found() -> None:
    data = honest("log")
    data["table"][0]["rows"][3][4] = 17.0
    finding = the_finding(data, "conventions")
    assert "no known definition reproduces all 6 figures" in finding.message


def test_what_changes_along_with_the_studied_axis_is_named() -> None:
    data = honest("blocks")
    data["quantity"][0]["formula"] = "pool_tokens * block * 256"
    finding = the_finding(data, "confounded")
    assert (
        "along block (1 to 32) not only block changes, but also pool: 16.78 MB to 536.9 MB at every point "
        "(beyond the 50 MB of l2 at 4, 8, 16, 32 only)"
    ) in finding.message


def test_missing_cells_are_counted_and_inapplicable_ones_are_not() -> None:
    data = honest("blocks")
    for row in data["table"][0]["rows"][:5]:
        row[2] = "blank"
    finding = the_finding(data, "missing")
    assert finding.message == "table, seq_len=1024: 5 of 6 cells have no number: left blank"


def test_parameters_tuned_for_another_problem_are_named() -> None:
    data = honest("kernels")
    data["tuned"][0]["at"] = {"rank": 64}
    finding = the_finding(data, "tuned")
    assert "192 of 192 numbers of config=tuned use parameters searched at rank=64" in finding.message


def test_a_setting_that_was_not_applied_everywhere_is_found() -> None:
    data = honest("kernels")
    default, tuned = data["table"]
    for one, other in zip(default["rows"], tuned["rows"], strict=True):
        if one[0] == 8:
            other[2] = one[2] * 1.001
    finding = the_finding(data, "effect")
    assert "config default and tuned do not differ in the median at batch 8, and do elsewhere" in finding.message


def test_rates_above_the_memorys_need_a_warm_cache() -> None:
    data = honest("kernels")
    data["protocol"]["l2"] = "warm"
    for table in data["table"]:
        table["rows"] = [[*row[:2], row[2] / 3, row[3]] if row[0] * row[1] < 10 else row for row in table["rows"]]
    found = {finding.guard: finding for finding in examine(data) if finding.guard != "shape"}
    assert set(found) == {"cache_rates"}
    assert found["cache_rates"].severity == "note"
    data["protocol"]["l2"] = "cold"
    assert {finding.severity for finding in examine(data) if finding.guard == "physics"} == {"refuted"}


def twice(data: dict[str, Any]) -> None:
    table = data["table"][0]
    rows = [[row[0], round(row[1] * 1.2, 6), row[2]] for row in table["rows"]]
    data["table"].append({**table, "title": "again", "rows": rows})


def stand_apart(data: dict[str, Any]) -> None:
    data["work"], data["expectation"] = [], []
    for i, row in enumerate(data["table"][0]["rows"]):
        row[1] = 3.0 if i == 2 else 1.0 + i / 100


def code_differs(data: dict[str, Any]) -> None:
    data["settings"] = [{**data["settings"][0], "found": {"layers": "63"}}]


def silent(data: dict[str, Any]) -> None:
    data["protocol"] = {**data["protocol"], "statistic": "unstated"}
    data["inferred"] = {"statistic": "mean"}


@pytest.mark.parametrize(
    ("kind", "plant", "rule", "severity", "said"),
    [
        ("blocks", twice, "agreement", "warning", "6 points stand in table and in again and differ by 20.0% to 20.0%"),
        (
            "blocks",
            stand_apart,
            "shape",
            "note",
            "1 of 12 numbers stand apart from others that agree; the farthest: table",
        ),
        ("log", code_differs, "settings", "warning", "layers is stated as 64, and 63 in the source's code"),
        ("log", silent, "unstated", "note", "the document does not state: statistic (inferred: mean)"),
    ],
)
def test_a_planted_oddity_is_the_only_finding(
    kind: str, plant: Callable[[dict[str, Any]], None], rule: str, severity: str, said: str
) -> None:
    data = honest(kind)
    # its own dictionaries: the head of all kinds is shared
    data["protocol"] = dict(data["protocol"])
    plant(data)
    finding = the_finding(data, rule)
    assert finding.severity == severity
    assert said in finding.message


def test_a_curve_that_turns_back_is_a_note() -> None:
    data = honest("kernels")
    data["work"] = []
    data["table"][0]["rows"][1][3] *= 0.4
    assert {(f.guard, f.severity) for f in examine(data)} == {("shape", "note")}
