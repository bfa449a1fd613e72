"""featx.py is read in one sitting: whoever adds something takes something else out."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any, Callable, Dict, Tuple

import pytest

from tests import featx

SOURCE = Path(featx.__file__).read_text(encoding="utf-8")
LINES, TREE = SOURCE.splitlines(), ast.parse(SOURCE)
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]
TOP = [node for node in TREE.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]


def body(function: Any) -> int:
    """The lines of a function below its docstring, with comments and what is empty."""
    first = function.body[0]
    return function.end_lineno - (first.end_lineno if ast.get_docstring(function) else first.lineno - 1)


def command_line() -> int:
    """The lines from the section's heading to the end of the file."""
    (heading,) = (line for line in LINES if line.startswith("# ----") and line.endswith(" command line"))
    return len(LINES) - LINES.index(heading)


# What is measured -> the limit, and what gives it.
LIMITS: Dict[str, Tuple[int, Callable[[], int]]] = {
    "lines": (1_600, lambda: len(LINES)),
    "bytes": (75_000, lambda: len(SOURCE.encode())),
    "lines of the command line": (250, command_line),
    "lines of the longest body": (40, lambda: max(map(body, FUNCTIONS))),
    "functions and classes at the top": (75, lambda: len(TOP)),
}


@pytest.mark.parametrize("what", LIMITS)
def test_no_limit_is_passed(what: str) -> None:
    limit, measure = LIMITS[what]
    measured = measure()
    assert measured <= limit, f"{what}: {measured}, at most {limit}"


def test_bodies_are_measured_below_their_docstrings() -> None:
    source = 'def f():\n    """Two\n    lines."""\n    # why\n\n    return 1\ndef g(\n):\n    return 1'
    assert [body(function) for function in ast.parse(source).body] == [3, 1]
