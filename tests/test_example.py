"""What a forward asks about its inputs is answered from an example, and other inputs are equal or refused (D28)."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import gc
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import Sequential

from tests import featx
from tests.helpers import (
    X,
    agree,
    eval_names,
    exact,
    extract,
    extract_quietly,
    feature_extraction,
    ignored_warnings,
    in_both_modes,
    node_names,
    parametrize,
    same,
)
from tests.nets import linear, net, stated
from tests.versions import fails_before

LONGER = torch.cat([X, X - 1])
NEGATIVE = -X
WEIGHTS = torch.ones(4)
in_both_ways = parametrize("is_exact", [False, True], ids=["default", "exact"])

# A forward that asks -> inputs of which some are answered otherwise than the example, X.
ASKING = {
    "truth": ("return h if x.ndim == 2 else x", X[0]),
    "not": ("return x if not x.shape[0] % 3 else h", X[:2]),
    "a number's truth": ("return h if x.shape[0] else x", X[:0]),
    "a tensor's truth": ("return h if (x > 0).all() else x", NEGATIVE),
    "a range": ("for i in range(x.shape[0]): h = h + i\nreturn h", LONGER),
    "unpacking": ("rows, width = x.shape\nreturn h if width == 4 else x", LONGER),
    "iteration": ("return sum(row for row in h)", LONGER),
    "the rest": ("first, *rest = h\nreturn torch.stack(rest) - first", LONGER),
    "zip": ("return torch.stack([a * b for a, b in zip(h, x)])", LONGER),
    "length": ("return h * len(x)", LONGER),
    "a star": ("return h.reshape(*x.shape[:-1], 2, 2)", X[None]),
    "in": ("return h if 3 in x.shape else x", LONGER),
    "int": ("return h[:, :int(x.sum() > 0) + 1]", NEGATIVE),
    "item": ("return h * 2 if x.max().item() > 0 else h", NEGATIVE),
    "float": ("return h * float(x.shape[0] / 2)", LONGER),
    "an index": ("return h * [1, 2, 3, 4, 5, 6, 7][x.shape[0]]", LONGER),
    "round": ("return h[:, :round(x.shape[0] / 2)]", LONGER),
    "a tensor made of a number": ("return h + torch.zeros(x.shape[0], 1) + torch.arange(len(x))[:, None]", LONGER),
    "a limit of a dtype": ("return h.clamp(min=torch.finfo(x.dtype).min)", X * 2),
    "a kind": ("return h if isinstance(x, torch.Tensor) else x[0]", [X]),
    "a kind of what is computed": ("return h if isinstance(h * 2, torch.Tensor) else x", X * 2),
    "protocols": ("return x if hasattr(x, '__cuda_array_interface__') else h", X * 2),
    "is_tensor": ("return h if torch.is_tensor(x) else x[0]", [X]),
    "callable": ("return x(h) if callable(x) else h", X * 2),
    "hasattr": ("return h if hasattr(x, 'shape') and not hasattr(x, 'features') else x", X * 2),
    "an attribute that is None": ("return h if x.grad is None else x", X * 2),
    "a parameter": ("return h if self.scale.shape[0] == 4 and self.scale.dim() == 1 else x", X * 2),
    "a text of an assert": ("assert x.ndim == 2, f'not {x.shape}'\nreturn h", X[0]),
    "a text": ("return h if str(x.shape[0]) == '3' else x", LONGER),
    "a text of a part": ("return x if 'meta' in str(x.device) else h", X * 2),
    "a text of a tensor": ("return h if f'{(x > 0).all()}' == 'True' else x", NEGATIVE),
    "a text and a truth": (
        "text = f'{x.shape[0] == 3}'\nif x.shape[0]: h = h * {'True': 2}.get(text, 1)\nreturn h",
        LONGER,
    ),
    "a text before an assert": (
        "text = f'{x.shape[0]}'\ntorch._assert(x.numel(), 'empty')\nreturn h * {'3': 2}.get(text, 1)",
        LONGER,
    ),
    "a text of a tuple": ("return h * {'(3, 4)': 2}.get(str(tuple(x.shape)), 1)", LONGER),
    "a text of several": ("return h * {'[3, 4]': 2}.get(f'{[*x.shape]}', 1)", LONGER),
    "a text of a number in a tensor": ("return h * {'tensor(3)': 2}.get(str(torch.tensor(x.shape[0])), 1)", LONGER),
    "a text of a number in a buffer": ("return h * {'1': 2}.get(f'{self.steps}', 1) * len(x)", LONGER),
    "divmod": ("half, rest = divmod(x.shape[0], 2)\nreturn h[:half] if rest else x", LONGER),
    "a text that is returned": ("return {f'of {x.shape[0]}': h}", LONGER),
    "a text of several numbers": ("print(f'{x} {x.shape}', end='')\nreturn h * len(x)", LONGER),
    "another module": ("return torch.nn.Softmax(-1)(h)", X * 2),
    "a check": ("torch._check(x.shape[0] == 3, lambda: 'not three')\nreturn h", LONGER),
    "a check of all": ("torch._check_tensor_all(x >= 0, lambda: 'negative')\nreturn h", NEGATIVE),
    "a check of nothing": ("torch._check(True)\nreturn h * len(x)", LONGER),
    "a text of it": ("return h * {'cpu': 2, 'meta': 3}[x.device.type]", X * 2),
    "a kind of number": ("return h + torch.zeros(x.shape[0], 1, dtype=int)", LONGER),
    "writes": ("h[:, :2] += len(x)\nx.mul_(2)\nreturn h + x", LONGER),
    "a constant that is given as out": ("return h * torch.arange(x.shape[1], out=torch.empty(4))", LONGER),
    "a constant that is written": ("o = torch.zeros(4); o += h.sum(0) * len(x)\nreturn o * 1", LONGER),
    "a failed call": ("try: return self.fc(h, mask=x)\nexcept TypeError: return self.fc(h)", X * 2),
    "a set": ("return h * len({*x.shape[:0]}) + len(x)", LONGER),
}


if not hasattr(torch, "_check_tensor_all"):  # which came with torch 2.1
    ASKING = {kind: asking for kind, asking in ASKING.items() if "_check" not in asking[0]}


@in_both_modes
@in_both_ways
@parametrize("body, other", ASKING.values(), ids=ASKING)
def test_a_question_is_answered_or_refused(body: str, other: Any, is_exact: bool, mode: bool) -> None:
    model = stated(body).train(mode)
    example = X.clone()
    before = copy.deepcopy(model.state_dict())
    extractor = extract_quietly(model, ["output", "fc"], exact=is_exact, example_inputs=(example,))
    assert same((model.state_dict(), example), (before, X))
    assert not hasattr(model, "_tensor_constant0")
    if "+=" not in body or is_exact:
        assert agree(extractor, model, X)
        assert agree(extractor, model, X * 0.9)
        agree(extractor, model, other)


def test_a_guard_names_the_line_and_the_answer() -> None:
    extractor = extract(Asks(), "output", example_inputs=(X,))
    with pytest.raises(AssertionError, match=r"\(if x\.shape\[0\] % 3 == 0:\) was True \(test_example\.py, line \d+\)"):
        extractor(X[:2])


class Asks(nn.Module):
    """A forward with a question, twice the same, and one about a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        if x.shape[0] % 3 == 0:
            y = self.fc(y)
        if x.shape[0] % 3 == 0 and self.fc.weight.shape[0] % 2 == 0:
            y = y + 1
        return y.relu()


def test_equal_guards_are_one() -> None:
    names = eval_names(Asks(), example_inputs=(X,))
    assert [name for name in names if "_assert" in name] == ["_assert"]


def test_the_text_of_an_assert_is_no_question() -> None:
    model = stated("torch._assert(x.ndim == 2, f'not {x.shape}, of {x.size(0)} rows')\nreturn h")
    assert node_names(model, example_inputs=(X,)) == node_names(model)


def test_guards_after_the_cut_are_gone() -> None:
    extractor = extract(stated("return h.relu() if len(h) == 3 else x"), "fc", example_inputs=(X,))
    assert same(extractor(LONGER)["fc"], extractor.fc(LONGER))


@parametrize("name, size", [("vit_b_16", 224), ("swin_t", 64), ("resnet18", 64)])
def test_a_model_that_asks_nothing_has_the_same_graph(name: str, size: int) -> None:
    feature_extraction()
    import torchvision

    model = getattr(torchvision.models, name)(weights=None).eval()
    example = (torch.rand(1, 3, size, size),)
    plain, answered = (extract(model, "output", exact=True, example_inputs=given) for given in (None, example))
    own, other = ([*extractor.eval_graph.nodes] for extractor in (plain, answered))
    assert [(node.name, str(node.target)) for node in own] == [(node.name, str(node.target)) for node in other]
    assert node_names(model, example_inputs=example) == node_names(model)


# --- arguments ---


def with_options(x: Any, mask: Any = None, *, flag: bool = False, kind: str = "sum", scale: float = 3.0) -> Any:
    h = x * scale if mask is None else x * mask
    h = -h if flag is True else h
    return h.sum(0) if kind == "sum" else h.mean(0)


def optional() -> nn.Module:
    return net(lambda self, *args, **kwargs: with_options(*args, **kwargs))


class Optional(nn.Module):
    """A forward with arguments of each kind."""

    def forward(self, x: Any, mask: Any = None, *, flag: bool = False, kind: str = "sum", scale: float = 3.0) -> Any:
        return with_options(x, mask, flag=flag, kind=kind, scale=scale)


@parametrize("model", [Optional(), optional()], ids=["named", "stars"])
@parametrize(
    "options",
    [{}, {"mask": X > 0.5}, {"mask": None}, {"flag": True}, {"kind": "mean", "flag": False}, {"scale": 2.0}],
    ids=str,
)
def test_an_extractor_is_called_as_the_example(model: nn.Module, options: dict[str, Any]) -> None:
    example = {**options, "x": X}
    if model.forward.__code__.co_flags & 4:
        example = options and pytest.skip("what has no name is given by its place") or (X,)
    extractor = exact(model, "output", example_inputs=example)
    given = {**options, "x": -X}
    arguments = (given.pop("x"),) if isinstance(example, tuple) else ()
    assert same(extractor(*arguments, **given)["output"], model(-X, **options))


def test_keywords_are_arguments() -> None:
    model = net(lambda self, x, **others: self.fc(x) + others["y"], fc=linear())
    extractor = exact(model, "output", example_inputs={"x": X, "y": X})
    assert same(extractor(x=X, y=-X)["output"], model(X, y=-X))


def test_many_positional_arguments() -> None:
    model = net(lambda self, *xs: sum(xs))
    assert same(exact(model, "output", example_inputs=(X, X, X))(X, -X, X)["output"], X)


@parametrize(
    "options, other",
    [({"mask": None}, X), ({"flag": True}, False), ({"kind": "mean"}, "sum")],
    ids=["mask", "flag", "kind"],
)
def test_a_constant_of_the_example_is_guarded(options: dict[str, Any], other: Any) -> None:
    (name,) = options
    extractor = exact(Optional(), "output", example_inputs={"x": X, **options})
    with pytest.raises((AssertionError, RuntimeError), match=f"{name!r} was {options[name]!r}|ambiguous"):
        extractor(X, other)


def test_trees_are_stand_ins() -> None:
    def forward(self: Any, batch: Any) -> Any:
        total = sum(batch[name] for name in batch) + sum(batch.values())
        for name, value in batch.items():
            total = total + value * len(name)
        first, _ = batch
        total = total + batch.get("c", 1) + (batch[first] if "b" in batch else 0)
        return {**batch, "total": total, "first": first}

    model = net(forward)
    extractor = exact(model, "output", example_inputs=({"a": X, "b": X},))
    assert same(extractor({"a": X, "b": -X})["output"], model({"a": X, "b": -X}))
    with pytest.raises(AssertionError, match=r"was \['a', 'b'\]"):
        extractor({"a": X, "b": X, "c": X})


def test_what_a_tree_has_may_be_asked_without_its_keys() -> None:
    model = net(lambda self, batch: batch["a"] * 2 if hasattr(batch, "items") else batch)
    extractor = exact(model, "output", example_inputs=({"a": X},))
    assert same(extractor({"a": X, "b": X})["output"], X * 2)


def test_a_bool_that_is_a_number_is_guarded_as_one() -> None:
    model = stated("for _ in range(int(x['n'])): h = h + 1\nreturn h", fc=net(lambda self, x: x["x"]))
    extractor = exact(model, "output", example_inputs=({"x": X, "n": True},))
    assert same(extractor({"x": -X, "n": True})["output"], 1 - X)
    with pytest.raises(AssertionError, match="was True"):
        extractor({"x": X, "n": 3})


def test_the_kind_of_what_a_leaf_returns_is_guarded() -> None:
    class Split(nn.Module):
        def forward(self, x: Any) -> Any:
            return (x, x) if len(x) > 3 else x

    def forward(self: Any, x: Any) -> Any:
        y = self.leaf(x)
        return y[0] if isinstance(y, tuple) else y

    model = net(forward, leaf=Split())
    extractor = exact(model, "output", example_inputs=(X,), tracer_kwargs={"leaf_modules": [Split]})
    assert same(extractor(X)["output"], X)
    with pytest.raises(AssertionError):
        extractor(torch.ones(4, 4))


def test_what_a_leaf_returns_may_be_none() -> None:
    class Nothing(nn.Module):
        def forward(self, x: Any) -> Any:
            return None

    model = net(lambda self, x: x if self.leaf(x) is None else -x, leaf=Nothing())
    extractor = exact(model, ["leaf", "output"], example_inputs=(X,), tracer_kwargs={"leaf_modules": [Nothing]})
    assert same(extractor(X), {"leaf": None, "output": X})


@parametrize("key", [lambda x: x.shape[0], lambda x: (x.shape[0], x.dtype)], ids=["a number", "a tuple"])
def test_nothing_stays_in_a_cache(key: Any) -> None:
    cache: dict[Any, int] = {}
    model = net(lambda self, x: x * cache.setdefault(key(x), 2))
    with pytest.raises(featx.UntraceableError, match="a cache of its own"):
        node_names(model, example_inputs=(X,))


def test_what_was_looked_up_may_stay_in_a_list() -> None:
    kept = []

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        kept.append(x.shape[0])
        return x * {3: 2}.get(kept[-1], 1)

    assert agree(exact(net(forward), "output", example_inputs=(X,)), net(forward), X)


def test_a_look_up_is_guarded() -> None:
    model = net(lambda self, x: x * {3: 2, 6: 5}.get(x.shape[0], 1))
    for example, other in ((X, LONGER), (X[:2], LONGER), (LONGER, X)):
        extractor = exact(model, "output", example_inputs=(example,))
        assert agree(extractor, model, example)
        assert not agree(extractor, model, other)


def test_a_tensor_is_looked_up_by_itself() -> None:
    model = net(lambda self, x: x * {x: 2}.get(x, 1) + of_nothing(x, None))
    assert agree(exact(model, "output", example_inputs=(X,)), model, X)


@functools.lru_cache(maxsize=8)
def of_nothing(x: torch.Tensor, nothing: None) -> torch.Tensor:
    return x + 1


def test_an_error_that_other_inputs_may_not_raise() -> None:
    model = stated("try: return h[x.shape[0]]\nexcept IndexError: return h")
    with pytest.raises(featx.UntraceableError, match="goes on after an error, .*IndexError"):
        exact(model, "output", example_inputs=(X,))


def test_a_refusal_cannot_be_caught() -> None:
    model = stated("try: return h + torch.rand(4)\nexcept ValueError: return h")
    with pytest.raises(featx.UntraceableError, match="goes on after an error, .*draws random numbers"):
        exact(model, "output")


class State:
    """An object that a forward gets, and writes into."""

    def __init__(self, h: torch.Tensor, n: int = 0) -> None:
        self.h, self.n = h, n


def test_attributes_are_read_where_the_forward_reads_them() -> None:
    def forward(self: Any, state: State) -> Any:
        before, start = state.h, state.n
        state.h = state.h.relu()
        state.n = state.n + len(state.h)
        return state.h - before, state.n - start, start

    extractor = exact(net(forward), "output", example_inputs=(State(X),))
    for x in (X, -X):
        assert same(extractor(State(x))["output"], forward(None, State(x)))


@parametrize("extractor", [extract, exact])
@parametrize("example", [None, (State(State(X)),)])
def test_attributes_of_attributes_are_written_too(extractor: Any, example: Any) -> None:
    def forward(self: Any, outer: State) -> Any:
        outer.h.h = outer.h.h.relu()
        return outer.h.h * 2

    right = extractor(net(forward), "output", example_inputs=example)
    for x in (X, -X):
        assert same(right(State(State(x)))["output"], x.relu() * 2)


def test_what_the_model_returns_of_itself_is_compared_as_it_was() -> None:
    model = stated("o = torch.zeros(4); k = o.add_(h[0]); o.add_(h[1]); return k")
    assert same(exact(model, "output", example_inputs=(X,))(X)["output"], model(X))


def test_parameters_keep_their_data() -> None:
    model = stated("self.scale.data = self.scale.data / 2\nreturn h * self.scale")
    scale, data = model.scale, model.scale.data_ptr()
    extractor = exact(model, "output", example_inputs=(X,))
    assert model.scale is scale
    assert same((scale.data_ptr(), scale), (data, torch.ones(4)))
    first = extractor(X)["output"]
    assert same(extractor(X)["output"], first / 2)


class Grid(nn.Module):
    """A module with a cache that all of its class share."""

    cache: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        key = f"{x.shape[0]}"
        if key not in self.cache:
            self.cache[key] = torch.arange(x.shape[0], device=x.device)[:, None]
        return x + self.cache[key]


def test_a_dict_of_the_class_is_as_it_was() -> None:
    Grid.cache.clear()
    extractor = exact(Grid(), "output", example_inputs=(X,))
    assert not Grid.cache
    assert agree(extractor, Grid(), X)
    assert not agree(extractor, Grid(), LONGER)


def test_numbers_of_numpy_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    model = net(lambda self, x: x * numpy.sqrt(4.0) + numpy.float32(1))
    assert same(extract(model, "output")(X)["output"], X * 2 + 1)
    assert agree(exact(model, "output", example_inputs=(X,)), model, X)


def test_functions_of_numpy_take_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    model = net(lambda self, x: x * int(numpy.sqrt(x.shape[0])) + float(numpy.prod(x.shape)))
    extractor = exact(model, "output", example_inputs=(X,))
    for x in (X, -X):
        assert agree(extractor, model, x)
    assert not agree(extractor, model, LONGER)


def test_functools_caches_are_cleared() -> None:
    gc.unfreeze()  # they are found among what is collected
    model = net(lambda self, x: x + positions(x.shape[0], x.dtype))
    extractor = exact(model, "output", example_inputs=(X,))
    assert agree(extractor, model, X)
    assert not agree(extractor, model, LONGER)
    assert isinstance(positions(3, X.dtype), torch.Tensor)


@functools.lru_cache(maxsize=8)
def positions(length: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(length, dtype=dtype)[:, None]


@fails_before(featx.UntraceableError, "a proxy cannot stand in for a buffer", torch="2.14")
def test_a_buffer_may_be_given_back() -> None:
    model = stated("self.mean = self.mean.to(x.dtype)\nreturn h + self.mean")
    assert agree(exact(model, "output", example_inputs=(X,)), model, X)


WITHOUT_GRADIENTS = [
    "k = h * 2",
    "k = h.max(0).values",
    "k = h.argmax(1)[:, None]; k += 1",
    "k = self.scale * 2",
    "h.mul_(2); k = h",
    "t = h.T\nk = t.T * 2",
    "k = torch.lerp(h, h + 1, 0.5)\nwith torch.enable_grad(): k = k * self.scale",
]


@parametrize("example", [None, (X,)], ids=["without an example", "with one"])
@parametrize("body", WITHOUT_GRADIENTS)
def test_gradients_that_are_switched_off(body: str, example: Any) -> None:
    lines = body.replace("\n", "\n ")
    model = stated(f"with torch.no_grad():\n {lines}\nreturn h * k + x")
    extractor = exact(model, ["fc", "output"], example_inputs=example)
    features, x = extractor(X), X.clone().requires_grad_()
    assert same(features["output"], model(X))
    own, eager = (
        torch.autograd.grad(call(x).sum(), [x, model.scale], allow_unused=True)
        for call in (lambda x: extractor(x)["output"], model)
    )
    assert same(own, eager)


@parametrize(
    "example, error, match",
    [
        (X, TypeError, "takes a tuple"),
        ((), TypeError, "missing a required argument: 'x'"),
        ((X, X, X), TypeError, "too many positional"),
        ({"y": X}, TypeError, "missing a required"),
    ],
    ids=["no tuple", "missing", "too many", "unknown"],
)
def test_an_example_that_does_not_fit(example: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        extract(stated("return h"), "output", example_inputs=example)


def test_an_example_and_concrete_args() -> None:
    with pytest.raises(ValueError, match="pass one of them"):
        extract(Optional(), "output", example_inputs=(X,), concrete_args={"flag": True})


# --- without an example ---


@parametrize("options", [{}, {"mask": None}, {"kind": "sum"}, {"scale": 2.0}], ids=str)
def test_exact_takes_defaults(options: dict[str, Any]) -> None:
    assert same(exact(Optional(), "output")(X, **options)["output"], Optional()(X, **options))


@parametrize("options", [{"mask": "x"}, {"flag": True}, {"kind": "mean"}], ids=str)
def test_exact_refuses_other_values_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match=repr([*options][0])):
        exact(Optional(), "output")(X, **options)


def test_a_tensor_among_concrete_args() -> None:
    assert same(exact(Optional(), "output", concrete_args={"mask": X})(X)["output"], Optional()(X, X))


def test_concrete_args_win_over_defaults() -> None:
    given = {"flag": True, "mask": fx.PH}
    extractor = exact(Optional(), "output", concrete_args=given)
    assert same(extractor(X, X)["output"], Optional()(X, X, flag=True))


def test_an_argument_by_position_only() -> None:
    def forward(self: Any, x: torch.Tensor, flag: bool = False, /) -> torch.Tensor:
        return x if flag else -x

    assert same(exact(net(forward), "output")(X)["output"], -X)


def test_the_rest_of_a_signature_is_empty() -> None:
    model = net(lambda self, x, *rest, **options: x + len(rest) + len(options))
    assert same(exact(model, "output")(X)["output"], X)


@in_both_ways
def test_a_tensor_as_default(is_exact: bool) -> None:
    model = net(lambda self, x, w=WEIGHTS: x * w)
    with pytest.raises(featx.UntraceableError, match="'w' has a tensor as default"):
        extract(model, "output", exact=is_exact)
    assert same(extract(model, "output", example_inputs=(X,))(X)["output"], X)


def test_an_argument_that_nobody_takes_is_said() -> None:
    with pytest.warns(featx.FeatureWarning, match=r"concrete_args=\{'mask': None\} or example_inputs"):
        extract(net(lambda self, x, mask=None: x if mask is None else x * 2), "output")
    assert same(extract(net(lambda self, x, y=None: x * y), "output")(X, X)["output"], X * X)


def test_the_error_names_the_example_first() -> None:
    with pytest.raises(featx.UntraceableError, match=r"What helps:\n- example_inputs=\(x,\)"):
        extract(Asks(), "output")


# --- what is checked, and modes ---


def test_an_example_that_shows_a_difference() -> None:
    model = stated("v = h[:, :2]; v += 1; return h * 1")
    assert agree(exact(model, "output", example_inputs=(X,)), model, X)
    with pytest.raises(featx.UntraceableError, match="something else than it does: the output: .*not equal"):
        extract_quietly(model, "output", example_inputs=(X,))
    model = Sequential(linear(), model, linear(), nn.ReLU())
    with pytest.raises(featx.UntraceableError, match="something else than it does: the module '2': "):
        extract_quietly(model, "output", example_inputs=(X,))


def test_a_structure_that_differs() -> None:
    model = net(lambda self, x: [x] * (1 + fx._symbolic_trace.is_fx_tracing()))
    with pytest.raises(featx.UntraceableError, match="the output: 2 values in place of 1"):
        extract(model, "output", example_inputs=(X,))


class OnlyIn(nn.Module):
    """A model that fails in the other mode."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training != (self.mode == "train"):
            raise ValueError("targets")
        return self.fc(x).relu()


@parametrize("mode, other", [("train", "eval"), ("eval", "train")])
def test_the_other_mode_may_fail(mode: str, other: str) -> None:
    model = getattr(OnlyIn(mode), mode)()
    with pytest.warns(UserWarning, match=f"in {other} mode an extractor will raise.*targets"):
        names = featx.get_graph_node_names(model)
    assert getattr(names, other) == []
    assert getattr(names, mode) == ["x", "fc", "relu"]
    extractor = extract_quietly(model, {"relu": "y", "fc": "z"})
    assert same(extractor(X)["y"], model(X))
    for copied in (extractor, copy.deepcopy(extractor), pickle.loads(pickle.dumps(extractor))):
        with pytest.raises(featx.UntraceableError, match="targets"):
            getattr(copied, other)()(X)


def test_the_own_mode_may_not_fail() -> None:
    with pytest.raises(featx.UntraceableError, match="targets"):
        node_names(OnlyIn("train").eval())


# --- where extractors go ---


def asking() -> Any:
    return exact(Sequential(Asks(), Asks()), ["0", "output"], example_inputs=(X,))


def test_copies_keep_guards() -> None:
    extractor = asking()
    for copied in (copy.copy(extractor), copy.deepcopy(extractor), pickle.loads(pickle.dumps(extractor))):
        assert same(copied(X), extractor(X))
        with pytest.raises(AssertionError, match="went one way"):
            copied(X[:2])


def test_scripts_exports_and_compiles() -> None:
    extractor = asking().eval()
    assert same(torch.jit.script(extractor)(X), extractor(X))
    if hasattr(torch, "compile"):
        assert same(torch.compile(extractor, backend="eager")(X), extractor(X))
    if hasattr(torch, "export"):
        assert same(dict(torch.export.export(extractor, (X,)).module()(X)), extractor(X))


def test_random_numbers_are_those_of_one_run() -> None:
    model = stated("h = torch.nn.functional.dropout(h, 0.5, self.training)\nreturn h if (h == h).all() else x")
    assert "dropout" in node_names(model.train(), example_inputs=(X,)).train


def test_values_are_let_go() -> None:
    alive: list[Any] = []

    def forward(self: Any, x: Any) -> Any:
        for _ in range(8):
            x = x + 1
            alive.append(weakref.ref(x))
        return x

    stand_ins = net(forward)
    extract(stand_ins, "output", example_inputs=(X,))
    assert sum(reference() is not None for reference in alive) == 0


def test_builtins_are_as_they_were() -> None:
    before = isinstance, callable, torch.is_tensor, torch.zeros
    extract(Asks(), "output", example_inputs=(X,))
    assert before == (isinstance, callable, torch.is_tensor, torch.zeros)


def test_a_list_is_iterated_with_a_guard() -> None:
    model = net(lambda self, xs: torch.stack([x * 2 for x in xs]))
    extractor = exact(model, "output", example_inputs=([X, X],))
    assert same(extractor([X, -X])["output"], model([X, -X]))
    with pytest.raises(AssertionError, match="was 2"):
        extractor([X, X, X])


def test_what_has_no_index_is_listed() -> None:
    model = net(lambda self, x: sum(part for part in reversed_rows(x)))
    options = {"tracer_kwargs": {"autowrap_functions": [reversed_rows]}, "example_inputs": (X,)}
    assert same(exact(model, "output", **options)(X)["output"], model(X))


def reversed_rows(x: torch.Tensor) -> Any:
    return collections.deque(reversed([*x])).__reversed__()


# --- what others broke ---


class Record:
    """What graph libraries have: attributes, of which some are None or missing."""

    def __init__(self, **members: Any) -> None:
        vars(self).update(members)


def mine(self: Any, b: Any) -> Any:
    return b["x"] if b["m"] is None else b["x"] * b["m"]


def popped(self: Any, b: Any) -> Any:
    return b["x"] * b.pop("m", 1)


def drained(self: Any, b: Any) -> Any:
    x = b["x"]
    while len(b["n"]):
        x = x * (2 if b["n"].pop(0) else 3)
    return x


def sorted_in_place(self: Any, b: Any) -> Any:
    b["n"].sort()
    return b["x"] * b["n"][0]


def joined(self: Any, b: Any) -> Any:
    return sum(b["n"]) if isinstance(b["n"], list) else b["n"][0]


def of_a_record(self: Any, b: Any) -> Any:
    x = b.x if b.m is None and b.m is None else b.x * b.m
    return x * (2 if hasattr(b, "n") else 3) * getattr(b, "k", 1)


def unpacked(self: Any, b: Any) -> Any:
    x, m = b["n"]
    return x if m is None else x * m


MORE: list[dict[str, Any]] = [{"m": X}, {"m": None, "n": 1}, {"m": None, "k": 2}]
# A forward -> what it is called with: the example first.
BROKEN = {
    "None in a tree": (mine, [{"x": X, "m": None}, {"x": X, "m": X}]),
    "None that is unpacked": (unpacked, [{"n": (X, None)}, {"n": (X, X)}]),
    "a default of pop": (popped, [{"x": X}, {"x": X, "m": X}]),
    "a list that shrinks": (drained, [{"x": X, "n": [1, 1]}, {"x": X, "n": [1, 0]}]),
    "a list that is sorted": (sorted_in_place, [{"x": X, "n": [3, 1, 2]}, {"x": X, "n": [2, 4, 3]}]),
    "a list or a tuple": (joined, [{"n": [X, X]}, {"n": (X, X)}, {"n": [X, -X]}]),
    "attributes": (
        of_a_record,
        [Record(x=X, m=None), Record(x=X, m=X), Record(x=X, m=None, n=1), Record(x=X, m=None, k=2)],
    ),
}


@in_both_ways
@parametrize("kind", BROKEN)
def test_what_is_none_missing_or_of_another_kind(kind: str, is_exact: bool) -> None:
    forward, (example, *others) = BROKEN[kind]
    model = net(forward)
    before = copy.deepcopy(example)
    extractor = extract_quietly(model, "output", exact=is_exact, example_inputs=(example,))
    assert same(*(getattr(item, "__dict__", item) for item in (example, before)))
    assert agree(extractor, model, example)
    for other in others:
        agree(extractor, model, other)


def test_a_tensor_is_given_and_none_later() -> None:
    extractor = exact(net(lambda self, x, m=None: x if m is None else x * 2), "output", example_inputs=(X, X))
    assert same(extractor(X, -X)["output"], X * 2)
    with pytest.raises(AssertionError, match="is None"):
        extractor(X, None)


def test_lengths_in_a_chain() -> None:
    def forward(self: Any, x: Any) -> Any:
        n = x.shape[0]
        for _ in range(60):
            n = (n + 2 * (n % 2) - 1) // 1 + 1
        return x * n if n > 2 else x

    assert agree(exact(net(forward), "output", example_inputs=(X,)), net(forward), X)


@parametrize(
    "body",
    ["self.scale.data.clamp_(0, 0.5); return h * self.scale", "self.scale.data[:2].fill_(3); return h * self.scale"],
)
def test_parameters_are_as_they_were(body: str) -> None:
    model = stated(body)
    before = copy.deepcopy(model.state_dict())
    extract_quietly(model, "fc", example_inputs=(X,))
    assert same(model.state_dict(), before)


def test_buffers_are_as_they_were_where_a_mode_fails_when_it_is_checked() -> None:
    model = Sequential(nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4)).eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="in train mode an extractor will raise"):
        extract(model, "output", example_inputs=(torch.rand(1, 4, 2, 2),))
    assert same(model.state_dict(), before)


def test_embeddings_are_as_they_were() -> None:
    model = Sequential(nn.Embedding(10, 4, max_norm=0.1))
    before = copy.deepcopy(model.state_dict())
    extract(model, "output", example_inputs=(torch.arange(10),))
    assert same(model.state_dict(), before)


def test_a_lazy_module_is_called_before() -> None:
    with ignored_warnings():
        model = Sequential(nn.LazyLinear(3))
    with pytest.raises(featx.UntraceableError, match="lazy modules: call it once before"):
        extract(model, "output", example_inputs=(X,))
    assert model(X).shape == (3, 3)


def test_a_codebook_keeps_its_gradients() -> None:
    def forward(self: Any, x: Any) -> Any:
        with torch.no_grad():
            nearest = (x[:, None] - self.codes).abs().sum(2).argmin(1)
            x = x.float()
        return self.codes[nearest] + x

    model = net(forward, codes=nn.Parameter(torch.rand(5, 4)))
    extractor = exact(model, "output", example_inputs=(X,))
    x = X.clone().requires_grad_()
    for call in (model, lambda x: extractor(x)["output"]):
        gradients = torch.autograd.grad(call(x).sum(), [x, model.codes], allow_unused=True)
        assert all(gradient is not None for gradient in gradients)


@parametrize(
    "wrong",
    [
        lambda x, is_traced: (x, 2 if is_traced else 3),
        lambda x, is_traced: None if is_traced else x,
        lambda x, is_traced: {"a" if is_traced else "b": x},
        lambda x, is_traced: [x, x] if is_traced else [x],
    ],
    ids=["a number", "None", "a key", "more"],
)
def test_outputs_are_compared_whole(wrong: Any) -> None:
    model = net(lambda self, x: wrong(x, fx._symbolic_trace.is_fx_tracing()))
    with pytest.raises(featx.UntraceableError, match="something else than it does: the output"):
        extract(model, "output", example_inputs=(X,))


@dataclasses.dataclass
class Output:
    value: torch.Tensor
    count: int = 2


@fails_before(featx.UntraceableError, "torch.fx takes no dataclass", torch="2.2")
def test_an_output_of_a_class_of_its_own() -> None:
    model = net(lambda self, x: Output(self.fc(x)), fc=linear())
    found = exact(model, "output", example_inputs=(X,))(X)["output"]
    assert (type(found), found.count) == (Output, 2)
    assert same(found.value, model.fc(X))


class Pair(nn.Module):
    def forward(self, x: Any) -> Any:
        return x, None if x.sum() > 0 else x


def test_none_in_what_a_leaf_returns() -> None:
    def forward(self: Any, x: Any) -> Any:
        value, more = self.pair(x)
        return value if more is None else value * more

    model = net(forward, pair=Pair())
    options = {"tracer_kwargs": {"leaf_modules": [Pair]}, "example_inputs": (X,)}
    extractor = exact(model, "output", **options)
    assert agree(extractor, model, X)
    assert not agree(extractor, model, NEGATIVE)


def test_what_cannot_be_copied_is_shared() -> None:
    model = net(lambda self, x, lock: x * 2)
    assert same(exact(model, "output", example_inputs=(X, threading.Lock()))(X, None)["output"], X * 2)


def test_without_an_example_nothing_is_answered() -> None:
    assert eval_names(net(lambda self, d: d.keys())) == ["d", "keys"]
    assert eval_names(net(lambda self, x: {x: x * 2}[x])) == ["x", "mul"]


def test_a_stand_in_left_in_a_global() -> None:
    left: list[Any] = []

    def forward(self: Any, x: Any) -> Any:
        left.append(x * 2)
        return left[0]

    with pytest.raises(featx.UntraceableError, match="a stand-in, which the forward has left"):
        extract(net(forward), "output", example_inputs=(X,))


def test_what_a_hook_keeps_of_the_example() -> None:
    kept: list[Any] = []
    model = stated("return h + self.last()", last=lambda: kept[-1])
    model.fc.register_forward_hook(lambda module, inputs, value: kept.append(value * 2))
    with pytest.raises(featx.UntraceableError, match="takes a tensor of an earlier call"):
        exact(model, "output", example_inputs=(X,))
    with pytest.warns(featx.FeatureWarning, match="takes a tensor of an earlier call"):
        extract(model, "output", example_inputs=(X,))
