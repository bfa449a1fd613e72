"""Values, keys and state dicts: what torchvision gives, featx gives, for one model of each family of the zoo."""

from __future__ import annotations

import random
from typing import Any

from torch import nn

from tests import nets
from tests.helpers import (
    extract,
    extract_quietly,
    feature_extraction,
    ignored_warnings,
    node_names,
    parametrize,
    run,
    same,
    select,
    zoo,
)
from tests.nets import build_on_meta, build_with_input

theirs = feature_extraction()

pytestmark = zoo


def draw_queries(names: list[str], rng: random.Random, count: int = 6) -> list[str]:
    """Queries of any depth, none of which lies below another: see D01 for those that do."""
    candidates = sorted(select(names))
    rng.shuffle(candidates)
    chosen: list[str] = []
    for query in candidates:
        if not any(query in select([other]) or other in select([query]) for other in chosen):
            chosen.append(query)
    return chosen[:count]


def quietly(model: nn.Module, **options: Any) -> nn.Module:
    with ignored_warnings():
        return theirs.create_feature_extractor(model, **options)


def state(reference: nn.Module) -> list[str]:
    """What is saved of torchvision's extractor, but for its constants: see test_constants_and_buffers."""
    return [key for key in reference.state_dict() if not key.startswith("_tensor_constant")]


# torchvision drops in-place operations that these models need: D03 in test_differences.py, and test_pruning.py.
PARITY = [name for name in nets.collected(nets.in_zoo, nets.FAMILIES) if not name.startswith("mvit")]


@parametrize("name", PARITY)
def test_drawn_nodes(name: str, rng: random.Random) -> None:
    model, x = build_with_input(name)
    train, evaluation = node_names(model)
    queries = draw_queries(sorted({*train} & {*evaluation}), rng)
    assert queries
    print(name, queries)
    return_nodes = {query: f"key of {query}" for query in queries}
    ours = extract_quietly(model, return_nodes)
    reference = quietly(model, return_nodes=return_nodes)
    kept = state(reference)
    needed = list(ours.state_dict())
    if any(name.endswith("_assert") for name in evaluation):  # which keep modules alive that nothing needs: D02
        kept = [key for key in kept if key in needed]
    assert needed == kept
    for mode in (False, True):
        expected = run(reference.train(mode), x)
        actual = run(ours.train(mode), x)
        assert list(actual) == list(expected)
        for key in expected:
            assert same(actual[key], expected[key]), (name, mode, key)


@parametrize("name", nets.collected(nets.in_zoo, nets.FAMILIES))
def test_state_dict_at_full_depth(name: str) -> None:
    model = build_on_meta(name)
    train, evaluation = node_names(model)
    returns = {"train_return_nodes": train[-1:], "eval_return_nodes": evaluation[-1:]}
    ours = extract(model, **returns)
    reference = quietly(model, **returns)
    assert list(ours.state_dict()) == state(reference)
