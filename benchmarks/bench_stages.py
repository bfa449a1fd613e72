"""Intermediate features: time, parameters and memory, for inference and for a training step."""

from __future__ import annotations

import functools
from typing import Any, Callable, Dict, List, Tuple

import pytest
import torch
from torch import nn
from torchvision.models import get_model
from torchvision.models._utils import IntermediateLayerGetter

from benchmarks.competitors import Features, Hooks, extractors, resnet_by_hand, swin_by_hand, vit_by_hand
from benchmarks.turns import Turns

STAGES = ["layer1", "layer2", "layer3", "layer4"]
TASKS: Dict[str, Tuple[str, Callable[..., Any], List[str]]] = {
    "the stages of resnet50": ("resnet50", resnet_by_hand, STAGES),
    "the first block of vit_b_16": ("vit_b_16", vit_by_hand, ["encoder.layers.encoder_layer_0"]),
    "the middle block of vit_b_16": ("vit_b_16", vit_by_hand, ["encoder.layers.encoder_layer_5"]),
    "the last block of vit_b_16": ("vit_b_16", vit_by_hand, ["encoder.layers.encoder_layer_11"]),
    "the first block of swin_t": ("swin_t", swin_by_hand, ["features.1.0"]),
    "the middle block of swin_t": ("swin_t", swin_by_hand, ["features.5.2"]),
    "the last block of swin_t": ("swin_t", swin_by_hand, ["features.7.1"]),
}
BATCH = {"cpu": 1, "cuda": 32}  # what the tables show


def compared(model: nn.Module, by_hand: Callable[..., Any], paths: List[str]) -> Dict[str, Features]:
    """All ways to the same features; the getter knows children of the model only."""
    ways: Dict[str, Any] = {"by hand": functools.partial(by_hand, model, paths), **extractors(model, paths)}
    if all("." not in path for path in paths):
        ways["IntermediateLayerGetter"] = IntermediateLayerGetter(model, {path: path for path in paths})
    return {**ways, "hooks": Hooks(model, paths), "stopping hooks": Hooks(model, paths, stop=True)}


def millions(way: Any, model: nn.Module, x: torch.Tensor) -> float:
    """Parameters that a way to the features holds on to; those of the code by hand are the ones that it uses."""
    if isinstance(way, functools.partial):
        features = sum(value.sum() for value in way(x).values())
        found = torch.autograd.grad(features, list(model.parameters()), allow_unused=True)
        parameters = [parameter for parameter, gradient in zip(model.parameters(), found) if gradient is not None]
    else:
        parameters = list((way.model if isinstance(way, Hooks) else way).parameters())
    return sum(parameter.numel() for parameter in parameters) / 1e6


@pytest.mark.parametrize(("task", "batch"), [(task, batch) for batch in (1, 32) for task in TASKS])
def test_features(task: str, batch: int, turns: Turns, device: str, not_run: Callable[[str], Any]) -> None:
    if device == "cpu" and batch == 32:
        not_run("takes minutes on two cores; --device cuda runs it")
    name, by_hand, paths = TASKS[task]
    model = get_model(name, weights=None).eval().to(device)
    x = torch.rand(batch, 3, 224, 224, device=device)
    ways = {"eager, all of the model": model, **compared(model, by_hand, paths)}
    parameters = {key: millions(way, model, x) for key, way in ways.items()}
    assert parameters["featx"] == parameters["featx exact"] == parameters["by hand"]
    with torch.inference_mode():
        expected = ways["by hand"](x)
        for key, way in list(ways.items())[1:]:
            features = way(x)
            assert list(features) == list(expected), key
            assert all(torch.equal(features[path], expected[path]) for path in paths), key
        calls = {key: functools.partial(way, x) for key, way in ways.items()}
        peaks = {key: turns.peak_memory(call) / 2**20 for key, call in calls.items()}
        task += f", batch {batch}" if batch != BATCH[device] else ""
        turns.take(calls, to="by hand", budget=8 if device == "cpu" else 4, least=11, task=task, batch=batch)
    turns.store(**{"million parameters": parameters, "MiB at most": peaks})


def test_training_step(turns: Turns, device: str) -> None:
    model = get_model("resnet50", weights=None).train().to(device)
    x = torch.rand(2 * BATCH[device], 3, 64, 64, device=device)
    ways = compared(model, resnet_by_hand, STAGES)
    parameters = [parameter for name, parameter in model.named_parameters() if not name.startswith("fc")]

    def step(features: Features) -> Tuple[torch.Tensor, ...]:
        return torch.autograd.grad(sum(value.square().mean() for value in features(x).values()), parameters)

    expected = step(ways["by hand"])
    for key, way in ways.items():
        assert all(map(torch.equal, step(way), expected)), key
    calls = {key: functools.partial(step, way) for key, way in ways.items()}
    peaks = {key: turns.peak_memory(call) / 2**20 for key, call in calls.items()}
    turns.take(calls, to="by hand", budget=6, least=11, task="training step, the stages of resnet50")
    turns.store(**{"MiB at most": peaks})
