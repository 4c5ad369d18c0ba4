"""Arithmetic that a data file states: `batch * seq_len / block_size` over named numbers. Owns its syntax, no names.

Only numbers, names, `+ - * / // % **`, brackets and the functions below: a file can compute, and do nothing else.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Annotated

from pydantic import AfterValidator, StrictStr

LONGEST = 500
"""Characters of an expression: more is no formula that a person checks."""

BINARY: Mapping[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
FUNCTIONS: Mapping[str, Callable[..., float]] = {
    "min": min,
    "max": max,
    "ceil": math.ceil,
    "floor": math.floor,
    "sqrt": math.sqrt,
}

Compute = Callable[[Mapping[str, float]], float]


def check(text: str) -> str:
    """The same text. ValueError says what in it is no arithmetic."""
    _compiled(text)
    return text


Formula = Annotated[StrictStr, AfterValidator(check)]
"""An expression as a field of a file: a fault in it is found when the file is loaded."""


def names(text: str) -> frozenset[str]:
    """The names that an expression needs a number for."""
    return _compiled(text)[0]


def evaluate(text: str, numbers: Mapping[str, float]) -> float:
    """The value over named numbers.

    ValueError where a name has no number, or the result is no finite real number.
    """
    needed, compute = _compiled(text)
    if absent := sorted(needed - numbers.keys()):
        raise ValueError(f"{text!r}: no number is known for {', '.join(absent)}; known: {', '.join(sorted(numbers))}")
    try:
        value = compute(numbers)
    # a root of a negative number is complex to Python, and a complex number has no order
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ValueError(f"{text!r}: {error}") from error
    if not isinstance(value, float) or not math.isfinite(value):
        raise ValueError(f"{text!r}: the result is no finite number")
    return value


@lru_cache(maxsize=1024)
def _compiled(text: str) -> tuple[frozenset[str], Compute]:
    if len(text) > LONGEST:
        raise ValueError(f"an expression of {len(text)} characters; {LONGEST} are allowed")
    needed: set[str] = set()
    try:
        compute = _compute(ast.parse(text, mode="eval").body, needed)
    except (SyntaxError, RecursionError, MemoryError, OverflowError) as error:
        raise ValueError(f"{text!r} is no expression: {error}") from error
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from error
    return frozenset(needed), compute


def _compute(node: ast.expr, needed: set[str]) -> Compute:
    """The function that a node is, all of it in floats: a power of integers could be as large as the memory."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            constant = float(value)
            return lambda numbers: constant
        case ast.Name(id=name):
            needed.add(name)
            return lambda numbers: float(numbers[name])
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            inner = _compute(operand, needed)
            return lambda numbers: -inner(numbers)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
            apply, first, second = BINARY[type(op)], _compute(left, needed), _compute(right, needed)
            return lambda numbers: apply(first(numbers), second(numbers))
        case ast.Call(func=ast.Name(id=name), args=[_, *_] as args, keywords=[]) if name in FUNCTIONS:
            function, arguments = FUNCTIONS[name], [_compute(argument, needed) for argument in args]
            return lambda numbers: float(function(*(argument(numbers) for argument in arguments)))
    known = f"numbers, names, + - * / // % **, {', '.join(FUNCTIONS)}"
    raise ValueError(f"{ast.unparse(node)!r} is no arithmetic; known: {known}")
