"""Forward at full depth, a model of each family. The floor: straight-line code with every leaf bound beforehand."""

from __future__ import annotations

import functools
import os
import shutil
from typing import Any, Callable, Dict, Tuple

import pytest
import torch
from torch import nn
from torchvision.models import get_model

import featx
from benchmarks.competitors import extractors, straight_line
from benchmarks.turns import Turns

MODELS = [
    "resnet18",
    "densenet121",
    "shufflenet_v2_x0_5",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "convnext_tiny",
    "vit_b_32",
    "swin_t",
    "lraspp_mobilenet_v3_large",
    "r3d_18",
]
PICTURE = {"small": (3, 64, 64), "usual": (3, 224, 224)}
VIDEO = {"small": (3, 8, 32, 32), "usual": (3, 16, 112, 112)}
CASES = [(name, size, batch) for name in MODELS for size in ("small", "usual") for batch in (1, 32)]
# Usual inputs, 32 of them, take these half a minute and more on two cores.
HEAVY = ("convnext_tiny", "vit_b_32", "swin_t", "r3d_18")
SLOW_TO_COMPILE = ("densenet121", "efficientnet_b0", "swin_t", "lraspp_mobilenet_v3_large")
COMPILED_ON_A_GPU = ("resnet18", "vit_b_32")  # so that all runs in ten minutes


def make(name: str, size: str, batch: int, device: str) -> Tuple[nn.Module, torch.Tensor]:
    """A model in eval mode and an input for it; usual inputs get all threads."""
    torch.set_num_threads(1 if size == "small" else os.cpu_count() or 1)
    shape = (VIDEO if name == "r3d_18" else PICTURE)[size]
    arguments: Dict[str, Any] = {"weights": None}
    if name.startswith("lraspp"):
        arguments["weights_backbone"] = None
    if name.startswith("vit"):
        arguments["image_size"] = shape[-1]
    model = get_model(name, **arguments).eval().to(device)
    return model, torch.rand(batch, *shape, device=device)


def output_of(model: Callable[[torch.Tensor], Any], x: torch.Tensor) -> torch.Tensor:
    """What a model returns, or what is in the dict that it returns."""
    output = model(x)
    return next(iter(output.values())) if isinstance(output, dict) else output


@pytest.mark.parametrize(("name", "size", "batch"), CASES)
def test_forward(name: str, size: str, batch: int, turns: Turns, device: str, not_run: Callable[[str], Any]) -> None:
    if device == "cpu" and name in HEAVY and (size, batch) == ("usual", 32):
        not_run("takes minutes on two cores; --device cuda runs it")
    model, x = make(name, size, batch, device)
    made = extractors(model, featx.get_graph_node_names(model, suppress_diff_warning=True).eval[-1:])
    modules = {"eager": model, "featx": made["featx"], "torchvision": made["torchvision"]}
    if batch == 1:
        modules.update({"featx exact": made["featx exact"], "straight line": straight_line(made["featx"])})
    with torch.inference_mode():
        expected = output_of(model, x)
        for competitor in modules.values():
            assert torch.equal(output_of(competitor, x), expected)
        turns.take(
            {key: functools.partial(module, x) for key, module in modules.items()},
            to="eager",
            budget=6 if size == "small" and batch == 1 else 2,
            model=name,
            size=size,
            batch=batch,
        )


@pytest.mark.parametrize(("name", "size", "batch"), CASES)
def test_compiled(name: str, size: str, batch: int, turns: Turns, device: str, not_run: Callable[[str], Any]) -> None:
    is_quick = name not in SLOW_TO_COMPILE if device == "cpu" else name in COMPILED_ON_A_GPU
    if not is_quick or (size, batch) != ("small", 1):
        not_run("to compile it takes minutes")
    if not shutil.which("g++"):
        not_run("torch.compile wants a C++ compiler")
    model, x = make(name, size, batch, device)
    made = extractors(model, featx.get_graph_node_names(model, suppress_diff_warning=True).eval[-1:])
    modules = {"eager": model, "featx": made["featx"], "torchvision": made["torchvision"]}
    torch.compiler.reset()
    compiled = {key: torch.compile(module) for key, module in modules.items()}
    with torch.no_grad():
        expected = output_of(model, x)
        for competitor in compiled.values():
            torch.testing.assert_close(output_of(competitor, x), expected, rtol=1e-3, atol=1e-3)
        turns.take(
            {key: functools.partial(module, x) for key, module in compiled.items()},
            to="eager",
            budget=3,
            model=name,
            size=size,
            batch=batch,
        )
