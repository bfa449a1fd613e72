"""The benchmarks run, refuse what they cannot do, and the READMEs quote what they measured."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from benchmarks import plot
from tests.helpers import ROOT, parametrize, python

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = dict(plot.results())


def benchmark(*arguments: str) -> tuple[int, str]:
    pytest.importorskip("torchvision")
    options = ["--override-ini", "python_files=bench_*.py", "--benchmark-quiet"]
    alone = {name: value for name, value in os.environ.items() if "XDIST" not in name}  # not as a worker of xdist
    done = python("-m", "pytest", "benchmarks", *options, *arguments, env=alone)
    return done.returncode, done.stdout + done.stderr


def stored() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (ROOT / "benchmarks" / "results").iterdir()}


def test_a_part_runs_and_is_not_saved() -> None:
    before = stored()
    code, text = benchmark("-k", "test_growth and functions and 250", "--save")
    assert code == 0, text
    assert re.search(r"test_growth_of_names\[functions in one scope-250\], compared with two traces, \d+ rounds", text)
    assert re.search(r"^ +featx +\d\.\d{3} \(\d\.\d{3} to \d\.\d{3}\) +\d+\.\d\d ms$", text, re.MULTILINE)
    assert "not run: CUDA: --device cuda runs it on a machine with a GPU" in text
    assert stored() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_passes_on_one() -> None:
    code, text = benchmark("--device", "cuda")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "--device cuda: torch finds no GPU, so that nothing was run" in text
    assert "passed" not in text


@parametrize("name", RESULTS)
def test_results_say_what_was_measured(name: str) -> None:
    found = RESULTS[name]
    assert re.fullmatch(r"[0-9a-f]{40}", found["commit"]["id"])
    # A machine with a GPU gets the files, and not the history.
    assert found["commit"]["changed_since"] is (found["device"] == "cuda")
    assert {"processor", "cores", "python", "torch", "torchvision", "featx"} <= set(found["machine"])
    assert all(found["not_run"].values())
    assert found["benchmarks"]
    for row in found["benchmarks"]:
        assert row["rounds"] >= 3
        assert row["ratios"][row["to"]] == [1, 1, 1]
        assert set(row["ratios"]) == set(row["seconds"])
        for low, middle, high in row["ratios"].values():
            assert 0 < low <= middle <= high


def test_the_readmes_show_the_results() -> None:
    """The first README five rows of each machine, that of the benchmarks all rows and a plot."""
    assert RESULTS
    first_screens = "\n".join(README.splitlines()[:80])
    everything = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for name, found in RESULTS.items():
        short, full = plot.table(found, plot.SHORT), plot.table(found)
        assert full in everything, "python -m benchmarks.plot prints it"
        assert plot.title(found) in everything
        assert plot.title(found) in first_screens
        kinds = ["features", "forward"]
        if found["device"] == "cpu":
            assert short in first_screens, "python -m benchmarks.plot prints it"
            assert len(short.splitlines()) == 2 + len(plot.SHORT)
            assert set(short.splitlines()) < set(full.splitlines())
            kinds.append("growth")
        for kind in kinds:
            assert f"](plots/{kind}-{name}.svg)" in everything
            drawn = (ROOT / "benchmarks" / "plots" / f"{kind}-{name}.svg").read_text(encoding="utf-8")
            assert drawn.startswith("<?xml")


def test_every_machine_has_its_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(plot, "HERE", tmp_path)
    (tmp_path / "plots").mkdir()
    for name, found in RESULTS.items():
        plot.draw(name, found)
    drawn = {path.name for path in (tmp_path / "plots").iterdir()}
    assert drawn == {path.name for path in (ROOT / "benchmarks" / "plots").glob("*.svg")}
    computed = [found for found in RESULTS.values() if found["device"] == "cuda"]
    assert len(drawn) == 3 * len(RESULTS) - len(computed)  # tracing is not measured on a GPU


def test_cells_of_the_table() -> None:
    rows = [{"ratios": {"featx": [0.5, ratio, 9.0]}} for ratio in (0.9, 1.1, 1.0)]
    assert plot.cell(rows, "featx") == "1.00 (0.90 to 1.10)"
    assert plot.cell(rows[:1], "featx") == "0.90 (0.50 to 9.00)"
    assert plot.cell(rows, "torchvision") == ""
