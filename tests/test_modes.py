"""Two modes, one module: whatever sets the mode, the extractor follows it; copies keep everything."""

from __future__ import annotations

import copy
import gc
import io
import linecache
import math
import pickle
from typing import Any, Callable

import pytest
import torch
from torch import equal, fx, nn
from torch.nn import Sequential
from torch.nn.utils import prune
from torch.nn.utils.parametrize import register_parametrization

from tests import featx
from tests.helpers import (
    COPIES,
    MODES,
    X,
    by_pickle,
    check_flips,
    extract,
    feature,
    in_both_modes,
    parametrize,
    run,
    same,
    seeded,
)
from tests.nets import LIKE_CODE, Block, Modes, linear, net, with_member
from tests.versions import needs, older

BOTH = {"body": "b", "head": "h", "output": "o"}


def make(model: nn.Module | None = None) -> Any:
    return extract(model or Modes(), BOTH)


def make_apart(model: nn.Module | None = None) -> Any:
    """Each mode has features of its own."""
    return extract(model or Modes(), train_return_nodes=["head", "aux"], eval_return_nodes=["head", "mul"])


def expected(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """By hand, in the model's own mode; each has operations that the other lacks."""
    body = model.body(x)
    head = model.head(body)
    output = head + model.aux(body).mean() if model.training else head * 2
    return {"b": body, "h": head, "o": output}


def test_train_and_eval() -> None:
    model = Modes()
    extractor = make(model)
    check_flips(lambda: run(extractor), lambda: run(lambda x: expected(model, x)), extractor, model)


@in_both_modes
def test_it_starts_in_the_models_mode(mode: bool) -> None:
    assert make(Modes().train(mode)).training is mode


def test_frozen_submodules_stay_frozen() -> None:
    model = Modes().train()
    model.body.eval()
    extractor = make(model)
    assert extractor.training
    assert not any(module.training for module in extractor.body.modules())
    assert not any(module.training for module in model.body.modules())


def test_the_attribute_set_by_hand() -> None:
    extractor = make_apart()
    extractor.training = False
    assert list(extractor(X)) == ["head", "mul"]
    extractor.training = True
    assert list(extractor(X)) == ["head", "aux"]


def test_one_graph_for_both_modes_needs_no_choice() -> None:
    extractor = extract(Block(), "add")
    assert "_featx_train" not in vars(type(extractor))
    for mode in MODES:
        assert list(extractor.train(mode)(X)) == ["add"]


def mark(module: nn.Module, inputs: Any, output: Any) -> Any:
    return {**output, "hooked": torch.ones(1)}


@parametrize("how", COPIES)
@in_both_modes
def test_copies(how: str, mode: bool) -> None:
    model = Modes()
    model.head.weight = model.aux.weight = nn.Parameter(torch.rand(3, 4))  # tied
    model.head.bias = model.aux.bias
    extractor = make_apart(model).train(mode)
    extractor.body.eval()
    extractor.register_forward_hook(mark)
    twin = COPIES[how](extractor)
    assert type(twin).__name__ == type(extractor).__name__ == "Modes"
    assert isinstance(twin, featx.DualGraphModule)
    assert [m.training for m in twin.modules()] == [m.training for m in extractor.modules()]
    assert list(twin.state_dict()) == list(extractor.state_dict())
    assert twin.head.weight is twin.aux.weight
    assert (twin.head is extractor.head) == (how == "copy")
    for each in MODES:
        twin.training = extractor.training = each
        assert same(run(twin), run(extractor))
        assert list(run(twin))[-1] == "hooked"
        assert twin.code == extractor.code
    assert [n.name for n in twin.train_graph.nodes] == [n.name for n in extractor.train_graph.nodes]


@parametrize("how", COPIES)
@pytest.mark.skipif(older(torch="2.2"), reason="modules of older torch have no compile()")
def test_copies_of_what_was_compiled_run_themselves(how: str) -> None:
    extractor = extract(Sequential(linear()), ["0"])
    extractor.compile(backend="eager")
    twin = COPIES[how](extractor)
    copied = twin.get_submodule("0")
    copied.weight.data.zero_()
    assert equal(twin(X)["0"], copied.bias.expand(3, 4))


@parametrize("how", [copy.copy, copy.deepcopy])
def test_copies_keep_what_was_noted_at_nodes(how: Callable[[Any], Any]) -> None:
    extractor = make()
    for graph in (extractor.train_graph, extractor.eval_graph):
        for node in graph.nodes:
            node.meta["noted"] = node.name
    twin = how(extractor)
    for graph in (twin.train_graph, twin.eval_graph):
        assert [node.meta["noted"] for node in graph.nodes] == [node.name for node in graph.nodes]
        next(iter(graph.nodes)).meta.clear()
    assert all(node.meta for node in (*extractor.train_graph.nodes, *extractor.eval_graph.nodes))


def test_copies_are_independent() -> None:
    extractor = make().eval()
    twin = copy.copy(extractor)
    twin.train().register_forward_hook(mark)
    assert not extractor.training
    assert list(extractor(X)) == ["b", "h", "o"]


def test_targets_that_pickle_cannot_find_by_itself() -> None:
    def forward(self: Any, x: Any) -> Any:
        pooled = torch.nn.functional.max_pool1d(torch.ops.aten.mul.Tensor(x, 2)[None], 2)
        return (pooled + torch.ops.aten.neg(x).sum()) * x.shape[0]  # which is a call of the builtin getattr

    model = net(forward)
    twin = by_pickle(extract(model, "output"))
    assert equal(twin(X)["output"], model(X))


def test_targets_without_a_name_can_be_copied() -> None:
    extractor = extract(Block(), "add")
    for graph in (extractor.train_graph, extractor.eval_graph):
        for node in graph.nodes:
            if node.target is torch.sigmoid:
                node.target = lambda x: torch.sigmoid(x) * 2
    before = extractor(X)["add"]
    extractor.recompile()
    after = extractor(X)["add"]
    assert not equal(after, before)
    for how in (copy.copy, copy.deepcopy):
        assert equal(how(extractor)(X)["add"], after)
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        pickle.dumps(extractor)


def test_script_follows_the_mode() -> None:
    extractor = make()
    scripted = torch.jit.script(extractor)
    # With gradients: without them the oldest torch draws other numbers in a script.
    check_flips(lambda: seeded(scripted, X), lambda: seeded(extractor, X), scripted, extractor)
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    for mode in MODES:
        # The file has statistics of its own; those of the extractor move in train mode.
        loaded.load_state_dict(extractor.state_dict(), strict=False)
        assert same(seeded(loaded.train(mode), X), seeded(extractor.train(mode), X))


@needs("torch.compile", torch="2.0")
def test_compile_follows_the_mode() -> None:
    extractor = make()
    compiled = torch.compile(extractor, backend="eager")
    check_flips(lambda: run(compiled), lambda: run(extractor), compiled)
    parent = Sequential(extractor)
    compiled_parent = torch.compile(parent, backend="eager")
    check_flips(lambda: run(compiled_parent), lambda: run(parent), parent)
    one_graph = extract(Block(), ["first", "add"])  # for both modes
    assert same(torch.compile(one_graph, backend="eager")(X), one_graph(X))


@needs("torch.export", torch="2.1")
@in_both_modes
def test_export_takes_the_mode_it_finds(mode: bool) -> None:
    model = net(lambda self, x: self.fc(x) + (1 if self.training else 2), fc=linear())
    extractor = extract(model, ["fc", "add"]).train(mode)
    program = torch.export.export(extractor, (X,))
    assert same(program.module()(X), extractor(X))


def test_graph_and_code_are_the_active_modes() -> None:
    extractor = make().eval()
    assert extractor.graph is extractor.eval_graph
    assert "aux" not in extractor.code
    extractor.train()
    assert extractor.graph is extractor.train_graph
    assert str(extractor).startswith("Modes(")
    extractor.graph.lint()


def test_a_graph_edited_by_hand() -> None:
    extractor = extract(Block(), "add")
    for node in extractor.eval_graph.nodes:
        if node.target is torch.sigmoid:
            node.target = torch.tanh
    before = extractor.eval()(X)["add"]
    assert extractor.recompile().src == extractor.code
    changed = extractor.eval()(X)["add"]
    assert not equal(changed, before)
    assert equal(extractor.train()(X)["add"], before), "the other mode's graph was not edited"
    assert equal(copy.deepcopy(extractor).eval()(X)["add"], changed)


def test_a_graph_that_is_replaced() -> None:
    extractor = extract(Block(), "add").eval()
    extractor.graph = copy.deepcopy(extractor.graph)
    assert extractor.eval_graph.owning_module is extractor
    assert list(extractor(X)) == ["add"]


@parametrize("how", COPIES)
def test_graphs_know_their_module(how: str) -> None:
    extractor = make()
    for module in (extractor, COPIES[how](extractor)):
        assert module.train_graph.owning_module is module
        assert module.eval_graph.owning_module is module


def test_children_are_looked_up_the_fast_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them costs the detour over nn.Module.__getattr__."""
    outer = net(lambda self, x: self.inner(x), inner=Block())
    model = net(lambda self, x: self.outer(x), outer=outer)
    extractor = extract(model, "outer")
    looked_up: list[str] = []
    original = nn.Module.__getattr__

    def noting(self: nn.Module, name: str) -> Any:
        looked_up.append(name)
        return original(self, name)

    monkeypatch.setattr(nn.Module, "__getattr__", noting)
    extractor(X)
    assert set(looked_up) == {"weight", "bias"}  # by the leaves themselves


def test_source_lines_go_with_their_module() -> None:
    def files() -> set[str]:
        gc.collect()
        return {name for name in linecache.cache if name.startswith("<featx ")}

    before = files()
    extractor = make()
    assert len(files() - before) == 3  # forward and one for each mode
    del extractor
    assert files() <= before


@parametrize("name", [*LIKE_CODE, 'a, print("executed") or "b'])
def test_the_name_of_a_module_is_never_code(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = with_member(name)
    try:
        value = feature(model, "add")
    except (SyntaxError, AttributeError, KeyError) as error:
        pytest.fail(f"the name became code: {error!r}")
    assert equal(value, model(X))
    assert capsys.readouterr().out == ""


@parametrize(
    ("train", "evaluation"),
    [
        ((0.0,), (-0.0,)),
        ((1,), (True,)),
        ((1,), (1.0,)),
        ((math.nan,), (math.inf,)),
        ((0.1 + 0.2,), (0.3,)),
        ((1, 2), (1,)),
        (([1, (2,)],), ([1, [2]],)),
        (({"a": 1},), ({"b": 1},)),
        ((torch.float32,), (torch.float64,)),
    ],
    ids=str,
)
def test_modes_that_differ_in_one_argument(train: Any, evaluation: Any) -> None:
    class Differing(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return noted(x, *(train if self.training else evaluation))

    extractor = extract(Differing(), "noted", tracer_kwargs={"autowrap_functions": (noted,)})
    for mode, expected in ((True, train), (False, evaluation), (True, train)):
        assert repr(extractor.train(mode)(X)["noted"]) == repr(list(expected))


def noted(x: torch.Tensor, *args: Any) -> list[Any]:
    return list(args)


def test_dual_graph_module_by_hand() -> None:
    model = Modes()
    graphs = [fx.Tracer().trace(model.train(mode)) for mode in (True, False)]
    module = featx.DualGraphModule(model, *graphs, class_name="Two")
    assert type(module).__name__ == "Two"
    check_flips(lambda: run(module), lambda: run(model), module, model)
    with pytest.raises(AttributeError, match="no attribute 'body'"):
        featx.DualGraphModule(nn.Linear(1, 1), *graphs)


# --- ways in which users change modules: the next call sees each of them ---


def block(extractor: nn.Module) -> Any:
    return extractor.get_submodule("a.0")


@parametrize(
    "change",
    [
        lambda e: setattr(block(e), "second", linear()),
        lambda e: block(e)._modules.__setitem__("second", linear()),
        lambda e: setattr(block(e), "_modules", dict(Block()._modules)),
        lambda e: setattr(e.a, "0", Block()),
        lambda e: setattr(e, "a", Sequential(Block())),
        lambda e: e.add_module("a", Sequential(Block())),
        lambda e: e.add_submodule("a.0", Block()),
        lambda e: block(e).load_state_dict(Block().state_dict()),
        lambda e: register_parametrization(block(e).first, "weight", Doubled()),
        lambda e: prune.random_unstructured(block(e).first, "weight", 5),
        lambda e: block(e).first.register_forward_hook(lambda module, args, value: value * 2),
        lambda e: setattr(block(e).first, "weight", nn.Parameter(torch.zeros(4, 4))),
        lambda e: e._apply(lambda tensor: tensor * 2),
    ],
)
@parametrize("how", ["as made", "deepcopy", "pickle"])
def test_changes_are_seen(change: Callable[[nn.Module], Any], how: str) -> None:
    model = net(lambda self, x: self.a(x), a=Sequential(Block()))
    original = extract(model, "a")
    extractor = {"as made": lambda e: e, **COPIES}[how](original)
    before = extractor(X)["a"]
    change(extractor)
    assert not equal(extractor(X)["a"], before)
    if how != "as made":
        assert equal(original(X)["a"], before)


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


@parametrize(
    ("delete", "error"),
    [
        (lambda e: delattr(e, "0"), "'0'"),
        (lambda e: setattr(e, "0", None), "NoneType"),
        (lambda e: e.delete_submodule("0.0"), "'0'"),
        (lambda e: e.get_submodule("0.0")._modules.pop("second"), "'second'"),
        (lambda e: setattr(e.get_submodule("0.0"), "_modules", {}), "'first'"),
    ],
)
def test_what_is_deleted_does_not_run(delete: Callable[[nn.Module], Any], error: str) -> None:
    extractor = extract(Sequential(Sequential(Block())), ["0"])
    delete(extractor)
    with pytest.raises((KeyError, AttributeError), match=error):
        extractor(X)


def test_annotations_that_are_strings_can_be_scripted() -> None:
    class Annotated(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    assert Annotated.forward.__annotations__["x"] == "torch.Tensor"
    extractor = extract(Annotated(), "mul")
    assert same(torch.jit.script(extractor)(X), extractor(X))


def test_annotations_that_mean_nothing_at_run_time() -> None:
    class Annotated(Block):
        def forward(self, x: OnlyForTypeCheckers) -> Any:  # type: ignore[name-defined]  # noqa: F821
            return super().forward(x)

    model = Annotated()
    extractor = extract(model, "output")
    assert equal(extractor(X)["output"], model(X))
    assert [node.type for node in extractor.graph.nodes][0] is None


def test_a_graph_with_a_code_generator_of_its_own() -> None:
    class Generator(fx.graph.CodeGen):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.ones(2)  # whose comparison is not a bool

    graphs = [fx.Tracer().trace(Sequential(nn.ReLU())) for _ in range(2)]
    for graph in graphs:
        graph.set_codegen(Generator())
    assert equal(featx.DualGraphModule(Sequential(nn.ReLU()), *graphs)(X), X.relu())


def test_quantization_swaps_leaves() -> None:
    model = Sequential(Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Conv2d(4, 4, 3)).eval()
    extractor = extract(model, ["0.0", "1"])
    observer = torch.ao.quantization.MinMaxObserver
    extractor.qconfig = torch.ao.quantization.QConfig(observer, observer.with_args(dtype=torch.qint8))
    prepared = torch.ao.quantization.prepare(extractor)
    prepared(torch.rand(2, 3, 8, 8))
    converted = torch.ao.quantization.convert(prepared)
    assert type(converted.get_submodule("0.0")).__module__.startswith("torch.ao.nn.quantized")
    quantized = torch.quantize_per_tensor(torch.rand(2, 3, 8, 8), 1 / 128, 0, torch.quint8)
    assert converted(quantized)["1"].is_quantized


def test_a_number_in_a_graph_by_hand() -> None:
    graphs = [fx.Graph(), fx.Graph()]
    for graph in graphs:
        operands = graph.placeholder("x"), graph.create_node("get_attr", "scale")
        graph.output(graph.call_function(torch.mul, operands))
    model = nn.Module()
    model.scale = 3.0
    assert equal(featx.DualGraphModule(model, *graphs)(X), X * 3)


def test_copies_share_their_code() -> None:
    extractor = extract(Modes(), "output")
    for copied in (copy.copy(extractor), copy.deepcopy(extractor)):
        assert type(copied).forward is type(extractor).forward
        copied.recompile()
        assert type(copied).forward is not type(extractor).forward
