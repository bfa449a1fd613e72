"""Times functions that take turns, and reports medians of ratios."""

from __future__ import annotations

import gc
import statistics
import time
from typing import Any, Callable, Dict


def take_turns(functions: Dict[str, Callable[[], Any]], rounds: int, collect: bool = False) -> Dict[str, list[float]]:
    """Seconds of each function in each round, after a round that does not count.

    With ``collect``, garbage is collected before each call, so that nobody pays for the graphs of the one before.
    """
    seconds: Dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(rounds + 1):
        for name, function in functions.items():
            if collect:
                gc.collect()
            start = time.perf_counter()
            function()
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Dict[str, list[float]], of: str, to: str) -> str:
    """The median over the rounds of the ratio of two functions, with the quartiles."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(seconds[of], seconds[to])], n=4)
    return f"{of}/{to} {middle:.3f} ({low:.3f} to {high:.3f})"
