"""What tracing would leave out, or make a constant, is right, refused or said."""

from __future__ import annotations

import copy
import inspect
import re
import threading
import warnings
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from torch import equal, nn
from torch.nn import Sequential

from tests import featx, nets
from tests.helpers import (
    MODES,
    X,
    as_leaves,
    eval_names,
    exact,
    extract,
    extract_quietly,
    feature,
    heard,
    in_its_mode,
    node_names,
    parametrize,
    python,
    refused,
    returned,
    run,
    same,
    seeded,
    texts,
    traced,
    truth,
    without_number,
    zoo,
)
from tests.nets import Block, blocks, build_on_meta, linear, net, stated
from tests.versions import older

ASSIGNED = "assigns or writes into a buffer"
KINDS = ["torch.autocast", "grad mode", "buffers", "random numbers", "replaced on the instance", ASSIGNED]


def said(model: nn.Module, *queries: Any, **options: Any) -> list[str]:
    """What an extractor is said to lose, each kind once; if nothing else is asked for, that of the output."""
    with heard() as caught:
        extract(model, *(queries or ["output"]), **options)
    assert {warning.category for warning in caught} <= {featx.FeatureWarning}
    messages = texts(caught)
    kinds = kinds_of(messages)
    assert len(kinds) == len(set(kinds)) == len(messages)
    return messages


def kinds_of(messages: list[str]) -> list[str]:
    return [kind for kind in KINDS for message in messages if kind in message]


def outcomes(function: Callable[..., Any], parameters: list[nn.Parameter]) -> list[Any]:
    """Values, with their dtypes, and gradients; where gradients are enabled, and where they are not."""
    found: list[Any] = []
    for enabled in MODES:
        with torch.set_grad_enabled(enabled):
            value = seeded(function, X)
        gradients: Any = []
        if value.requires_grad:
            gradients = torch.autograd.grad(value.sum(), parameters, allow_unused=True)
        found.append([value.detach().clone(), value.requires_grad, list(gradients)])
    return found


def check_as_leaves(model: nn.Module) -> None:
    """Where what cannot be traced becomes a leaf, values and gradients are the model's."""
    right = as_leaves(model)
    parameters = list(model.parameters())
    assert same(outcomes(lambda x: right(x)["output"], parameters), outcomes(model, parameters))


# ---------------------------------------------------------------------------------------- blocks


def plain(self: Any, x: Any) -> Any:
    return self.fc(x)


ENABLING = torch.enable_grad()(plain)
NO_GRAD = "with torch.no_grad(): return self.fc(x)"
ENABLE = "with torch.enable_grad(): return self.fc(x)"
CAST = "with torch.autocast('cpu', torch.bfloat16): return self.fc(x)"
NOT_CAST = "with torch.autocast('cpu', enabled=False): return self.fc(x)"
BLOCKS: dict[str, list[Any]] = {
    "grad mode": [
        NO_GRAD,
        "with torch.no_grad(): x = self.fc(x)\nreturn self.fc(x)",
        "with torch.no_grad(): return torch.sigmoid(x)",
        "with torch.set_grad_enabled(False): return self.fc(x)",
        "with torch.inference_mode(): return self.fc(x)",
        ENABLE,
        "with torch.set_grad_enabled(True): return self.fc(x)",
        "with torch.no_grad():\n x = torch.sigmoid(x)\n with torch.enable_grad(): return self.fc(x)",
        "with torch.enable_grad(), torch.no_grad(): return self.fc(x)",
        torch.no_grad()(plain),
        ENABLING,
        torch.inference_mode()(plain),
    ],
    "torch.autocast": [
        CAST,
        NOT_CAST,
        "with torch.autocast('cpu', torch.bfloat16):\n x = self.fc(x)\n"
        " with torch.autocast('cpu', enabled=False): return self.fc(x.float())",
        torch.autocast("cpu", dtype=torch.bfloat16)(plain),
    ],
}
CASES = [(kind, forward) for kind, forwards in BLOCKS.items() for forward in forwards]


def around(forward: Any) -> nn.Module:
    """A model, its module '1' with a forward, or the text of one, and a buffer ``scale``."""
    make = stated if isinstance(forward, str) else net
    return Sequential(linear(), make(forward, fc=linear(), scale=torch.rand(4)), nn.Identity())


@parametrize(("kind", "forward"), CASES)
def test_a_block_is_said_refused_or_right(kind: str, forward: Callable[..., Any]) -> None:
    model = around(forward)
    (message,) = said(model)
    for part in (kind, "module '1'", "exact=True", "auto_leaf=True"):
        assert part in message
    if kind == "torch.autocast":
        refused(model, "1", kind)
    else:
        assert "1" not in eval_names(model, exact=True, auto_leaf=True)  # it is no leaf
    parameters = list(model.parameters())
    expected = outcomes(model, parameters)
    right = as_leaves(model, {"output": "y", "0": "first", "1": "second"})
    assert same(outcomes(lambda x: right(x)["y"], parameters), expected)
    assert same(outcomes(lambda x: right(x)["second"], parameters), expected)
    assert same(extract_quietly(model, "output")(X)["output"], truth(model)["2"])  # which is what torch.fx gives


def test_what_both_modes_lose_is_said_once() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.fc(x if self.training else -x)  # it asks, so that each mode is traced

    assert kinds_of(said(around(forward))) == ["grad mode"]


def test_an_item_is_set_in_its_block() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        h = x @ self.fc.weight
        with torch.no_grad():
            self.fc.weight[0] = 0.0  # which raises an error where gradients are on
        return h

    model = Sequential(net(forward, fc=linear()))
    exact(model, "output")(X)
    assert model[0].fc.weight[0].tolist() == [0.0] * 4


def test_the_function_that_sets_the_grad_mode() -> None:
    model = around("torch.set_grad_enabled(False); x = self.fc(x); torch.set_grad_enabled(True); return self.fc(x)")
    assert kinds_of(said(model)) == ["grad mode"]
    own, eager = exact(model, "output")(X)["output"], model(X)
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad(value.sum(), parameters, allow_unused=True) for value in (own, eager)]
    assert same([own, gradients[0]], [eager, gradients[1]])


def no_grad_at_last(self: Any, x: Any) -> Any:
    x = self.fc(x)
    with torch.no_grad():
        return self.fc(x)


def cast_in_no_grad(self: Any, x: Any) -> Any:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        return self.fc(x)


def enable_in_no_grad(self: Any, x: Any) -> Any:
    with torch.no_grad():
        x = torch.sigmoid(x)
        with torch.enable_grad():
            return self.fc(x)


@parametrize("forward", [no_grad_at_last, cast_in_no_grad, enable_in_no_grad, torch.no_grad()(plain), ENABLING])
def test_the_line(forward: Any) -> None:
    model = around(forward)
    lines, first = inspect.getsourcelines(forward)
    error = str(refused(model, "1")) if forward is cast_in_no_grad else ""
    for text in filter(None, (*said(model), error)):
        found = re.findall(rf'File "{re.escape(__file__)}", line (\d+), in .*\n    (.*)', text)
        assert len(found) == 1
        for number, line in found:
            assert line == lines[int(number) - first].strip()


class Around(nn.Module):
    """Runs what is traced inside of it in a block."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.inner = blocks()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.block():
            return self.inner(x)


@parametrize("block", [torch.no_grad, torch.enable_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_a_block_around_inner_modules_is_the_outer_ones(block: Any) -> None:
    model = Sequential(Block(), Around(block), Block())
    for query in ("1.inner.0", "1.inner.1", "output"):
        (message,) = said(model, query)
        assert "module '1' " in message
    if block not in (torch.no_grad, torch.enable_grad):
        refused(model, "1")
        with pytest.warns(UserWarning, match=r"\[tests\.test_tracing\.Around\]"):
            names = eval_names(model, exact=True, auto_leaf=True)
        assert "1" in names
        assert {"0.first", "2.first"} < set(names)
    check_as_leaves(model[:2])  # what comes after autocast would take its bfloat16 for a mistake


def test_one_warning_for_each_kind() -> None:
    everything = """
with torch.no_grad(), torch.autocast('cpu', torch.bfloat16): h = self.fc(x + torch.rand(4)) * self.scale.sqrt()
return h"""
    model = Sequential(around(everything), around(everything), around(NO_GRAD))
    messages = said(model)
    assert sorted(kinds_of(messages)) == sorted(KINDS[:4])
    assert all("module '0.1' " in message for message in messages)
    refused(model, "0.1")
    check_as_leaves(model)


def test_one_warning_for_both_modes() -> None:
    body = f"if self.training:\n {CAST}\n{NO_GRAD}"
    assert kinds_of(said(around(body))) == ["torch.autocast", "grad mode"]
    for mode, kind in zip(MODES, KINDS):
        model = around(body).train(mode)
        assert kinds_of(said(model, *in_its_mode(model, "output"))) == [kind]


# ------------------------------------------------------------------------- what is not concerned


NOISE = "return self.fc(x + torch.rand(4))"
SCALE = "return self.fc(x * self.scale.sqrt())"


@parametrize("forward", [NO_GRAD, ENABLE, CAST, NOT_CAST, NOISE, SCALE])
def test_what_comes_before_is_not_concerned_and_what_comes_later_is(forward: str) -> None:
    def branches(self: Any, x: Any) -> Any:
        before = self.before(x)
        return self.losing(before), self.beside(before)

    model = net(branches, before=Block(), losing=around(forward), beside=Block())
    for queries in ("output", ["beside", "losing"], "losing.1", "beside"):
        assert len(said(model, queries)) == 1
    assert said(model, ["before", "losing.0"]) == []
    assert len(said(model, None, ["before"], ["output"])) == 1


def test_all_of_a_block_is_concerned() -> None:
    model = stated("with torch.enable_grad(): return self.first(x), self.second(x)", first=linear(), second=linear())
    assert [len(said(model, query)) for query in ("first", "second")] == [1, 1]


def test_a_number_concerns_all_that_comes_later() -> None:
    body = "number = self.mean.mean().item(); beside = torch.sigmoid(x); return beside, self.fc(x) * number"
    model = stated(body)
    for query in ("sigmoid", "mul"):
        assert kinds_of(said(model, query)) == ["buffers"]


NOTHING = {
    "zeros": "return x + torch.zeros(4)",
    "arange": "return x + torch.arange(4) * 2",
    "tensor": "return x * torch.tensor([1.0, 2.0, 3.0, 4.0]).sqrt()",
    "mask": "return x.masked_fill(torch.ones(4, 4).tril()[2] == 0, -1.0)",
    "new": "return torch.cat([x, torch.full((3, 1), 2.0)], dim=1)",
    "integers": "return x[:, self.index.view(-1).flip(0)]",
    "a number": "return x * torch.tensor(3).item() * int(self.index.sum())",
    "a buffer as it is": "return x * self.scale",
    "half of a buffer": "return x[:, :2] * self.scale[:2]",
    "a view of a view": "return x[:, :2] * self.scale.view(2, 2).t()[1]",
    "what a buffer is like": "return x.to(self.scale.dtype) * self.scale.shape[0]",
    "a parameter": "return x * self.weight.exp()",
}


@parametrize("case", NOTHING)
def test_no_false_alarm(case: str) -> None:
    index = torch.tensor([[1, 0], [3, 2]])
    weight = nn.Parameter(torch.rand(4))
    model = Sequential(stated(NOTHING[case], scale=torch.rand(4), index=index, weight=weight))
    assert equal(feature(model), model(X))
    if case != "a number":  # whose int() cannot be traced where buffers are nodes
        assert equal(feature(model, exact=True), model(X))
    assert equal(as_leaves(model)(X)["output"], model(X))


# --------------------------------------------------------------------------- what is made constant


# What is computed from a buffer; the model's value is multiplied by it.
CONSTANTS = {
    "computed": "self.scale.sqrt()",
    "twice": "self.scale.sqrt().neg()",
    "with another constant": "torch.ones(4) / self.scale",
    "half of it": "self.scale[:2].repeat(2)",
    "a number": "self.scale.mean().item()",
    "data": "self.scale.data.sqrt()",
    "detached": "self.scale.detach().abs()",
    "another type": "self.scale.double()",
    "in place": "torch.empty(4).copy_(self.scale)",
    "a part in place": "torch.cat([torch.zeros(4)[:2], self.scale.sqrt()[:2]])",
    "complex": "self.scale.abs()",
}


@parametrize("case", CONSTANTS)
def test_what_is_computed_from_buffers_is_said_and_exact_follows(case: str) -> None:
    buffer = torch.rand(4, dtype=torch.complex64 if case == "complex" else None)
    model = Sequential(linear(), stated(f"return h * ({CONSTANTS[case]})", scale=buffer))
    before = model(X)
    (message,) = said(model)
    assert "buffers" in message
    assert "module '1' " in message
    default = extract_quietly(model, "output")
    right = exact(model, "output")
    assert equal(default(X)["output"], before)
    state = {key: value + 0.5 for key, value in model.state_dict().items()}
    for module in (model, right):
        module.load_state_dict(state, strict=False)
        assert equal(right(X)["output"], model(X))
    assert not equal(model(X), before)


@parametrize("options", [{}, {"exact": True}])
def test_views_of_buffers_follow_the_model(options: dict[str, Any]) -> None:
    model = net(lambda self, x: x * self.scale.view(2, 2)[0].repeat_interleave(x.shape[1] // 2), scale=torch.rand(4))
    extractor = extract(model, "output", **options)
    before = model(X)
    assert equal(extractor(X)["output"], before)
    model.load_state_dict({"scale": model.scale + 0.5})
    assert equal(extractor(X)["output"], model(X))
    assert not equal(model(X), before)


def test_buffers_are_nodes() -> None:
    model = around(lambda self, x: self.fc(x * self.scale.sqrt()))
    names = ["input", "0", "1._1_scale", "1.sqrt", "1.mul", "1.fc", "2"]  # as torch.fx calls parameters
    assert eval_names(model, exact=True) == names
    right = exact(model, {"1._1_scale": "scale", "1.sqrt": "root", "output": "output"})
    assert equal(right(X)["scale"], model[1].scale)
    assert sorted(right.state_dict()) == sorted(model.state_dict())
    assert right.get_buffer("1.scale") is model[1].scale
    right.load_state_dict({key: value * 2 for key, value in model.state_dict().items()})
    assert equal(right(X)["output"], model(X))


def test_a_buffer_that_is_not_saved_is_a_node_too() -> None:
    model = around(lambda self, x: self.fc(x * self.scale.sqrt()))
    model[1].register_buffer("scale", torch.rand(4), persistent=False)
    right = exact(model, "output")
    assert list(right.state_dict()) == list(model.state_dict())
    model[1].scale += 1
    assert equal(right(X)["output"], model(X))


@pytest.mark.skipif(older(torch="2.14"), reason="a proxy cannot stand in for a buffer, so that any way is refused")
def test_a_buffer_that_is_assigned_is_said_refused_or_right() -> None:
    model = around("self.scale = x.mean(0) * 0.5 + 1; return x * self.scale")
    for query in ("input", "output"):
        assert ASSIGNED in kinds_of(said(model, query))
    refused(model, "1", ASSIGNED)
    refused(model[1], "", ASSIGNED)
    right = as_leaves(model)
    reference = copy.deepcopy(model)
    for _ in range(3):
        assert equal(right(X)["output"], reference(X))


def test_an_empty_buffer_that_is_assigned_is_said_or_refused() -> None:
    model = around("self.table = torch.ones(4); return x * self.table")
    model[1].register_buffer("table", None)
    assert ASSIGNED in kinds_of(said(model, "output"))
    refused(model, "1", ASSIGNED)
    assert model[1].table is None


DRAWS = {
    "rand": "return x + torch.rand(4)",
    "randn": "return x * torch.randn(4).abs().sqrt()",
    "order": "return x[:, torch.randperm(4)]",
    "normal": "return x + torch.normal(torch.zeros(4), 1.0)",
    "integers": "return x + torch.randint(0, 1000, (4,))",
    "bernoulli": "return x * torch.bernoulli(torch.full((4, 4), 0.5)).sum(0)",
    "in place": "return x * torch.empty(4).uniform_()",
    "a part in place": "o = torch.zeros(4); o[:2] = torch.rand(2); return x * o",
    "dropout": "return x + F.dropout(torch.ones(64)).sum()",
    "a number": "return x * torch.rand(1).item()",
    "a way": "return self.fc(x) if torch.rand(1) < 0.5 else x",
    "an early return": "return x if torch.rand(1) < 2 else self.fc(x)",
}


@parametrize("case", DRAWS)
def test_what_is_drawn_is_said_refused_or_right(case: str) -> None:
    model = around(DRAWS[case])
    assert kinds_of(said(model)) == ["random numbers"]
    refused(model, "1", "random numbers")
    check_as_leaves(model)


def test_a_draw_that_only_picks_the_output() -> None:
    model = around("return h if torch.rand(1) < 2 else x")[:2]
    assert kinds_of(said(model)) == ["random numbers"]
    assert said(model, "1.fc") == []


def test_what_is_drawn_like_the_input_is_a_node() -> None:
    model = around("return self.fc(x + torch.rand_like(x))")
    assert said(model) == []
    right = exact(model, "output")
    assert not equal(right(X)["output"], right(X)["output"])


# ------------------------------------------------------------------------- the model's own forward


@parametrize("body", [NO_GRAD, ENABLE, CAST, NOISE])
def test_the_models_own_forward(body: str) -> None:
    model = stated(body, part=Sequential(Block()), bad=around(CAST))
    (message,) = said(model)
    assert message.startswith("the model's own forward ")
    for auto_leaf in (False, True) if body in (CAST, NOISE) else ():
        assert refused(model, "", "the model's own forward", auto_leaf=auto_leaf).traceable == ["part"]
    check_as_leaves(Sequential(model))


def test_the_model_computes_from_buffers() -> None:
    model = stated(SCALE, scale=torch.rand(4))
    (message,) = said(model)
    assert message.startswith("the model's own forward ")
    right = exact(model, "output")
    model.scale += 1
    assert equal(right(X)["output"], model(X))


def replaced(model: nn.Module) -> nn.Module:
    """As adapters do it."""
    forward = model.forward
    model.forward = lambda x: forward(x) + 1  # type: ignore[method-assign]
    return model


def test_a_replaced_forward_inside_is_traced() -> None:
    model = Sequential(Block(), replaced(Block()), replaced(Sequential(Block())))
    for mended in (False, True):
        assert equal(feature(model, exact=mended), model(X))


# ------------------------------------------------------------------------------- the caller's things


def test_what_other_threads_run_is_not_seen_and_not_disturbed() -> None:
    busy = Sequential(*(around(forward) for forward in (NO_GRAD, ENABLE, cast_in_no_grad)))
    found: list[Any] = []

    def elsewhere() -> None:
        found.extend(outcomes(busy, list(busy.parameters())))
        found.append(busy[0][1].scale.sqrt() * torch.zeros(4))
        torch.rand(4)
        torch.enable_grad().__enter__()  # in which the thread ends

    def forward(self: Any, x: Any) -> Any:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return self.fc(x) * self.scale

    elsewhere()
    expected = copy.copy(found)
    for mended in (False, True):
        found.clear()
        assert said(around(forward), exact=mended) == []
        assert same(found, expected)  # one trace serves both modes


def test_what_the_thread_is_in_is_no_block() -> None:
    model = Sequential(Block(), around(plain))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert said(model) == said(model, exact=True) == []
    with torch.inference_mode():
        assert said(model) == said(model, exact=True) == []
    with torch.no_grad():
        for forward in (NO_GRAD, ENABLE):
            assert kinds_of(said(around(forward))) == ["grad mode"]


@parametrize("exact", [False, True])
@parametrize("forward", ["return h", ENABLE, NO_GRAD, CAST, NOISE, "self.missing"])
def test_torch_is_as_it_was(forward: str, exact: bool) -> None:
    def state() -> list[Any]:
        blocks = [torch.enable_grad, torch.set_grad_enabled, torch.no_grad]
        modes = [torch.is_grad_enabled(), torch.is_autocast_enabled(), torch._C._len_torch_dispatch_stack()]
        return [*modes, *(vars(block).get("__enter__") for block in blocks)]

    before = state()
    model = around(forward)
    try:
        extract_quietly(model, "output", exact=exact)
    except featx.UntraceableError:
        assert exact or "missing" in forward
    assert state() == before


@parametrize("model", [around(NO_GRAD), around(SCALE), around(NOISE), replaced(around(plain))])
def test_the_warnings_can_be_silenced(model: nn.Module) -> None:
    with pytest.raises(featx.FeatureWarning):
        extract(model, "output")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=featx.FeatureWarning)
        extract(model, "output")


def test_computing_while_tracing_imports_nothing() -> None:
    program = """
import sys
import torch
import featx

class Computing(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x):
        with torch.no_grad():
            return x * self.scale.sqrt() + torch.zeros(4).exp() + torch.rand(4)

before = set(sys.modules)
featx.create_feature_extractor(Computing(), "output")
added = sorted(set(sys.modules) - before)
assert not [name for name in added if name.startswith("torch._dynamo")], added
"""
    folder = Path(str(featx.__file__)).parent
    done = python("-W", "ignore", "-c", program, cwd=folder)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------- real pieces


class FrozenBatchNorm2d(nn.Module):
    """As DETR's: all four are buffers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = [self.weight, self.bias, self.running_mean, self.running_var]
        weight, bias, mean, variance = [value.reshape(1, -1, 1, 1) for value in values]
        scale = weight * (variance + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


def test_a_frozen_batch_norm_follows_its_checkpoint() -> None:
    models = pytest.importorskip("torchvision.models")
    model = models.resnet50(weights=None, norm_layer=FrozenBatchNorm2d).eval()
    queries = ["bn1", "layer1", "layer4", ""]
    x = torch.rand(1, 3, 64, 64)
    assert kinds_of(said(model, queries[1:3])) == ["buffers"]
    right = exact(model, {query or "output": query for query in queries})
    assert sorted(right.state_dict()) == sorted(model.state_dict())
    for module in (model, right):
        state = {key: torch.rand_like(value) * 0.1 for key, value in model.state_dict().items()}
        module.load_state_dict(state)
        seen = returned(model, x)
        assert same(run(right, x), {query: seen[query][0] for query in queries})


# ----------------------------------------------------------------------------------------- the zoo


@zoo
@parametrize("name", nets.collected(nets.traceable))
def test_the_zoo_is_silent_and_gains_nodes_of_buffers_alone(name: str) -> None:
    model = build_on_meta(name)
    names = node_names(model)
    with heard() as caught:
        extract(model, None, *names)
    assert kinds_of(texts(caught)) == []
    buffers = {path for path, _ in model.named_buffers()}
    for mode in MODES:
        before = traced(model.train(mode), exact=True)[0].names
        nodes = traced(model, buffers=True, exact=True)[0].node_to_qualname
        gained = set()
        for node in nodes:  # buffers, and operations on nothing else
            operands = node.all_input_nodes
            computed = node.op != "call_module" and operands and gained.issuperset(operands)
            if computed or (node.op == "get_attr" and node.target in buffers):
                gained.add(node)
        assert set(before) <= set(nodes.values())
        stems = [without_number(name) for node, name in nodes.items() if node not in gained]
        assert stems == list(map(without_number, before))
