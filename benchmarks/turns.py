"""Lets competitors take turns within one process, and keeps what may be quoted: medians of ratios, and their spread."""

from __future__ import annotations

import dataclasses
import functools
import gc
import random
import statistics
import time
from typing import Any, Callable, Dict, Iterable, List, Tuple

import torch
from torch.profiler import ProfilerActivity, profile

Competitors = Dict[str, Callable[[], Any]]


@dataclasses.dataclass
class Turns:
    """Times competitors, on the device that the benchmarks run on.

    Args:
        benchmark: the fixture of pytest-benchmark, which runs and stores the rounds.
        device: ``"cpu"`` or ``"cuda"``; on the second, CUDA events before and after each call take the time.
    """

    benchmark: Any
    device: str

    def take(
        self, competitors: Competitors, to: str, budget: float = 4, least: int = 3, collect: bool = False, **facts: Any
    ) -> None:
        """Call each competitor once in each round, in random order, after a round that does not count.

        Args:
            competitors: what to time, by name.
            to: the name of the one that the others are compared with, in each round.
            budget: about as many seconds as the rounds shall take in all.
            least: at least as many rounds, however long they take; at most there are 200.
            collect: collect garbage before each call, and not in it, so that nobody pays for what another left.
            facts: what else is to be stored, such as parameters.
        """
        rounds: Dict[str, List[float]] = {name: [] for name in competitors}
        order = list(competitors)
        chance = random.Random(0)

        def one_round() -> None:
            chance.shuffle(order)
            for name in order:
                rounds[name].append(roomy(functools.partial(self._seconds, competitors[name], collect)))

        gc.collect()
        gc.freeze()  # what was there before is no garbage of theirs, and is not looked through again and again
        one_round()
        first = sum(seconds.pop() for seconds in rounds.values())
        self.benchmark.pedantic(one_round, rounds=max(least, min(200, int(budget / first))))
        gc.unfreeze()
        self.store_rounds(rounds, to)
        self.store(**facts)

    def store_rounds(self, rounds: Dict[str, List[float]], to: str) -> None:
        """Keep the seconds and the ratios of competitors that took turns."""
        self.store(
            to=to,
            rounds=len(rounds[to]),
            seconds={name: statistics.median(seconds) for name, seconds in rounds.items()},
            ratios={name: quartiles(a / b for a, b in zip(rounds[name], rounds[to])) for name in rounds},
        )

    def store(self, **facts: Any) -> None:
        """Keep facts beside the times."""
        self.benchmark.extra_info.update(facts)

    def _seconds(self, function: Callable[[], Any], collect: bool) -> float:
        if collect:
            gc.collect()
            gc.disable()  # as timeit does: when it runs depends on what everybody before has allocated
        seconds = on_a_gpu(function) if self.device == "cuda" else on_the_cpu(function)
        gc.enable()
        return seconds

    def memory(self, function: Callable[[], Any]) -> Tuple[int, int]:
        """The most bytes that are allocated at a time while the function runs, and those that it leaves.

        Both are beyond what was there before.
        """
        function()
        gc.collect()
        if self.device == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            function()
            return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            function()
        # The events of the allocator itself: bytes, negative when they are given back.
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        assert events, "the profiler records memory"
        peak = now = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            peak = max(peak, now)
        return peak, now

    def peak_memory(self, function: Callable[[], Any]) -> int:
        """The most bytes that are allocated at a time while the function runs."""
        return self.memory(function)[0]


def on_the_cpu(function: Callable[[], Any]) -> float:
    """How many seconds a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def on_a_gpu(function: Callable[[], Any]) -> float:
    """The same on a GPU that has nothing else to do, from before the call until all that it started is done."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def roomy(function: Callable[[], float]) -> float:
    """Call a function where there is memory for the frames of all calls of its own.

    From 3.11 on Python keeps frames in pieces of 16 KiB, and gets and gives back a piece for each call that
    goes over the end of one. A frame this large has a piece to itself, of which half is left.

    >>> roomy(lambda: 0.5)
    0.5
    """
    return function()


roomy.__code__ = roomy.__code__.replace(co_stacksize=2**18 + 1)  # places of 8 bytes: 2 of 4 MiB


def quartiles(values: Iterable[float]) -> Tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile.

    >>> quartiles([3, 1, 2])
    (1.5, 2.0, 2.5)
    """
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
