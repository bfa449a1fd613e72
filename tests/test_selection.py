"""Queries: literal, each by itself, in execution order."""

from __future__ import annotations

from typing import Any

import torch
from torch import equal, nn
from torch.nn import Sequential

from tests.helpers import X, extract, feature, parametrize, same, select
from tests.nets import Block, Modes, linear, net

NAMES = ["x", "layer1.0.conv", "layer1.0.relu", "layer1.1.conv", "layer10.conv", "fc", "fc_1"]


@parametrize(
    ("query", "position"),
    [
        ("x", 0),
        ("layer1", 3),
        ("layer1.0", 2),
        ("layer1.0.conv", 1),
        ("layer10", 4),
        ("fc", 5),
        ("fc_1", 6),
        ("layer", None),
        ("layer1.", None),
        ("layer1.0.con", None),
        ("layer.*", None),
        (".", None),
        ("", None),
        ("X", None),
    ],
)
def test_a_query_matches_literally_up_to_a_dot(query: str, position: int | None) -> None:
    assert select(NAMES).get(query) == position


def test_each_query_is_resolved_by_itself() -> None:
    expected = {"layer1": 3, "layer1.1": 3, "layer1.1.conv": 3, "layer1.0": 2, "layer10": 4}
    assert select(NAMES) == {**dict(zip(NAMES, range(7))), **expected}


MODEL = Sequential(Block(), Block(), nn.Linear(4, 2))


@parametrize(
    ("return_nodes", "keys"),
    [
        ("1", ["1"]),
        (["2", "0"], ["0", "2"]),
        (("2", "0.first"), ["0.first", "2"]),
        ({"2": "b", "0": "a"}, ["a", "b"]),
        ({"1", "0"}, ["0", "1"]),
        ((str(number) for number in (2, 0)), ["0", "2"]),
        ({"2": "b", "0": "a"}.keys(), ["0", "2"]),
        ([2, 0], ["0", "2"]),
        ({0: 1}, ["1"]),
        (["1", "1"], ["1"]),
        ([], []),
        (["output", "1"], ["1", "output"]),
    ],
)
def test_forms_of_return_nodes(return_nodes: object, keys: list[str]) -> None:
    extractor = extract(MODEL, return_nodes)
    assert list(extractor(X)) == keys


def test_queries_for_each_mode() -> None:
    extractor = extract(Modes(), train_return_nodes={"aux": "a", "head": "h"}, eval_return_nodes="mul")
    assert list(extractor.train()(X)) == ["h", "a"]
    assert list(extractor.eval()(X)) == ["mul"]


def test_a_value_of_any_structure_can_be_asked_for() -> None:
    def forward(self: Any, x: Any) -> Any:
        return {"halves": torch.chunk(self.fc(x), 2, 1), "size": x.shape[0], "none": None}

    model = net(forward, fc=linear())
    values = extract(model, ["chunk", "output", "getattr"])(X)
    assert same(values["output"], model(X))
    assert same(values["chunk"], torch.chunk(model.fc(X), 2, 1))
    assert same(tuple(values["getattr_1" if "getattr_1" in values else "getattr"]), (3, 4))
    assert list(values)[-1] == "output"


def test_output_means_a_module_of_that_name_where_there_is_one() -> None:
    model = net(lambda self, x: self.output(x) * 2, output=linear())
    assert equal(feature(model, "output"), model.output(X))
