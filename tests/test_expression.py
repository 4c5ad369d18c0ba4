"""Formulas of data files compute, and can do nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smbench.expression import check, evaluate, names


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2 * layers + 1", 7.0),
        ("-layers ** 2", -9.0),
        ("ceil(8000 / 1024) * layers", 24.0),
        ("max(layers, 2, 5) // 2 % 2", 0.0),
        ("1 - (1 - 1 / layers) ** 2", 1 - (2 / 3) ** 2),
    ],
)
def test_arithmetic(text: str, value: float) -> None:
    assert evaluate(check(text), {"layers": 3}) == pytest.approx(value, rel=1e-15)


def test_names_are_those_that_need_a_number() -> None:
    assert names("max(batch, 2) * seq_len / batch") == {"batch", "seq_len"}


@pytest.mark.parametrize(
    "text",
    [
        *("a.b", "a[0]", "__import__('os')", "(lambda: 1)()", "1 if a else 2", "a < b", "f(1)"),
        *("max()", "max(*a)", "min(a, key=b)", "'text'", "True", "a := 1", "a; b", "", "1 2", "\0"),
        *("(" * 300 + "1" + ")" * 300, "1+" * 300 + "1", "1" * 400),
    ],
)
def test_whatever_is_no_arithmetic_is_refused_before_it_runs(text: str) -> None:
    with pytest.raises(ValueError):
        check(text)


@pytest.mark.parametrize("text", ["1 / 0", "9 ** 9 ** 9", "(-8) ** 0.5", "sqrt(-1)", "1e308 * 10", "min(1)", "1e400"])
def test_a_result_that_is_no_number_is_an_error(text: str) -> None:
    with pytest.raises(ValueError):
        evaluate(text, {})


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no number is known for bath; known: batch, rank"):
        evaluate("bath * 2", {"batch": 1, "rank": 16})


@given(st.text(alphabet="ab12+-*/%().,[]{}'\" _:=<>\\\n", max_size=40))
def test_no_text_does_anything_but_compute_or_be_refused(text: str) -> None:
    try:
        value = evaluate(text, {"a": 2.0, "b": 3.0})
    except ValueError:
        return
    assert isinstance(value, float)
