"""Comparing tokens and log-probabilities with the truth: what is right, what is close, what is wrong."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from smbench.worker.outputs import BOUND_NATS, MOST_FAULTS, Comparison

TRUTH = torch.log_softmax(torch.tensor([[4.0, 3.9, 0.0], [0.0, 1.0, 5.0]]), dim=-1)


def judged(tokens: Sequence[int], bound: float = 0.01) -> Comparison:
    found = Comparison(bound)
    found.judge(0, TRUTH, tokens)
    return found


def test_the_likeliest_tokens_are_right() -> None:
    record = judged([0, 2]).record("truth")
    assert record == {
        "passed": True,
        "reference": "truth",
        "tokens": 2,
        "equal_tokens": 2,
        "logprob_error": None,
        "logprob_bound": 0.01,
        "faults": [],
    }


def test_a_close_race_may_end_otherwise_within_twice_the_bound() -> None:
    assert judged([1, 2], bound=0.051).record("")["passed"]
    lost = judged([1, 2], bound=0.049).record("")
    assert (lost["passed"], lost["equal_tokens"]) == (False, 1)
    assert lost["faults"] == ["request 0, token 0: 1 is 0.1 nats less likely than 0"]


def test_log_probabilities_are_held_against_the_bound() -> None:
    found = judged([0, 2])
    found.judge_logprobs(0, TRUTH, [{0: float(TRUTH[0, 0]) + 0.009}, {2: float(TRUTH[1, 2])}])
    assert found.record("")["passed"]
    assert found.logprob_error == pytest.approx(0.009, abs=1e-6)
    found.judge_logprobs(1, TRUTH, [{0: float(TRUTH[0, 0]) - 0.02}])
    record = found.record("")
    assert not record["passed"]
    assert record["logprob_error"] == pytest.approx(0.02, abs=1e-6)
    assert record["faults"][0].startswith("request 1, token 0: log-probability of 0 is -0.")


def test_log_probabilities_that_are_no_numbers_are_wrong() -> None:
    found = judged([0, 2])
    found.judge_logprobs(0, TRUTH, [{0: float("nan")}])
    record = found.record("")
    assert not record["passed"]
    # no NaN goes into a record
    assert record["logprob_error"] is None


def test_nothing_generated_is_nothing_right() -> None:
    record = judged([]).record("")
    assert (record["passed"], record["faults"]) == (False, ["no token was generated"])


def test_a_few_faults_are_named() -> None:
    found = Comparison(BOUND_NATS["float32"])
    found.judge(0, TRUTH[1:].expand(50, 3), [0] * 50)
    record = found.record("")
    assert (record["tokens"], record["equal_tokens"], len(record["faults"])) == (50, 0, MOST_FAULTS)
