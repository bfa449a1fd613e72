"""The four rules of names, on strings and on nets."""

from __future__ import annotations

import math
import time
from typing import Any, Iterator, Optional

import pytest
import torch
from torch import equal, nn
from torch.nn import Sequential

from tests import featx
from tests.conformance import slow
from tests.helpers import (
    X,
    eval_names,
    exact,
    feature_extraction,
    given_names,
    in_both_modes,
    node_names,
    parametrize,
    recording,
    refused,
    run,
)
from tests.nets import Block, Modes, net
from tests.versions import older


# Each once on a short example; conformance/naming.json has many more.
@parametrize(
    ("calls", "names"),
    [
        # rule 1: a leaf by its path, anything else by scope and fx's name
        ([("", "x"), ("conv", None), ("layer.0", "relu")], ["x", "conv", "layer.0.relu"]),
        # rule 2: fx's number goes
        ([("a", "relu_7")], ["a.relu"]),
        # rule 3: numbers within a scope
        ([("a", "add"), ("b", "add_1"), ("a", "add_2")], ["a.add", "b.add", "a.add_1"]),
        # rule 4: torchvision repeats x_1 here
        ([("", "x"), ("", "x_1"), ("", "x_0_1"), ("", "x_2")], ["x", "x_1", "x_0", "x_2"]),
        # nothing before the underscore: no suffix
        ([("", "_1"), ("", "_1")], ["_1", "_1_1"]),
        # digits that are not ASCII are letters here
        ([("a_²", None), ("a_٣", None)], ["a_²", "a_٣"]),
        # characters that mean something in a regular expression
        ([("a+b", None), ("a+b", None), ("a(b", None), ("1", None), ("1", None), ("1", None)],
         ["a+b", "a+b_1", "a(b", "1", "1_1", "1_2"]),
    ],
)  # fmt: skip
def test_rules(calls: list[tuple[str, Optional[str]]], names: list[str]) -> None:
    assert given_names(calls) == names


PATHS = ["1", "_1", "a", "a_1", "a_2", "a.b", "a.b_1", "a_1.b", "x", "x_1", "x_1_1", "x_3"]
OWN = ["x", "x_1", "x_0", "x_2", "x_1_1", "x_10", "x_00", "_1", "a_x", "a", "a_2_1", "b", "b_7"]


@parametrize("exact", [False, True])
def test_the_fast_way_equals_the_slow_one(rng: Any, exact: bool) -> None:
    for _ in range(500):
        paths = rng.sample(PATHS, rng.randrange(1, 8))
        calls: list[tuple[str, str | None]] = []
        for _ in range(rng.randrange(40)):
            if rng.random() < 0.4:
                calls.append((rng.choice(paths), None))
            else:
                calls.append((rng.choice(["", "a", "a_1", "a.b"]), rng.choice(OWN)))
        names = given_names(calls, paths if exact else [])
        assert names == (slow.exact_names(paths, calls) if exact else slow.names(calls)), (paths, calls)
        assert len(set(names)) == len(names)
        if exact:
            for call, name in zip(calls, names):
                assert name not in paths or call == (name, None)


def test_a_descending_run_does_not_make_naming_slow() -> None:
    """Each reset runs into the names before it; walking over them again and again would be quadratic."""
    count = 20_000
    calls = []
    for number in range(count, 0, -1):
        calls.append(("", f"x_{number}_1"))
        calls.append(("", "x"))
    start = time.perf_counter()
    assert len(set(given_names(calls))) == 2 * count
    assert time.perf_counter() - start < 5


BLOCK = ["first", "sigmoid", "second", "sigmoid_1", "add"]


def test_names_of_both_modes() -> None:
    names = node_names(Modes())
    block = [f"body.0.{name}" for name in BLOCK]
    assert isinstance(names, featx.NodeNames)
    assert names.train == ["x", *block, "body.1", "body.2", "head", "aux", "mean", "add"]
    assert names.eval == ["x", *block, "body.1", "body.2", "head", "mul"]


def test_shared_and_repeated_modules() -> None:
    shared = Block()
    model = net(lambda self, x: self.b(self.a(self.a(x))), a=shared, b=shared)
    first = [f"a.{name}" for name in BLOCK]
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
    model = Sequential(Block(), nn.Identity())
    closed = eval_names(model, {"leaf_modules": [Block]})
    opened = eval_names(model, {"non_leaf_modules": {nn.Identity, nn.Linear}})
    plain = ["input", *(f"0.{name}" for name in BLOCK), "1"]
    assert eval_names(model) == plain
    assert closed == ["input", "0", "1"]
    assert "0.first.linear" in opened
    assert "0.first" not in opened
    assert "1" not in opened
    assert eval_names(model, {"leaf_modules": Block}) == closed
    both = {"leaf_modules": (Block,), "non_leaf_modules": (Block,)}
    assert eval_names(model, both) == plain


OPENED = {"non_leaf_modules": [nn.TransformerEncoderLayer]}


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
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    model = Sequential(layer).train(mode)
    x = X[None]
    names = eval_names(model, OPENED, exact=True)
    parts = ["self_attn", "dropout1", "norm1", "linear1", "dropout", "linear2", "dropout2", "norm2"]
    paths = [path for path, _ in model.named_modules()]
    assert [name for name in names if name in paths] == [f"0.{part}" for part in parts]
    features = exact(model, ["0.linear1", "0"], tracer_kwargs=OPENED)(x)
    with recording(model) as calls:
        model(x)  # with gradients, which keeps torch from its fast way, in which linear1 is not called
    seen = dict(calls)
    assert equal(features["0"], seen["0"])
    assert equal(features["0.linear1"], seen["0.linear1"])
    torch.testing.assert_close(features["0"], run(model, x))


def test_what_fx_cannot_open_is_said() -> None:
    model = Sequential(nn.TransformerEncoderLayer(4, 2, 8))
    remedy = r"each torch\.nn\S+\.TransformerEncoderLayer one operation"
    error = refused(model, "0", remedy, exact=False, tracer_kwargs=OPENED)
    # All of it is torch's own source, of which no line is shown.
    assert f"{error.__cause__}\nWhat helps" in str(error)


def test_autowrapped_functions() -> None:
    model = net(lambda self, x: helper(x) + 1)
    assert eval_names(model) == ["x", "sigmoid", "mul", "add"]
    wrapped = eval_names(model, {"autowrap_functions": (helper,)})
    assert wrapped == ["x", "helper", "add"]


def test_functions_of_math_and_of_torchvision_are_single_operations() -> None:
    ops = pytest.importorskip("torchvision.ops")
    model = net(lambda self, x: ops.box_area(x) * math.sqrt(x.shape[0]))
    names = eval_names(model)
    assert names == feature_extraction().get_graph_node_names(model)[1]
    assert {"box_area", "sqrt"} <= set(names)


def helper(x: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(x) * 2
