"""Write the files of zoo/, or say how they differ from what featx gives here.

python -m tests.conformance.generate                     write all files
python -m tests.conformance.generate resnet18            write one
python -m tests.conformance.generate --check [MODEL …]   write nothing; exit 1 if something differs
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, List, Optional, Sequence

import torch
from torch import fx, nn
from torch.fx.node import _get_qualified_name

from tests import featx, nets
from tests.helpers import Snapshots, both_traced, ignored_warnings, tensors
from tests.nets import build_on_meta, zoo_input

ZOO = Path(__file__).parent / "zoo"
COLUMNS = ("name", "operation", "target", "shape")
SAME = "same as train"
NOT_HEADER = ("made_by", "count", "train", "eval")
MOST = 12  # lines for each mode of a model

Row = List[Any]


def versions() -> dict[str, str]:
    """What a file would be made by here."""
    import torchvision

    libraries = {"featx": featx, "torch": torch, "torchvision": torchvision}
    return {name: str(library.__version__).partition("+")[0] for name, library in libraries.items()}


def stored() -> list[str]:
    """The models that have a file."""
    return sorted(path.stem for path in ZOO.glob("*.json"))


def path_of(name: str) -> Path:
    return ZOO / f"{name}.json"


def load(name: str) -> dict[str, Any]:
    """A model's file as it is stored."""
    document: dict[str, Any] = json.loads(path_of(name).read_text(encoding="utf-8"))
    return document


def make(name: str) -> dict[str, Any]:
    """A model's file as featx makes it here; the model runs on the meta device, which computes shapes only."""
    x = zoo_input(name)
    model = build_on_meta(name).to("meta")
    with ignored_warnings(), both_traced(model) as tracers:  # what torchvision's models warn of is not about names
        train = rows(model.train(), tracers["train"], x)
        evaluation = train
        if code(tracers["eval"]) != code(tracers["train"]):  # the same calls give the same shapes
            evaluation = rows(model.eval(), tracers["eval"], x)
    return {
        "$schema": "../schemas/zoo.json",
        "format": 1,
        "description": f"The nodes of {name} in execution order, in both modes.",
        "made_by": versions(),
        "model": name,
        "input": {"shape": list(x.shape), "dtype": str(x.dtype).replace("torch.", "")},
        "count": {"train": len(train), "eval": len(evaluation)},
        "columns": list(COLUMNS),
        "train": train,
        "eval": SAME if evaluation == train else evaluation,
    }


def code(tracer: Any) -> str:
    """All that a graph calls, and with what."""
    return str(tracer.graph.python_code("self").src)


def rows(model: nn.Module, tracer: Any, x: torch.Tensor) -> list[Row]:
    """What is stored of each node that has a name."""
    interpreter = Snapshots(fx.GraphModule(model, tracer.graph))
    with torch.no_grad():
        interpreter.run(x.to("meta"))
    return [
        [name, node.op, target_name(node), shape(interpreter.seen[node.name])]
        for node, name in tracer.node_to_qualname.items()
    ]


def target_name(node: fx.Node) -> str:
    """A path, the name of an argument or of a method, or where a function is found."""
    return node.target if isinstance(node.target, str) else _get_qualified_name(node.target)


def shape(value: Any) -> Any:
    """The shape of a tensor, the shapes of those in a list or tuple, None for anything else.

    >>> shape(torch.ones(2, 3)), shape((torch.ones(2), [torch.tensor(1.0)])), shape(3), shape((2, 3))
    ([2, 3], [[2], [[]]], None, None)
    """
    if isinstance(value, torch.Tensor):
        return list(value.shape)
    if isinstance(value, (list, tuple)) and list(tensors(value)):
        return [shape(item) for item in value]
    return None


def text(document: dict[str, Any]) -> str:
    """JSON with one line for each entry of the header and one for each node."""

    def dump(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False)

    def entry(value: Any) -> str:
        if isinstance(value, list) and value and isinstance(value[0], list):
            return "[\n{}\n]".format(",\n".join(map(dump, value)))
        return dump(value)

    entries = (f"{dump(key)}: {entry(value)}" for key, value in document.items())
    return "\n".join(["{", ",\n".join(entries), "}\n"])


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """How a stored file differs from a new one; what made them does not count.

    >>> old = {"train": [["x", "placeholder", "x", [1]], ["fc", "call_module", "fc", [1, 2]]], "eval": SAME}
    >>> new = {"train": [["x", "placeholder", "x", [1]], ["fc", "call_module", "fc", [1, 3]]], "eval": SAME}
    >>> differences(old, new)
    ['train and eval: changed fc: shape [1, 2] -> [1, 3]']
    """
    changes = {mode: mode_differences(rows_of(old, mode), rows_of(new, mode)) for mode in ("train", "eval")}
    if changes["train"] == changes["eval"]:
        changes = {"train and eval": changes["train"]}
    lines = [f"{mode}: {line}" for mode, all_lines in changes.items() for line in shortened(all_lines)]
    headers = [{key: value for key, value in document.items() if key not in NOT_HEADER} for document in (old, new)]
    keys = [key for key in {**headers[0], **headers[1]} if headers[0].get(key) != headers[1].get(key)]
    return [*(f"{key}: {headers[0].get(key)} -> {headers[1].get(key)}" for key in keys), *lines]


def rows_of(document: dict[str, Any], mode: str) -> list[Row]:
    listed: list[Row] = document["train"] if document[mode] == SAME else document[mode]
    return listed


def mode_differences(old: list[Row], new: list[Row]) -> list[str]:
    """The nodes that were removed, added and changed, and where the order begins to differ."""
    before, after = ({row[0]: row for row in listed} for listed in (old, new))
    lines = [f"removed {described(row)}" for row in old if row[0] not in after]
    lines += [f"added {described(row)}" for row in new if row[0] not in before]
    for name in filter(after.get, before):
        parts = zip(COLUMNS, before[name], after[name])
        changed = [f"{column} {was} -> {now}" for column, was, now in parts if was != now]
        lines += [f"changed {name}: {', '.join(changed)}"] if changed else []
    orders = ([row[0] for row in listed if row[0] in before and row[0] in after] for listed in (old, new))
    moved = next((f"{now} now comes before {was}" for was, now in zip(*orders) if was != now), None)
    return [*lines, moved] if moved else lines


def described(row: Row) -> str:
    return "{} ({} {}, shape {})".format(*row)


def shortened(lines: list[str]) -> list[str]:
    return lines if len(lines) <= MOST else [*lines[:MOST], f"… and {len(lines) - MOST} more"]


def check(name: str) -> list[str]:
    """How the stored file of a model differs from what featx gives here."""
    if name not in nets.traceable():
        return ["there is a file, but torchvision has no such model that torch.fx can trace"]
    if name not in stored():
        return ["there is no file, but torchvision has this model"]
    try:
        new = make(name)
    except (featx.UntraceableError, RuntimeError) as error:  # some versions of torch cannot do all on the meta device
        return [f"here it cannot be traced and run: {first_line(error)}"]
    try:
        old = load(name)
        lines = differences(old, new)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return [f"the file is none that the generator writes: {first_line(error)}"]
    as_written = text({**new, "made_by": old.get("made_by")}) == path_of(name).read_text(encoding="utf-8")
    return lines or ([] if as_written else ["the nodes are the same, but the generator writes them otherwise"])


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def write(name: str) -> None:
    """Write the file of a model, or remove that of a model that is gone."""
    if name in nets.traceable():
        path_of(name).write_text(text(make(name)), encoding="utf-8")
    else:
        path_of(name).unlink()


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser("python -m tests.conformance.generate", description="Write the files of zoo/.")
    parser.add_argument("models", nargs="*", metavar="MODEL", help="only these; without any, all")
    parser.add_argument("--check", action="store_true", help="write nothing; say what differs, exit 1 if anything does")
    options = parser.parse_args(argv)
    try:
        known = sorted({*nets.traceable(), *stored()})
        unknown = [name for name in options.models if name not in known]
        if unknown:
            raise ValueError(f"no model that torch.fx can trace, nor a file: {', '.join(unknown)}")
        return write_or_check(options.models or known, options.check)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(first_line(error), file=sys.stderr)
        return 2


def write_or_check(names: Sequence[str], only_check: bool) -> int:
    """Write the files, or compare with them; 1 if any differs."""
    failed = False
    for name in names:
        if only_check:
            lines = check(name)
            print(f"{name}: {'differs' if lines else 'as stored'}", *lines, sep="\n  ", flush=True)
            failed = failed or bool(lines)
        else:
            write(name)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
