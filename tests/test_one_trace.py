"""Where no forward asks for the mode, one trace serves both modes: two graphs, of which one is a copy."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Sequential

from tests import featx
from tests.helpers import X, exact, extract, in_both_modes, node_names, parametrize, same
from tests.nets import Block, build_on_meta, linear, net, stated


class Odd(nn.Module):
    """Reads its mode in a way of its own; gives 1 in train mode and 0 in eval mode."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.read()

    def read(self) -> int:
        return int(self.training)


class InItsDict(Odd):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * int(self.__dict__["training"])


class InVars(Odd):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * int(vars(self)["training"])


class Attributes(Odd):
    def __getattribute__(self, name: str) -> Any:
        return (
            object.__getattribute__(self, "__dict__")["training"] if name == "mode" else super().__getattribute__(name)
        )

    def read(self) -> int:
        return int(self.mode)


class Train(Odd):
    def train(self, mode: bool = True) -> Any:
        self.factor = int(mode)
        return super().train(mode)

    def read(self) -> int:
        return self.factor


class Property(Odd):
    @property
    def training(self) -> bool:
        return self.own

    @training.setter
    def training(self, value: bool) -> None:
        self.own = value


ASKING = {
    "a branch": stated("return h * 2 if self.training else h"),
    "an argument": stated("return F.dropout(h, 1.0, self.training)"),
    "of a child": net(lambda self, x: x * int(self.fc.training), fc=linear()),
    "getattr": stated("return h * int(getattr(self, 'training'))"),
    "any child": net(lambda self, x: x * sum(m.training for m in self.modules()), fc=linear()),
    **{kind.__name__: Sequential(kind(), linear()) for kind in (Odd, InItsDict, InVars, Attributes, Train, Property)},
}
SILENT = {
    "blocks": Sequential(Block(), nn.BatchNorm1d(4), nn.Dropout(0.5)),
    "a buffer": stated("self.mean.add_(1); return h + self.mean"),
    "operators in place": stated("h += x; v = h[:, :2]; v *= 2; return h"),
    "a constant": stated("o = torch.zeros(4); o += h.sum(0); return o * 1"),
}


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The modes in which something is traced, as it is."""
    found: list[bool] = []
    trace = featx.NodePathTracer.trace

    def counted(self: Any, root: Any, *args: Any) -> Any:
        found.append(vars(root).get("training", True))
        return trace(self, root, *args)

    monkeypatch.setattr(featx.NodePathTracer, "trace", counted)
    return found


@in_both_modes
@parametrize("name", ASKING)
def test_who_asks_is_traced_twice(name: str, mode: bool, traces: list[bool]) -> None:
    model = ASKING[name].train(mode)
    extractor = exact(model, "output")
    assert len(traces) == 2
    for other in (mode, not mode):
        assert same(extractor.train(other)(X)["output"], model.train(other)(X))
    assert not hasattr(nn.Module, "training")


@in_both_modes
@parametrize("name", SILENT)
def test_who_does_not_is_traced_once(name: str, mode: bool, traces: list[bool]) -> None:
    model = SILENT[name].train(mode)
    eager = copy.deepcopy(model)
    extractor = exact(model, "output")
    assert traces == [mode]
    for other in (mode, not mode):
        found, expected = (run.train(other) for run in (extractor, eager))
        torch.manual_seed(0)
        value = found(X)["output"]
        torch.manual_seed(0)
        assert same(value, expected(X))
    assert extractor.train_graph is not extractor.eval_graph


def test_a_scripted_part_may_be_asked(traces: list[bool]) -> None:
    model = net(lambda self, x: self.part(x) if self.part.training else x, part=torch.jit.script(linear()))
    extract(model, "output")
    assert len(traces) == 2


def test_the_graphs_are_edited_apart() -> None:
    extractor = extract(Sequential(Block(), linear()), "output")
    (node,) = (node for node in extractor.eval_graph.nodes if node.target is torch.sigmoid and node.name == "sigmoid")
    node.target = torch.relu
    extractor.recompile()
    assert not same(extractor.eval()(X), extractor.train()(X))


@pytest.mark.zoo
@parametrize("name, times", [("resnet18", 1), ("vit_b_16", 1), ("googlenet", 2)])
def test_of_the_zoo(name: str, times: int, traces: list[bool]) -> None:
    pytest.importorskip("torchvision")
    node_names(build_on_meta(name))
    assert len(traces) == times


def test_other_threads_may_ask(traces: list[bool]) -> None:
    other = linear()
    seen: list[bool] = []

    def forward(self: Any, x: Any) -> Any:
        thread = threading.Thread(target=lambda: seen.append(other.training))
        thread.start()
        thread.join()
        return x + 1

    extract(net(forward), "output")
    assert (seen, len(traces)) == ([True], 1)


def test_leaves_may_ask_with_an_example(traces: list[bool]) -> None:
    model = Sequential(linear(), nn.Dropout(0.5), nn.BatchNorm1d(4))
    extractor = exact(model, "output", example_inputs=(X,))
    assert len(traces) == 1
    assert same(extractor.eval()(X)["output"], model.eval()(X))
