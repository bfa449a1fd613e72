"""The four rules of names, on strings and on nets."""

from __future__ import annotations

import math
import time
from typing import Any, Iterator, Optional

import pytest
import torch
from torch import equal, nn

from tests import featx
from tests.conformance import slow
from tests.helpers import X, eval_names, extract, in_both_modes, node_names, parametrize
from tests.nets import Block, Modes, net
from tests.versions import older

X = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0))


def names_of(calls: list[tuple[str, Optional[str]]]) -> list[str]:
    namer = featx._Namer()
    return [namer.name(scope, own) for scope, own in calls]


@parametrize(
    ("calls", "names"),
    [
        # rule 1: a leaf by its path, anything else by scope and fx's name
        ([("", "x"), ("conv", None), ("layer.0", "relu")], ["x", "conv", "layer.0.relu"]),
        # rule 2: fx's number goes
        ([("a", "relu_7")], ["a.relu"]),
        # rule 2 eats real suffixes too
        ([("fc_1", None), ("fc_2", None)], ["fc", "fc_1"]),
        # rule 3: numbers within a scope
        ([("a", "add"), ("b", "add_1"), ("a", "add_2")], ["a.add", "b.add", "a.add_1"]),
        # rule 3: a module called again
        ([("a.b", None), ("a.b", None), ("a.b", None)], ["a.b", "a.b_1", "a.b_2"]),
        # rule 3: only one suffix is removed
        ([("", "x_1_2"), ("", "x_1_3"), ("", "x_4")], ["x_1", "x_1_1", "x_2"]),
        # rule 3: the most recently given form decides
        ([("", "x_5_1"), ("", "x_7"), ("", "x_8")], ["x_5", "x_6", "x_7"]),
        # rule 4: torchvision repeats x_1 here
        ([("", "x"), ("", "x_1"), ("", "x_0_1"), ("", "x_2")], ["x", "x_1", "x_0", "x_2"]),
        # rule 4: and so does it here, where the next free number is beyond a run
        ([("", "x"), ("", "x"), ("", "x"), ("", "x_0_9"), ("", "x")], ["x", "x_1", "x_2", "x_0", "x_3"]),
        # nothing before the underscore: no suffix
        ([("", "_1"), ("", "_1")], ["_1", "_1_1"]),
        # digits that are not ASCII are letters here
        ([("a_²", None), ("a_٣", None)], ["a_²", "a_٣"]),
        # characters that mean something in a regular expression
        ([("a+b", None), ("a+b", None), ("a(b", None), ("1", None), ("1", None), ("1", None)],
         ["a+b", "a+b_1", "a(b", "1", "1_1", "1_2"]),
        ([("a_b", None), ("a.b", None)], ["a_b", "a.b"]),
    ],
)  # fmt: skip
def test_rules(calls: list[tuple[str, Optional[str]]], names: list[str]) -> None:
    assert names_of(calls) == names


def test_the_fast_way_equals_the_slow_one(rng: Any) -> None:
    for _ in range(300):
        pieces = ["x", "x_1", "x_0", "x_2", "x_1_1", "_1", "a_x", "x_10", "x_00", "1"]
        calls = [(rng.choice(["", "a", "a_1", "a.b"]), rng.choice(pieces)) for _ in range(rng.randrange(40))]
        calls = [(scope, own) if own != "1" or not scope else (scope, None) for scope, own in calls]
        names = names_of(calls)
        assert names == slow.names(calls), calls
        assert len(set(names)) == len(names), calls


def test_a_descending_run_does_not_make_naming_slow() -> None:
    """Each reset runs into the names before it; walking over them again and again would be quadratic."""
    count = 20_000
    calls = [call for i in range(count, 0, -1) for call in (("", f"x_{i}_1"), ("", "x"))]
    start = time.perf_counter()
    assert len(set(names_of(calls))) == 2 * count
    assert time.perf_counter() - start < 5


def test_names_of_both_modes() -> None:
    names = node_names(Modes())
    block = ["body.0.first", "body.0.sigmoid", "body.0.second", "body.0.sigmoid_1", "body.0.add"]
    assert isinstance(names, featx.NodeNames)
    assert names.train == ["x", *block, "body.1", "body.2", "head", "aux", "mean", "add"]
    assert names.eval == ["x", *block, "body.1", "body.2", "head", "mul"]


def test_shared_and_repeated_modules() -> None:
    shared = Block()
    model = net(lambda self, x: self.b(self.a(self.a(x))), a=shared, b=shared)
    first = ["a.first", "a.sigmoid", "a.second", "a.sigmoid_1", "a.add"]
    second = ["a.first_1", "a.sigmoid_2", "a.second_1", "a.sigmoid_3", "a.add_1"]
    third = ["a.first_2", "a.sigmoid_4", "a.second_2", "a.sigmoid_5", "a.add_2"]
    assert eval_names(model) == ["x", *first, *second, *third]


def test_parameters_that_are_used_directly_have_names() -> None:
    model = net(lambda self, x: x @ self.weight + self.bias, weight=nn.Parameter(torch.ones(2, 2)), bias=torch.ones(2))
    assert eval_names(model) == ["x", "weight", "matmul", "add"]


def test_tracer_names_follow_execution_order() -> None:
    tracer = featx.NodePathTracer()
    graph = tracer.trace(Block())
    nodes = list(tracer.node_to_qualname)
    assert nodes == [node for node in graph.nodes if node.op != "output"]
    assert tracer.names == list(tracer.node_to_qualname.values())


def test_a_function_can_be_traced() -> None:
    tracer = featx.NodePathTracer(exact=True)
    tracer.trace(lambda x: torch.relu(torch.relu(x)) + 1)
    assert tracer.names == ["x", "relu", "relu_1", "add"]


def test_leaf_modules_and_non_leaf_modules() -> None:
    model = nn.Sequential(Block(), nn.Identity())
    plain = eval_names(model)
    closed = eval_names(model, {"leaf_modules": [Block]})
    opened = eval_names(model, {"non_leaf_modules": {nn.Identity, nn.Linear}})
    assert plain == ["input", "0.first", "0.sigmoid", "0.second", "0.sigmoid_1", "0.add", "1"]
    assert closed == ["input", "0", "1"]
    assert "0.first.linear" in opened
    assert "0.first" not in opened
    assert "1" not in opened
    assert eval_names(model, {"leaf_modules": Block}) == closed
    both = {"leaf_modules": (Block,), "non_leaf_modules": (Block,)}
    assert eval_names(model, both) == plain


@pytest.mark.zoo
def test_what_is_inside_of_torchvisions_modules_can_be_asked_for() -> None:
    models, ops = (pytest.importorskip(f"torchvision.{part}") for part in ("models", "ops"))
    model, x, seen = models.efficientnet_b0().eval(), torch.rand(1, 3, 64, 64), []
    kwargs = {"non_leaf_modules": [ops.Conv2dNormActivation]}
    model.features[0][0].register_forward_hook(lambda module, args, value: seen.append(value.clone()))
    extractor = extract(model, ["features.0.0"], tracer_kwargs=kwargs)
    assert list(extractor.state_dict()) == ["features.0.0.weight"]
    with torch.no_grad():
        assert equal(extractor(x)["features.0.0"], seen.pop())
        model(x)
    names = eval_names(model, kwargs)
    leaves = [path for path, module in model.named_modules() if not any(module.children())]
    missing = [path for path in leaves if path not in names and "stochastic" not in path]
    assert {path.rsplit(".", 1)[0] for path in missing} == {
        path for path, module in model.named_modules() if isinstance(module, ops.SqueezeExcitation)
    }
    seen.clear()


@pytest.fixture
def no_fast_path() -> Iterator[None]:
    """Attention's fast way cannot be traced; torch lets one switch it off."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(fast)


@pytest.mark.skipif(older(torch="2.5"), reason="the fast way cannot be switched off")
@pytest.mark.usefixtures("no_fast_path")
@in_both_modes
def test_what_is_inside_of_a_transformers_layer_can_be_asked_for(mode: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)).train(mode), X
    kwargs = {"non_leaf_modules": [nn.TransformerEncoderLayer]}
    names = eval_names(model, kwargs, exact=True)
    assert [name for name in names if name.count(".") and name.split(".")[1] in dict(model[0].named_modules())] == [
        f"0.{part}" for part in ("self_attn", "dropout1", "norm1", "linear1", "dropout", "linear2", "dropout2", "norm2")
    ]
    seen = []
    model[0].linear1.register_forward_hook(lambda module, args, value: seen.append(value.clone()))
    extractor = extract(model, ["0.linear1", "0"], tracer_kwargs=kwargs, exact=True)
    features = extractor(x)
    own = model(x)  # with gradients, which keeps torch from its fast way, in which linear1 is not called
    assert equal(features["0"], own)
    assert equal(features["0.linear1"], seen[-1])
    assert len(seen) == 2
    with torch.no_grad():
        torch.testing.assert_close(features["0"], model(x))


def test_what_fx_cannot_open_is_said() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8))
    kwargs = {"non_leaf_modules": [nn.TransformerEncoderLayer]}
    with pytest.raises(featx.UntraceableError, match=r"one operation \(non_leaf_modules win\);") as raised:
        node_names(model, kwargs)
    assert (raised.value.path, raised.value.module_type) == ("0", nn.TransformerEncoderLayer)
    # All of it is torch's own source, of which no line is shown.
    assert f"{raised.value.__cause__}\nWhat helps" in str(raised.value)


def test_autowrapped_functions() -> None:
    model = net(lambda self, x: helper(x) + 1)
    assert eval_names(model) == ["x", "sigmoid", "mul", "add"]
    wrapped = eval_names(model, {"autowrap_functions": (helper,)})
    assert wrapped == ["x", "helper", "add"]


def test_functions_of_math_and_of_torchvision_are_single_operations() -> None:
    theirs, ops = (pytest.importorskip(f"torchvision.{part}") for part in ("models.feature_extraction", "ops"))
    model = net(lambda self, x: ops.box_area(x) * math.sqrt(x.shape[0]))
    names = eval_names(model)
    assert names == theirs.get_graph_node_names(model)[1]
    assert {"box_area", "sqrt"} <= set(names)


def helper(x: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(x) * 2
