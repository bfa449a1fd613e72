"""The public interface: names, positions, and what a user would try first."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import fx, nn

from tests import featx, nets
from tests.nets import net
from tests.versions import older

X = torch.rand(3, 4)


@pytest.mark.parametrize("name", ["get_graph_node_names", "create_feature_extractor", "_warn_graph_differences"])
def test_positions_are_torchvisions(name: str) -> None:
    theirs = inspect.signature(getattr(pytest.importorskip("torchvision.models.feature_extraction"), name)).parameters
    ours = inspect.signature(getattr(featx, name)).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for parameter in theirs:
        assert ours[parameter].default == theirs[parameter].default
    later = ["concrete_args"] if older(torchvision="0.20") and not name.startswith("_") else []
    more = [name for name in ours if ours[name].kind is not inspect.Parameter.KEYWORD_ONLY][len(theirs) :]
    assert more == later


def test_classes_have_torchvisions_bases() -> None:
    assert issubclass(featx.LeafModuleAwareTracer, fx.Tracer)
    assert issubclass(featx.NodePathTracer, featx.LeafModuleAwareTracer)
    assert issubclass(featx.DualGraphModule, fx.GraphModule)
    assert set(featx.__all__) <= set(dir(featx))


def test_names_are_a_pair() -> None:
    train, evaluation = featx.get_graph_node_names(nets.Block())
    assert train == evaluation == ["x", "first", "sigmoid", "second", "sigmoid_1", "add"]


def test_the_signature_is_the_models() -> None:
    def forward(self: Any, x: torch.Tensor, *rest: Any, scale: float = 2.0, **options: Any) -> Any:
        return self.fc(x) * scale

    model = net(forward, fc=nn.Linear(4, 4))
    extractor = featx.create_feature_extractor(model, ["fc", "mul"])
    assert torch.equal(extractor(X)["mul"], model(X))
    assert torch.equal(extractor(X, scale=3.0, other=1)["mul"], model(X, scale=3.0, other=1))
    parameters = inspect.signature(extractor.forward).parameters
    assert set(parameters) == {"x", "rest", "scale", "options"}
    assert parameters["scale"].default == 2.0


def test_concrete_args() -> None:
    model = net(lambda self, x, double=False: self.fc(x) * 2 if double else self.fc(x), fc=nn.Linear(4, 4))
    names = featx.get_graph_node_names(model, concrete_args={"double": True})
    assert names.eval == ["x", "double", "eq", "_assert", "fc", "mul"]
    extractor = featx.create_feature_extractor(model, ["mul"], concrete_args={"double": True})
    assert torch.equal(extractor(X, True)["mul"], model(X, True))
    with pytest.raises(AssertionError, match="specialized"):
        extractor(X, False)


def test_param_shapes_constant() -> None:
    def forward(self: Any, x: Any) -> Any:
        return x * self.weight.shape[0] if self.weight.dim() == 2 else x

    model = net(forward, weight=nn.Parameter(torch.rand(3, 4)))
    with pytest.raises(featx.UntraceableError, match="control flow"):
        featx.get_graph_node_names(model)
    kwargs = {"param_shapes_constant": True}
    assert featx.get_graph_node_names(model, kwargs).eval == ["x", "weight", "mul"]
    assert torch.equal(featx.create_feature_extractor(model, "mul", tracer_kwargs=kwargs)(X)["mul"], X * 3)


def test_one_query_for_a_module_and_for_what_is_in_it() -> None:
    model = nn.Sequential(nets.Block(), nets.Block())
    features = featx.create_feature_extractor(model, ["0", "1", "0.first"])(X)
    assert list(features) == ["0.first", "0", "1"]
    assert torch.equal(features["0"], model[0](X))
    assert torch.equal(features["1"], model(X))
    assert torch.equal(features["0.first"], model[0].first(X))


def test_an_extractor_of_an_extractor() -> None:
    model = nn.Sequential(nets.Block(), nets.Block())
    inner = featx.create_feature_extractor(model, ["0", "1"])
    outer = featx.create_feature_extractor(inner, ["0.first", "output"])
    features = outer(X)
    assert torch.equal(features["0.first"], model[0].first(X))
    assert nets.same(features["output"], inner(X))


def test_gradients_are_the_models() -> None:
    model = nn.Sequential(nets.Block(), nets.Block())
    extractor = featx.create_feature_extractor(model, ["0"])
    model[0](X).sum().backward()
    expected = [parameter.grad.clone() for parameter in model[0].parameters()]
    model.zero_grad()
    extractor(X)["0"].sum().backward()
    assert nets.same([parameter.grad for parameter in extractor.parameters()], expected)
    assert all(parameter.grad is None for parameter in model[1].parameters())


def test_hooks_of_leaves_run() -> None:
    model = nets.Block()
    model.first.register_forward_hook(lambda module, inputs, output: output * 0)
    assert featx.create_feature_extractor(model, ["first"])(X)["first"].eq(0).all()


def test_a_module_that_is_a_leaf_and_whose_parameter_is_used_elsewhere() -> None:
    model = net(lambda self, x: self.fc(x) @ self.fc.weight + self.fc.weight.sum(), fc=nn.Linear(4, 4))
    for query in ("output", "fc"):
        extractor = featx.create_feature_extractor(model, [query])
        assert list(extractor.state_dict()) == ["fc.weight", "fc.bias"]
        assert isinstance(extractor.fc, nn.Linear)
    assert torch.equal(featx.create_feature_extractor(model, ["output"])(X)["output"], model(X))


def test_members_that_hide_behind_attributes_of_a_graph_module() -> None:
    def forward(self: Any, x: Any) -> Any:
        return self.graph(self.code(self.meta[0](self.train_graph(self.eval_graph(x)))))

    names = ["graph", "code", "train_graph", "eval_graph"]
    model = net(forward, meta=nn.Sequential(nn.Linear(4, 4)), **{name: nn.Linear(4, 4) for name in names})
    extractor = featx.create_feature_extractor(model, ["code", "output"])
    assert torch.equal(extractor(X)["output"], model(X))
    assert sorted(extractor.state_dict()) == sorted(model.state_dict())
