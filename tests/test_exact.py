"""With exact=True every feature is what was returned in eager execution; without, a warning says where it is not."""

from __future__ import annotations

import collections
import copy
import dataclasses
import warnings
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import equal, fx, nn

from tests import featx, nets
from tests.conformance import slow
from tests.helpers import (
    X,
    by_pickle,
    by_torch_save,
    eval_names,
    extract,
    feature_extraction,
    heard,
    in_both_modes,
    node_names,
    parametrize,
    same,
    snapshot,
    truth,
)
from tests.nets import IN_PLACE, Block, build, build_on_meta, build_with_input, linear, net, writes_in_place, zoo_input
from tests.versions import needs, older


def exact(model: nn.Module, queries: Any, **options: Any) -> nn.Module:
    """An exact extractor, made without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return extract(model, queries, exact=True, **options)


def names(model: nn.Module) -> list[str]:
    return eval_names(model, exact=True)


def seen_by_hooks(model: nn.Module, x: torch.Tensor) -> dict[str, list[Any]]:
    """What each call of each module returned, cloned at that moment, in eager execution."""
    seen: dict[str, list[Any]] = collections.defaultdict(list)
    hooks = [
        module.register_forward_hook(lambda m, args, value, path=path: seen[path].append(snapshot(value)))
        for path, module in model.named_modules()
        if path
    ]
    torch.manual_seed(1)
    with torch.no_grad():
        model(x.clone())
    for hook in hooks:
        hook.remove()
    return dict(seen)


def run(extractor: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    torch.manual_seed(1)
    with torch.no_grad():
        return extractor(x.clone())


# --- the zoo ---


def operators() -> list[Any]:
    """torchvision's own modules but those that fx cannot trace in train mode; opened, all inside can be asked for."""
    from torchvision import ops

    return [ops.Conv2dNormActivation, ops.SqueezeExcitation, ops.MLP, ops.Permute]


@pytest.mark.zoo
@parametrize("opened", [False, True])
@parametrize("name", ["resnet18", "googlenet", "densenet121", "mobilenet_v3_small", "swin_t", "vit_b_32"])
def test_all_modules_of_a_model_at_once(name: str, opened: bool) -> None:
    model, x = build_with_input(name)
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
        features = run(
            exact(model, None, train_return_nodes=by_mode[0], eval_return_nodes=by_mode[1], tracer_kwargs=kwargs), x
        )
        assert set(features) == set(queries)
        assert [query for query in queries if not equal(features[query], expected[query][0])] == []


def warned(model: nn.Module, queries: list[str]) -> Any:
    """An extractor for the mode that the model is in, and what its warnings say, by query."""
    with heard() as caught:
        by_mode = (queries, []) if model.training else ([], queries)
        extractor = extract(model, None, *by_mode)
    texts = [str(warning.message) for warning in caught]
    said = {text.split("'")[1]: text for text in texts}
    assert len(said) == len(texts), "one warning for each query"
    return extractor, said


@pytest.mark.zoo
@parametrize("name", nets.collected(nets.traceable))
def test_warnings_for_all_tensors_of_a_model(name: str) -> None:
    model, x = build_with_input(name)
    for mode in (True, False):
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


@pytest.mark.zoo
@parametrize("name", nets.collected(nets.in_zoo, nets.FAMILIES))
def test_warnings_for_all_modules_of_a_model(name: str) -> None:
    model, x = build_with_input(name)
    for mode in (True, False):
        model.train(mode)
        seen = seen_by_hooks(model, x)
        listed = node_names(model)[0 if mode else 1]
        queries = [path for path in seen if featx._select(listed, [path])]
        extractor, said = warned(model, queries)
        values = run(extractor, x)
        assert len(queries) > 10
        changed = {query for query in queries if not same(values[query], seen[query][0])}
        assert changed <= set(said) <= changed | believed(said)


STAGES = {
    "resnet18": ["layer1", "layer2", "layer3", "layer4", "avgpool", "fc"],
    "vgg16_bn": ["features", "classifier", *(f"features.{at}" for at in (6, 13, 23, 33, 43))],
    "densenet121": [f"features.{part}" for part in ("pool0", "denseblock1", "transition1", "denseblock4")],
    "swin_t": [f"features.{at}" for at in range(8)],
    "efficientnet_b0": [f"features.{at}" for at in range(9)],
}


@pytest.mark.zoo
@parametrize("name", STAGES)
def test_no_warning_for_stages(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extract(build_on_meta(name), STAGES[name])


# --- names ---


def test_the_path_of_a_module_means_that_module() -> None:
    def forward(self: Any, x: Any) -> Any:
        return self.relu(torch.relu(self.fc_2(self.fc_1(x))) + self.ln_1(x))

    model = net(forward, fc_1=linear(), fc_2=linear(), ln_1=nn.LayerNorm(4), relu=nn.ReLU())
    default = eval_names(model)
    assert default == ["x", "fc", "fc_1", "relu", "ln", "add", "relu_1"]
    assert names(model) == ["x", "fc_1", "fc_2", "relu_1", "ln_1", "add", "relu"]
    assert node_names(model, exact=True).train == names(model)
    seen = seen_by_hooks(model, X)
    features = run(exact(model, ["fc_1", "fc_2", "ln_1", "relu"]), X)
    assert list(features) == ["fc_1", "fc_2", "ln_1", "relu"]
    for path, value in features.items():
        assert equal(value, seen[path][0]), path


def test_vits_layer_norms() -> None:
    model = build_on_meta("vit_b_32")
    first = "encoder.layers.encoder_layer_0"
    default, mended = (eval_names(model, exact=way) for way in (False, True))
    assert f"{first}.ln" in default
    assert f"{first}.ln" not in mended
    assert [name for name in mended if name.startswith(f"{first}.ln")] == [f"{first}.ln_1", f"{first}.ln_2"]


def test_the_fast_way_equals_the_slow_one(rng: Any) -> None:
    for _ in range(500):
        pool = ["a", "a_1", "a_2", "a.b", "a.b_1", "a_1.b", "x", "x_1", "x_1_1", "x_3"]
        paths = rng.sample(pool, rng.randrange(1, 8))
        calls = []
        for _ in range(rng.randrange(30)):
            if rng.random() < 0.4:
                calls.append((rng.choice(paths), None))
            else:
                calls.append(
                    (rng.choice(["", "a", "a_1"]), rng.choice(["x", "x_1", "x_0", "b", "b_7", "a", "a_2_1", "x_1_1"]))
                )
        namer = featx._Namer(paths)
        given = [namer.name(*call) for call in calls]
        assert given == slow.exact_names(paths, calls), (paths, calls)
        assert len(set(given)) == len(given)
        for path in paths:
            assert all(call == (path, None) for call, name in zip(calls, given) if name == path)


def test_a_module_called_again() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.leaf = Block(), linear()
            self.block_1 = nn.Tanh()  # a real path, which numbers go around

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.leaf(self.block(self.block_1(self.leaf(self.block(x)))))

    model = Twice()
    seen = seen_by_hooks(model, X)
    features = run(exact(model, ["block", "block_2", "leaf", "leaf_1", "block_1"]), X)
    assert list(features) == ["block", "leaf", "block_1", "block_2", "leaf_1"]
    assert equal(features["block"], seen["block"][0])
    assert equal(features["block_2"], seen["block"][1])
    assert equal(features["leaf"], seen["leaf"][0])
    assert equal(features["leaf_1"], seen["leaf"][1])
    assert equal(features["block_1"], seen["block_1"][0])
    extractor, said = warned(model.eval(), ["block"])
    assert set(said) == {"block"}
    assert equal(run(extractor, X)["block"], seen["block"][1])


def test_a_module_under_two_paths_has_the_first() -> None:
    shared = Block()
    model = net(lambda self, x: self.b(self.a(x)), a=shared, b=shared)
    features = run(exact(model, ["a", "a_1"]), X)
    with torch.no_grad():
        assert equal(features["a"], shared(X))
        assert equal(features["a_1"], shared(shared(X)))
    with pytest.raises(featx.NodeNameError, match="'b' or lies below it"):
        exact(model, ["b"])


# --- what modules return ---


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
    seen = seen_by_hooks(model, X)["inner"][0]
    if structure == "dataclass" and older(torch="2.1"):  # a graph cannot hold one
        with pytest.raises(ValueError, match="'inner' returned cannot be a feature, ask for what is inside"):
            exact(model, ["inner", "last"])
        return
    features = run(exact(model, ["inner", "last"]), X)
    value = features["inner"]
    if isinstance(seen, Record):
        assert isinstance(value, Record)
        assert same(dataclasses.astuple(value), dataclasses.astuple(seen))
    else:
        assert same(
            tuple(value) if structure in ("chunks", "named_tuple_of_torch") else value,
            seen if structure not in ("chunks", "named_tuple_of_torch") else tuple(seen),
        )


def test_what_is_changed_after_it_was_returned() -> None:
    def forward(self: Any, x: Any) -> Any:
        out = self.inner(x)
        out["hidden"].mul_(0)
        out["late"] = x
        out["list"].append(x)
        return self.last(out["hidden"])

    inner = net(lambda self, x: {"hidden": self.fc(x), "list": [x + 1]}, fc=linear())
    model = net(forward, inner=inner, last=linear())
    seen = seen_by_hooks(model, X)["inner"][0]
    features = run(exact(model, ["inner", "inner.fc", "last"]), X)
    assert list(features["inner"]) == ["hidden", "list"]
    assert same(features["inner"], seen)
    assert equal(features["inner.fc"], seen["hidden"])
    assert equal(features["last"], model.last(torch.zeros(3, 4)).detach())


@pytest.mark.zoo
def test_structures_of_the_zoo() -> None:
    googlenet, x = build("googlenet").train(), zoo_input("googlenet")
    torch.manual_seed(1)
    with torch.no_grad():
        own = googlenet(x.clone())
    value = run(exact(googlenet, None, train_return_nodes=["output"], eval_return_nodes=[]), x)["output"]
    assert type(value) is type(own)
    assert same(tuple(value), tuple(own))
    assert equal(value.aux_logits1, own.aux_logits1)
    model, x = build("lraspp_mobilenet_v3_large").eval(), zoo_input("lraspp_mobilenet_v3_large")
    seen = seen_by_hooks(model, x)["backbone"][0]
    features = run(exact(model, ["backbone", "output", "classifier"]), x)
    assert list(seen) == ["low", "high"]
    assert same(features["backbone"], dict(seen))
    assert isinstance(features["output"], dict)
    extractor, said = warned(model, ["backbone"])
    assert "is the value of the operation" in said["backbone"] or "is the value of the module" in said["backbone"]


def test_a_container_that_is_never_called_means_what_is_last_in_it() -> None:
    def forward(self: Any, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x + 1

    model = net(forward, layers=nn.ModuleList([Block(), Block()]))
    features = run(exact(model, ["layers", "layers.1"]), X)
    assert equal(features["layers"], features["layers.1"])
    assert not warned(model.eval(), ["layers", "layers.1"])[1]


def test_a_module_that_runs_no_operation() -> None:
    model = net(lambda self, x: self.fc(self.same(x)), same=net(lambda self, x: x), fc=linear())
    assert equal(run(exact(model, ["same"]), X)["same"], X)
    with pytest.raises(featx.NodeNameError, match="'same' or lies below it"):
        extract(model, ["same"])


def test_what_is_there_before_anything_runs() -> None:
    model = net(lambda self: self.fc(self.inner() * torch.ones(4)), inner=net(lambda self: 3.0), fc=linear())
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
    with pytest.raises(
        ValueError, match="what the module 'inner' returned cannot be a feature, ask for what is inside: .*Odd"
    ):
        exact(model, ["inner"])
    assert list(exact(model, ["add"])(X)) == ["add"]


class Odd(tuple):
    def __new__(cls, first: Any, second: Any) -> Any:
        return super().__new__(cls, (first, second))


def endless(x: Any) -> Any:
    items = [x]
    items.append(items)
    return items


@parametrize("odd", [lambda x: Odd(x, x), endless])
def test_classes_that_cannot_be_built_again_disturb_only_whoever_asks_for_them(odd: Any) -> None:
    model = net(lambda self, x: self.fc(self.inner(x)[0]), inner=net(lambda self, x: odd(x)), fc=linear())
    for options in ({}, {"exact": True}):
        extractor = extract(model, ["fc"], **options)
        assert equal(extractor(X)["fc"], model(X))
    with pytest.raises(ValueError, match="'inner' returned cannot be a feature"):
        exact(model, ["inner"])


def test_attributes_of_tensors() -> None:
    """Such a proxy has no node before it is used: that must come neither too late nor at another place."""
    inner = net(lambda self, x: (x.shape, x.mT, x.dtype))

    def forward(self: Any, x: Any) -> Any:
        shape, turned, _ = self.inner(x)
        return self.fc(x).view(shape) + turned.sum()

    model = net(forward, inner=inner, fc=linear())
    features = run(exact(model, ["inner", "output"]), X)
    assert same(features["inner"], (X.shape, X.mT, X.dtype))
    assert equal(features["output"], model(X))
    constant = net(lambda self, x: self.fc(x + len(self.inner())), inner=net(lambda self: torch.zeros(2, 3).shape))
    constant.fc = linear()
    assert run(exact(constant, ["inner", "fc"]), X)["inner"] == (2, 3)
    theirs = feature_extraction()
    assert eval_names(model) == theirs.get_graph_node_names(model)[1]


# --- what is overwritten ---


@parametrize("kind", IN_PLACE)
def test_each_way_of_writing_in_place(kind: str) -> None:
    model = writes_in_place(kind).eval()
    seen = seen_by_hooks(model, X)["linear"][0]
    listed = names(model)
    features = run(exact(model, ["linear", listed[-1]]), X)
    assert equal(features["linear"], seen)
    with torch.no_grad():
        assert equal(features[listed[-1]], model(X))
    _, said = warned(model, ["linear", listed[-1]])
    assert list(said) == ["linear"]
    assert "is overwritten in place by" in said["linear"]
    assert not warned(model, ["linear"])[1], "alone it is not overwritten: nothing after it runs"


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
    seen = seen_by_hooks(model, X)
    for queries in (["inner"], ["inner", "mul"], ["inner.fc", "inner", "mul"]):
        features = run(exact(model, queries), X)
        for path in set(queries) & set(seen):
            assert equal(features[path], seen[path][0]), (queries, path)
    assert "is overwritten in place by" not in warned(model.eval(), ["inner"])[1].get("inner", "")
    assert not warned(model, ["inner"])[1], "the write in place returns what the module returns"


def test_no_clone_where_none_is_needed() -> None:
    model = build("resnet18")
    both = [exact(model, ["bn1"]), exact(model, ["layer1", "layer4", "fc"])]
    for extractor in both:
        assert not [node for node in extractor.graph.nodes if node.target is featx._clone]
    overwritten = exact(model, ["bn1", "layer1"])
    assert len([node for node in overwritten.graph.nodes if node.target is featx._clone]) == 1


def test_the_input_and_tuples_are_cloned_too() -> None:
    def forward(self: Any, x: Any) -> Any:
        halves = x.chunk(2, 1)
        x.mul_(3)
        return halves[0] + 1

    model = net(forward)
    features = run(exact(model, ["x", "chunk", "add"]), X)
    assert equal(features["x"], X)
    assert same(tuple(features["chunk"]), X.chunk(2, 1))
    assert equal(features["add"], X[:, :2] * 3 + 1)


def test_the_first_of_two_inputs_is_cloned() -> None:
    features = exact(net(lambda self, x, y: x.mul_(3) + y), ["x", "add"])(X.clone(), X)
    assert equal(features["x"], X)
    assert equal(features["add"], X * 3 + X)


def test_a_buffer_is_what_it_was() -> None:
    def forward(self: Any, x: Any) -> Any:
        before = self.inner(x)
        self.inner.count.add_(1)
        return before + self.inner.count

    model = net(forward, inner=net(lambda self, x: (self.count, x)[0], count=torch.zeros(4)))
    extractor = exact(model, ["inner", "output"])
    features = run(extractor, X)
    assert equal(features["inner"], torch.zeros(4))


class Doubling(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(2) + 1


class Rectifying(nn.Module):
    """A part of it works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(x) + 1


class Dropping(nn.Dropout):
    """Called so, and yet it does something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(self.p)


def doubled(x: torch.Tensor) -> torch.Tensor:
    return x.mul_(2) + 1


@parametrize(
    ("opaque", "warns"),
    [(Doubling(), 0), (Rectifying(), 1), (Dropping(), 0), (net(lambda self, x: doubled(x)), 0)],
)
def test_opaque_calls_that_write_into_their_input(opaque: nn.Module, warns: int) -> None:
    """In doubt they do, which is no ground to warn."""
    model = nn.Sequential(linear(), opaque, linear()).eval()
    kwargs = {"leaf_modules": [Doubling, Rectifying, Dropping], "autowrap_functions": [doubled]}
    seen = seen_by_hooks(model, X)
    features = run(exact(model, ["0", "2"], tracer_kwargs=kwargs), X)
    assert equal(features["0"], seen["0"][0])
    assert equal(features["2"], seen["2"][0])
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
    extractor = exact(model, "output", tracer_kwargs={"leaf_modules": [Adding]})
    assert equal(run(extractor, X)["output"], run(model, X))


def test_dropout_in_place_writes_in_train_mode_only() -> None:
    model = nn.Sequential(linear(), nn.Dropout(0.5, inplace=True))
    for mode in (True, False):
        assert set(warned(model.train(mode), ["0", "1"])[1]) == ({"0"} if mode else set())
    # Whoever switches the dropout of an extractor on by hand has exact features all the same.
    extractor = exact(model.eval(), ["0", "1"])
    extractor.get_submodule("1").train()
    assert equal(run(extractor, X)["0"], model[0](X).detach())


# --- warnings ---


class Misleading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2, self.relu = nn.LayerNorm(4), nn.LayerNorm(4), nn.ReLU(inplace=True)
        self.pair = net(lambda self, x: (x * 2, x + 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pair(self.relu(self.ln_2(self.ln_1(x))))[0]


def test_the_texts() -> None:
    with pytest.warns(UserWarning, match="exact=True") as caught:
        extract(Misleading(), ["ln_1", "relu", "pair", "output"])
    assert [str(warning.message) for warning in caught] == [
        "the feature 'ln_1' is the value of the module 'ln_2', not what the module 'ln_1' returns,"
        " and is overwritten in place by the module 'relu'; exact=True gives its own value",
        "the feature 'pair' is the value of the operation 'pair.add', not what the module 'pair' returns;"
        " exact=True gives its own value",
    ]
    assert {warning.filename for warning in caught} == {__file__}


def test_a_hazard_of_one_mode() -> None:
    def forward(self: Any, x: Any) -> Any:
        y = self.fc(x)
        return torch.relu_(y) if self.training else torch.relu(y)

    with pytest.warns(UserWarning, match="'fc' is overwritten in place by the operation 'relu_';"):
        extract(net(forward, fc=linear()), ["fc", "output"])


def test_hazards_do_not_change_values() -> None:
    """The default is torchvision's, with a warning or without."""
    theirs = feature_extraction()
    model = Misleading().eval()
    with pytest.warns(UserWarning, match="exact=True"):
        ours = extract(model, ["ln", "ln_1", "pair"])
    assert same(run(ours, X), run(theirs.create_feature_extractor(model, ["ln", "ln_1", "pair"]), X))


def test_the_models_own_output_beside_a_module_of_that_name() -> None:
    def forward(self: Any, x: Any) -> Any:
        y = self.output(x)
        return self.fc(y), y

    model = net(forward, output=net(lambda self, x: x), fc=linear())
    assert same(run(extract(model, ["output"]), X)["output"], model(X))
    assert equal(run(exact(model, ["output"]), X)["output"], X)


def test_a_later_call_of_a_module_that_works_in_place() -> None:
    class Doubling(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.mul_(2)
            return x

    def forward(self: Any, x: Any) -> Any:
        return self.last(self.act_1(self.act_1(self.twice(self.twice(self.fc(x))))))

    parts = {"twice": Doubling(), "act_1": nn.LeakyReLU(0.5, inplace=True)}
    model = net(forward, fc=linear(), last=linear(), **parts).eval()
    seen = seen_by_hooks(model, X)
    extractor, said = warned(model, ["twice", "act_1"])
    values = run(extractor, X)
    assert not equal(values["twice"], seen["twice"][0])
    assert "a later call of the module 'act_1'" in said["act_1"]
    assert set(said) == {"twice", "act_1"}
    features = run(exact(model, ["twice", "twice_1", "act_1", "act_1_1"]), X)
    assert same([features[name] for name in ("twice", "twice_1")], seen["twice"])
    assert same([features[name] for name in ("act_1", "act_1_1")], seen["act_1"])


def test_an_operation_with_the_name_of_a_module_that_is_not_called() -> None:
    model = net(lambda self, x: F.relu(self.fc(x)) + 1, fc=linear(), relu=nn.ReLU()).eval()
    assert "'relu' is the value of the operation 'relu', not what the module" in warned(model, ["relu"])[1]["relu"]
    with pytest.raises(featx.NodeNameError, match="a module of the model in which no operation runs"):
        exact(model, ["relu"])


# --- what can be done with them ---


def make_exact() -> Any:
    model = nn.Sequential(linear(), nn.ReLU(inplace=True), nn.BatchNorm1d(4), nn.ReLU(inplace=True))
    extractor = exact(model, ["0", "2", "3"])
    assert [node.target for node in extractor.graph.nodes].count(featx._clone) == 2
    return model, extractor


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
        copy.deepcopy,
        copy.copy,
        by_torch_save,
        by_pickle,
        pytest.param(compiled, marks=needs("torch.compile", torch="2.0")),
        fx.symbolic_trace,
        extracted,
    ],
)
def test_what_can_be_done_with_extractors(how: Any, mode: bool) -> None:
    model, extractor = make_exact()
    model.train(mode)
    seen = seen_by_hooks(model, X)
    features = run(how(extractor.train(mode)), X)
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
        assert same(run(script, X), run(extractor, X))


def test_gradients_are_those_of_eager_execution() -> None:
    model, extractor = make_exact()
    model.eval(), extractor.eval()
    loss = sum((value * (index + 1)).pow(2).sum() for index, value in enumerate(extractor(X).values()))
    ours = torch.autograd.grad(loss, list(model.parameters()))
    kept: list[torch.Tensor] = []
    for at in (0, 2, 3):
        model[at].register_forward_hook(lambda m, args, value: kept.append(value.clone()))
    model(X)
    loss = sum((value * (index + 1)).pow(2).sum() for index, value in enumerate(kept))
    assert all(map(torch.equal, ours, torch.autograd.grad(loss, list(model.parameters()))))
