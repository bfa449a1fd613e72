"""What featx is compared with: each returns what it is asked for, as the model itself computes it."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import re
import warnings
from typing import Any, Callable, Dict, Iterable, List, Sequence

import torch
from torch import fx, nn
from torchvision.models import feature_extraction as torchvision

import featx

Features = Callable[[torch.Tensor], Dict[str, torch.Tensor]]


def traces(model: nn.Module) -> List[fx.Graph]:
    """Two bare traces: the least that listing the names of both modes can take."""
    return [fx.Tracer().trace(model.train(mode)) for mode in (True, False)]


def traces_and_codes(model: nn.Module) -> List[Any]:
    """Two bare traces and the code of each."""
    return [graph.python_code("self") for graph in traces(model)]


def extractors(model: nn.Module, queries: Iterable[str]) -> Dict[str, nn.Module]:
    """Those of featx, in both ways, and torchvision's."""
    queries = list(queries)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the modes differ
        return {
            "featx": featx.create_feature_extractor(model, queries),
            "featx exact": featx.create_feature_extractor(model, queries, exact=True),
            "torchvision": torchvision.create_feature_extractor(model, queries),
        }


def straight_line(extractor: featx.DualGraphModule) -> Features:
    """The extractor's code in which each leaf is bound beforehand: the floor for any code that calls the leaves."""
    graph = copy.deepcopy(extractor.graph)
    leaves: Dict[str, Any] = {}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            leaves[f"leaf_{len(leaves)}"] = functools.reduce(getattr, node.target.split("."), extractor)
            node.target = f"leaf_{len(leaves) - 1}"
    code = graph.python_code("self")
    names = {**code.globals, **leaves}
    exec(re.sub(r"\bself\.(leaf_\d+)\b", r"\1", code.src), names)
    return functools.partial(names["forward"], None)


class Hooks:
    """Forward hooks on the requested modules.

    Args:
        model: shares its leaves, and so its weights, with the one that has the hooks.
        paths: the modules to return; the last one is that which runs last.
        stop: end the run by an exception after the last one; without it the whole model runs.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str], stop: bool = False) -> None:
        leaves = (module for module in model.modules() if not any(module.children()))
        shared = itertools.chain(leaves, model.parameters(), model.buffers())
        self.model = copy.deepcopy(model, {id(kept): kept for kept in shared})
        self.features: Dict[str, torch.Tensor] = {}
        for path in paths:
            hook = functools.partial(self._keep, path, stop and path == paths[-1])
            self.model.get_submodule(path).register_forward_hook(hook)

    def _keep(self, path: str, stop: bool, module: nn.Module, args: Any, value: torch.Tensor) -> None:
        self.features[path] = value
        if stop:
            raise _Stop

    def __call__(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        with contextlib.suppress(_Stop):
            self.model(x)
        features, self.features = self.features, {}
        return features


class _Stop(Exception):
    """All is there that was asked for."""


# Cut by hand: what somebody who knows the model would write.


def resnet_by_hand(model: nn.Module, paths: Sequence[str], x: torch.Tensor) -> Dict[str, torch.Tensor]:
    x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    features = {}
    for path in paths:
        x = features[path] = getattr(model, path)(x)
    return features


def vit_by_hand(model: nn.Module, paths: Sequence[str], x: torch.Tensor) -> Dict[str, torch.Tensor]:
    x = model._process_input(x)
    x = torch.cat([model.class_token.expand(x.shape[0], -1, -1), x], dim=1)
    x = model.encoder.dropout(x + model.encoder.pos_embedding)
    for name, layer in model.encoder.layers.named_children():
        x = layer(x)
        if paths == [f"encoder.layers.{name}"]:
            break
    return {paths[0]: x}


def swin_by_hand(model: nn.Module, paths: Sequence[str], x: torch.Tensor) -> Dict[str, torch.Tensor]:
    _, stage, block = paths[0].split(".")
    for module in model.features[: int(stage)]:
        x = module(x)
    for module in model.features[int(stage)][: int(block) + 1]:
        x = module(x)
    return {paths[0]: x}
