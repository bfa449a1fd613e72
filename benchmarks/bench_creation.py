"""Listing names and creating extractors: featx, torchvision and two bare traces."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from torch import fx
from torchvision.models import feature_extraction as torchvision
from torchvision.models import get_model

import featx
from benchmarks.ratios import ratio, take_turns


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", ["densenet201", "maxvit_t", "mvit_v2_s"])
def test_names(name: str, benchmark: Any, record_ratio: Any) -> None:
    model = get_model(name, weights=None)
    assert featx.get_graph_node_names(model) == torchvision.get_graph_node_names(model)
    functions = {
        "traces": lambda: [fx.Tracer().trace(model.train(mode)) for mode in (True, False)],
        "featx": lambda: featx.get_graph_node_names(model),
        "torchvision": lambda: torchvision.get_graph_node_names(model),
    }
    seconds = take_turns(functions, 7, collect=True)
    benchmark.pedantic(functions["featx"], rounds=3)
    record_ratio(f"names {name}", ratio(seconds, "featx", "traces"), ratio(seconds, "torchvision", "traces"))


@pytest.mark.parametrize("name", ["densenet201", "mvit_v2_s", "resnet50"])
def test_create(name: str, benchmark: Any, record_ratio: Any) -> None:
    model = get_model(name, weights=None)
    last = featx.get_graph_node_names(model).eval[-1]
    functions = {
        "featx": lambda: featx.create_feature_extractor(model, [last]),
        "torchvision": lambda: torchvision.create_feature_extractor(model, [last]),
    }
    ours, theirs = (set(function().state_dict()) for function in functions.values())
    assert ours == theirs
    seconds = take_turns(functions, 9, collect=True)
    benchmark.pedantic(functions["featx"], rounds=3)
    record_ratio(f"create {name}", ratio(seconds, "torchvision", "featx"))
