"""Counts the models of five libraries that can be cut, and holds what comes out against eager execution.

``python -m benchmarks.bench_reach`` goes over all models; ``timm torchaudio/Conformer`` after it are those of a library
and a single one, and ``--save FILE`` writes what is printed. Models are in eval mode and have no trained weights. Each
has a process of its own, with limits of time and memory. What does not run at all is not counted.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import dataclasses
import itertools
import json
import logging
import multiprocessing
import os
import platform
import re
import resource
import textwrap
import time
import traceback
import warnings
from importlib import metadata
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Tuple

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import torch
from torch import fx, nn
from torchvision.models import feature_extraction

import featx
from benchmarks import plot, reach_models

AT_A_TIME = 2
SECONDS = 150
BYTES = 7 << 30
FEATURES = 8
Row = Dict[str, Any]
Tell = Callable[..., None]


class Library(NamedTuple):
    names: Callable[[], List[str]]
    candidates: Callable[[str], reach_models.Candidates]


LIBRARIES = {
    "torchvision": Library(reach_models.torchvision_names, reach_models.torchvision_candidates),
    "timm": Library(reach_models.timm_names, reach_models.timm_candidates),
    "segmentation_models_pytorch": Library(reach_models.segmentation_names, reach_models.segmentation_candidates),
    "torchaudio": Library(reach_models.torchaudio_names, reach_models.torchaudio_candidates),
    "transformers": Library(reach_models.transformers_names, reach_models.transformers_candidates),
}
# What else the extractor is called with: other values, two at a time, and larger or longer ones.
OTHERS = {"values": (1, 1, 0), "batch": (2, 2, 0), "size": (3, 1, 1)}


# ------------------------------------------------------------------------------------ one model


def examine(library: str, name: str, tell: Tell) -> None:
    """Tell what is found out about a model, step by step, since a later one may not come to an end."""
    torch.manual_seed(0)
    found = first_that_runs(LIBRARIES[library].candidates(name))
    if found is None:
        return
    model, inputs = found
    tell(runs=True, inputs=described(inputs(0, 1, 0)))
    with_example(model, inputs, tell)
    by_default = reason_of(lambda: featx.get_graph_node_names(model, suppress_diff_warning=True))
    tell(default=by_default)
    options = {"suppress_diff_warning": True, "auto_leaf": True}
    tell(auto_leaf=by_default and reason_of(lambda: featx.get_graph_node_names(model, **options)))
    # The last, since it leaves models that it cannot trace in train mode.
    tell(torchvision=reason_of(lambda: feature_extraction.get_graph_node_names(model, suppress_diff_warning=True)))


def with_example(model: nn.Module, inputs: reach_models.Inputs, tell: Tell) -> None:
    """Cut some modules' features out of a model, and compare them with eager execution."""
    example = inputs(0, 1, 0)
    expected = eager(model, example)
    queries = spread([path for path in expected if path != "output"], FEATURES)
    extractors: List[fx.GraphModule] = []

    def create() -> None:
        options = {"exact": True, "example_inputs": example, "suppress_diff_warning": True}
        extractors.append(featx.create_feature_extractor(model, None, [], [*queries, "output"], **options))

    before = time.perf_counter()
    tell(example=reason_of(create), seconds=round(time.perf_counter() - before, 1))
    for extractor in extractors:
        guards = sum(node.target is torch._assert for node in extractor.graph.nodes)
        tell(nodes=len(extractor.graph.nodes), guards=guards, features=len(queries))
        wrong = differing(call(extractor, example), expected)
        tell(equal=len(queries) - len({*queries} & {*wrong}))
        for kind, how in OTHERS.items():
            outcome = compared(model, extractor, inputs(*how))
            tell(**{kind: outcome})
            if outcome == "wrong":
                wrong.append(f"other inputs ({kind})")
        if differing(eager(model, example), expected):
            wrong.append("the model afterwards")
        tell(wrong=wrong)


def first_that_runs(candidates: reach_models.Candidates) -> Tuple[nn.Module, reach_models.Inputs] | None:
    for model, inputs in candidates:
        with contextlib.suppress(Exception):
            if tensors(call(model.eval(), inputs(0, 1, 0))):
                return model, inputs
    return None


def reason_of(attempt: Callable[[], Any]) -> str:
    """Why something fails, in a line; nothing if it does not."""
    try:
        attempt()
    except Exception as error:
        return shortened(getattr(error, "reason", "") or f"{type(error).__name__}: {error}")
    return ""


def shortened(text: str) -> str:
    """In a line, with paths that are the same everywhere."""
    return textwrap.shorten(re.sub(r"[^\s\"(]*/site-packages/", "", text), 120)


def eager(model: nn.Module, arguments: Any) -> Dict[str, List[torch.Tensor]]:
    """What modules return at their first call, in this order, and under "output" what the model returns.

    Where a module of the model is called "output", featx takes the query for that one, and so does this.
    """
    seen: Dict[str, List[torch.Tensor]] = {}

    def hook_of(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, value: Any) -> None:
            if path not in seen and tensors(value):
                seen[path] = clones(value)

        return hook

    with contextlib.ExitStack() as hooks:
        for path, module in watched(model):
            hooks.callback(module.register_forward_hook(hook_of(path)).remove)
        output = call(model, arguments)
    seen.setdefault("output", clones(output))
    return seen


def clones(value: Any) -> List[torch.Tensor]:
    return [tensor.clone() for tensor in tensors(value)]


def differing(values: Dict[str, Any], expected: Dict[str, Any]) -> List[str]:
    """The keys of values that are not those of eager execution, where they should be."""
    return [key for key in values if not same(values[key], expected.get(key))]


def watched(model: nn.Module) -> Iterator[Tuple[str, nn.Module]]:
    """The modules that can be features: not those inside of leaves.

    Nor torch's own with parts, which compute in another way where they have hooks (nn.MultiheadAttention).
    """
    inside: Tuple[str, ...] = ()
    for path, module in model.named_modules():
        if not path or path.startswith(inside):
            continue
        is_torchs = type(module).__module__.startswith(("torch.nn", "torch.ao")) and type(module) not in CONTAINERS
        is_operation = any(base.__module__.startswith("torchvision.ops") for base in type(module).__mro__)
        if is_torchs or is_operation:
            inside += (f"{path}.",)
        if not (is_torchs and any(module.children())):
            yield path, module


CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def spread(seen: Iterable[str], count: int) -> List[str]:
    """A number of paths, from the first to the last, at equal distances.

    >>> spread("abcdefg", 3)
    ['a', 'd', 'g']
    """
    paths = list(seen)
    last = len(paths) - 1
    return [paths[place * last // (count - 1)] for place in range(count)] if last >= count else paths


def compared(model: nn.Module, extractor: nn.Module, arguments: Any) -> str:
    """What becomes of other arguments; "wrong" is the only outcome that may not be."""
    outcomes: List[Any] = []
    for run, module in ((eager, model), (call, extractor)):
        try:
            outcomes.append(run(module, arguments))
        except Exception as error:
            outcomes.append(error)
    expected, actual = outcomes
    if isinstance(expected, Exception):
        return "eager raises, too" if isinstance(actual, Exception) else "eager alone raises"
    if isinstance(actual, AssertionError):
        return "refused"
    if isinstance(actual, Exception):
        return shortened(f"raises {type(actual).__name__}: {actual}")
    return "wrong" if differing(actual, expected) else "equal"


@torch.no_grad()
def call(module: nn.Module, arguments: Any) -> Any:
    """With copies of the arguments, which some models write into, and the same random numbers."""
    arguments = copy.deepcopy(arguments)
    torch.manual_seed(0)
    return module(**arguments) if isinstance(arguments, dict) else module(*arguments)


def tensors(value: Any) -> List[torch.Tensor]:
    """The tensors in a structure."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif dataclasses.is_dataclass(value):
        value = vars(value).values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [*itertools.chain.from_iterable(map(tensors, value))]


def same(a: Any, b: Any) -> bool:
    """Whether the tensors of both are equal, bit for bit, where not a number is equal to itself."""
    a, b = tensors(a), tensors(b)
    return len(a) == len(b) and all(map(is_equal, a, b))


def is_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return torch.equal(a, b) or (a.is_floating_point() and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))


def described(arguments: Any) -> str:
    """``"(1, 3, 64, 64)"``; by name ``"input_ids (1, 8)"``."""
    items = arguments.items() if isinstance(arguments, dict) else (("", item) for item in arguments)
    shapes = [f"{name} {[tuple(tensor.shape) for tensor in tensors(item)] or item}" for name, item in items]
    return ", ".join(shapes).replace("[(", "(").replace(")]", ")").strip()


# ----------------------------------------------------------------------------------- all models


def run(names: Iterable[Tuple[str, str]]) -> Iterator[Row]:
    """A row for each model, some at a time, each in a process of its own."""
    waiting = collections.deque(names)
    running: Dict[Any, Tuple[Any, float, Row]] = {}
    fork = multiprocessing.get_context("fork")  # so that the libraries are imported once
    while waiting or running:
        while waiting and len(running) < AT_A_TIME:
            library, name = waiting.popleft()
            reader, writer = fork.Pipe(duplex=False)
            process = fork.Process(target=in_a_process, args=(library, name, writer))
            process.start()
            writer.close()
            running[reader] = process, time.monotonic() + SECONDS, {"library": library, "name": name}
        ready = wait(list(running), timeout=1)
        for reader, (process, end, row) in list(running.items()):
            if reader in ready:
                with contextlib.suppress(EOFError):
                    row.update(reader.recv())
                    continue
            elif time.monotonic() < end:
                continue
            else:
                row["stopped"] = f"after {SECONDS} s"
                process.kill()
            process.join()
            if process.exitcode and "stopped" not in row:
                row["stopped"] = f"exit code {process.exitcode}"
            reader.close()
            del running[reader]
            yield row


def in_a_process(library: str, name: str, writer: Any) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    try:
        examine(library, name, lambda **found: writer.send(found))
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"
        writer.send({"stopped": shortened(text)})
    writer.close()


def chosen(patterns: Iterable[str]) -> Iterator[Tuple[str, str]]:
    """The models of libraries, or single ones; all if nothing is given.

    >>> list(chosen(["torchvision/resnet18"]))
    [('torchvision', 'resnet18')]
    """
    for library in LIBRARIES:
        asked = [pattern for pattern in patterns or LIBRARIES if pattern.split("/")[0] == library]
        for name in LIBRARIES[library].names() if asked else ():
            if {library, f"{library}/{name}", f"{library}/{name.split()[0]}"} & {*asked}:
                yield library, name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="LIBRARY or LIBRARY/MODEL")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    rows = []
    for row in run(chosen(options.models)):
        rows.append(row)
        print(json.dumps(row), flush=True)
    print(plot.reach(rows))
    if options.save:
        options.save.write_text(lines(rows), encoding="utf-8")


def lines(rows: List[Row]) -> str:
    """What was found as JSON, a model on a line; of those that do not run the names."""
    rows = sorted(rows, key=lambda row: (list(LIBRARIES).index(row["library"]), row["name"]))
    packages = ["torch", *LIBRARIES]
    versions = {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}
    not_run = [f"{row['library']}/{row['name']}" for row in rows if not row.get("runs")]
    ran = [json.dumps(row) for row in rows if row.get("runs")]
    head = json.dumps({"versions": versions, "not_run": not_run})
    return head[:-1] + ', "models": [\n' + ",\n".join(ran) + "\n]}\n"


if __name__ == "__main__":
    main()
