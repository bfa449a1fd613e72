"""Values, keys and state dicts: what torchvision gives, featx gives, for one model of each family of the zoo."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn

from tests import featx, nets
from tests.helpers import extract, feature_extraction, ignored_warnings, node_names, parametrize, same
from tests.nets import build_on_meta, build_with_input

theirs = feature_extraction()

pytestmark = pytest.mark.zoo


def draw_queries(names: list[str], rng: random.Random, count: int = 6) -> list[str]:
    """Queries of any depth, none of which lies below another: see D01 for those that do."""
    candidates = sorted({".".join(name.split(".")[:depth]) for name in names for depth in range(1, 9)})
    rng.shuffle(candidates)
    chosen: list[str] = []
    for query in candidates:
        if not any((a + ".").startswith(b + ".") for one in chosen for a, b in ((one, query), (query, one))):
            chosen.append(query)
    return chosen[:count]


def quietly(library: Any, model: nn.Module, return_nodes: Any) -> nn.Module:
    with ignored_warnings():
        return library.create_feature_extractor(model, return_nodes)


def run(extractor: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    torch.manual_seed(1)  # dropout and stochastic depth draw the same
    with torch.no_grad():
        return extractor(x.clone())


# torchvision drops in-place operations that these models need: D03 in test_differences.py, and test_pruning.py.
PARITY = [name for name in nets.collected(nets.in_zoo, nets.FAMILIES) if not name.startswith("mvit")]


@parametrize("name", PARITY)
def test_drawn_nodes(name: str, rng: random.Random) -> None:
    model, x = build_with_input(name)
    names = node_names(model)
    both = [name for name in names.train if name in set(names.eval)]
    queries = draw_queries(both, rng)
    assert queries
    print(name, queries)
    return_nodes = {query: f"key of {query}" for query in queries}
    ours, reference = quietly(featx, model, return_nodes), quietly(theirs, model, return_nodes)
    kept, needed = list(reference.state_dict()), list(ours.state_dict())
    if any(name.endswith("_assert") for name in names.eval):  # which keep modules alive that nothing needs: D02
        kept = [key for key in kept if key in needed]
    assert needed == kept
    for mode in (False, True):
        expected, actual = run(reference.train(mode), x), run(ours.train(mode), x)
        assert list(actual) == list(expected)
        for key in expected:
            assert same(actual[key], expected[key]), (name, mode, key)


@parametrize("name", nets.collected(nets.in_zoo, nets.FAMILIES))
def test_state_dict_at_full_depth(name: str) -> None:
    model = build_on_meta(name)
    names = node_names(model)
    returns = {"train_return_nodes": [names.train[-1]], "eval_return_nodes": [names.eval[-1]]}
    ours = extract(model, **returns)
    with ignored_warnings():
        reference = theirs.create_feature_extractor(model, **returns)
    assert list(ours.state_dict()) == list(reference.state_dict())
