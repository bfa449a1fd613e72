"""What else one does with an extractor: change its mode, copy it, save it; and the import of featx itself."""

from __future__ import annotations

import copy
import functools
import os
import pickle
import subprocess
import sys
from typing import Any, Callable, Dict

import pytest
import torch
from torch import nn
from torchvision.models import get_model

from benchmarks.competitors import extractors
from benchmarks.turns import Turns

FLIPPED = {"resnet50": "fc", "densenet201": "classifier", "swin_t": "head"}
COPIED = {"mobilenet_v3_small": "classifier.3", "resnet18": "fc", "resnet50": "fc"}


def modules(name: str, last: str) -> Dict[str, nn.Module]:
    """The whole model, and extractors of its last node."""
    model = get_model(name, weights=None)
    return {"the model": model, **extractors(model, [last])}


@pytest.mark.parametrize("name", FLIPPED)
def test_mode_flips(name: str, turns: Turns) -> None:
    found = modules(name, FLIPPED[name])

    def flip(module: nn.Module) -> None:
        module.train()
        module.eval()

    for module in found.values():
        assert all(part.training for part in module.train().modules())
        assert not any(part.training for part in module.eval().modules())
    turns.take({key: functools.partial(flip, module) for key, module in found.items()}, to="the model", budget=3)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", COPIED)
def test_copies(name: str, how: str, turns: Turns) -> None:
    copies: Dict[str, Callable[[Any], Any]] = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    }
    last, x = COPIED[name], torch.rand(1, 3, 64, 64)
    found = {key: module.eval() for key, module in modules(name, last).items()}
    with torch.no_grad():
        for key in ("featx", "featx exact"):  # of torchvision's, a copy is in train mode, or has one mode only
            assert torch.equal(copies[how](found[key])(x)[last], found["the model"](x))
    calls = {key: functools.partial(copies[how], module) for key, module in found.items()}
    turns.take(calls, to="the model", collect=True)


IMPORT = """
import sys, time
{before}
start = time.perf_counter()
import {module}
print(time.perf_counter() - start)
assert "{module}" in sys.modules
"""


def test_import(turns: Turns) -> None:
    """In new processes, after torch, or what else there must be."""
    sources = {
        "featx, after torch": IMPORT.format(before="import torch", module="featx"),
        "torchvision's, after torch": IMPORT.format(
            before="import torch", module="torchvision.models.feature_extraction"
        ),
        "torch": IMPORT.format(before="", module="torch"),
    }
    rounds: Dict[str, list[float]] = {key: [] for key in sources}
    # As for anything that is installed, the bytecode is there from the first round on, which does not count.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def one_round() -> None:
        for key, source in sources.items():
            done = subprocess.run([sys.executable, "-c", source], check=True, capture_output=True, text=True, env=env)
            rounds[key].append(float(done.stdout))

    turns.benchmark.pedantic(one_round, rounds=4, warmup_rounds=1)
    turns.store_rounds({key: seconds[1:] for key, seconds in rounds.items()}, to="torch")
