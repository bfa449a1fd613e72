"""Forward at full depth: featx, torchvision and the model itself."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torchvision.models import feature_extraction as torchvision
from torchvision.models import get_model

import featx
from benchmarks.ratios import ratio, take_turns

MODELS = ["resnet18", "densenet121", "shufflenet_v2_x0_5", "mobilenet_v3_small", "efficientnet_b0"]


@pytest.mark.parametrize("name", MODELS)
def test_forward(name: str, benchmark: Any, record_ratio: Any) -> None:
    torch.set_num_threads(1)
    model, x = get_model(name, weights=None).eval(), torch.rand(1, 3, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        last = featx.get_graph_node_names(model).eval[-1]
        ours = featx.create_feature_extractor(model, [last])
        theirs = torchvision.create_feature_extractor(model, [last])
    with torch.no_grad():
        assert torch.equal(ours(x)[last], model(x))
        assert torch.equal(theirs(x)[last], model(x))
        seconds = take_turns(
            {"eager": lambda: model(x), "featx": lambda: ours(x), "torchvision": lambda: theirs(x)}, 300
        )
        benchmark(ours, x)
    record_ratio(name, ratio(seconds, "featx", "eager"), ratio(seconds, "torchvision", "eager"))
