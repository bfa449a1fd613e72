"""The public interface: names, positions, and what a user would try first."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import equal, nn
from torch.nn import Sequential

from tests import featx
from tests.helpers import X, eval_names, extract, feature, feature_extraction, node_names, parametrize
from tests.nets import linear, net
from tests.versions import older


@parametrize("name", ["get_graph_node_names", "create_feature_extractor", "_warn_graph_differences"])
def test_positions_are_torchvisions(name: str) -> None:
    theirs = inspect.signature(getattr(feature_extraction(), name)).parameters
    ours = inspect.signature(getattr(featx, name)).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for parameter in theirs:
        assert ours[parameter].default == theirs[parameter].default
    positional = [name for name in ours if ours[name].kind is not inspect.Parameter.KEYWORD_ONLY]
    later = older(torchvision="0.20") and not name.startswith("_")
    assert positional[len(theirs) :] == (["concrete_args"] if later else [])


def test_private_names_that_programs_import_give_the_same_defaults() -> None:
    theirs = feature_extraction()
    assert set(featx._get_leaf_modules_for_ops()) == set(theirs._get_leaf_modules_for_ops())
    expected = theirs._set_default_tracer_kwargs(None)
    arguments = featx._set_default_tracer_kwargs(None)
    for name in ("autowrap_modules", "leaf_modules"):
        assert len(arguments[name]) == len(expected[name]) > 1
        assert set(arguments[name]) == set(expected[name])


def test_the_signature_is_the_models() -> None:
    def forward(self: Any, x: torch.Tensor, *rest: Any, scale: float = 2.0, **options: Any) -> Any:
        return self.fc(x) * scale

    model = net(forward, fc=linear())
    extractor = extract(model, ["fc", "mul"])
    assert equal(extractor(X)["mul"], model(X))
    assert equal(extractor(X, scale=3.0, other=1)["mul"], model(X, scale=3.0, other=1))
    parameters = inspect.signature(extractor.forward).parameters
    assert set(parameters) == {"x", "rest", "scale", "options"}
    assert parameters["scale"].default == 2.0


def test_concrete_args() -> None:
    model = net(lambda self, x, double=False: self.fc(x) * 2 if double else self.fc(x), fc=linear())
    names = node_names(model, concrete_args={"double": True})
    assert names.eval == ["x", "double", "eq", "_assert", "fc", "mul"]
    extractor = extract(model, "mul", concrete_args={"double": True})
    assert equal(extractor(X, True)["mul"], model(X, True))
    with pytest.raises(AssertionError, match="specialized"):
        extractor(X, False)


def test_param_shapes_constant() -> None:
    def forward(self: Any, x: Any) -> Any:
        return x * self.weight.shape[0] if self.weight.dim() == 2 else x

    model = net(forward, weight=nn.Parameter(torch.rand(3, 4)))
    with pytest.raises(featx.UntraceableError, match="control flow"):
        node_names(model)
    kwargs = {"param_shapes_constant": True}
    assert eval_names(model, kwargs) == ["x", "weight", "mul"]
    assert equal(feature(model, "mul", tracer_kwargs=kwargs), X * 3)


def test_a_module_that_is_a_leaf_and_whose_parameter_is_used_elsewhere() -> None:
    model = net(lambda self, x: self.fc(x) @ self.fc.weight + self.fc.weight.sum(), fc=linear())
    for query in ("output", "fc"):
        extractor = extract(model, query)
        assert list(extractor.state_dict()) == ["fc.weight", "fc.bias"]
        assert isinstance(extractor.fc, nn.Linear)
    assert equal(feature(model), model(X))


def test_members_that_hide_behind_attributes_of_a_graph_module() -> None:
    def forward(self: Any, x: Any) -> Any:
        return self.graph(self.code(self.meta[0](x)))

    names = ["graph", "code"]
    model = net(forward, meta=Sequential(linear()), **{name: linear() for name in names})
    extractor = extract(model, ["code", "output"])
    assert equal(extractor(X)["output"], model(X))
    assert sorted(extractor.state_dict()) == sorted(model.state_dict())
