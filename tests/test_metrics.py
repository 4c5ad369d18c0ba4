"""The glossary: each metric is declared once, each name of a tool leads to it, and rates are what formulas say."""

from __future__ import annotations

import pytest

from smbench import importing, metricnames, metrics, rates, workloads
from smbench.errors import UsageError
from smbench.expression import evaluate
from smbench.metricnames import NAMES, TOOLS
from smbench.metrics import METRICS


def test_every_metric_has_a_direction_a_formula_and_our_definition() -> None:
    for name, metric in METRICS.items():
        assert metric.name == name
        assert metric.formula
        assert metric.way(metric.definition).formula
        ways = [way.name for way in metric.ways]
        assert len(set(ways)) == len(ways)
        # what is arithmetic is what an audit evaluates
        assert set(metric.definitions) == {way.name for way in metric.ways if way.expression}


def test_what_our_workloads_measure_is_declared_and_counted_as_declared() -> None:
    for workload, names in workloads.MEASURES.items():
        for name in names:
            METRICS[name].way(metrics.definition_of(workload, name))
    assert metrics.definition_of("online", "duration") == "load"
    assert metrics.definition_of("bgmv_shrink", "duration") == "call"
    assert metrics.definition_of("static_batch", "e2e_latency") == "sum of phases"
    with pytest.raises(KeyError, match="itl has no definition 'per word'; known: per chunk, per token"):
        METRICS["itl"].way("per word")


def test_every_name_of_a_tool_leads_to_a_metric_and_one_of_its_definitions() -> None:
    for name in NAMES:
        assert name.tool in TOOLS
        assert METRICS[name.metric].way(name.definition)
    keys = [(name.tool, name.metric, name.definition) for name in NAMES]
    assert len(set(keys)) == len(keys)
    assert all(metricnames.names_in(tool) for tool in TOOLS)
    with pytest.raises(KeyError, match="known: vllm-serve"):
        metricnames.names_in("ab")


def test_names_that_mislead_are_told_apart() -> None:
    # of a tool with several definitions, the first one is what it has as a rule
    by_own = {(name.tool, name.own): (name.metric, name.definition) for name in reversed(NAMES)}
    assert by_own["guidellm", "inter_token_latency_ms"] == ("tpot", "after first token")
    assert by_own["guidellm", "time_per_output_token_ms"] == ("tpot", "all tokens")
    assert by_own["aiperf", "inter_token_latency"] == ("tpot", "after first token")
    assert by_own["aiperf", "inter_chunk_latency"] == ("itl", "per chunk")
    assert by_own["lmdeploy-profile", "mean_tpot_ms"] == ("tpot", "after first chunk")
    itl = {name.definition for name in metricnames.names_of("itl") if name.tool == "sglang-serving"}
    assert itl == {"per chunk", "per token"}


def test_every_reader_is_of_a_tool_in_the_map() -> None:
    assert {form.TOOL for form in importing.FORMATS} <= TOOLS.keys()


def test_rates_of_a_batch_are_the_formulas_of_the_glossary() -> None:
    # the second record of document 004
    numbers = {"batch": 4, "input_len": 1024, "output_len": 1024, "e2e_latency": 22.969415187835693}
    times = {"prefill_latency": 3.58247447013855, "decode_latency": 0.018887758255004883}
    found = rates.batch_rates(4, 1024, 1024, times["prefill_latency"], times["decode_latency"], numbers["e2e_latency"])
    for metric, value in found.items():
        expression = METRICS[metric].definitions[metrics.definition_of("static_batch", metric)]
        assert value == pytest.approx(evaluate(expression, {**numbers, **times}))
    assert found["prefill_throughput"] == pytest.approx(1143.3438072320973)
    assert found["decode_throughput"] == pytest.approx(211.77738225975435)
    assert found["overall_throughput"] == pytest.approx(356.64817467091535)
    assert found["output_throughput"] == pytest.approx(356.64817467091535 / 2)
    assert rates.batch_rates(4, 1024, 1, None, None, 2.0).keys() == {"overall_throughput", "output_throughput"}


def test_rates_of_a_load() -> None:
    assert rates.load_rates(2.0, 6, 144, 48) == {
        "request_throughput": 3.0,
        "input_throughput": 72.0,
        "output_throughput": 24.0,
        "total_token_throughput": 96.0,
    }


def test_goodput_counts_requests_that_keep_every_limit() -> None:
    latencies = {"ttft": [0.1, 0.2, 0.3, 0.4], "tpot": [0.02, 0.01, 0.01, 0.05]}
    assert rates.goodput(2.0, latencies, {"ttft": 0.3}) == 1.5
    # the limit itself is kept
    assert rates.goodput(2.0, latencies, {"ttft": 0.3, "tpot": 0.01}) == 1.0
    with pytest.raises(UsageError, match="no limit 'itl'; known: ttft, tpot, e2e_latency"):
        rates.goodput(1.0, latencies, {"itl": 1.0})
    with pytest.raises(UsageError, match="needs a limit"):
        rates.goodput(1.0, latencies, {})
    with pytest.raises(UsageError, match="ttft: 4, tpot: 1"):
        rates.goodput(1.0, {**latencies, "tpot": [0.1]}, {"ttft": 1.0, "tpot": 1.0})
