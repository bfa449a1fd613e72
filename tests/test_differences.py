"""One test for each difference from torchvision. It shows both behaviours, so that a change upstream is noticed."""

from __future__ import annotations

import copy
import functools
import re
import sys
from typing import Any, Callable

import pytest
import torch
from torch import equal, fx, nn
from torch.nn import Sequential

from tests import featx
from tests.helpers import (
    X,
    as_leaves,
    by_pickle,
    eval_names,
    exact,
    extract,
    feature,
    feature_extraction,
    heard,
    ignored_warnings,
    node_names,
    parametrize,
    refused,
    run,
    same,
    texts,
    verdict,
    zoo,
)
from tests.nets import (
    IN_PLACE,
    LIKE_CODE,
    Block,
    blocks,
    build_with_input,
    linear,
    misleading,
    net,
    stated,
    with_member,
    writes_in_place,
)
from tests.versions import older

torchvision = feature_extraction()

LIBRARIES = [torchvision, featx]


@pytest.fixture(autouse=True)
def _no_warnings() -> Any:
    """Both libraries warn where the modes differ, which is not what these tests are about."""
    with ignored_warnings():
        yield


def both(call: Callable[[Any], Any]) -> list[Any]:
    """What a call gives with torchvision, and with featx."""
    return [call(library) for library in LIBRARIES]


def extractors(model: nn.Module, queries: Any) -> list[Any]:
    """Of torchvision, and of featx."""
    return both(lambda library: library.create_feature_extractor(model, queries))


def modal() -> nn.Module:
    """In train mode adds 1, in eval mode 2."""

    def forward(self, x):  # type: ignore[no-untyped-def]  # torchvision's cannot script annotations that are strings
        return self.fc(x) + (1 if self.training else 2)

    return net(forward, fc=linear())


def test_d01_each_query_its_own_last_node() -> None:
    model = blocks()
    theirs, ours = (extractor(X) for extractor in extractors(model, ["1", "1.add"]))
    assert equal(ours["1"], model(X))
    assert equal(ours["1.add"], model(X))
    assert not ("1.add" in theirs and "1" in theirs and equal(theirs["1"], theirs["1.add"]))


@zoo
def test_d02_nothing_runs_after_the_last_requested_node() -> None:
    query = "encoder.layers.encoder_layer_0.mlp"
    model, x = build_with_input("vit_b_16")
    theirs, ours = extractors(model.eval(), [query])
    assert equal(run(theirs, x)[query], run(ours, x)[query])
    parameters = [sum(parameter.numel() for parameter in module.parameters()) for module in (theirs, ours)]
    assert parameters[0] > 78e6
    assert parameters[1] < 8e6
    assert [len(module.encoder.layers._modules) for module in (theirs, ours)] == [11, 1]
    operations = [sum(node.op == "call_module" for node in module.graph.nodes) for module in (theirs, ours)]
    assert operations[0] > 5 * operations[1]
    with pytest.raises(AssertionError, match="image height"):
        ours(torch.rand(1, 3, 200, 200))


@parametrize("kind", IN_PLACE)
def test_d03_in_place_operations_stay(kind: str) -> None:
    model = writes_in_place(kind).eval()
    last = eval_names(model)[-1]
    theirs, ours = extractors(model, [last])
    assert equal(run(ours)[last], run(model))
    assert not equal(run(theirs)[last], run(model))


def test_d04_deepcopy_keeps_mode_graphs_and_hooks() -> None:
    theirs, ours = extractors(modal().eval(), ["add"])
    kept = older(torch="2.14")  # the copy's mode, in torch itself
    for extractor in (theirs.eval(), ours.eval()):
        extractor.register_forward_hook(lambda module, inputs, output: {**output, "hooked": 1})
    their_copy = copy.deepcopy(theirs)
    our_copy = copy.deepcopy(ours)
    assert their_copy.training is not kept
    assert "hooked" not in their_copy(X)
    assert torch.allclose(their_copy(X)["add"], theirs(X)["add"] - (0 if kept else 1))
    assert not our_copy.training
    assert our_copy(X)["hooked"] == 1
    assert equal(our_copy(X)["add"], ours(X)["add"])


@parametrize("how", [by_pickle, copy.copy])
def test_d05_pickles_and_copies_have_both_modes(how: Callable[[Any], Any]) -> None:
    found = []
    for extractor in extractors(modal().train(), ["add"]):
        copied = how(extractor)
        found.append((copied.eval()(X)["add"] - copied.train()(X)["add"]).round())
    assert found[0].eq(0).all()
    assert found[1].eq(1).all()


def test_d06_the_mode_is_looked_up_at_each_call() -> None:
    def steps(using: Callable[[Any], Any], flip: Callable[[Any], Any]) -> list[float]:
        """How much the feature changes from train to eval; it should be 1."""
        found = []
        for extractor in extractors(modal().train(), ["add"]):
            module = using(extractor)
            before = module(X)["add"]
            flip(module)
            found.append(float((module(X)["add"] - before).mean().round()))
        return found

    assert steps(lambda extractor: extractor, lambda module: setattr(module, "training", False)) == [0, 1]
    assert steps(torch.jit.script, lambda module: module.eval()) == [0, 1]
    if hasattr(torch, "compile"):
        followed = int(older(torch="2.5"))  # torch.compile then found out by itself
        compiled = functools.partial(torch.compile, backend="eager")
        assert steps(compiled, lambda module: module.eval()) == [followed, 1]


def test_d07_modes_are_restored() -> None:
    def after(library: Any) -> list[bool]:
        model = Sequential(nn.BatchNorm1d(4), linear()).train()
        model[0].eval()
        library.create_feature_extractor(model, ["1"])
        return [module.training for module in model.modules()]

    def after_failure(library: Any) -> bool:
        model = net(lambda self, x: x if x.sum() > 0 else -x).eval()
        with pytest.raises(fx.proxy.TraceError):
            library.get_graph_node_names(model)
        return model.training

    assert both(after) == [[True, True, True], [True, False, True]]
    assert both(after_failure) == [True, False]


def test_d08_tracer_kwargs_are_untouched() -> None:
    model = Sequential(Block())

    def leaves(library: Any) -> list[Any]:
        kwargs = {"leaf_modules": [Block]}
        library.get_graph_node_names(model, kwargs)
        return [list(kwargs), kwargs["leaf_modules"]]

    theirs, ours = both(leaves)
    assert theirs != ours == [["leaf_modules"], [Block]]
    kwargs = {"leaf_modules": (Block,)}
    with pytest.raises(TypeError):
        torchvision.get_graph_node_names(model, dict(kwargs))
    assert eval_names(model, kwargs) == ["input", "0"]


def test_d09_constants_do_not_stay_on_the_model() -> None:
    def left(library: Any) -> list[str]:
        model = net(lambda self, x: x + torch.tensor([1.0]))
        library.get_graph_node_names(model)
        return [name for name in vars(model) if name.startswith("_tensor_constant")]

    assert both(left) == [["_tensor_constant0", "_tensor_constant1"], []]


def test_d10_queries_are_literal() -> None:
    model = Sequential(Block())
    assert torchvision.create_feature_extractor(model, ["[0]"])(X) == {}
    with pytest.raises(re.error):
        torchvision.create_feature_extractor(model, ["("])
    for query in ("[0]", "("):
        with pytest.raises(featx.NodeNameError, match="no node"):
            extract(model, query)


def test_d11_two_nodes_under_one_key() -> None:
    model = Sequential(linear(), linear())
    assert list(torchvision.create_feature_extractor(model, {"0": "a", "1": "a"})(X)) == ["a"]
    with pytest.raises(ValueError, match="both '0' and '1' are put under the key 'a'"):
        extract(model, {"0": "a", "1": "a"})


def sequence(*names: str) -> Sequential:
    model = Sequential()
    for name in names:
        model.add_module(name, nn.Identity())
    return model


@parametrize(
    ("model", "repeats", "crash"),
    [
        (sequence("a+b"), 2, None),
        (sequence("a(b"), 1, re.error),
        (sequence("1"), 3, ValueError),
        (net(lambda self, x: self.a.b(self.a_b(x)), a=sequence("b"), a_b=nn.Identity()), 1, ValueError),
    ],
)
def test_d12_names_are_distinct(model: nn.Module, repeats: int, crash: Any) -> None:
    forward = model.forward

    def repeated(self: Any, x: Any) -> Any:
        for _ in range(repeats):
            x = forward(x)
        return x

    wrapped = net(repeated, **dict(model.named_children()))
    if crash is None:
        theirs = torchvision.get_graph_node_names(wrapped)[1]
        assert len(set(theirs)) < len(theirs)
    else:
        with pytest.raises(crash):
            torchvision.get_graph_node_names(wrapped)
    ours = eval_names(wrapped)
    assert len(set(ours)) == len(ours)
    features = extract(wrapped, ours)(X)
    assert list(features) == ours
    assert equal(features[ours[-1]], wrapped(X))


def test_d13_one_query_or_a_tuple() -> None:
    model = Sequential(linear())
    for queries in ("0", ("0",)):
        with pytest.raises(AttributeError):
            torchvision.create_feature_extractor(model, queries)
        assert list(extract(model, queries)(X)) == ["0"]


@parametrize("name", LIKE_CODE)
def test_d14_names_never_become_code(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = with_member(name)
    if name == "a'b":
        torchvision.create_feature_extractor(model, ["add"])(X)
    else:
        with pytest.raises(Exception):  # noqa: B017, PT011  # of many kinds
            torchvision.create_feature_extractor(model, ["add"])(X)
    assert ("executed" in capsys.readouterr().out) == ("executed" in name)
    assert equal(feature(model, "add"), model(X))
    assert capsys.readouterr().out == ""


def test_d15_naming_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts the steps of naming: torchvision's comparisons with earlier names, featx's calls of functions."""
    steps: list[Any] = []

    class Counting:
        @staticmethod
        def match(pattern: str, string: str) -> Any:
            steps.append(pattern)
            return re.match(pattern, string)

    def profile(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename == featx.__file__:
            steps.append(frame.f_code)

    def counted(library: Any, size: int) -> int:
        model = Sequential(*(nn.Identity() for _ in range(size)))
        steps.clear()
        sys.setprofile(profile)
        try:
            library.get_graph_node_names(model)
        finally:
            sys.setprofile(None)
        return len(steps)

    monkeypatch.setattr(torchvision, "re", Counting)
    theirs, ours = both(lambda library: counted(library, 400) / counted(library, 100))
    assert theirs > 10
    assert 3 < ours < 4.5


def test_d16_no_recompile_on_a_flip(monkeypatch: pytest.MonkeyPatch) -> None:
    generated: list[fx.Graph] = []
    python_code = fx.Graph.python_code

    def counting(graph: fx.Graph, *args: Any, **kwargs: Any) -> Any:
        generated.append(graph)
        return python_code(graph, *args, **kwargs)

    monkeypatch.setattr(fx.Graph, "python_code", counting)
    counts = []
    for extractor in extractors(modal(), ["add"]):
        extractor.train()
        generated.clear()
        for mode in (False, True, False):
            extractor.train(mode)(X)
        counts.append(len(generated))
    assert counts == [3, 0]


class Bad(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def test_d17_errors_say_where() -> None:
    model = Sequential(Block(), Sequential(Bad()))
    with pytest.raises(fx.proxy.TraceError) as theirs:
        torchvision.get_graph_node_names(model)
    assert not re.search(r"1\.0|Bad|leaf_modules", str(theirs.value))
    with pytest.raises(featx.UntraceableError) as ours:
        node_names(model)
    assert (ours.value.path, ours.value.module_type) == ("1.0", Bad)
    for part in (f"{__name__}.Bad at '1.0'", "return x if x.sum() > 0", f"leaf_modules=[{__name__}.Bad]"):
        assert part in str(ours.value)


def test_d18_what_misleads_is_said_and_mended() -> None:
    model = misleading()
    queries = ["ln_1", "pair", "relu"]
    first = model.ln_1(X)
    second = model.ln_2(first)
    with heard() as nothing:
        theirs = torchvision.create_feature_extractor(model, queries)(X)
        mended = exact(model, [*queries, "ln_2"])(X)
    assert nothing == []
    with pytest.warns(UserWarning, match="exact=True") as caught:
        ours = extract(model, queries)(X)
    assert [text.split("'")[1] for text in texts(caught)] == ["ln_1", "pair"]
    # ln_1 is ln_2's output, and overwritten; pair is its last operation.
    for default in (theirs, ours):
        assert equal(default["ln_1"], second.relu())
        assert equal(default["pair"], second.relu() + 1)
    assert equal(mended["ln_1"], first)
    assert equal(mended["ln_2"], second)
    assert same(mended["pair"], (second.relu() * 2, second.relu() + 1))


def test_d19_the_models_own_output() -> None:
    model = net(lambda self, x: {"logits": self.fc(x), "twice": (x * 2, None)}, fc=linear())
    with pytest.raises(ValueError, match="output"):
        torchvision.create_feature_extractor(model, ["fc", "output"])
    features = extract(model, ["fc", "output"])(X)
    assert list(features) == ["fc", "output"]
    assert same(features["output"], model(X))


def test_d20_modules_of_torchvision_can_be_opened() -> None:
    block = pytest.importorskip("torchvision.ops").Conv2dNormActivation
    model = Sequential(block(3, 4))
    kwargs = {"non_leaf_modules": [block]}
    with pytest.raises(TypeError):
        torchvision.get_graph_node_names(model, dict(kwargs))
    assert torchvision.get_graph_node_names(model)[1] == eval_names(model) == ["input", "0"]
    assert eval_names(model, kwargs) == ["input", "0.0", "0.1", "0.2"]


def test_d21_train_that_returns_nothing() -> None:
    class Silent(Block):
        def train(self, mode: bool = True) -> Any:
            super().train(mode)

    with pytest.raises(AssertionError):
        torchvision.get_graph_node_names(Silent())
    assert len(eval_names(Silent())) == 6


@parametrize("arguments", [(["0"], ["0"]), (["0"], ["0"], ["0"]), (None, ["0"]), (None, None, "0"), ()])
def test_d22_queries_that_are_given_in_no_way_or_in_two(arguments: Any) -> None:
    model = Sequential(linear())
    with pytest.raises(ValueError, match="specif"):
        torchvision.create_feature_extractor(model, *arguments)
    with pytest.raises(ValueError, match="pass either return_nodes, or both train_return_nodes and eval_return_nodes"):
        extract(model, *arguments)


@parametrize("value", [3, nn.ReLU()])
def test_d22_queries_that_are_none(value: Any) -> None:
    model = Sequential(linear())
    with pytest.raises(AttributeError, match="has no attribute"):
        torchvision.create_feature_extractor(model, value)
    with pytest.raises(TypeError, match=f"return_nodes takes a dict, .* not a {type(value).__name__}"):
        extract(model, value)


@parametrize("value", [nn.ReLU, ["layer1"], None])
def test_d22_a_model_that_is_no_module(value: Any) -> None:
    with pytest.raises(AttributeError, match="training"):
        torchvision.get_graph_node_names(value)
    with pytest.raises(TypeError, match=r"model takes a torch\.nn\.Module, not"):
        node_names(value)


# D23 to D36: what `helpers.verdict` says of the extractors of torchvision, of featx by default, and of exact ones.


def verdicts(model: nn.Module, query: str = "mul") -> list[str]:
    ways = [torchvision.create_feature_extractor, extract, exact]
    return [verdict(way, model, query) for way in ways]


def test_d23_autocast() -> None:
    model = stated("with torch.autocast('cpu', dtype=torch.bfloat16): h = self.fc(x)\nreturn h * 2")
    assert verdicts(model) == ["wrong", "said", "refused"]
    assert verdict(as_leaves, Sequential(model)) == "right"


def test_d24_no_grad() -> None:
    part = stated("with torch.no_grad(): h = self.fc(x)\nreturn h * 2")
    model = Sequential(part, linear())

    def is_frozen(value: torch.Tensor) -> bool:
        (gradient,) = torch.autograd.grad(value.sum(), part.fc.weight, allow_unused=True)
        return gradient is None

    assert is_frozen(model(X))
    for extractor in extractors(model, ["1"]):
        assert not is_frozen(extractor(X)["1"])
    assert is_frozen(exact(model, "output")(X)["output"])


def test_d25_what_is_computed_from_buffers() -> None:
    model = stated("self.mean.add_(x[0].abs()); return h * self.mean.rsqrt()")
    assert verdicts(model) == ["wrong", "said", "right"]


def test_d26_random_numbers() -> None:
    model = stated("return h * torch.randn(4)")
    assert verdicts(model) == ["wrong", "said", "refused"]


def test_d27_a_forward_of_the_instance() -> None:
    model = stated("return h * 2")
    model.forward = lambda x: x * 3
    assert verdicts(model) == ["wrong", "said", "refused"]


def test_d28_arguments_that_have_a_default() -> None:
    def forward(self: Any, x: Any, mask: Any = None, flag: bool = False) -> Any:
        x = x if mask is None else x + 1
        return x * 2 if flag is False else x * 3

    model = net(forward)
    assert not same(torchvision.create_feature_extractor(model, ["mul"])(X)["mul"], model(X))
    with pytest.warns(featx.FeatureWarning, match="its argument 'mask'"):
        extract(model, ["mul"])
    assert same(exact(model, "mul")(X)["mul"], model(X))
    assert same(exact(model, "mul", example_inputs=(X, X))(X, X)["mul"], model(X, X))
    with pytest.raises(AssertionError, match="'mask' was None"):
        exact(model, "mul")(X, X)


def test_d29_what_is_written_last() -> None:
    moving = stated("y = h * self.mean; self.mean.copy_(x[0]); return y * 1")
    assert verdicts(moving, "mul_1") == ["wrong", "right", "right"]


def test_d30_operators_in_place() -> None:
    model = stated("v = h[:, :2]; v += 1; return h * 1")
    assert verdicts(model) == ["wrong", "said", "right"]
    items = stated("h[:, :2] += 1; return h * 1")
    with pytest.raises(TypeError, match="item assignment"):
        torchvision.get_graph_node_names(items)
    assert verdict(extract, items) == "right"


def test_d31_tensors_of_earlier_calls() -> None:
    kept: Any = []
    model = stated("return h + self.last()", last=lambda: kept[-1])
    model.fc.register_forward_hook(lambda module, inputs, value: kept.append(value * 2))
    model(X)
    refused(model, "", "takes a tensor of an earlier call")
    for extractor in extractors(model, ["add"]):  # featx says so: test_met.py
        assert not equal(extractor(-X)["add"], model(-X))


def test_d32_parts_in_another_mode() -> None:
    model = Sequential(stated("return F.dropout(h, 0.5, self.training)"), linear()).train()
    model[0].eval()
    assert verdicts(model, "1") == ["wrong", "right", "right"]


def test_d33_modules_that_are_not_called() -> None:
    model = stated("return self.part.forward(h)", part=Sequential(linear(), nn.ReLU()))
    assert equal(torchvision.create_feature_extractor(model, ["part"])(X)["part"], model(X))
    with pytest.raises(featx.NodeNameError, match="not called"):
        exact(model, "part")


def test_d34_hooks_of_the_model() -> None:
    model = stated("return h * 2")
    model.register_forward_hook(lambda module, inputs, value: value + 1)
    assert verdicts(model) == ["wrong", "said", "refused"]


def test_d35_methods_of_containers() -> None:
    model = stated("x.update(y=h); return x['y'] * 2", fc=net(lambda self, x: x["k"] + 1))
    theirs = torchvision.create_feature_extractor(model, ["mul"])
    with pytest.raises(KeyError, match="y"):
        theirs({"k": X})
    assert verdict(extract, model, inputs=[{"k": X}]) == "right"


def test_d36_constants_that_are_written_into() -> None:
    model = stated("o = torch.zeros(4); o.add_(h[0]); return h * o")
    assert verdicts(model) == ["wrong", "right", "right"]
