"""With exact=True every feature is what was returned in eager execution; without, a warning says where it is not."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import equal, fx, nn
from torch.nn import Sequential

from tests import featx, nets
from tests.helpers import (
    MODES,
    X,
    eval_names,
    exact,
    extract,
    feature,
    feature_extraction,
    heard,
    in_both_modes,
    in_its_mode,
    node_names,
    parametrize,
    returned,
    run,
    same,
    select,
    texts,
    truth,
    zoo,
)
from tests.nets import (
    IN_PLACE,
    Block,
    Rectifying,
    build,
    build_with_input,
    linear,
    misleading,
    net,
    writes_in_place,
)
from tests.versions import needs, older

# --- the zoo ---


def operators() -> list[Any]:
    """torchvision's own modules but those that fx cannot trace in train mode; opened, all inside can be asked for."""
    from torchvision import ops

    return [ops.Conv2dNormActivation, ops.SqueezeExcitation, ops.MLP, ops.Permute]


@zoo
@parametrize("opened", [False, True])
@parametrize("name", ["resnet18", "googlenet", "densenet121", "mobilenet_v3_small", "swin_t", "vit_b_32"])
def test_all_modules_of_a_model_at_once(name: str, opened: bool) -> None:
    model, x = build_with_input(name)
    kwargs = {"non_leaf_modules": operators()} if opened else None
    closed = (nn.MultiheadAttention,) if opened else (nn.MultiheadAttention, *operators())
    hidden = [f"{path}." for path, module in model.named_modules() if isinstance(module, closed)]
    for mode in MODES:
        expected = {}
        for path, values in returned(model.train(mode), x).items():
            single = len(values) == 1 and isinstance(values[0], torch.Tensor)
            if path and single and not path.startswith(tuple(hidden)):
                expected[path] = values[0]
        assert len(expected) > 40
        features = run(exact(model, *in_its_mode(model, list(expected)), tracer_kwargs=kwargs), x)
        assert set(features) == set(expected)
        assert [path for path, value in expected.items() if not equal(features[path], value)] == []


def check_modules(model: nn.Module, queries: list[str], **options: Any) -> dict[str, Any]:
    """Exact features; those that are paths of modules are what the first calls of these returned."""
    seen = returned(model)
    features = run(exact(model, queries, **options))
    assert set(features) == set(queries)
    for path in seen.keys() & features.keys():
        assert same(features[path], seen[path][0]), path
    return features


def warned(model: nn.Module, queries: list[str]) -> Any:
    """An extractor for the mode that the model is in, and what its warnings say, by query."""
    with heard() as caught:
        extractor = extract(model, *in_its_mode(model, queries))
    said = {text.split("'")[1]: text for text in texts(caught)}
    assert len(said) == len(caught), "one warning for each query"
    return extractor, said


@zoo
@parametrize("name", nets.collected(nets.traceable))
def test_warnings_for_all_tensors_of_a_model(name: str) -> None:
    model, x = build_with_input(name)
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        x = x[:1]  # one image is enough
    for mode in MODES:
        check_warnings_for_all_tensors(model.train(mode), x)  # a call, since all tensors of one mode are enough to keep


def check_warnings_for_all_tensors(model: nn.Module, x: torch.Tensor) -> None:
    expected = {name: value for name, value in truth(model, x).items() if isinstance(value, torch.Tensor)}
    extractor, said = warned(model, list(expected))
    values = run(extractor, x)
    assert len(expected) > 20
    changed = {query for query, value in expected.items() if not same(values[query], value)}
    overwritten = {query for query, text in said.items() if "is overwritten in place by" in text}
    assert changed <= overwritten <= changed | believed(said)


def believed(said: dict[str, str]) -> set[str]:
    """Nobody takes the value of this function of MViT v2, so it is believed to write into all that it is given."""
    return {query for query, text in said.items() if "._add_shortcut'" in text}


@zoo
@parametrize("name", nets.collected(nets.in_zoo, nets.FAMILIES))
def test_warnings_for_all_modules_of_a_model(name: str) -> None:
    model, x = build_with_input(name)
    for mode in MODES:
        seen = returned(model.train(mode), x)
        found = select(node_names(model)[0 if mode else 1])
        queries = [path for path in seen if path in found]
        extractor, said = warned(model, queries)
        values = run(extractor, x)
        assert len(queries) > 10
        changed = {query for query in queries if not same(values[query], seen[query][0])}
        assert changed <= set(said) <= changed | believed(said)


# --- names ---


def test_the_path_of_a_module_means_that_module() -> None:
    def forward(self: Any, x: Any) -> Any:
        return self.relu(torch.relu(self.fc_2(self.fc_1(x))) + self.ln_1(x))

    model = net(forward, fc_1=linear(), fc_2=linear(), ln_1=nn.LayerNorm(4), relu=nn.ReLU())
    mended = ["x", "fc_1", "fc_2", "relu_1", "ln_1", "add", "relu"]
    assert eval_names(model) == ["x", "fc", "fc_1", "relu", "ln", "add", "relu_1"]
    assert node_names(model, exact=True) == (mended, mended)
    assert list(check_modules(model, ["fc_2", "fc_1", "ln_1", "relu"])) == ["fc_1", "fc_2", "ln_1", "relu"]


def test_a_module_called_again() -> None:
    def forward(self: Any, x: Any) -> Any:
        return self.leaf(self.block(self.block_1(self.leaf(self.block(x)))))

    model = net(forward, block=Block(), leaf=linear(), block_1=nn.Tanh())  # block_1 is a path, which numbers go around
    seen = returned(model)
    features = run(exact(model, ["block", "block_2", "leaf", "leaf_1", "block_1"]))
    assert list(features) == ["block", "leaf", "block_1", "block_2", "leaf_1"]
    assert same([features["block"], features["block_2"]], seen["block"])
    assert same([features["leaf"], features["leaf_1"]], seen["leaf"])
    assert equal(features["block_1"], seen["block_1"][0])
    extractor, said = warned(model.eval(), ["block"])
    assert set(said) == {"block"}
    assert equal(run(extractor)["block"], seen["block"][1])


def test_a_module_under_two_paths_has_the_first() -> None:
    shared = Block()
    model = net(lambda self, x: self.b(self.a(x)), a=shared, b=shared)
    features = run(exact(model, ["a", "a_1"]))
    assert equal(features["a"], run(shared))
    assert equal(features["a_1"], run(model))
    with pytest.raises(featx.NodeNameError, match="'b' or lies below it"):
        exact(model, "b")


# --- what modules return ---


def test_a_constant_that_is_returned_and_then_written_into() -> None:
    def forward(self: Any, x: Any) -> Any:
        total = self.make(x)
        total.add_(x[0])
        self.hand_on(total)
        total.add_(x[1])
        return total

    make, hand_on = net(lambda self, x: torch.zeros(4)), net(lambda self, x: x)
    extractor = exact(net(forward, make=make, hand_on=hand_on), ["make", "hand_on", "output"])
    for x in (X, -X):
        expected = {"make": torch.zeros(4), "hand_on": x[0], "output": x[0] + x[1]}
        assert same(extractor(x), expected)


def test_a_module_with_the_name_of_the_output_comes_after_what_it_returns() -> None:
    model = Sequential()
    model.add_module("output", Sequential(nn.ReLU()))
    assert [*exact(model, ["output", "output.0"])(X)] == ["output.0", "output"]


class Named(NamedTuple):
    hidden: Any
    pooled: Any


@dataclasses.dataclass(frozen=True)
class Record:
    hidden: Any
    history: Any


STRUCTURES = {
    "tuple": lambda self, h: (h, h.mean()),
    "list": lambda self, h: [h, (h * 2, None)],
    "dict": lambda self, h: {"hidden": h, "more": {"twice": h * 2}},
    "ordered": lambda self, h: collections.OrderedDict(out=h, aux=h + 1),
    "named": lambda self, h: Named(h, h.mean()),
    "dataclass": lambda self, h: Record(h, [h, h + 1]),
    "constants": lambda self, h: (h, 3, "text", None, 0.5, True),
    "buffer": lambda self, h: (h, self.buffer),
    "parameter": lambda self, h: self.fc.weight,
    "named_tuple_of_torch": lambda self, h: torch.max(h, 1),
    "chunks": lambda self, h: h.chunk(2),
    "its_input": lambda self, h: h,
    "nothing": lambda self, h: None,
}


def wrapped(structure: str) -> nn.Module:
    """A net whose module ``inner`` returns a structure, and which goes on from there."""

    def inner(self: Any, x: Any) -> Any:
        return STRUCTURES[structure](self, self.fc(x))

    def forward(self: Any, x: Any) -> Any:
        self.inner(x)
        return self.last(torch.sigmoid(x))

    return net(forward, inner=net(inner, fc=linear(), buffer=torch.ones(2)), last=linear())


@parametrize("structure", STRUCTURES)
def test_structures_come_back(structure: str) -> None:
    model = wrapped(structure)
    expected = returned(model)["inner"][0]
    if structure == "dataclass" and older(torch="2.1"):  # a graph cannot hold one
        not_called(model, "inner")
        return
    value = run(exact(model, ["inner", "last"]))["inner"]
    if structure == "dataclass":
        assert isinstance(value, Record)
        expected = dataclasses.astuple(expected)
        value = dataclasses.astuple(value)
    elif structure in ("chunks", "named_tuple_of_torch"):
        expected = tuple(expected)
        value = tuple(value)
    assert same(value, expected)


def test_what_is_changed_after_it_was_returned() -> None:
    def forward(self: Any, x: Any) -> Any:
        out = self.inner(x)
        out["hidden"].mul_(0)
        out["late"] = x
        out["list"].append(x)
        return self.last(out["hidden"])

    inner = net(lambda self, x: {"hidden": self.fc(x), "list": [x + 1]}, fc=linear())
    model = net(forward, inner=inner, last=linear())
    features = check_modules(model, ["inner", "inner.fc", "last"])
    assert list(features["inner"]) == ["hidden", "list"]
    assert equal(features["last"], model.last(torch.zeros(3, 4)))


def not_called(model: nn.Module, path: str) -> None:
    text = f"named '{path}' or lies below it. It is a module that is not called in train mode, or returns what no graph"
    with pytest.raises(featx.NodeNameError, match=text):
        exact(model, path)


def each_in_turn(self: Any, x: Any) -> Any:
    for layer in self.layers:
        x = layer(x)
    return x + 1


@parametrize("forward", [each_in_turn, lambda self, x: self.layers.forward(x) + 1])
def test_a_module_that_is_never_called_itself_means_by_default_what_is_last_in_it(forward: Any) -> None:
    model = net(forward, layers=Sequential(Block(), Block()))
    not_called(model, "layers")
    features = check_modules(model, ["layers.1", "output"])
    extractor, said = warned(model.eval(), ["layers", "layers.1"])
    assert list(said) == ["layers"]
    assert "is the value of the operation 'layers.1.add', not what the module 'layers' returns" in said["layers"]
    assert same(run(extractor), {"layers": features["layers.1"], "layers.1": features["layers.1"]})


def test_a_module_that_runs_no_operation() -> None:
    inner = net(lambda self, x: x)
    model = net(lambda self, x: self.fc(self.same(x)), same=inner, fc=linear())
    assert equal(feature(model, "same", exact=True), X)
    with pytest.raises(featx.NodeNameError, match="'same' or lies below it"):
        extract(model, "same")


def test_what_is_there_before_anything_runs() -> None:
    inner = net(lambda self: 3.0)
    model = net(lambda self: self.fc(self.inner() * torch.ones(4)), inner=inner, fc=linear())
    features = exact(model, ["fc", "inner"])()
    assert list(features) == ["inner", "fc"]
    assert features["inner"] == 3.0
    assert equal(features["fc"], model())


def test_what_a_graph_cannot_hold() -> None:
    class Odd:
        pass

    def forward(self: Any, x: Any) -> Any:
        self.inner(x)
        return x + 1

    model = net(forward, inner=net(lambda self, x: [x, Odd()]))
    not_called(model, "inner")
    assert list(exact(model, "add")(X)) == ["add"]


class Odd(tuple):
    def __new__(cls, first: Any, second: Any) -> Any:
        return super().__new__(cls, (first, second))


def endless(x: Any) -> Any:
    items = [x]
    items.append(items)
    return items


@parametrize("odd", [lambda x: Odd(x, x), endless])
def test_classes_that_cannot_be_built_again_disturb_only_whoever_asks_for_them(odd: Any) -> None:
    inner = net(lambda self, x: odd(x))
    model = net(lambda self, x: self.fc(self.inner(x)[0]), inner=inner, fc=linear())
    for mended in (False, True):
        assert equal(feature(model, "fc", exact=mended), model(X))
    not_called(model, "inner")


def test_attributes_of_tensors() -> None:
    """Such a proxy has no node before it is used: that must come neither too late nor at another place."""
    inner = net(lambda self, x: (x.shape, x.mT, x.dtype))

    def forward(self: Any, x: Any) -> Any:
        shape, turned, _ = self.inner(x)
        return self.fc(x).view(shape) + turned.sum()

    model = net(forward, inner=inner, fc=linear())
    features = run(exact(model, ["inner", "output"]))
    assert same(features["inner"], (X.shape, X.mT, X.dtype))
    assert equal(features["output"], model(X))
    inner = net(lambda self: torch.zeros(2, 3).shape)
    constant = net(lambda self, x: self.fc(x + len(self.inner())), inner=inner, fc=linear())
    assert run(exact(constant, ["inner", "fc"]))["inner"] == (2, 3)
    assert eval_names(model) == feature_extraction().get_graph_node_names(model)[1]


# --- what is overwritten ---


@parametrize("kind", IN_PLACE)
def test_each_way_of_writing_in_place(kind: str) -> None:
    model = writes_in_place(kind).eval()
    queries = ["fc", eval_names(model, exact=True)[-1]]
    features = check_modules(model, queries)
    assert equal(features[queries[1]], run(model))
    _, said = warned(model, queries)
    assert list(said) == ["fc"]
    assert "is overwritten in place by" in said["fc"]
    assert not warned(model, ["fc"])[1], "alone it is not overwritten: nothing after it runs"


def test_a_write_inside_of_a_module_is_part_of_what_it_returns() -> None:
    def inner(self: Any, x: Any) -> Any:
        y = self.fc(x)
        torch.relu_(y)
        return y

    def forward(self: Any, x: Any) -> Any:
        y = self.inner(x)
        y.add_(1)
        return y * 2

    model = net(forward, inner=net(inner, fc=linear()))
    for queries in (["inner"], ["inner", "mul"], ["inner.fc", "inner", "mul"]):
        check_modules(model, queries)
    assert "is overwritten in place by" not in warned(model.eval(), ["inner"])[1].get("inner", "")
    assert not warned(model, ["inner"])[1], "the write in place returns what the module returns"


def clones(extractor: Any) -> int:
    return [node.target for node in extractor.graph.nodes].count(featx._clone)


def test_no_clone_where_none_is_needed() -> None:
    model = build("resnet18")
    assert clones(exact(model, "bn1")) == 0
    assert clones(exact(model, ["layer1", "layer4", "fc"])) == 0
    assert clones(exact(model, ["bn1", "layer1"])) == 1


def test_the_input_and_tuples_are_cloned_too() -> None:
    def forward(self: Any, x: Any) -> Any:
        halves = x.chunk(2, 1)
        x.mul_(3)
        return halves[0] + 1

    model = net(forward)
    features = run(exact(model, ["x", "chunk", "add"]))
    assert equal(features["x"], X)
    assert same(tuple(features["chunk"]), X.chunk(2, 1))
    assert equal(features["add"], X[:, :2] * 3 + 1)


def test_the_first_of_two_inputs_is_cloned() -> None:
    model = net(lambda self, x, y: x.mul_(3) + y)
    features = exact(model, ["x", "add"])(X.clone(), X)
    assert equal(features["x"], X)
    assert equal(features["add"], X * 3 + X)


def test_a_buffer_is_what_it_was() -> None:
    def forward(self: Any, x: Any) -> Any:
        before = self.inner(x)
        self.inner.count.add_(1)
        return before + self.inner.count

    inner = net(lambda self, x: (self.count, x)[0], count=torch.zeros(4))
    model = net(forward, inner=inner)
    assert equal(run(exact(model, ["inner", "output"]))["inner"], torch.zeros(4))


class Doubling(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(2) + 1


class Dropping(nn.Dropout):
    """Called so, and yet it does something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(self.p)


def doubled(x: torch.Tensor) -> torch.Tensor:
    return x.mul_(2) + 1


@parametrize(
    ("opaque", "warns"),
    [
        (Doubling(), 0),
        (Rectifying(), 1),
        (Dropping(), 0),
        (net(lambda self, x: doubled(x)), 0),
    ],
)
def test_opaque_calls_that_write_into_their_input(opaque: nn.Module, warns: int) -> None:
    """In doubt they do, which is no ground to warn."""
    model = Sequential(linear(), opaque, linear()).eval()
    kwargs = {"leaf_modules": [Doubling, Rectifying, Dropping], "autowrap_functions": [doubled]}
    check_modules(model, ["0", "2"], tracer_kwargs=kwargs)
    with heard() as caught:
        extract(model, ["0", "2"], tracer_kwargs=kwargs)
    assert len(caught) == warns


def test_what_an_opaque_leaf_may_write_is_kept_though_nothing_that_stays_takes_its_value() -> None:
    class Adding(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.add_(1)

    def forward(self: Any, x: Any) -> Any:
        y = self.fc(x)
        self.leaf(y) * 2
        return y + 1

    model = net(forward, fc=linear(), leaf=Adding()).eval()
    assert equal(feature(model, exact=True, tracer_kwargs={"leaf_modules": [Adding]}), model(X))


def test_dropout_in_place_writes_in_train_mode_only() -> None:
    model = Sequential(linear(), nn.Dropout(0.5, inplace=True))
    for mode in MODES:
        said = warned(model.train(mode), ["0", "1"])[1]
        assert list(said) == (["0"] if mode else [])
    # Whoever switches the dropout of an extractor on by hand has exact features all the same.
    extractor = exact(model.eval(), *in_its_mode(model, ["0", "1"]))
    extractor.get_submodule("1").train()
    assert equal(run(extractor)["0"], model[0](X).detach())


# --- warnings ---


def test_the_texts() -> None:
    with pytest.warns(UserWarning, match="exact=True") as caught:
        featx.create_feature_extractor(misleading(), ["ln_1", "relu", "pair", "output"])
    assert texts(caught) == [
        "the feature 'ln_1' is the value of the module 'ln_2', not what the module 'ln_1' returns,"
        " and is overwritten in place by the module 'relu'; exact=True gives its own value, or an error",
        "the feature 'pair' is the value of the operation 'pair.add', not what the module 'pair' returns;"
        " exact=True gives its own value, or an error",
    ]
    assert {warning.filename for warning in caught} == {__file__}


def test_a_hazard_of_one_mode() -> None:
    def forward(self: Any, x: Any) -> Any:
        y = self.fc(x)
        return torch.relu_(y) if self.training else torch.relu(y)

    with pytest.warns(UserWarning, match="'fc' is overwritten in place by the operation 'relu_';"):
        extract(net(forward, fc=linear()), ["fc", "output"])


def test_the_models_own_output_beside_a_module_of_that_name() -> None:
    def forward(self: Any, x: Any) -> Any:
        y = self.output(x)
        return self.fc(y), y

    model = net(forward, output=net(lambda self, x: x), fc=linear())
    assert same(feature(model), model(X))
    assert equal(feature(model, exact=True), X)


def test_a_later_call_of_a_module_that_works_in_place() -> None:
    class Doubling(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.mul_(2)
            return x

    def forward(self: Any, x: Any) -> Any:
        return self.last(self.act_1(self.act_1(self.twice(self.twice(self.fc(x))))))

    act = nn.LeakyReLU(0.5, inplace=True)
    model = net(forward, fc=linear(), twice=Doubling(), act_1=act, last=linear()).eval()
    seen = returned(model)
    extractor, said = warned(model, ["twice", "act_1"])
    values = run(extractor)
    assert not equal(values["twice"], seen["twice"][0])
    assert "a later call of the module 'act_1'" in said["act_1"]
    assert set(said) == {"twice", "act_1"}
    features = run(exact(model, ["twice", "twice_1", "act_1", "act_1_1"]))
    assert same([features[name] for name in ("twice", "twice_1")], seen["twice"])
    assert same([features[name] for name in ("act_1", "act_1_1")], seen["act_1"])


def test_an_operation_with_the_name_of_a_module_that_is_not_called() -> None:
    model = net(lambda self, x: F.relu(self.fc(x)) + 1, fc=linear(), relu=nn.ReLU()).eval()
    assert "'relu' is the value of the operation 'relu', not what the module" in warned(model, ["relu"])[1]["relu"]
    not_called(model, "relu")


# --- what can be done with them ---


def scripted(extractor: nn.Module) -> Any:
    return torch.jit.script(extractor)


def exported(extractor: nn.Module) -> Any:
    return torch.export.export(extractor, (X,)).module()


def compiled(extractor: nn.Module) -> Any:
    return torch.compile(extractor, backend="aot_eager")


def extracted(extractor: nn.Module) -> Any:
    return lambda x: exact(extractor, "output")(x)["output"]


@in_both_modes
@parametrize(
    "how",
    [
        scripted,
        pytest.param(exported, marks=needs("torch.export", torch="2.1")),
        pytest.param(compiled, marks=needs("torch.compile", torch="2.0")),
        fx.symbolic_trace,
        extracted,
    ],
)
def test_what_can_be_done_with_extractors(how: Any, mode: bool) -> None:
    model = Sequential(linear(), nn.ReLU(inplace=True), nn.BatchNorm1d(4), nn.ReLU(inplace=True)).train(mode)
    extractor = exact(model, ["0", "2", "3"])
    assert clones(extractor) == 2
    seen = returned(model)
    features = run(how(extractor))
    for key in ("0", "2", "3"):
        assert equal(features[key], seen[key][0]), key


def test_features_whose_types_differ_by_mode_are_scripted_in_one_mode() -> None:
    inner = net(lambda self, x: x + 1 if self.training else (x + 1, x * 2))
    model = net(lambda self, x: (self.inner(x), x)[1], inner=inner)
    extractor = exact(model, "inner")
    for mode in ("train", "eval"):
        getattr(extractor, mode)()
        with pytest.warns(UserWarning, match=f"the {mode} mode only"):
            script = torch.jit.script(extractor)
        assert same(run(script), run(extractor))
