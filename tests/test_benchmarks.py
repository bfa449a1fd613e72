"""The benchmarks run, refuse what they cannot do, and the READMEs quote what they measured."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import plot
from tests.helpers import ROOT, ignored_warnings, parametrize, python

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


def test_a_part_runs_and_is_saved_elsewhere_alone(tmp_path: Path) -> None:
    before = stored()
    code, text = benchmark("-k", "test_growth and functions and 250", "--save", "--save-to", str(tmp_path))
    assert code == 0, text
    assert re.search(r"test_growth_of_names\[functions in one scope-250\], compared with two traces, \d+ rounds", text)
    assert re.search(r"^ +featx +\d\.\d{3} \(\d\.\d{3} to \d\.\d{3}\) +\d+\.\d\d ms$", text, re.MULTILINE)
    assert "not run: CUDA: --device cuda runs it on a machine with a GPU" in text
    assert stored() == before
    (path,) = tmp_path.iterdir()
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert [row["benchmark"] for row in saved["benchmarks"]] == re.findall(r"^(test_\w+\[.*\]), compared", text, re.M)
    assert saved["not_run"]["all other benchmarks"].endswith("leaves them out")
    assert saved["commit"]["featx.py"] == git_name_of((ROOT / "featx.py").read_bytes())


def git_name_of(text: bytes) -> str:
    return hashlib.sha1(b"blob " + str(len(text)).encode() + b"\0" + text).hexdigest()


def test_a_part_that_began_too_late_is_left_out() -> None:
    code, text = benchmark("-k", "test_mode_flips", "--until", "0")
    assert code == 0, text
    assert re.search(r"not run: test_mode_flips\S*: --until 0: no time was left", text)
    assert "compared with" not in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_passes_on_one() -> None:
    code, text = benchmark("--device", "cuda")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "--device cuda: torch finds no GPU, so that nothing was run" in text
    assert "passed" not in text


@parametrize("name", RESULTS)
def test_results_say_what_was_measured(name: str) -> None:
    found = RESULTS[name]
    # A machine with a GPU gets the files, and not the history: then it is the file's own hash that tells.
    assert re.fullmatch(r"[0-9a-f]{40}", found["commit"].get("featx.py", found["commit"]["id"]))
    assert found["device"] == "cuda" or re.fullmatch(r"[0-9a-f]{40}", found["commit"]["id"])
    assert found["device"] == "cuda" or not found["commit"]["changed_since"]
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
    first_screens = "\n".join(README.splitlines()[:90])
    everything = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for name, found in RESULTS.items():
        short, full = plot.table(found, plot.SHORT), plot.table(found)
        assert full in everything, "python -m benchmarks.plot prints it"
        assert plot.memory(found) in everything
        assert plot.title(found) in everything
        assert plot.title(found) in first_screens
        kinds = ["features", "forward"]
        if found["device"] == "cuda":
            _, ratios = plot.in_words(found).split(": ")
            assert ratios in " ".join(first_screens.split()), "python -m benchmarks.plot prints it"
        if found["device"] == "cpu":
            assert short in first_screens, "python -m benchmarks.plot prints it"
            assert len(short.splitlines()) == 2 + len(plot.SHORT)
            assert set(short.splitlines()) < set(full.splitlines())
            kinds.append("growth")
        for kind in kinds:
            assert f"](plots/{kind}-{name}.svg)" in everything
            drawn = (ROOT / "benchmarks" / "plots" / f"{kind}-{name}.svg").read_text(encoding="utf-8")
            assert drawn.startswith("<?xml")


def test_every_machine_has_its_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, found in RESULTS.items():
        plot.draw(name, found, tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (ROOT / "benchmarks" / "plots").glob("*.svg")}
    computed = [found for found in RESULTS.values() if found["device"] == "cuda"]
    assert len(drawn) == 3 * len(RESULTS) - len(computed)  # tracing is not measured on a GPU


@parametrize("name", [name for name, found in RESULTS.items() if found["device"] == "cuda"])
def test_the_file_of_a_gpu_is_all_that_the_readmes_need(name: str, tmp_path: Path) -> None:
    """benchmarks/gpu.sh shows what it left as this does."""
    pytest.importorskip("matplotlib")
    shutil.copy(ROOT / "benchmarks" / "results" / f"{name}.json", tmp_path)
    done = python("-m", "benchmarks.plot", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert plot.in_words(RESULTS[name]) in done.stdout
    assert plot.table(RESULTS[name]) in done.stdout
    assert {path.stem for path in tmp_path.glob("*.svg")} == {f"{kind}-{name}" for kind in ("features", "forward")}


@parametrize(
    ("arguments", "error"),
    [
        (["--device", "tpu"], "--device is cpu or cuda, and not tpu"),
        (["--device"], "--device is cpu or cuda"),
        (["--fast"], "there is no option --fast"),
    ],
)
@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
def test_wrong_options_of_the_script_for_a_gpu(arguments: list[str], error: str) -> None:
    script = str(ROOT / "benchmarks" / "gpu.sh")
    done = subprocess.run(["bash", script, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"gpu.sh: {error}; benchmarks/gpu.sh [--device cpu] [--quick] [FOLDER]\n"


def test_words_of_a_part_without_the_rows_of_the_readme() -> None:
    assert plot.in_words({"benchmarks": []}) == "The rows of the first README were not run."


def test_cells_of_the_table() -> None:
    rows = [{"ratios": {"featx": [0.5, ratio, 9.0]}} for ratio in (0.9, 1.1, 1.0)]
    assert plot.cell(rows, "featx") == "1.00 (0.90 to 1.10)"
    assert plot.cell(rows[:1], "featx") == "0.90 (0.50 to 9.00)"
    assert plot.cell(rows, "torchvision") == ""


# --- reach ---


def bench_reach() -> Any:
    pytest.importorskip("torchvision")
    from benchmarks import bench_reach

    return bench_reach


def test_reach_counts_what_is_equal() -> None:
    bench_reach()
    done = python("-m", "benchmarks.bench_reach", "torchvision/resnet18")
    assert done.returncode == 0, done.stderr
    first, table = done.stdout.split("\n", 1)
    row = json.loads(first)
    assert row["features"] == row["equal"] == 8
    assert [row[key] for key in ("example", "default", "auto_leaf", "torchvision")] == [""] * 4
    assert [row[key] for key in ("values", "batch", "size", "wrong")] == ["equal", "equal", "equal", []]
    assert table == plot.reach([row]) + "\n"
    assert table.splitlines()[-1] == "| torchvision | 1 | 1 | 1 | 1 | 1 | 8 of 8 | 0 |"


class Asks(nn.Module):
    """Its features are those of its only module."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) if len(x) < 3 else self.layer(x) * 2


def inputs(seed: int, batch: int, more: int) -> Any:
    return (torch.rand(1 + batch, 4, generator=torch.Generator().manual_seed(seed)),)


def found(monkeypatch: pytest.MonkeyPatch, mend: Any = None) -> dict[str, Any]:
    """What is found out about a model, with extractors that something was done to."""
    bench = bench_reach()
    if mend:
        create = bench.featx.create_feature_extractor
        changed = lambda *args, **options: mend(create(*args, **options))  # noqa: E731
        monkeypatch.setattr(bench.featx, "create_feature_extractor", changed)
    row: dict[str, Any] = {}
    with ignored_warnings():
        bench.with_example(Asks().eval(), inputs, row.update)
    return row


def test_reach_tells_equal_from_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    row = found(monkeypatch)
    assert (row["example"], row["equal"], row["wrong"]) == ("", 1, [])
    assert (row["values"], row["batch"], row["size"]) == ("equal", "refused", "equal")
    assert row["guards"] == 1


def test_reach_notices_wrong_values(monkeypatch: pytest.MonkeyPatch) -> None:
    def mend(extractor: Any) -> Any:
        with torch.no_grad():
            extractor.layer = nn.Identity()
        return extractor

    assert found(monkeypatch, mend)["wrong"] == ["layer", "output", "other inputs (values)", "other inputs (size)"]


def test_outcomes_of_other_inputs() -> None:
    bench = bench_reach()
    model = Asks().eval()

    def raising(error: Exception) -> Any:
        def extractor(x: torch.Tensor) -> Any:
            raise error

        return extractor

    def one_way(x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"output": model.layer(x)}

    assert bench.compared(model, one_way, (torch.rand(2, 4),)) == "equal"
    assert bench.compared(model, one_way, (torch.rand(3, 4),)) == "wrong"
    assert bench.compared(model, raising(AssertionError()), (torch.rand(3, 4),)) == "refused"
    assert bench.compared(model, raising(ValueError("no")), (torch.rand(3, 4),)) == "raises ValueError: no"
    assert bench.compared(model, one_way, (torch.rand(2, 5),)) == "eager raises, too"
    assert bench.compared(model, lambda x: {}, (torch.rand(2, 5),)) == "eager alone raises"


def test_the_readme_shows_the_reach() -> None:
    rows = json.loads(plot.REACH.read_text(encoding="utf-8"))["models"]
    everything = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert plot.reach(rows) in everything, "python -m benchmarks.plot prints it"
    assert [row["name"] for row in rows if row.get("wrong")] == []
