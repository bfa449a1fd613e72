"""The first block of ViT-B/16: featx and torchvision."""

from __future__ import annotations

from typing import Any

import torch
from torchvision.models import feature_extraction as torchvision
from torchvision.models import get_model

import featx
from benchmarks.ratios import ratio, take_turns

QUERY = "encoder.layers.encoder_layer_0.mlp"


def test_first_block(benchmark: Any, record_ratio: Any) -> None:
    torch.set_num_threads(1)
    model, x = get_model("vit_b_16", weights=None).eval(), torch.rand(1, 3, 224, 224)
    ours, theirs = (library.create_feature_extractor(model, [QUERY]) for library in (featx, torchvision))
    millions = [sum(parameter.numel() for parameter in module.parameters()) / 1e6 for module in (ours, theirs)]
    with torch.no_grad():
        assert torch.equal(ours(x)[QUERY], theirs(x)[QUERY])
        seconds = take_turns({"featx": lambda: ours(x), "torchvision": lambda: theirs(x)}, 9)
        benchmark.pedantic(ours, (x,), rounds=3)
    record_ratio(
        "vit_b_16, first block", ratio(seconds, "torchvision", "featx"), "{:.1f} M / {:.1f} M".format(*millions)
    )
