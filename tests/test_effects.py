"""The caller's things come back untouched, on success and on every failure."""

from __future__ import annotations

import collections
import threading
import warnings
from typing import Any, Callable, Dict, List

import pytest
import torch
from torch import nn

from tests import featx, nets
from tests.nets import net
from tests.versions import fails_before


def picture(model: nn.Module) -> Dict[str, Any]:
    """All that a user can see of a model and of the process, as plain data with identities."""

    def shown(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return id(value), value.detach().clone()
        if isinstance(value, dict):
            return [(key, id(item)) for key, item in value.items()]
        if isinstance(value, (list, set)):
            return [id(item) for item in value]
        return value if isinstance(value, (bool, int, str)) else id(value)

    return {
        "modules": {
            path: [(name, shown(value)) for name, value in vars(module).items()]
            for path, module in model.named_modules()
        },
        "state": {key: value.clone() for key, value in model.state_dict(keep_vars=False).items()},
        "grad": torch.is_grad_enabled(),
        "rng": torch.get_rng_state(),
        "call": id(nn.Module.__call__),
        "getattr": id(nn.Module.__getattr__),
        "filters": list(warnings.filters),
    }


def frozen(model: nn.Module) -> nn.Module:
    model.train()
    list(model.modules())[-1].eval()
    return model


class Careless(nn.Module):
    """Its forward leaves traces on itself: attributes, list entries, counts in a buffer, random draws, constants."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.fails = fails
        self.fc = nn.Linear(4, 4)
        self.calls = 0
        self.history = [1]
        self.cache: Dict[str, Any] = {"a": 1}
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


MODELS: Dict[str, Callable[[], nn.Module]] = {
    "modes": nets.Modes,
    "frozen": lambda: frozen(nets.Modes()),
    "careless": Careless,
    "tied": lambda: net(lambda self, x: self.a(self.b(x)), a=(shared := nn.Linear(4, 4)), b=shared),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("mode", [True, False])
def test_success(kind: str, mode: bool) -> None:
    model = MODELS[kind]()
    if kind != "frozen":
        model.train(mode)
    before = picture(model)
    featx.get_graph_node_names(model, suppress_diff_warning=True)
    assert nets.same(picture(model), before)
    extractor = featx.create_feature_extractor(model, ["x"], suppress_diff_warning=True)
    assert nets.same(picture(model), before)
    extractor(torch.rand(2, 4))


FAILURES: Dict[str, Callable[[nn.Module], Any]] = {
    "unknown name": lambda model: featx.create_feature_extractor(model, ["nowhere"], suppress_diff_warning=True),
    "same key": lambda model: featx.create_feature_extractor(model, {"x": "k", "fc": "k"}),
    "no queries": lambda model: featx.create_feature_extractor(model),
    "bad tracer_kwargs": lambda model: featx.get_graph_node_names(model, {"leafs": 1}),
    "bad leaf": lambda model: featx.get_graph_node_names(model, {"leaf_modules": [3]}),
    "bad argument": lambda model: featx.get_graph_node_names(model, concrete_args=3),
    "unknown argument": lambda model: featx.get_graph_node_names(model, concrete_args={"nope": 3}),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("kind", MODELS)
def test_failure(kind: str, failure: str) -> None:
    model = MODELS[kind]()
    before = picture(model)
    with pytest.raises((ValueError, TypeError)):
        FAILURES[failure](model)
    assert nets.same(picture(model), before)


@pytest.mark.parametrize("function", [featx.get_graph_node_names, lambda m: featx.create_feature_extractor(m, "x")])
def test_failure_inside_of_the_trace(function: Callable[[nn.Module], Any]) -> None:
    model = nn.Sequential(nets.Block(), Careless(fails=True))
    model[0].eval()
    before = picture(model)
    with pytest.raises(featx.UntraceableError, match="at '1'"):
        function(model)
    assert nets.same(picture(model), before)


def test_failure_in_one_mode_only() -> None:
    model = net(lambda self, x: x + 1 if self.training else (x if x.sum() > 0 else -x))
    before = picture(model)
    with pytest.raises(featx.UntraceableError, match="control flow"):
        featx.get_graph_node_names(model)
    assert model.training
    assert nets.same(picture(model), before)


def test_tracer_kwargs_and_return_nodes_are_not_written_to() -> None:
    kwargs = {"leaf_modules": [nets.Block], "autowrap_functions": ()}
    return_nodes = {"0": "a"}
    concrete: Dict[str, Any] = {}
    featx.create_feature_extractor(nn.Sequential(nets.Block()), return_nodes, None, None, kwargs, True, concrete)
    assert kwargs == {"leaf_modules": [nets.Block], "autowrap_functions": ()}
    assert return_nodes == {"0": "a"}
    assert concrete == {}


class Silent(nets.Modes):
    def train(self, mode: bool = True) -> Any:  # no return value
        super().train(mode)


def test_train_that_returns_nothing() -> None:
    names = featx.get_graph_node_names(Silent(), suppress_diff_warning=True)
    assert names == featx.get_graph_node_names(nets.Modes(), suppress_diff_warning=True)


class Merging(nn.Module):
    """Merges a second weight into the first in eval mode and takes it out again in train mode, as adapters do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.delta = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.ones(4, 4))
        self.merged = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight if self.merged else x @ (self.weight + self.delta)

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if self.merged == mode:
            self.weight.data += -self.delta.data if mode else self.delta.data
            self.merged = not mode
        return self


@pytest.mark.parametrize("mode", [True, False])
def test_a_train_method_that_changes_the_weights(mode: bool) -> None:
    model, x = nn.Sequential(Merging()).train(mode), torch.rand(2, 4)
    before, expected = picture(model), model(x)
    featx.get_graph_node_names(model, suppress_diff_warning=True)
    assert nets.same(picture(model), before)
    assert torch.equal(model(x), expected)
    extractor = featx.create_feature_extractor(model, "output", suppress_diff_warning=True)
    assert torch.equal(extractor(x)["output"], expected)


class Swapping(nn.Module):
    """Keeps its weight in a dict while it is in eval mode, as moving averages do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.backup = nn.Parameter(torch.ones(4, 4)), {}

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


@pytest.mark.parametrize("outer", [lambda model: model, nn.Sequential])
def test_a_train_method_that_swaps_the_weights(outer: Callable[[nn.Module], nn.Module]) -> None:
    model = outer(Swapping()).train()
    before = picture(model)
    featx.get_graph_node_names(model)
    assert nets.same(picture(model), before)


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


@pytest.mark.parametrize("kind", ["buffer", "parameter", "attribute"])
def test_what_a_forward_makes_for_itself_is_in_the_extractor_and_not_on_the_model(kind: str) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), Lazy(kind)), torch.rand(2, 4)
    before = picture(model)
    extractor = featx.create_feature_extractor(model, ["1"])
    assert nets.same(picture(model), before)
    assert torch.equal(extractor(x)["1"], model(x))


class Strange(list):  # type: ignore[type-arg]
    def __bool__(self) -> bool:
        raise RuntimeError("has no truth")


def test_containers_of_all_sorts() -> None:
    def forward(self: Any, x: Any) -> Any:
        self.counts["a"] += 1
        return self.fc(x)

    model = net(forward, fc=nn.Linear(4, 4))
    model.counts, model.strange, model.cycle = collections.defaultdict(int, {"a": 1}), Strange([1]), []
    model.cycle.append(model.cycle)
    deep = model.deep = []
    for _ in range(3000):
        deep.append([])
        deep = deep[0]
    model.fc.register_buffer("sparse", torch.eye(3).to_sparse())
    featx.get_graph_node_names(model)
    assert model.counts == {"a": 1}
    assert len(model.cycle) == 1


@pytest.mark.skipif(not hasattr(torch, "uint4"), reason="this torch has no such type")
def test_a_buffer_that_cannot_be_copied() -> None:
    model = nets.Block()
    model.register_buffer("codes", torch.empty(2, dtype=torch.uint4))
    with pytest.raises(RuntimeError, match="not implemented for"):
        model.codes.clone()
    extractor = featx.create_feature_extractor(model, ["first"])
    assert torch.equal(extractor(torch.ones(2, 4))["first"], model.first(torch.ones(2, 4)))


def test_a_buffer_with_nan_is_not_touched() -> None:
    model = net(lambda self, x: self.fc(x) * self.scale, fc=nn.Linear(4, 4), scale=torch.tensor(float("nan")))
    model.register_buffer("count", torch.zeros(3))
    value = model(torch.rand(2, 4))
    featx.get_graph_node_names(model)
    value.sum().backward()  # would fail had the buffer been written to

    def forward(self: Any, x: Any) -> Any:
        self.count.data.add_(1)
        return self.fc(x)

    model = net(forward, fc=nn.Linear(4, 4), count=torch.zeros(3))
    featx.get_graph_node_names(model)
    assert model.count.eq(0).all()


def test_a_tracer_may_be_made_in_one_thread_and_used_in_another() -> None:
    tracer = featx.NodePathTracer()
    thread = threading.Thread(target=tracer.trace, args=(nn.Sequential(nn.Linear(4, 4), nn.ReLU()),))
    thread.start()
    thread.join()
    assert tracer.names == ["input", "0", "1"]


class Freezing(nets.Block):
    """Its train() freezes a stage for good."""

    def train(self, mode: bool = True) -> Freezing:
        super().train(mode)
        if mode:
            self.first.requires_grad_(False)
        return self


def test_a_train_method_that_freezes() -> None:
    model = Freezing().eval()
    featx.get_graph_node_names(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


class Caching(nn.Module):
    """What it makes while one mode is traced must not be seen by the trace of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: Any = None
        self.count = 0
        self.seen: Dict[str, Any] = {"deep": [[]]}
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.cache is None:
            self.cache = torch.arange(4).to(x.dtype)
        self.count += 1
        self.mean = self.mean * 0.9 + x.mean(0) * 0.1
        self.seen["deep"][0].append(x)
        return torch.stack(self.seen["deep"][0]).sum(0) * self.count + self.cache + self.mean


@fails_before(featx.UntraceableError, "a proxy cannot stand in for a buffer", torch="2.14")
def test_a_trace_does_not_see_the_one_before() -> None:
    model, x = Caching(), torch.rand(2, 4)
    before = picture(model)
    names = featx.get_graph_node_names(model)
    assert names.train == names.eval
    with pytest.warns(featx.FeatureWarning):
        extractor = featx.create_feature_extractor(model, ["output"])
    assert nets.same(picture(model), before)
    assert model.seen == {"deep": [[]]}
    assert torch.equal(extractor(x)["output"], Caching()(x))


RUNS: List[Any] = []


def noting(x: torch.Tensor) -> torch.Tensor:
    RUNS.append(x)
    return x * 2


class Noting(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return noting(x)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("leaves", [[], [Noting]])
def test_opaque_calls_do_not_run_before_the_extractor_does(exact: bool, leaves: List[Any]) -> None:
    RUNS.clear()
    model, x = nn.Sequential(nn.Linear(4, 4), Noting(), nn.Linear(4, 4)), torch.rand(2, 4)
    kwargs = {"leaf_modules": leaves, "autowrap_functions": [noting]}
    extractor = featx.create_feature_extractor(model, ["0", "2"], tracer_kwargs=kwargs, exact=exact)
    assert RUNS == []
    assert torch.equal(extractor(x)["2"], model(x))


def test_an_iterator_of_leaf_modules_serves_both_modes() -> None:
    names = featx.get_graph_node_names(nn.Sequential(nets.Block()), {"leaf_modules": iter([nets.Block])})
    assert names.train == names.eval == ["input", "0"]


def extracted(model: nn.Module) -> List[str]:
    return [node.name for node in featx.create_feature_extractor(model, ["first", "add"]).graph.nodes]


@pytest.mark.parametrize("work", [featx.get_graph_node_names, extracted])
def test_other_threads_run_their_models_while_one_traces(work: Callable[[nn.Module], Any]) -> None:
    errors, served, done = [], [], threading.Event()
    others, mine, x = nets.Modes().eval(), nets.Block(), torch.rand(2, 4)
    expected, result = others(x), work(mine)

    def serve() -> None:
        try:
            while not done.is_set():
                assert torch.equal(others(x), expected)
                assert isinstance(mine(x), torch.Tensor)
                served.append(True)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=serve, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(30):
            assert work(mine) == result
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert errors == []
    assert served


def test_constants_and_buffers() -> None:
    def forward(self: Any, x: Any) -> Any:
        return x + self.kept + self.volatile + self.plain + torch.tensor([1.0, 2.0])

    model = net(forward, kept=torch.ones(2))
    model.register_buffer("volatile", torch.ones(2) * 2, persistent=False)
    object.__setattr__(model, "plain", torch.ones(2) * 3)
    before = list(model.state_dict())
    extractor = featx.create_feature_extractor(model, ["output"])
    assert list(model.state_dict()) == before
    assert not hasattr(model, "_tensor_constant0")
    x = torch.rand(2)
    assert torch.equal(extractor(x)["output"], model(x))
    # As in the model, a buffer that is not persistent is in no state dict; the constants are, as torchvision's are.
    assert "volatile" not in extractor.state_dict()
    assert extractor.load_state_dict(model.state_dict(), strict=False).unexpected_keys == []
    assert {key for key, _ in extractor.named_buffers()} >= {"kept", "volatile", "plain"}


def test_weights_are_shared_with_the_model() -> None:
    model = nets.Modes()
    extractor = featx.create_feature_extractor(model, ["body"], suppress_diff_warning=True)
    assert getattr(extractor.body, "0").first is model.body[0].first
    assert extractor.load_state_dict(model.state_dict(), strict=False).missing_keys == []


def test_one_thread_traces_at_a_time() -> None:
    expected = featx.get_graph_node_names(nets.Modes(), suppress_diff_warning=True)
    results, errors = [], []

    def work() -> None:
        try:
            for _ in range(5):
                results.append(featx.get_graph_node_names(nets.Modes(), suppress_diff_warning=True))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert results == [expected] * 30


def test_a_trace_waits_for_that_of_another_thread() -> None:
    other = threading.Thread(target=featx.get_graph_node_names, args=(nets.Block(),))

    def forward(self: Any, x: Any) -> Any:
        if not other.is_alive():
            other.start()
        other.join(0.5)
        assert other.is_alive(), "the other thread traced while this one does"
        return x + 1

    tracer_names = featx.get_graph_node_names(net(forward))
    other.join()
    assert tracer_names.eval == ["x", "add"]


def test_a_trace_inside_of_a_trace() -> None:
    """A forward that itself lists names: the lock lets the same thread in again."""
    inner = nets.Block()
    model = net(lambda self, x: x + len(featx.get_graph_node_names(inner).eval))
    assert featx.get_graph_node_names(model).eval == ["x", "add"]


def test_a_buffer_that_was_made_for_inference() -> None:
    """It may not be written to outside of inference mode, not even with what it holds."""
    with torch.inference_mode():
        table = torch.zeros(4)
    model = net(lambda self, x: self.fc(x) + self.table, fc=nn.Linear(4, 4), table=table)
    assert featx.get_graph_node_names(model).eval == ["x", "fc", "add"]
