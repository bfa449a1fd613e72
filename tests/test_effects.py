"""The caller's things come back untouched, on success and on every failure."""

from __future__ import annotations

import collections
import threading
from typing import Any, Callable

import pytest
import torch
from torch import equal, nn
from torch.nn import Sequential

from tests import featx
from tests.helpers import (
    COPIES,
    X,
    eval_names,
    extract,
    feature,
    heard,
    in_both_modes,
    node_names,
    parametrize,
    texts,
    untouched,
)
from tests.nets import Block, Modes, linear, net
from tests.versions import fails_before


def frozen(model: nn.Module) -> nn.Module:
    model.train()
    list(model.modules())[-1].eval()
    return model


class Careless(nn.Module):
    """Its forward leaves traces on itself: attributes, list entries, counts in a buffer, random draws, constants."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.fails = fails
        self.fc = linear()
        self.calls = 0
        self.history = [1]
        self.cache: dict[str, Any] = {"a": 1}
        self.register_buffer("steps", torch.zeros(3))
        self.fc.register_forward_hook(lambda module, inputs, output: None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.latest = x
        self.history.append(x)
        self.cache["x"] = x
        self.steps += 1
        noise = torch.rand(4)
        torch.set_grad_enabled(False)
        y = self.fc(x) + noise + torch.tensor([1.0])
        if self.fails and x.sum() > 0:
            return y
        return y


MODELS: dict[str, Callable[[], nn.Module]] = {
    "modes": Modes,
    "frozen": lambda: frozen(Modes()),
    "careless": Careless,
    "tied": lambda: net(lambda self, x: self.a(self.b(x)), a=(shared := linear()), b=shared),
}


@parametrize("kind", MODELS)
@in_both_modes
def test_success(kind: str, mode: bool) -> None:
    model = MODELS[kind]()
    if kind != "frozen":
        model.train(mode)
    with untouched(model):
        node_names(model)
    with untouched(model), heard() as caught:
        extractor = extract(model, "x")
    found = ["assigns or writes into a buffer" in text for text in texts(caught)]
    assert found == ([True] if kind == "careless" else [])
    extractor(X)


FAILURES: dict[str, Callable[[nn.Module], Any]] = {
    "unknown name": lambda model: extract(model, "nowhere"),
    "same key": lambda model: extract(model, {"x": "k", "fc": "k"}),
    "no queries": lambda model: extract(model),
    "bad tracer_kwargs": lambda model: node_names(model, {"leafs": 1}),
    "bad leaf": lambda model: node_names(model, {"leaf_modules": [3]}),
    "bad argument": lambda model: node_names(model, concrete_args=3),
    "unknown argument": lambda model: node_names(model, concrete_args={"nope": 3}),
}


@parametrize("failure", FAILURES)
@parametrize("kind", MODELS)
def test_failure(kind: str, failure: str) -> None:
    model = MODELS[kind]()
    with untouched(model), pytest.raises((ValueError, TypeError)):
        FAILURES[failure](model)


@parametrize("function", [featx.get_graph_node_names, lambda m: extract(m, "x")])
def test_failure_inside_of_the_trace(function: Callable[[nn.Module], Any]) -> None:
    model = Sequential(Block(), Careless(fails=True))
    model[0].eval()
    with untouched(model), pytest.raises(featx.UntraceableError, match="at '1'"):
        function(model)


def test_failure_in_one_mode_only() -> None:
    model = net(lambda self, x: x + 1 if self.training else (x if x.sum() > 0 else -x)).eval()
    with untouched(model), pytest.raises(featx.UntraceableError, match="control flow"):
        node_names(model)
    assert not model.training


def test_constants_after_a_failure() -> None:
    model = net(lambda self, x: x + torch.ones(4))
    with untouched(model), pytest.raises(featx.NodeNameError):
        extract(model, "nothing")
    assert not [name for name in vars(model) if name.startswith("_tensor_constant")]


def test_tracer_kwargs_and_return_nodes_are_not_written_to() -> None:
    kwargs = {"leaf_modules": [Block], "autowrap_functions": ()}
    return_nodes = {"0": "a"}
    concrete: dict[str, Any] = {}
    extract(Sequential(Block()), return_nodes, tracer_kwargs=kwargs, concrete_args=concrete)
    assert kwargs == {"leaf_modules": [Block], "autowrap_functions": ()}
    assert return_nodes == {"0": "a"}
    assert concrete == {}


class Merging(nn.Module):
    """Merges a second weight into the first in eval mode and takes it out again in train mode, as adapters do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4))
        self.delta = nn.Parameter(torch.ones(4, 4))
        self.merged = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight if self.merged else x @ (self.weight + self.delta)

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if self.merged == mode:
            self.weight.data += -self.delta.data if mode else self.delta.data
            self.merged = not mode
        return self


@in_both_modes
def test_a_train_method_that_changes_the_weights(mode: bool) -> None:
    model = Sequential(Merging()).train(mode)
    expected = model(X)
    with untouched(model):
        node_names(model)
    assert equal(model(X), expected)
    assert equal(feature(model), expected)


class Swapping(nn.Module):
    """Keeps its weight in a dict while it is in eval mode, as moving averages do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))
        self.backup = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight

    def train(self, mode: bool = True) -> Swapping:
        super().train(mode)
        if not mode and not self.backup:
            self.backup["weight"] = self.weight.data.clone()
            self.weight.data.mul_(2)
        elif mode and self.backup:
            self.weight.data.copy_(self.backup.pop("weight"))
        return self


@parametrize("outer", [lambda model: model, Sequential])
def test_a_train_method_that_swaps_the_weights(outer: Callable[[nn.Module], nn.Module]) -> None:
    model = outer(Swapping()).train()
    with untouched(model):
        node_names(model)


class Lazy(nn.Module):
    """Makes a buffer, an attribute or a parameter at its first call."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "position"):
            value = torch.arange(4.0)
            if self.kind == "buffer":
                self.register_buffer("position", value)
            elif self.kind == "parameter":
                self.position = nn.Parameter(value)
            else:
                self.position = value
        return x + self.position


@parametrize("kind", ["buffer", "parameter", "attribute"])
def test_what_a_forward_makes_for_itself_is_in_the_extractor_and_not_on_the_model(kind: str) -> None:
    model = Sequential(linear(), Lazy(kind))
    with untouched(model):
        extractor = extract(model, "1")
    assert equal(extractor(X)["1"], model(X))


class Strange(list):  # type: ignore[type-arg]
    def __bool__(self) -> bool:
        raise RuntimeError("has no truth")


def test_containers_of_all_sorts() -> None:
    def forward(self: Any, x: Any) -> Any:
        self.counts["a"] += 1
        return self.fc(x)

    model = net(forward, fc=linear())
    model.counts = collections.defaultdict(int, {"a": 1})
    model.strange = Strange([1])
    model.cycle = []
    model.cycle.append(model.cycle)
    model.fc.register_buffer("sparse", torch.eye(3).to_sparse())
    node_names(model)
    assert model.counts == {"a": 1}
    assert len(model.cycle) == 1


@pytest.mark.skipif(not hasattr(torch, "uint4"), reason="this torch has no such type")
def test_a_buffer_that_cannot_be_copied() -> None:
    model = Block()
    model.register_buffer("codes", torch.empty(2, dtype=torch.uint4))
    with pytest.raises(RuntimeError, match="not implemented for"):
        model.codes.clone()
    assert equal(feature(model, "first"), model.first(X))


def test_a_buffer_with_nan_is_not_touched() -> None:
    model = net(lambda self, x: self.fc(x) * self.scale, fc=linear(), scale=torch.tensor(float("nan")))
    model.register_buffer("count", torch.zeros(3))
    value = model(X)
    node_names(model)
    value.sum().backward()  # would fail had the buffer been written to

    def forward(self: Any, x: Any) -> Any:
        self.count.data.add_(1)
        return self.fc(x)

    model = net(forward, fc=linear(), count=torch.zeros(3))
    node_names(model)
    assert model.count.eq(0).all()


def test_a_tracer_may_be_made_in_one_thread_and_used_in_another() -> None:
    tracer = featx.NodePathTracer()
    thread = threading.Thread(target=tracer.trace, args=(Sequential(linear(), nn.ReLU()),))
    thread.start()
    thread.join()
    assert tracer.names == ["input", "0", "1"]


class Freezing(Block):
    """Its train() freezes a stage for good."""

    def train(self, mode: bool = True) -> Freezing:
        super().train(mode)
        if mode:
            self.first.requires_grad_(False)
        return self


def test_a_train_method_that_freezes() -> None:
    model = Freezing().eval()
    node_names(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


class Caching(nn.Module):
    """What it makes while one mode is traced must not be seen by the trace of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: Any = None
        self.count = 0
        self.seen: dict[str, Any] = {"deep": [[]]}
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.cache is None:
            self.cache = torch.arange(4).to(x.dtype)
        self.count += 1 if self.training else 1  # as it asks, each mode is traced
        self.mean = self.mean * 0.9 + x.mean(0) * 0.1
        self.seen["deep"][0].append(x)
        return torch.stack(self.seen["deep"][0]).sum(0) * self.count + self.cache + self.mean


@fails_before(featx.UntraceableError, "a proxy cannot stand in for a buffer", torch="2.14")
def test_a_trace_does_not_see_the_one_before() -> None:
    model = Caching()
    with untouched(model):
        train, evaluation = node_names(model)
        with pytest.warns(featx.FeatureWarning):
            extractor = extract(model, "output")
    assert train == evaluation
    assert model.seen == {"deep": [[]]}
    assert equal(extractor(X)["output"], Caching()(X))


RUNS: list[Any] = []


def noting(x: torch.Tensor) -> torch.Tensor:
    RUNS.append(x)
    return x * 2


class Noting(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return noting(x)


@parametrize("exact", [False, True])
@parametrize("leaves", [[], [Noting]])
def test_opaque_calls_do_not_run_before_the_extractor_does(exact: bool, leaves: list[Any]) -> None:
    RUNS.clear()
    model = Sequential(linear(), Noting(), linear())
    kwargs = {"leaf_modules": leaves, "autowrap_functions": [noting]}
    extractor = extract(model, ["0", "2"], tracer_kwargs=kwargs, exact=exact)
    assert RUNS == []
    assert equal(extractor(X)["2"], model(X))


def test_an_iterator_of_leaf_modules_serves_both_modes() -> None:
    train, evaluation = node_names(Sequential(Block()), {"leaf_modules": iter([Block])})
    assert train == evaluation == ["input", "0"]


def test_constants_and_buffers() -> None:
    def forward(self: Any, x: Any) -> Any:
        return x + self.kept + self.volatile + self.plain + torch.tensor([1.0, 2.0])

    model = net(forward, kept=torch.ones(2))
    model.register_buffer("volatile", torch.ones(2) * 2, persistent=False)
    object.__setattr__(model, "plain", torch.ones(2) * 3)
    before = list(model.state_dict())
    extractor = extract(model, "output")
    assert list(model.state_dict()) == before
    assert not hasattr(model, "_tensor_constant0")
    x = torch.rand(2)
    assert equal(extractor(x)["output"], model(x))
    assert {key for key, _ in extractor.named_buffers()} >= {"kept", "volatile", "plain"}
    # What is no state of the model is none of the extractor: buffers that are not persistent, and constants.
    extractor.load_state_dict(model.state_dict())
    for made in [*(make(extractor) for make in COPIES.values()), extractor.double()]:
        assert set(made.state_dict()) <= set(model.state_dict())
        assert equal(made(x)["output"].to(x.dtype), model(x))


def test_weights_are_shared_with_the_model() -> None:
    model = Modes()
    extractor = extract(model, "body")
    assert getattr(extractor.body, "0").first is model.body[0].first
    assert extractor.load_state_dict(model.state_dict(), strict=False).missing_keys == []


def test_a_trace_waits_for_that_of_another_thread() -> None:
    other = threading.Thread(target=featx.get_graph_node_names, args=(Block(),))

    def forward(self: Any, x: Any) -> Any:
        if not other.is_alive():
            other.start()
        other.join(0.5)
        assert other.is_alive(), "the other thread traced while this one does"
        return x + 1

    names = eval_names(net(forward))
    other.join()
    assert names == ["x", "add"]


def test_a_trace_inside_of_a_trace() -> None:
    """A forward that itself lists names: the lock lets the same thread in again."""
    inner = Block()
    model = net(lambda self, x: x + len(eval_names(inner)))
    assert eval_names(model) == ["x", "add"]


def test_a_buffer_that_was_made_for_inference() -> None:
    """It may not be written to outside of inference mode, not even with what it holds."""
    with torch.inference_mode():
        table = torch.zeros(4)
    model = net(lambda self, x: self.fc(x) + self.table, fc=linear(), table=table)
    assert eval_names(model) == ["x", "fc", "add"]
