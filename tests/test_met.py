"""Programs that people met: what a forward does to memory, to buffers and to the modules around it.

One forward each, with its neighbours, as text that `nets.stated` makes a net of.
"""

from __future__ import annotations

import importlib
import operator
import re
import sys
from typing import Any, Callable

import pytest
import torch
from torch import nn
from torch.nn import Sequential

from tests import featx
from tests.helpers import (
    X,
    eval_names,
    exact,
    extract,
    extract_quietly,
    feature,
    ignored_warnings,
    in_both_modes,
    parametrize,
    refused,
    same,
    verdict,
)
from tests.nets import linear, net, stated
from tests.versions import fails_before, needs

# Right, by default and if exact, without a warning.
RIGHT = {
    "a mean that moves": "y = h - self.mean; self.mean.lerp_(h.mean(0).detach(), 0.5); return y",
    "a copy": "y = h - self.mean; self.mean.copy_(h[0].detach()); return y",
    "never read": "self.mean.copy_(x[0]); return h",
    "rows of a memory bank": "y = h @ self.bank; self.bank[:, 0] = x[0]; return y",
    "out": "y = h + self.mean; torch.add(self.mean, x.sum(), out=self.mean); return y",
    "a parameter": "y = h * self.scale; self.scale.data.mul_(0.5); return y",
    "only viewed": "return h @ self.bank.t() + self.mean.view(1, 4) + self.bank[0]",
    "items": "h[:, :2] += 1; return h * 1",
    "masked items": "h[h < 0] = 0; return h * 1",
    "a number into items": "h[0] = 7.0; return h * 1",
    "items of another": "k = h.clone(); k[:, 0] = h[:, 1]; return k",
    "data": "h.data = h.data * 2; return h * 1",
    "a residual": "out = h.relu(); out += x; return out",
    "a list": "a = [h]; b = a; a += [x]; return b[0] + b[1]",
    "numbers": "i = 0\nfor j in range(3): i += j\nreturn h * i",
    "a sum": "o = torch.zeros(4); o += h.sum(0); return o * 1",
    "rows of a constant": "o = torch.zeros(4, 4); o[:2] = h[:2]; return self.fc(o)",
    "a constant's method": "o = torch.zeros(4); o.add_(h.sum(0)); return h + o",
    "two constants": "a, b = torch.zeros(4), torch.ones(4); a += h[0]; b.mul_(h[1]); return h + a * b",
    "a constant written twice": "o = torch.zeros(4); k = o.add_(h[0]); o.add_(h[1]); return h * k",
    "a constant masked": "o = torch.full((3, 4), 2.0); o[h > 0] = 1; return h * o",
    "a constant is out": "o = torch.zeros(3, 4); torch.add(h.detach(), 1, out=o); return self.fc(o)",
    "returned": "o = torch.zeros(3, 4); o[:] = h; return o",
    "returned with more": "o = torch.zeros(3, 4); o[:2] = h[:2]; o[2:] = h[2:]; return o, h",
    "like another": "o = torch.zeros_like(h); o[:2] = h[:2]; return o * 2",
}


@in_both_modes
@parametrize("extractor", [extract, exact])
@parametrize("kind", RIGHT)
def test_right(kind: str, extractor: Callable[..., Any], mode: bool) -> None:
    assert verdict(extractor, stated(RIGHT[kind]).train(mode)) == "right"


BUFFER = "assigns or writes into a buffer"
OPERATOR = "works in place, of which tracing makes a new value"
# Right if exact; by default wrong, and a warning says so.
SAID = {
    "steps": (BUFFER, "self.steps.add_(1); return h / self.steps"),
    "steps afterwards": (BUFFER, "y = h / self.steps; self.steps.add_(1); return y"),
    "a part of a buffer": (BUFFER, "y = h + self.mean; self.mean[:2].add_(1); return y"),
    "a number": (BUFFER, "y = h + self.mean; self.mean[0] = 5.0; return y"),
    "a traced part": (BUFFER, "y = h + self.mean; self.mean[:2].copy_(x[0, :2]); return y"),
    "data": (BUFFER, "y = h + self.mean; self.mean.data.copy_(x[0]); return y"),
    "an attribute": (OPERATOR, "t = h.T; t += 1; return h * 1"),
    "a view": (OPERATOR, "v = h[:, :2]; v += 1; return h * 1"),
    "a view, read as feature": (OPERATOR, "v = h[:, :2]; v += 1; return h"),
    "an argument": (OPERATOR, "v = x[:, :2]; v += 1; return self.fc(x)"),
    "another name": (OPERATOR, "skip = h; h *= 2; return skip * 1"),
    "another name, written later": (OPERATOR, "a = h; a += 1; h.mul_(2); return a"),
    "another name, a part of it later": (OPERATOR, "a = h; a += 1; h[:, 0].fill_(7); return a"),
    "two names": (OPERATOR, "a = h; a += 1; h += 5; return a * 1"),
    "two views": (OPERATOR, "v = h[:, :2]; v += 1; w = h[:, :2]; w += 1; return v * 1"),
    "transposed": (OPERATOR, "t = h.t(); t -= 1; return h * 1"),
    "bool": (OPERATOR, "k = h > 0; j = k; k &= x > 0.5; return h * j"),
    "powers": (OPERATOR, "k = h.detach(); k **= 2; k /= 2; return h * 1"),
    "remainders": (OPERATOR, "k = h.detach(); k //= 0.1; k %= 3; return h * 1"),
    "bits": (OPERATOR, "j = k = (x * 8).int(); k <<= 1; k |= 1; k ^= 3; k >>= 1; return h * j"),
}
COUNTED = "y = h / self.steps; self.steps += 1; return y"
old = fails_before(AssertionError, "a proxy cannot stand in for a buffer", torch="2.14")


@in_both_modes
@parametrize(("text", "body"), [*SAID.values(), pytest.param(BUFFER, COUNTED, marks=old)], ids=[*SAID, "an operator"])
def test_said_by_default(text: str, body: str, mode: bool) -> None:
    model = stated(body).train(mode)
    assert verdict(exact, model) == "right"
    assert verdict(extract, model) == "said"
    with pytest.warns(featx.FeatureWarning, match=text):
        extract(model, "output")


def test_numbers_may_be_said_idly() -> None:
    model = stated("n = x.shape[0]; m = n; n += 1; return h * n + m")
    assert verdict(exact, model) == "right"
    assert verdict(extract, model) == "said idly"


class Deciding(nn.Module):
    def __call__(self, x: Any) -> Any:
        return super().__call__(x)

    def forward(self, x: Any) -> Any:
        return x if x.sum() > 0 else -x


@parametrize("options", [{"auto_leaf": True}, {"tracer_kwargs": {"leaf_modules": [Deciding]}}], ids=str)
def test_what_has_a_call_of_its_own_is_no_leaf(options: dict[str, Any]) -> None:
    text = r"Deciding: its __call__ is its own, so leaf_modules and auto_leaf do nothing for it"
    assert "leaf_modules=[" not in str(refused(Sequential(Deciding()), "0", text, exact=False, **options))


EARLIER = "takes a tensor of an earlier call"
CONSTANT = "computes from buffers"
REFUSED = {
    "kept": (EARLIER, "return h + self.kept[0]"),
    "computed from what was kept": (EARLIER, "return h + self.kept[0].mean() * 2"),
    "a view of a constant": (BUFFER, "o = torch.zeros(4, 4); v = o[:2]; v.copy_(h[:2]); return self.fc(o)"),
    "a view of what is written": (CONSTANT, "o = torch.zeros(4, 4); o[:2] = h[:2]; return h @ o.t()"),
    "changed after it was taken": (BUFFER, "o = torch.zeros(4, 1); k = torch.cat([h, o], 1); o += 1; return k[:, 3:]"),
    "a parameter that was taken": (
        BUFFER,
        "w = self._parameters['scale']; k = h * w\nwith torch.no_grad(): w.mul_(0.5)\nreturn k",
    ),
    "integers": (CONSTANT, "o = torch.zeros(4, dtype=torch.long); o[:2] = x[0, :2].long() + 3; return x * (o * 2)"),
    "out of the graph": (CONSTANT, "o = torch.zeros(4, 4); o[:2] = h[:2]; return o * 2"),
}


def test_a_plain_tensor_may_be_filled_before_it_is_taken() -> None:
    model = stated("self.plain.fill_(2.0); return h * self.plain")
    model.plain = torch.zeros(4)
    assert verdict(exact, model) == "right"


def test_a_plain_tensor_is_left_as_it_was() -> None:
    model = stated("self.plain.add_(h[0]); self.plain.zero_(); return h")
    model.plain = torch.ones(4)
    with ignored_warnings():
        featx.get_graph_node_names(model)
    assert same(model.plain, torch.ones(4))


@parametrize("kind", REFUSED)
def test_refused_if_exact(kind: str) -> None:
    text, body = REFUSED[kind]
    model = stated(body, kept=[linear()(X)])
    refused(model, "", text)
    with pytest.warns(featx.FeatureWarning, match=text):
        extract(model, "output")


def test_an_assigned_counter_is_said() -> None:
    model = stated("self.steps = self.steps + 1; return h / self.steps")
    with pytest.warns(featx.FeatureWarning, match=BUFFER):
        extract(model, "output")


class Calling(nn.Sequential):
    def __call__(self, x: Any) -> Any:
        return super().__call__(x) + 1


def test_what_surrounds_a_forward_is_no_part_of_what_the_forward_returns() -> None:
    model = nn.Sequential(linear(), Calling(linear()))
    for extractor in (extract, exact):
        assert verdict(extractor, model) == "right"
        closed = extractor(model, "output", tracer_kwargs={"leaf_modules": [Calling]})  # which does nothing
        assert torch.equal(closed(X)["output"], model(X))
    assert verdict(extract, model, "1") == "said"
    with pytest.raises(featx.NodeNameError, match="not called in"):
        exact(model, "1")


# What a forward does to a list that it is given, whose second item is a dict.
CONTAINERS = {
    "update": "x[1].update(y=h); return x[1]['y'] * 2",
    "setdefault": "x[1].setdefault('y', h); return x[1]['y'] * 2",
    "item": "x[1]['y'] = h; return x[1]['y'] * 2",
    "append": "x.append(h); return x[-1] * 2",
    "insert": "x.insert(0, h); return x[0] * 2",
    "extend": "x.extend([h]); return x[-1] * 2",
    "reverse": "x.reverse(); return x[0]['k'] * h",
    "pop": "x.pop(0); return x[0]['k'] * h",
}


@parametrize("extractor", [extract, exact])
@parametrize("kind", CONTAINERS)
def test_methods_of_containers(kind: str, extractor: Callable[..., Any]) -> None:
    model = stated(CONTAINERS[kind], fc=net(lambda self, x: self.one(x[0]), one=linear()))
    assert verdict(extractor, model, inputs=[[X, {"k": -X}]]) == "right"


DROPPING = "return F.dropout(h, 0.5, self.training)"
NORM = "return F.batch_norm(h, self.mean, self.bank[0], training=self.training)"


@in_both_modes
@parametrize("extractor", [extract, exact])
@parametrize("body", [DROPPING, NORM])
def test_a_part_in_the_other_mode(body: str, extractor: Callable[..., Any], mode: bool) -> None:
    model = Sequential(stated(body), linear()).train(mode)
    model[0].train(not mode)
    assert verdict(extractor, model) == "right"


def test_modes_that_differ_where_nobody_looks() -> None:
    model = stated("return h * 2 if self.training else h")
    exact(model, "fc", suppress_diff_warning=False)
    with pytest.warns(UserWarning, match="differ"):
        exact(model, "output", suppress_diff_warning=False)


@parametrize("method", ["encode", "forward", "__call__"])
def test_the_path_of_what_is_not_called(method: str) -> None:
    part = net(lambda self, x: x, one=linear())
    setattr(type(part), method, lambda self, x: self.one(x).relu())
    model = stated(f"return self.part.{method}(h)", part=part)
    with pytest.warns(featx.FeatureWarning, match="'part.one', not what the module 'part' returns"):
        extract(model, "part")
    with pytest.raises(featx.NodeNameError, match="not called in train mode"):
        exact(model, "part")


AROUND: dict[str, Callable[[Any], Any]] = {
    "hook": lambda model: model.register_forward_hook(lambda module, inputs, value: value * 2),
    "pre-hook": lambda model: model.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,)),
    "call": lambda model: setattr(type(model), "__call__", lambda self, x: self.forward(x) * 2),
}


@parametrize("kind", AROUND)
def test_around_the_model(kind: str) -> None:
    model = stated("return h + 1")
    AROUND[kind](model)
    refused(model, "", "was replaced on the instance, or stands inside of hooks or a __call__")
    assert verdict(extract, model) == "said"
    for mended in (extract, exact):
        assert verdict(mended, Sequential(model)) == "right"


# Other programs of torch.


@in_both_modes
@parametrize("extractor", [extract, exact])
def test_replicas(extractor: Callable[..., Any], mode: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As nn.DataParallel makes them; what it copies to other devices is cloned."""
    module = importlib.import_module("torch.nn.parallel.replicate")
    clones = lambda tensors, *_, **__: [[tensor.clone() for tensor in tensors]] * 2  # noqa: E731
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", clones)

    def second(model: nn.Module, queries: Any) -> Any:
        return module.replicate(extractor(model, queries), [0, 0])[1]

    assert verdict(second, Sequential(linear(), nn.Dropout()).train(mode)) == "right"


def test_scripted_and_traced_parts_are_leaves() -> None:
    model = Sequential(torch.jit.script(linear()), torch.jit.trace(linear(), X))
    assert eval_names(model) == ["input", "0", "1"]
    assert same(feature(model, exact=True), model(X))


def test_lazy_parts_stay_lazy() -> None:
    with ignored_warnings():
        model = Sequential(nn.LazyLinear(4))
    extract(model, "0")
    assert model[0].has_uninitialized_params()


@parametrize("kind", ["jit.script", pytest.param("compile", marks=needs("torch.compile", torch="2.0"))])
def test_compiled_models_are_not_taken(kind: str) -> None:
    with pytest.raises(TypeError, match="_orig_mod"):
        extract(operator.attrgetter(kind)(torch)(linear()), "output")


def test_gradients_of_what_is_overwritten() -> None:
    """Grad-CAM."""
    model = Sequential(linear(), nn.ReLU(inplace=True), linear())
    ours, output = exact(model, ["0", "2"])(X).values()
    value = model[0](X)
    assert same(ours, value)
    expected = torch.autograd.grad(model[2](value.relu()).sum(), value)
    assert same(torch.autograd.grad(output.sum(), ours), expected)


def test_what_meets_later_is_not_overwritten() -> None:
    """A pyramid of features takes all of them, when nothing is written any more."""
    rectifiers = {name: nn.ReLU(inplace=True) for name in ("one", "two")}
    model = stated("a = self.one(h); return self.top([a, self.two(self.fc(a))])", top=nn.Identity(), **rectifiers)
    for extractor in (extract, exact):
        assert "clone" not in extractor(model, ["one", "two"]).code


# What errors advise.


def _first(x: torch.Tensor) -> torch.Tensor:
    return x[:, : int(x.shape[1] // 2)]


@parametrize("function", [lambda x: _first(x), lambda x: sys.modules[__name__]._first(x)])
def test_functions_that_are_autowrapped(function: Callable[[Any], Any]) -> None:
    model = net(lambda self, x: function(x))
    assert eval_names(model, {"autowrap_functions": [_first]}) == ["x", "_first"]


@parametrize("function", [torch.relu, lambda x: x])
def test_functions_that_no_namespace_has_may_be_autowrapped(function: Callable[[Any], Any]) -> None:
    assert eval_names(net(lambda self, x: torch.relu(x)), {"autowrap_functions": [function]}) == ["x", "relu"]


shared = nn.ReLU()
HINTS: dict[str, tuple[Any, str, str]] = {
    "shared": (Sequential(shared, linear(), shared), "2", "It is the module '0'; a second call of that is '0_1'"),
    "auto_leaf": (Sequential(stated("return h if h.sum() > 0 else x")), "0.fc", "auto_leaf=True made it a leaf: "),
}


@parametrize("kind", HINTS)
def test_hints(kind: str) -> None:
    model, query, hint = HINTS[kind]
    with pytest.raises(featx.NodeNameError) as raised:
        extract_quietly(model, query, auto_leaf=True)
    assert re.search(hint, raised.value.hint)


Result = type("Result", (), {})


@parametrize(
    ("forward", "reason"),
    [
        (torch.no_grad()(lambda self, x, **options: x), r"is wrapped by \w+ \(.*, line \d+\)"),
        (lambda self, x: Result(), "takes or returns a tests.test_met.Result"),
    ],
)
def test_reasons(forward: Any, reason: str) -> None:
    refused(net(forward), "", reason, exact=False)
