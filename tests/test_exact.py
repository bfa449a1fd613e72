"""With exact=True every feature is what its module or operation returned; without it, a warning says where it is not."""

from __future__ import annotations

import collections
import copy
import dataclasses
import io
import pickle
import warnings
from typing import Any, Dict, List, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from tests import featx, nets
from tests.nets import net, same

X = torch.rand(3, 4)


def exact(model: nn.Module, queries: Any, **options: Any) -> nn.Module:
    """An exact extractor, made without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return featx.create_feature_extractor(model, queries, suppress_diff_warning=True, exact=True, **options)


def names(model: nn.Module) -> List[str]:
    return featx.get_graph_node_names(model, suppress_diff_warning=True, exact=True).eval


def cloned(value: Any) -> Any:
    """A deep copy with clones of the tensors: what a cloning hook keeps."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return type(value)((key, cloned(item)) for key, item in value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(cloned, value))
    return type(value)(map(cloned, value)) if isinstance(value, (list, tuple)) else value


def seen_by_hooks(model: nn.Module, x: torch.Tensor) -> Dict[str, List[Any]]:
    """What each call of each module returned, cloned at that moment, in eager execution."""
    seen: Dict[str, List[Any]] = collections.defaultdict(list)
    hooks = [
        module.register_forward_hook(lambda m, args, value, path=path: seen[path].append(cloned(value)))
        for path, module in model.named_modules()
        if path
    ]
    torch.manual_seed(1)
    with torch.no_grad():
        model(x.clone())
    for hook in hooks:
        hook.remove()
    return dict(seen)


def run(extractor: nn.Module, x: torch.Tensor) -> Dict[str, Any]:
    torch.manual_seed(1)
    with torch.no_grad():
        return extractor(x.clone())


# --- the zoo ---


def operators() -> List[Any]:
    """torchvision's own modules but those that fx cannot trace in train mode: opened, all that is inside can be asked for."""
    from torchvision import ops

    return [ops.Conv2dNormActivation, ops.SqueezeExcitation, ops.MLP, ops.Permute]


@pytest.mark.zoo
@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize(
    "name", ["resnet18", "googlenet", "densenet121", "mobilenet_v3_small", "swin_t", "vit_b_32"]
)
def test_all_modules_of_a_model_at_once(name: str, opened: bool) -> None:
    model, x = nets.build(name), nets.zoo_input(name)
    kwargs = {"non_leaf_modules": operators()} if opened else None
    for mode in (True, False):
        model.train(mode)
        expected = seen_by_hooks(model, x)
        leaves = [] if opened else [path for path, m in model.named_modules() if isinstance(m, tuple(operators()))]
        leaves += [path for path, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
        queries = [
            path
            for path, values in expected.items()
            if len(values) == 1
            and isinstance(values[0], torch.Tensor)
            and not any(path.startswith(f"{leaf}.") for leaf in leaves)
        ]
        assert len(queries) > 40
        by_mode = (queries, []) if mode else ([], queries)
        features = run(exact(model, None, train_return_nodes=by_mode[0], eval_return_nodes=by_mode[1], tracer_kwargs=kwargs), x)
        assert set(features) == set(queries)
        assert [query for query in queries if not torch.equal(features[query], expected[query][0])] == []


class Watching(fx.Interpreter):
    """Runs a graph in eager mode and keeps a clone of each tensor as soon as it is there."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.clones[n] = value.clone()
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        plain = [list(value) if isinstance(value, list) else value for value in args]  # some functions change these
        return super().call_function(target, tuple(plain), kwargs)


def clones_by_name(model: nn.Module, x: torch.Tensor) -> Dict[str, torch.Tensor]:
    tracer = featx.NodePathTracer(
        leaf_modules=featx._tracer_arguments({})["leaf_modules"],
        autowrap_modules=featx._tracer_arguments({})["autowrap_modules"],
    )
    with featx._unchanged(model):
        graph = tracer.trace(model)
        watching = Watching(fx.GraphModule(model, graph))
        watching.clones = {}
        torch.manual_seed(1)
        with torch.no_grad():
            watching.run(x.clone())
    return {name: watching.clones[n] for n, name in tracer.node_to_qualname.items() if n in watching.clones}


def warned(model: nn.Module, queries: List[str]) -> Any:
    """An extractor for the mode that the model is in, and what its warnings say, by query."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        by_mode = (queries, []) if model.training else ([], queries)
        extractor = featx.create_feature_extractor(model, None, *by_mode, suppress_diff_warning=True)
    texts = [str(warning.message) for warning in caught]
    said = {text.split("'")[1]: text for text in texts}
    assert len(said) == len(texts), "one warning for each query"
    return extractor, said


@pytest.mark.zoo
@pytest.mark.parametrize("name", nets.FAMILIES)
def test_warnings_for_all_tensors_of_a_model(name: str) -> None:
    model, x = nets.build(name), nets.zoo_input(name)
    for mode in (True, False):
        model.train(mode)
        expected = clones_by_name(model, x)
        extractor, said = warned(model, list(expected))
        values = run(extractor, x)
        assert len(expected) > 20
        changed = {query for query, value in expected.items() if not same(values[query], value)}
        assert {query for query, text in said.items() if "is overwritten in place by" in text} == changed


@pytest.mark.zoo
@pytest.mark.parametrize("name", nets.FAMILIES)
def test_warnings_for_all_modules_of_a_model(name: str) -> None:
    model, x = nets.build(name), nets.zoo_input(name)
    for mode in (True, False):
        model.train(mode)
        seen = seen_by_hooks(model, x)
        listed = featx.get_graph_node_names(model, suppress_diff_warning=True)[0 if mode else 1]
        queries = [path for path in seen if featx._select(listed, [path])]
        extractor, said = warned(model, queries)
        values = run(extractor, x)
        assert len(queries) > 10
        assert set(said) == {query for query in queries if not same(values[query], seen[query][0])}


STAGES = {
    "resnet18": ["layer1", "layer2", "layer3", "layer4", "avgpool", "fc"],
    "vgg16_bn": ["features", "classifier", *(f"features.{at}" for at in (6, 13, 23, 33, 43))],
    "densenet121": [f"features.{part}" for part in ("pool0", "denseblock1", "transition1", "denseblock4")],
    "swin_t": [f"features.{at}" for at in range(8)],
    "efficientnet_b0": [f"features.{at}" for at in range(9)],
}


@pytest.mark.zoo
@pytest.mark.parametrize("name", STAGES)
def test_no_warning_for_stages(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        featx.create_feature_extractor(nets.build_on_meta(name), STAGES[name], suppress_diff_warning=True)
