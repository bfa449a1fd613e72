"""Listing names and creating extractors: time, and memory with an example. The floor: two bare traces, and the code."""

from __future__ import annotations

import gc
from typing import Any, Callable, Dict, List

import pytest
import torch
from torch import nn
from torchvision.models import feature_extraction as torchvision
from torchvision.models import get_model

import featx
from benchmarks.competitors import traces, traces_and_codes
from benchmarks.turns import Turns

# The last node of each of the four stages, as detectors and segmenters ask for them.
STAGES = {
    "resnet50": ["layer1", "layer2", "layer3", "layer4"],
    "densenet201": [f"features.denseblock{number}" for number in (1, 2, 3, 4)],
    "swin_t": [f"features.{number}" for number in (1, 3, 5, 7)],
    "swin_v2_b": [f"features.{number}" for number in (1, 3, 5, 7)],
    "maxvit_t": [f"blocks.{number}" for number in (0, 1, 2, 3)],
    "mvit_v2_s": [f"blocks.{number}" for number in (0, 2, 13, 15)],
}
# The last few blocks or stages of some models, as one asks for them in a U-Net or to compare representations.
BLOCKS = {
    "densenet201": [f"features.denseblock{number}" for number in (2, 3, 4)],
    "vit_b_16": [f"encoder.layers.encoder_layer_{number}" for number in (5, 11)],
    "maxvit_t": [f"blocks.{number}" for number in (1, 2, 3)],
    "convnext_base": [f"features.{number}" for number in (3, 5, 7)],
}
# With a batch of 8: what is asked for while memory is measured.
WITH_EXAMPLE = {"resnet50": STAGES["resnet50"], "vit_b_16": ["encoder.layers.encoder_layer_5"]}


class Functions(nn.Module):
    """Many functions in one scope."""

    def __init__(self, operations: int) -> None:
        super().__init__()
        self.operations = operations

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.operations):
            x = torch.relu(x)
        return x


def deep(operations: int) -> nn.Module:
    """One Sequential."""
    return nn.Sequential(*(nn.ReLU() for _ in range(operations)))


def nested(operations: int) -> nn.Module:
    """Containers of four containers of four ..."""
    modules = [nn.ReLU() for _ in range(operations)]
    while len(modules) > 1:
        modules = [nn.Sequential(*modules[at : at + 4]) for at in range(0, len(modules), 4)]
    return modules[0]


SHAPES: Dict[str, Callable[[int], nn.Module]] = {
    "deep Sequential": deep,
    "nested containers": nested,
    "functions in one scope": Functions,
}
SIZES = [250, 1000, 4000, 16000]


@pytest.mark.parametrize("name", STAGES)
def test_names(name: str, turns: Turns) -> None:
    model = get_model(name, weights=None)
    assert featx.get_graph_node_names(model) == torchvision.get_graph_node_names(model)
    competitors = {"two traces": lambda: traces(model), **listing(model)}
    turns.take(competitors, to="two traces", budget=3, least=5, collect=True)


@pytest.mark.parametrize("name", STAGES)
def test_create(name: str, turns: Turns, against: Any) -> None:
    compare_creation(name, STAGES[name], turns, against)


@pytest.mark.parametrize("name", BLOCKS)
def test_create_blocks(name: str, turns: Turns, against: Any) -> None:
    compare_creation(name, BLOCKS[name], turns, against)


def compare_creation(name: str, queries: List[str], turns: Turns, against: Any) -> None:
    model = get_model(name, weights=None)
    competitors = {"two traces and codes": lambda: traces_and_codes(model), **creating(model, queries)}
    if against is not None:
        competitors[against.__name__] = lambda: against.create_feature_extractor(model, queries)
    ours, theirs = (competitors[library]() for library in ("featx", "torchvision"))
    assert set(dict(ours.named_parameters())) == set(dict(theirs.named_parameters()))
    turns.take(competitors, to="two traces and codes", budget=3, least=5, collect=True)


@pytest.mark.parametrize("name", WITH_EXAMPLE)
def test_memory_with_an_example(name: str, turns: Turns) -> None:
    model, x = get_model(name, weights=None).eval(), torch.rand(8, 3, 224, 224)

    @torch.no_grad()
    def eager() -> None:
        model(x)

    def create() -> None:
        featx.create_feature_extractor(model, WITH_EXAMPLE[name], example_inputs=(x,))
        gc.collect()  # a module of torch.fx has cycles

    calls = {"eager": eager, "featx": create}
    found = {key: turns.memory(call) for key, call in calls.items()}
    turns.take(calls, to="eager", budget=1, model=name)
    peaks = {key: peak / 2**20 for key, (peak, _) in found.items()}
    left = {key: after / 2**20 for key, (_, after) in found.items()}
    turns.store(**{"MiB at most": peaks, "MiB left": left})


@pytest.mark.parametrize("operations", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_growth_of_names(shape: str, operations: int, turns: Turns) -> None:
    model = SHAPES[shape](operations)
    names = featx.get_graph_node_names(model).eval
    assert len(set(names)) == operations + 1
    competitors = {"two traces": lambda: traces(model), **listing(model)}
    if operations > most_for_torchvision(shape):
        del competitors["torchvision"]
    turns.take(competitors, to="two traces", budget=1, collect=True, operations=operations, shape=shape)


@pytest.mark.parametrize("operations", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_growth_of_creation(shape: str, operations: int, turns: Turns) -> None:
    model, x = SHAPES[shape](operations), torch.randn(3)
    last = featx.get_graph_node_names(model).eval[-1:]
    competitors = {"two traces and codes": lambda: traces_and_codes(model), **creating(model, last)}
    del competitors["featx exact"]
    if operations > most_for_torchvision(shape):
        del competitors["torchvision"]
    assert [torch.equal(value, x.relu()) for value in competitors["featx"]()(x).values()] == [True]
    turns.take(competitors, to="two traces and codes", budget=1, collect=True, operations=operations, shape=shape)


def most_for_torchvision(shape: str) -> int:
    """4,000 modules take it ten seconds, and each time that there are twice as many it takes four times as long."""
    return 4000 if shape == "functions in one scope" else 1000


def listing(model: nn.Module) -> Dict[str, Callable[[], Any]]:
    return {
        "featx": lambda: featx.get_graph_node_names(model),
        "torchvision": lambda: torchvision.get_graph_node_names(model),
    }


def creating(model: nn.Module, queries: List[str]) -> Dict[str, Callable[[], Any]]:
    return {
        "featx": lambda: featx.create_feature_extractor(model, queries),
        "featx exact": lambda: featx.create_feature_extractor(model, queries, exact=True),
        "torchvision": lambda: torchvision.create_feature_extractor(model, queries),
    }
