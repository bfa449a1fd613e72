"""Draws benchmarks/plots from benchmarks/results, and prints the READMEs' tables: ``python -m benchmarks.plot``.

``python -m benchmarks.plot FOLDER`` does so for the results in a folder, and draws into it, where matplotlib is there.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
from pathlib import Path
from typing import Any, Collection, Dict, Iterable, Iterator, List, Tuple

HERE = Path(__file__).parent
REACH = HERE / "results" / "reach.json"
Row = Dict[str, Any]
# The same colour everywhere; grey is for what no extractor can be better than.
COLOURS = {
    "featx": "#0072b2",
    "featx exact": "#56b4e9",
    "torchvision": "#d55e00",
    "IntermediateLayerGetter": "#cc79a7",
    "hooks": "#e69f00",
    "stopping hooks": "#009e73",
}
FLOOR = "#888888"
# What the results call these, in words.
LABELS = {
    "hooks": "hooks, all of the model runs",
    "stopping hooks": "hooks, the last one ends the run",
}


def results(folder: Path = HERE / "results") -> Iterator[Tuple[str, Dict[str, Any]]]:
    """The results of each machine: ``(name of the file, what is in it)``."""
    for path in sorted(folder.glob("*.json")):
        if path != REACH:
            yield path.stem, json.loads(path.read_text(encoding="utf-8"))


def chosen(rows: Iterable[Row], benchmark: str, **facts: Any) -> List[Row]:
    """The results of a benchmark for which the facts are true."""
    return [
        row
        for row in rows
        if row["benchmark"].split("[")[0] == benchmark and all(row.get(key) == value for key, value in facts.items())
    ]


def title(found: Dict[str, Any]) -> str:
    """Which machine and which versions."""
    machine = found["machine"]
    cores = f", {machine['cores']} cores" * (found["device"] == "cpu")
    return f"{machine['processor']}{cores}, torch {machine['torch']}, torchvision {machine['torchvision']}"


# ------------------------------------------------------------------------------------- the tables

# The rows of the first README; that of the benchmarks has all.
SHORT = (
    "list the names of six models",
    "create extractors of the stages of six models",
    "run ten whole models, small inputs",
    "compute the first block of vit_b_16",
    "call `train()` and `eval()`",
)


def table(found: Dict[str, Any], only: Collection[str] = ()) -> str:
    """Medians of ratios as a table, with the quartiles; of several models the median and the extremes.

    Args:
        found: the results of one machine.
        only: the first cells of the rows that are wanted; if empty, all.
    """
    rows = found["benchmarks"]
    small = {"size": "small", "batch": 1}
    by_hand = "calling only the needed layers by hand"
    lines = [
        ("list the names of six models", "tracing each twice with torch.fx", chosen(rows, "test_names")),
        (
            "list 16,000 names, three models",
            "tracing each twice with torch.fx",
            chosen(rows, "test_growth_of_names", operations=16000),
        ),
        (
            "create extractors of the stages of six models",
            "tracing each twice and generating its code",
            chosen(rows, "test_create"),
        ),
        (
            "create extractors of some blocks of four models",
            "tracing each twice and generating its code",
            chosen(rows, "test_create_blocks"),
        ),
        ("run ten whole models, small inputs", "the model itself", chosen(rows, "test_forward", **small)),
        ("run whole models, compiled", "the model itself, compiled", chosen(rows, "test_compiled", **small)),
        *((f"compute {row['task']}", by_hand, [row]) for row in chosen(rows, "test_features")),
        *((f"run a {row['task']}", by_hand, [row]) for row in chosen(rows, "test_training_step")),
        ("call `train()` and `eval()`", "the same calls on the model", chosen(rows, "test_mode_flips")),
    ]
    columns = ["featx", "torchvision", "stopping hooks", "hooks"]
    headings = ["time to", "1.00 is the time of", *(LABELS.get(column, column) for column in columns)]
    text = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    for what, to, of in lines:
        if of and (not only or what in only):
            text.append(f"| {what} | {to} | " + " | ".join(cell(of, column) for column in columns) + " |")
    return "\n".join(text)


def in_words(found: Dict[str, Any]) -> str:
    """What the first README says of a GPU, where models compute and nothing is traced; of a CPU it has the table."""
    rows = found["benchmarks"]
    whole = chosen(rows, "test_forward", size="small", batch=1)
    block = chosen(rows, "test_features", task="the first block of vit_b_16")
    if not (whole and block):
        return "The rows of the first README were not run."
    ours, theirs = (
        " and ".join(cell(of, name).split(" ")[0] for of in (whole, block)) for name in ("featx", "torchvision")
    )
    return f"{title(found)}: the two rows that compute are {ours}, torchvision's {theirs}."


def cell(rows: List[Row], name: str) -> str:
    """``"0.97 (0.93 to 1.01)"``: of one result the quartiles, of several the extremes; nothing where it was not run."""
    ratios = [row["ratios"][name] for row in rows if name in row["ratios"]]
    if not ratios:
        return ""
    medians = [middle for _, middle, _ in ratios]
    low, high = (min(medians), max(medians)) if len(ratios) > 1 else (ratios[0][0], ratios[0][2])
    return f"{statistics.median(medians):.2f} ({low:.2f} to {high:.2f})"


def memory(found: Dict[str, Any]) -> str:
    """The most memory while an extractor is created with an example, as a table; nothing where it was not measured."""
    rows = chosen(found["benchmarks"], "test_memory_with_an_example")
    text = ["| model | one eager forward, MiB | creation, MiB | ratio | left afterwards, MiB |", "|---" * 5 + "|"]
    for row in rows:
        eager, creation = row["MiB at most"]["eager"], row["MiB at most"]["featx"]
        cells = f"{eager:.0f} | {creation:.0f} | {creation / eager:.2f} | {row['MiB left']['featx']:.0f}"
        text.append(f"| {row['model']} | {cells} |")
    return "\n".join(text) if rows else ""


# Column -> what a row of bench_reach says of tracing in this way; nothing if it worked.
WAYS = {
    "torchvision's function": "torchvision",
    "featx": "default",
    "`auto_leaf`": "auto_leaf",
    "`example_inputs`": "example",
}


def reach(rows: List[Row]) -> str:
    """How many models can be cut, as a table."""
    headings = ["models of", "models", *WAYS, "features equal", "silently wrong"]
    text = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    for library in dict.fromkeys(row["library"] for row in rows):
        ran = [row for row in rows if row["library"] == library and row.get("runs")]
        traced = [sum(row.get(way) == "" for row in ran) for way in WAYS.values()]
        equal, features = (sum(row.get(count, 0) for row in ran) for count in ("equal", "features"))
        wrong = sum(bool(row.get("wrong")) for row in ran)
        cells = [library, len(ran), *traced, f"{equal:,} of {features:,}", wrong]
        text.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(text)


# ----------------------------------------------------------------------------------------- drawing


def draw(name: str, found: Dict[str, Any], folder: Path) -> None:
    """The plots of one machine, into a folder."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "featx", "font.size": 9, "axes.spines.top": False})
    matplotlib.rcParams["axes.spines.right"] = False
    for plot in (forward, features, growth):
        figure = plot(found["benchmarks"])
        if figure is not None:
            figure.suptitle(title(found), fontsize=8)
            figure.savefig(folder / f"{plot.__name__}-{name}.svg", metadata={"Date": None}, bbox_inches="tight")


def forward(rows: List[Row]) -> Any:
    """Forward at full depth, small inputs, against eager."""
    shown = chosen(rows, "test_forward", size="small", batch=1)
    return _ratios(shown, "model", ["torchvision", "featx", "straight line"], "forward, as a multiple of eager's time")


def features(rows: List[Row]) -> Any:
    """Stages and blocks, against calling the needed layers by hand."""
    shown = chosen(rows, "test_features")
    ways = ["hooks", "torchvision", "IntermediateLayerGetter", "stopping hooks", "featx"]
    return _ratios(shown, "task", ways, "time, as a multiple of calling only the needed layers by hand", log=True)


def _ratios(rows: List[Row], fact: str, names: List[str], caption: str, log: bool = False) -> Any:
    from matplotlib.figure import Figure

    if not rows:
        return None
    figure = Figure(figsize=(7.5, 0.42 * len(rows) + 1))
    axes = figure.subplots()
    axes.axvline(1, color=FLOOR, linewidth=1)
    for offset, name in enumerate(names):
        places = [(at + 0.14 * (len(names) / 2 - offset), row) for at, row in enumerate(rows) if name in row["ratios"]]
        low, middle, high = zip(*(row["ratios"][name] for _, row in places))
        errors = [[b - a for a, b in zip(low, middle)], [c - b for b, c in zip(middle, high)]]
        colour = COLOURS.get(name, FLOOR)
        label = LABELS.get(name, name)
        axes.errorbar(middle, [at for at, _ in places], xerr=errors, fmt="o", color=colour, label=label, markersize=4)
    axes.set_yticks(range(len(rows)), [row[fact] for row in rows])
    axes.invert_yaxis()
    if log:
        axes.set_xscale("log")
        axes.set_xticks([1, 2, 5, 10], ["1", "2", "5", "10"])
        axes.minorticks_off()
    axes.set_xlabel(f"{caption} (medians and quartiles)")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def growth(rows: List[Row]) -> Any:
    """Seconds against operations, both on logarithmic scales."""
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(row["shape"] for row in chosen(rows, "test_growth_of_names")))
    if not shapes:
        return None
    figure = Figure(figsize=(8.5, 5))
    grid = figure.subplots(2, len(shapes), sharex=True, sharey=True, squeeze=False)
    for axes_of_row, benchmark, verb in zip(
        grid, ("test_growth_of_names", "test_growth_of_creation"), ("names", "creation")
    ):
        for axes, shape in zip(axes_of_row, shapes):
            for name in ("two traces", "two traces and codes", "torchvision", "featx"):
                shown = [row for row in chosen(rows, benchmark, shape=shape) if name in row["seconds"]]
                if shown:
                    x, y = zip(*((row["operations"], row["seconds"][name]) for row in shown))
                    axes.loglog(x, y, "o-", color=COLOURS.get(name, FLOOR), label=name, markersize=3, linewidth=1)
            axes.set_title(f"{verb}: {shape}", fontsize=8)
            axes.set_xlabel("operations" * (benchmark == "test_growth_of_creation"))
        axes_of_row[0].set_ylabel("seconds")
        axes_of_row[0].legend(frameon=False, fontsize=7)
    return figure


def show(results_folder: Path, plots_folder: Path) -> None:
    """Draw what was measured on each machine, and print it."""
    plots_folder.mkdir(exist_ok=True)
    for name, found in results(results_folder):
        if importlib.util.find_spec("matplotlib"):
            draw(name, found, plots_folder)
        else:
            print("no plots, since matplotlib is not there\n")
        print(f"{title(found)}\n\n{in_words(found)}\n\n{table(found, SHORT)}\n\n{table(found)}\n\n{memory(found)}\n")


def main() -> None:
    """Draw everything, and print the tables."""
    if sys.argv[1:]:
        show(Path(sys.argv[1]), Path(sys.argv[1]))
        return
    show(HERE / "results", HERE / "plots")
    print(reach(json.loads(REACH.read_text(encoding="utf-8"))["models"]))


if __name__ == "__main__":
    main()
