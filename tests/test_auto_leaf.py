"""What cannot be traced becomes a leaf, class by class; the result is that of passing the classes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import equal, nn
from torch.nn import Sequential

from tests import featx, nets
from tests.helpers import MODES, X, eval_names, extract, ignored_warnings, node_names, parametrize, refused, same, zoo
from tests.nets import Block, build_on_meta, linear, net


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = linear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) if x.sum() > 0 else -self.fc(x)


class Typed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * int(x.shape[0])


class Raising(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, torch.Tensor):
            raise RuntimeError("tensors only")
        return x + 1


class TrainOnly(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and x.sum() < 0:
            return -x
        return x * 2


class EvalOnly(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training and x.sum() < 0:
            return -x
        return x * 2


class Outer(nn.Module):
    """Fails by itself, and holds something that fails."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Branching()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        return y if y.sum() > 0 else -y


class Constant(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tensor([1.0, 2.0, 3.0, 4.0])


shared = Branching()
CASES = {
    "deep": (Sequential(Sequential(Block(), Sequential(Branching())), Block()), [Branching]),
    "shared": (net(lambda self, x: self.a(self.b(x)) + 1, a=shared, b=shared), [Branching]),
    "type error": (Sequential(Typed(), Block()), [Typed]),
    "runtime error": (Sequential(Block(), Raising()), [Raising]),
    "one mode": (Sequential(Block(), TrainOnly()), [TrainOnly]),
    "several": (Sequential(Raising(), TrainOnly(), Branching()), [Raising, TrainOnly, Branching]),
    "nested": (Sequential(Block(), Outer()), [Branching, Outer]),
    "constants of the other mode": (Sequential(Constant(), EvalOnly()), [EvalOnly]),
    "constants before": (Sequential(Constant(), Branching(), Constant()), [Branching]),
}


def classes_in(message: str) -> list[str]:
    (listed,) = re.findall(r"tracer_kwargs=\{'leaf_modules': \[(.*)\]\} does the same", message)
    return [path.rpartition(".")[2] for path in listed.split(", ")]


@parametrize("case", CASES)
def test_it_equals_passing_the_classes(case: str) -> None:
    model, classes = CASES[case]
    with pytest.raises(featx.UntraceableError), ignored_warnings():
        [node_names(model.train(mode)) for mode in MODES]
    with pytest.warns(UserWarning, match="became leaves") as caught:
        names = featx.get_graph_node_names(model, auto_leaf=True, suppress_diff_warning=True)
    assert classes_in(str(caught[0].message)) == [cls.__name__ for cls in classes]
    assert caught[0].filename == __file__
    by_hand = {"leaf_modules": classes}
    assert names == node_names(model, by_hand)
    queries = [*names.eval, "output"]
    with pytest.warns(UserWarning, match="became leaves"):
        automatic = extract(model, queries, auto_leaf=True)
    manual = extract(model, queries, tracer_kwargs=by_hand)
    assert list(automatic.state_dict()) == list(manual.state_dict())
    for mode in MODES:
        features = automatic.train(mode)(X)
        assert same(features, manual.train(mode)(X))
        assert equal(features["output"], model.train(mode)(X))
    assert not [name for name in vars(model) if name.startswith("_tensor_constant")]


def test_no_warning_where_nothing_failed() -> None:
    assert node_names(Block(), auto_leaf=True) == node_names(Block())


def test_it_is_added_to_what_the_caller_passes_and_non_leaf_modules_win() -> None:
    model = Sequential(Block(), Branching())
    kwargs = {"leaf_modules": [Block]}
    with pytest.warns(UserWarning, match="became leaves"):
        assert eval_names(model, kwargs, auto_leaf=True) == ["input", "0", "1"]
    kwargs = {"non_leaf_modules": [Branching]}
    refused(model, "1", "Branching at '1'", exact=False, auto_leaf=True, tracer_kwargs=kwargs)


def test_the_models_own_forward_and_the_children_that_can_be_traced() -> None:
    def forward(self: Any, x: Any) -> Any:
        return self.head(self.backbone(x)) if x.sum() > 0 else x

    model = net(forward, backbone=Sequential(Block()), head=linear(), bad=Sequential(Branching()))
    for auto_leaf in MODES:
        error = refused(model, "", "the model's own forward", exact=False, auto_leaf=auto_leaf)
        assert error.traceable == ["backbone"]
        assert str(error).endswith("\nIts children backbone can be traced by themselves.")


@zoo
@parametrize("name", nets.collected(nets.in_zoo, nets.UNTRACEABLE))
def test_the_untraceable_of_the_zoo_lead_to_something_that_works(name: str) -> None:
    model = build_on_meta(name)
    with pytest.raises(featx.UntraceableError) as raised:
        extract(model, "output", auto_leaf=True)
    assert raised.value.traceable
    for path in raised.value.traceable:
        child = model.get_submodule(path)
        assert extract(child, eval_names(child)[-1]).eval_graph.nodes


class Remembering(nn.Module):
    """What it has of a try before cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x)
        return torch.stack(self.seen).sum(0)


def test_a_try_does_not_see_what_the_ones_before_left() -> None:
    with pytest.warns(UserWarning, match=r"\[tests\.test_auto_leaf\.Branching\]"):
        names = eval_names(Sequential(Remembering(), Branching()), auto_leaf=True)
    assert names == ["input", "0.stack", "0.sum", "1"]
