"""Write the files of zoo/, or say how they differ from what featx gives here.

Shapes are those of a run of the graph, what stays is read off extractors, and the rest is what featx knows of a node.

python -m tests.conformance.generate                     write all files
python -m tests.conformance.generate resnet18            write one
python -m tests.conformance.generate --check [MODEL …]   write nothing; exit 1 if something differs
"""

from __future__ import annotations

import argparse
import collections
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import fx, nn
from torch.fx.node import _get_qualified_name

from tests import featx, nets
from tests.conformance import port
from tests.helpers import (
    Snapshots,
    both_traced,
    extract_quietly,
    ignored_warnings,
    operations_of,
    prefixes,
    tensors,
    traced_already,
)
from tests.nets import build_on_meta, zoo_input

ZOO = Path(__file__).parent / "zoo"
COLUMNS = ("name", "operation", "target", "shape", "inputs", "writes", "views")
SAME = "same as train"
NOT_HEADER = ("made_by", "count", "train", "eval", "extractors")
MOST = 12  # lines for each mode of a model

Row = List[Any]


class Example(NamedTuple):
    """A model that traces by an example only: whose it is, and the code that makes both, without weights."""

    library: str
    code: Tuple[str, ...]


# Detectors return as many boxes as they find, which rounding decides: this one finds all that it may.
SSDLITE = "weights=None, weights_backbone=None, num_classes=3, score_thresh=0.0, topk_candidates=4, nms_thresh=1.0"
LLAMA = "num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, vocab_size=100, use_cache=False"
IMAGES = "example = (torch.rand(2, 3, 64, 64),)"
EXAMPLES = {
    "raft_small": Example(
        "torchvision",
        (
            "import torch, torchvision",
            "model = torchvision.models.get_model('raft_small', weights=None)",
            "example = (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128), 2)",
        ),
    ),
    "segmentation_fpn": Example(
        "segmentation_models_pytorch",
        (
            "import segmentation_models_pytorch, torch",
            "model = segmentation_models_pytorch.create_model('fpn', 'resnet18', encoder_weights=None)",
            IMAGES,
        ),
    ),
    "segmentation_unetplusplus": Example(
        "segmentation_models_pytorch",
        (
            "import segmentation_models_pytorch, torch",
            "model = segmentation_models_pytorch.create_model('unetplusplus', 'resnet18', encoder_weights=None)",
            IMAGES,
        ),
    ),
    "ssdlite320_mobilenet_v3_large": Example(
        "torchvision",
        (
            "import torch, torchvision",
            f"model = torchvision.models.get_model('ssdlite320_mobilenet_v3_large', {SSDLITE})",
            "example = ([torch.rand(3, 64, 64)],)",
        ),
    ),
    "timm_mvitv2": Example(
        "timm",
        (
            "import torch",
            "from timm.models import mvitv2",
            "model = mvitv2.MultiScaleVit(mvitv2.MultiScaleVitCfg(depths=(1, 1, 1, 1)), img_size=64)",
            IMAGES,
        ),
    ),
    "timm_naflexvit": Example(
        "timm",
        (
            "import torch",
            "from timm.models import naflexvit",
            "model = naflexvit.NaFlexVit(naflexvit.NaFlexVitCfg(embed_dim=64, depth=4, num_heads=4))",
            IMAGES,
        ),
    ),
    "torchaudio_conformer": Example(
        "torchaudio",
        (
            "import torch, torchaudio",
            "model = torchaudio.models.Conformer(80, 4, 64, 4, 7)",
            "example = (torch.rand(2, 24, 80), torch.tensor([24, 20]))",
        ),
    ),
    "torchaudio_conv_tasnet": Example(
        "torchaudio",
        (
            "import torch, torchaudio",
            "model = torchaudio.models.ConvTasNet(2, 16, 32, 3, 16, 32, 2, 2)",
            "example = (torch.rand(2, 1, 800),)",
        ),
    ),
    "transformers_llama": Example(
        "transformers",
        (
            "import torch, transformers",
            f"config = transformers.LlamaConfig(hidden_size=64, num_hidden_layers=4, {LLAMA})",
            "model = transformers.LlamaModel(config)",
            "example = {'input_ids': torch.randint(5, 90, (2, 8))}",
        ),
    ),
    "transformers_vit": Example(
        "transformers",
        (
            "import torch, transformers",
            "sizes = {'hidden_size': 64, 'intermediate_size': 64, 'image_size': 64}",
            "config = transformers.ViTConfig(num_hidden_layers=4, num_attention_heads=4, **sizes)",
            "model = transformers.ViTModel(config)",
            IMAGES,
        ),
    ),
}


def library_of(name: str) -> str:
    """The library that a model comes from."""
    return EXAMPLES[name].library if name in EXAMPLES else "torchvision"


def versions(library: str = "torchvision") -> dict[str, str]:
    """What a file of a model of a library would be made by here."""
    with ignored_warnings():
        found = {"featx": featx, "torch": torch, library: importlib.import_module(library)}
    return {name: str(module.__version__).partition("+")[0] for name, module in found.items()}


def is_here(name: str) -> bool:
    """Whether the library of a model is installed."""
    return importlib.util.find_spec(library_of(name)) is not None


def models() -> list[str]:
    """All models that have or should have a file, wherever they come from."""
    return sorted({*nets.traceable(), *EXAMPLES})


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
    """A model's file as featx makes it here."""
    model, example = build(name)
    x = None if example else zoo_input(name).to("meta")
    listed: Dict[str, List[Row]] = {}
    cuts: List[Dict[str, Any]] = []
    shapes: List[Any] = []
    # What torchvision's models warn of is not about names.
    with ignored_warnings(), both_traced(model, example) as tracers:
        for mode in ("train", "eval"):
            tracer = tracers[mode]
            if str(tracer.graph) != str(tracers["train"].graph) or not shapes:  # the same calls give the same shapes
                shapes = shapes_of(getattr(model, mode)(), tracer, x)
            listed[mode] = rows(tracer, mode, shapes)
            if listed[mode] != listed["train"] or mode == "train":
                cuts += [extractor(model, tracers, mode, query) for query in queries(tracer.names)]
    given = {"code": list(EXAMPLES[name].code)} if example else {"input": {"shape": list(x.shape), "dtype": "float32"}}
    return {
        "$schema": "../schemas/zoo.json",
        "format": 2,
        "description": f"The nodes of {name} in execution order, in both modes, and three cuts of them.",
        "made_by": versions(library_of(name)),
        "model": name,
        **given,
        "count": {mode: len(all_rows) for mode, all_rows in listed.items()},
        "columns": list(COLUMNS),
        "train": listed["train"],
        "eval": SAME if listed["eval"] == listed["train"] else listed["eval"],
        "extractors": cuts,
    }


def build(name: str) -> Tuple[nn.Module, Any]:
    """A model and, if it needs one, its example; else it is on the meta device, which computes shapes only."""
    if name not in EXAMPLES:
        return build_on_meta(name).to("meta"), None
    made: Dict[str, Any] = {}
    torch.manual_seed(0)
    with ignored_warnings():
        exec("\n".join(EXAMPLES[name].code), made)
    return made["model"].eval(), made["example"]


def shapes_of(model: nn.Module, tracer: Any, x: Optional[torch.Tensor]) -> List[Any]:
    """The shape of the value of each node that has a name."""
    if tracer.error:  # the mode cannot be traced, and has no nodes
        return []
    interpreter = Snapshots(fx.GraphModule(model, tracer.graph))
    arguments = [x] if tracer.example is None else list(tracer.given.values())
    with torch.no_grad():
        interpreter.run(*arguments)
    return [shape(interpreter.seen[node.name]) for node in tracer.node_to_qualname]


def rows(tracer: Any, mode: str, shapes: Iterable[Any]) -> list[Row]:
    """What is stored of each node that has a name."""
    places = {node: position for position, node in enumerate(tracer.node_to_qualname)}
    operations = operations_of(tracer, mode)
    check_unlisted(operations, places)
    listed = []
    for (node, name), of_value in zip(tracer.node_to_qualname.items(), shapes):
        inputs, writes, views, kind = operations[node]
        assert (kind == "assert") == (node.target is torch._assert), "what a reader takes for an assert"
        # State views where it was fetched first, and that may be here; nobody takes the value of an assert.
        others = [] if kind == "assert" else [other for other in views if other is not node]
        positions = [positions_of(nodes, places) for nodes in (inputs, writes, others)]
        listed.append([name, node.op, target_name(node), of_value, *positions])
    return listed


def positions_of(nodes: Iterable[fx.Node], places: Dict[fx.Node, int]) -> List[int]:
    return [places[node] for node in nodes if node in places]


def check_unlisted(operations: Dict[fx.Node, Any], places: Dict[fx.Node, int]) -> None:
    """See that what has no name can be left out: it takes nothing, and no node writes into memory that it shares."""
    number = {node: place for place, node in enumerate(operations)}
    memories = port.Memories(len(operations))
    for node, operation in operations.items():
        memories.join(number[node], [number[other] for other in operation.views])
    unlisted = {number[node] for node in operations if node not in places and node.op != "output"}
    for node, operation in operations.items():
        taken = [other for other in operation.inputs if number[other] in unlisted and other.all_input_nodes]
        written = [other for other in operation.writes if memories.of[number[other]] & unlisted]
        if node in places and taken or written:
            raise ValueError(f"{node} takes what is not listed, or writes into it: {taken + written}")


def queries(names: Sequence[str]) -> List[str]:
    """A first stage or block, a middle one, and the last node but one.

    A *part* is the shortest beginning of a name, up to a dot or its end, that at most a quarter of the names match. The
    first part that four names or more match, and that ends in the first half, is the first stage; where there is none,
    the part of the node at a quarter of all. The middle one is the part of the node at half of all.

    >>> queries(["x", "a.conv", *(f"b.{block}.{part}" for block in range(4) for part in range(5)), "flatten", "fc"])
    ['b.0', 'b.2', 'flatten']
    """
    sizes: Dict[str, int] = collections.Counter()
    ends = {}
    for place, name in enumerate(names):
        sizes.update(prefixes(name))
        ends.update(dict.fromkeys(prefixes(name), place))
    parts = []
    for name in names:
        small = (path for path in prefixes(name) if 4 * sizes[path] <= len(names))
        parts.append(next(small, name))
    stages = (part for part in parts if sizes[part] >= 4 and 2 * ends[part] < len(names))
    return [next(stages, parts[len(names) // 4]), parts[len(names) // 2], names[-2]] if names else []


def extractor(model: nn.Module, tracers: Dict[str, Any], mode: str, query: str) -> Dict[str, Any]:
    """What is stored of an extractor of one query in one mode."""
    asked = (None, [query], []) if mode == "train" else (None, [], [query])
    with traced_already(tracers):
        made = extract_quietly(model, *asked)
    places = {node.name: position for position, node in enumerate(tracers[mode].node_to_qualname)}
    *nodes, output = (made.train_graph if mode == "train" else made.eval_graph).nodes
    return {
        "mode": mode,
        "query": query,
        "position": places[output.args[0][query].name],
        "stays": [places[node.name] for node in nodes if node.name in places],
        "parameters": sum(parameter.numel() for parameter in made.parameters()),
    }


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
        if isinstance(value, list) and value and isinstance(value[0], (list, dict)):
            return "[\n{}\n]".format(",\n".join(map(dump, value)))
        return dump(value)

    entries = (f"{dump(key)}: {entry(value)}" for key, value in document.items())
    return "\n".join(["{", ",\n".join(entries), "}\n"])


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """How a stored file differs from a new one; what made them does not count.

    >>> x = ["x", "placeholder", "x", [1], [], [], []]
    >>> old, new = (
    ...     {"train": [x, ["fc", "call_module", "fc", [1, size], [0], [], []]], "eval": SAME, "extractors": []}
    ...     for size in (2, 3)
    ... )
    >>> differences(old, new)
    ['train and eval: changed fc: shape [1, 2] -> [1, 3]']
    """
    changes = {mode: mode_differences(rows_of(old, mode), rows_of(new, mode)) for mode in ("train", "eval")}
    if changes["train"] == changes["eval"]:
        changes = {"train and eval": changes["train"]}
    lines = [f"{mode}: {line}" for mode, all_lines in changes.items() for line in shortened(all_lines)]
    lines += shortened(cut_differences(old, new))
    headers = [{key: value for key, value in document.items() if key not in NOT_HEADER} for document in (old, new)]
    keys = [key for key in {**headers[0], **headers[1]} if headers[0].get(key) != headers[1].get(key)]
    return [*(f"{key}: {headers[0].get(key)} -> {headers[1].get(key)}" for key in keys), *lines]


def rows_of(document: dict[str, Any], mode: str) -> list[Row]:
    listed: list[Row] = document["train"] if document[mode] == SAME else document[mode]
    return listed


def by_name(listed: list[Row]) -> list[Row]:
    """Rows with names in place of positions, which change with each node that comes or goes."""
    named = []
    for row in listed:
        others = [listed_names(listed, positions) for positions in row[4:]]
        named.append([*row[:4], *others])
    return named


def listed_names(listed: list[Row], positions: Iterable[int]) -> list[str]:
    return [listed[position][0] for position in positions]


def cut_differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What the extractors of two files keep otherwise, by names."""
    before, after = cuts_of(old), cuts_of(new)
    lines = [f"removed the extractor of {which}" for which in before if which not in after]
    lines += [f"added the extractor of {which}" for which in after if which not in before]
    for which in filter(after.get, before):
        was, now = before[which], after[which]
        changed = [f"{part} {was[part]} -> {now[part]}" for part in ("node", "parameters") if was[part] != now[part]]
        for said, more, less in (("keeps", now, was), ("keeps no longer", was, now)):
            names = [name for name in more["stays"] if name not in less["stays"]]
            changed += [f"{said} {', '.join(names)}"] if names else []
        lines += [f"extractor of {which}: {', '.join(changed)}"] if changed else []
    return lines


def cuts_of(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Which extractor -> what it keeps, by names."""
    found = {}
    for cut in document["extractors"]:
        listed = rows_of(document, cut["mode"])
        (node,) = listed_names(listed, [cut["position"]])
        kept = {"node": node, "parameters": cut["parameters"], "stays": listed_names(listed, cut["stays"])}
        found[f"{cut['query']} in {cut['mode']} mode"] = kept
    return found


def mode_differences(old: list[Row], new: list[Row]) -> list[str]:
    """The nodes that were removed, added and changed, and where the order begins to differ."""
    old, new = by_name(old), by_name(new)
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
    if name not in models():
        return ["there is a file, but torchvision has no such model that torch.fx can trace"]
    if name not in stored():
        return [f"there is no file, but {library_of(name)} has this model"]
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
    if name in models():
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
        known = sorted({*models(), *stored()})
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
        if not is_here(name):
            print(f"{name}: left out, for {library_of(name)} is not here", flush=True)
        elif only_check:
            lines = check(name)
            print(f"{name}: {'differs' if lines else 'as stored'}", *lines, sep="\n  ", flush=True)
            failed = failed or bool(lines)
        else:
            write(name)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
