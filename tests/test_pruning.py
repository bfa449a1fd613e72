"""What runs is what the requested values need; the oracle is the whole traced graph, run node by node with clones."""

from __future__ import annotations

import io
import operator
import random
from typing import Any

import pytest
import torch
from torch import equal, fx, nn
from torch.nn import Sequential

from tests import featx
from tests.helpers import (
    MODES,
    X,
    both_traced,
    effects,
    eval_names,
    exact,
    extract,
    extract_quietly,
    feature,
    ignored_warnings,
    parametrize,
    recording,
    run,
    same,
    tensors,
    traced,
    traced_already,
    truth,
    zoo,
)
from tests.nets import IN_PLACE, Rectifying, build_with_input, linear, net, writes_in_place


def test_the_oracle_sees_what_is_overwritten() -> None:
    model = net(lambda self, x: self.relu(x - 0.5), relu=nn.ReLU(inplace=True))
    seen = truth(model)
    assert equal(seen["sub"], X - 0.5)
    assert seen["sub"].min() < 0 <= seen["relu"].min()


EVERY_NODE = ["googlenet", "mobilenet_v3_small", "resnet18", "swin_t", "vit_b_32"]


@zoo
@parametrize("name", EVERY_NODE)
def test_every_node_alone_has_the_value_it_had_when_it_was_made(name: str) -> None:
    model, x = build_with_input(name)
    seen = truth(model.eval(), x)
    assert len(seen) > 50
    with both_traced(model) as tracers, traced_already(tracers):
        for query, expected in seen.items():
            actual = run(extract_quietly(model, query), x)
            assert list(actual) == [query]
            assert same(actual[query], expected), query


@zoo
@parametrize("name", ["mvit_v1_b", "mvit_v2_s"])
def test_drawn_nodes_of_models_with_unassigned_writes(name: str, rng: random.Random) -> None:
    model, x = build_with_input(name)
    seen = truth(model.eval(), x)
    drawn = [*rng.sample(sorted(seen), 5), list(seen)[-1]]
    expected = {query: seen[query] for query in drawn}
    expected["output"] = run(model, x)
    for query, value in expected.items():
        print(name, query)
        assert same(run(extract_quietly(model, query), x)[query], value), query


@parametrize("kind", IN_PLACE)
def test_a_write_is_kept_while_something_later_reads_the_memory(kind: str) -> None:
    model = writes_in_place(kind).eval()
    expected = run(model)
    untouched = run(model.fc)
    assert not equal(expected, untouched), "the write makes no difference, so this net shows nothing"
    last = eval_names(model)[-1]
    actual = run(extract(model, [last, "output"]))
    assert equal(actual[last], expected)
    assert equal(actual["output"], expected)
    # The requested value is no reader: alone, it is what it was when it was made, and the write is not run.
    alone = extract(model, "fc")
    assert operations(alone) == ["fc"]
    assert equal(run(alone)["fc"], untouched)


def operations(extractor: Any) -> list[Any]:
    """What stays: the functions, and the names of methods and modules."""
    return [node.target for node in extractor.graph.nodes if node.op.startswith("call")]


def called(extractor: nn.Module) -> list[str]:
    """The leaves that run, in order."""
    with recording(extractor) as calls:
        extractor(X)
    return [path for path, _ in calls if not any(extractor.get_submodule(path).children())]


def test_nothing_runs_after_the_last_requested_node() -> None:
    extractor = extract(Sequential(*(linear() for _ in range(5))), ["2"])
    assert called(extractor) == ["0", "1", "2"]
    assert list(extractor.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"]


def test_a_branch_that_nothing_reads_is_gone_with_its_in_place_operations() -> None:
    def forward(self: Any, x: Any) -> Any:
        trunk = self.trunk(x)
        side = self.relu(self.side(trunk))  # in place, but into memory of its own
        return self.head(trunk), side

    relu = nn.ReLU(inplace=True)
    model = net(forward, trunk=linear(), side=linear(), relu=relu, head=linear())
    assert called(extract(model, "head")) == ["trunk", "head"]


def auxiliary(model: nn.Module) -> list[str]:
    return [path for path, _ in model.named_children() if path.lower().startswith("aux")]


@zoo
@parametrize(
    ("name", "options", "query"),
    [
        ("googlenet", {"init_weights": False}, "fc"),
        ("inception_v3", {"init_weights": False}, "fc"),
        ("fcn_resnet50", {"weights_backbone": None, "aux_loss": True}, "classifier"),
        ("deeplabv3_mobilenet_v3_large", {"weights_backbone": None, "aux_loss": True}, "classifier"),
    ],
)
def test_auxiliary_heads_are_gone(name: str, options: dict[str, Any], query: str) -> None:
    model = pytest.importorskip("torchvision.models").get_model(name, weights=None, **options)
    assert auxiliary(model)
    assert not auxiliary(extract(model, query))


def test_asserts_before_the_cut_stay_and_those_after_it_go() -> None:
    def forward(self: Any, x: Any) -> Any:
        torch._assert(x.shape[1] == 4, "four features")
        y = self.first(x[:, :4])  # which would take more
        torch._assert(y.shape[0] == 1, "one sample")
        return self.second(y)

    model = net(forward, first=linear(), second=linear())
    early = extract(model, "first")
    late = extract(model, "second")
    with pytest.raises(AssertionError, match="four features"):
        early(torch.rand(1, 5))
    assert list(early(torch.rand(2, 4))) == ["first"]
    with pytest.raises(AssertionError, match="one sample"):
        late(torch.rand(2, 4))


def test_placeholders_stay() -> None:
    model = net(lambda self, x, unused, scale=2.0, *rest, **options: self.first(x) * scale, first=linear())
    assert equal(extract(model, "x")(X, None, 3.0, "more", option=1)["x"], X)


def test_the_output_reads_its_values_when_all_is_done() -> None:
    def forward(self: Any, x: Any) -> Any:
        a = x * 2
        b = x * 3
        a.add_(1)
        b.mul_(2)
        c = x * 4
        c.sub_(1)
        x * 5  # nobody takes it
        return a, {"b": b}

    extractor = extract(net(forward), "output")
    assert same(extractor(X)["output"], (X * 2 + 1, {"b": X * 3 * 2}))
    assert operations(extractor) == [operator.mul, operator.mul, "add_", "mul_"]


def bump(x: torch.Tensor, y: torch.Tensor) -> None:
    y += x


class Bumping(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> None:
        bump(x, y)


@parametrize("kind", ["function", "leaf"])
def test_an_opaque_call_whose_value_nobody_takes_is_there_for_its_effect(kind: str) -> None:
    def forward(self: Any, x: Any) -> Any:
        y = self.linear(x)
        (bump if kind == "function" else self.opaque)(x, y)
        return self.head(y)

    model = net(forward, linear=linear(), opaque=Bumping(), head=linear())
    kwargs = {"leaf_modules": [Bumping], "autowrap_functions": [bump]}
    assert equal(feature(model, "head", tracer_kwargs=kwargs), model(X))
    assert operations(extract(model, "linear", tracer_kwargs=kwargs)) == ["linear"]


def test_an_opaque_call_whose_value_is_taken_is_believed_not_to_write() -> None:
    def forward(self: Any, x: Any) -> Any:
        y = self.linear(x)
        return branching(y), y + 1

    model = net(forward, linear=linear())
    extractor = extract(model, "add", tracer_kwargs={"autowrap_functions": [branching]})
    assert operations(extractor) == ["linear", operator.add]


def branching(x: torch.Tensor) -> torch.Tensor:
    return x * 2 if x.sum() > 0 else x + 1  # fx cannot trace this


def storages(value: Any) -> set[int]:
    return {tensor.storage().data_ptr() for tensor in tensors(value) if tensor.numel()}


def versions(value: Any) -> list[int]:
    return [tensor._version for tensor in tensors(value)]


class Watch(fx.Interpreter):
    """Storages and version counters say what each node wrote to and shared; the analysis must have foreseen it."""

    def __init__(self, model: nn.Module) -> None:
        self.tracer, module = traced(model)
        super().__init__(module)

    def run_node(self, n: fx.Node) -> Any:
        before = {node: versions(self.env[node]) for node in n.all_input_nodes}
        value = super().run_node(n)
        if n.op.startswith("call"):
            writes, views = effects(self.tracer, n)
            for node, counts in before.items():
                if versions(self.env[node]) != counts:
                    assert node in writes, f"{n.name} writes into {node.name}"
                if storages(value) & storages(self.env[node]):
                    assert node in views, f"{n.name} views {node.name}"
        return value


@zoo
@parametrize("name", ["efficientnet_b0", "googlenet", "maxvit_t", "mvit_v1_b", "resnet18", "swin_t", "vit_b_32"])
def test_no_write_and_no_view_of_the_zoo_is_missed(name: str) -> None:
    model, x = build_with_input(name)
    for mode in MODES:
        with ignored_warnings():  # of TypedStorage, which is what all versions of torch have
            run(Watch(model.train(mode)).run, x)


def test_an_opaque_leaf_with_an_in_place_part_may_write_its_input() -> None:
    def forward(self: Any, x: Any) -> Any:
        y = x - 0.5
        z = self.leaf(y)
        return y * 2, z

    model = net(forward, leaf=Rectifying())
    kwargs = {"leaf_modules": [Rectifying]}
    assert equal(feature(model, "mul", tracer_kwargs=kwargs), model(X)[0])


def halve_(x: torch.Tensor) -> torch.Tensor:
    return x.mul_(0.5)


def test_the_name_of_an_opaque_function_is_believed() -> None:
    def forward(self: Any, x: Any) -> Any:
        y = x - 0.5
        z = halve_(y)
        return y * 2, z

    model = net(forward)
    kwargs = {"autowrap_functions": [halve_]}
    assert equal(feature(model, "mul", tracer_kwargs=kwargs), model(X)[0])


@zoo
def test_a_sequence_that_begins_with_a_fresh_value_does_not_write_its_input() -> None:
    """torchvision's convolution blocks end in an in-place activation, but on a value of their own."""
    block = pytest.importorskip("torchvision.ops").Conv2dNormActivation

    def forward(self: Any, x: Any) -> Any:
        y = self.stem(x)
        return self.unwanted(y), self.wanted(y)

    model = net(forward, stem=nn.Conv2d(3, 4, 1), unwanted=block(4, 4), wanted=nn.Conv2d(4, 4, 1))
    assert list(extract(model, "wanted")._modules) == ["stem", "wanted"]


def test_a_write_by_keyword() -> None:
    def forward(self: Any, x: Any) -> Any:
        y = x - 0.5
        torch.relu_(input=y)
        return y * 2

    model = net(forward)
    assert equal(feature(model, "mul"), model(X))


def test_a_write_into_several_outputs() -> None:
    def forward(self: Any, x: Any) -> Any:
        values = x * 0
        indices = (x * 0).long()
        torch.sort(x, out=(values, indices))
        return values * 2

    model = net(forward)
    assert equal(feature(model), model(X))


def test_operators_of_python_neither_write_nor_give_views() -> None:
    def forward(self: Any, x: Any) -> Any:
        inside = (x > 0) & (x < 1)  # operator.and_, which ends as what works in place does
        product = x @ self.weight
        half = product / 2
        half.masked_fill_(inside, 0.0)
        return half * inside

    model = net(forward, weight=nn.Parameter(torch.rand(4, 4)))
    extract(model, ["x", "gt", "lt", "and_", "matmul", "output"])
    with pytest.warns(featx.FeatureWarning, match="'truediv' is overwritten in place"):
        extract(model, ["truediv", "output"])


def test_what_sorts_a_list_only_reads_a_tensor() -> None:
    def forward(self: Any, x: Any) -> Any:
        y = self.fc(x)
        y.sort()  # of a list, this would be a write
        return y * 2

    extractor = extract(net(forward, fc=linear()), ["mul"])
    assert operations(extractor) == ["fc", operator.mul]


@parametrize("inplace", [torch.zeros(2), lambda: True, None, "no"])
def test_an_attribute_that_happens_to_be_called_inplace(inplace: Any) -> None:
    class Leaf(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    leaf = Leaf()
    object.__setattr__(leaf, "inplace", inplace)
    model = net(lambda self, x: (self.leaf(x * 2), x * 3), leaf=leaf)
    extractor = extract(model, "mul_1", tracer_kwargs={"leaf_modules": [Leaf]})
    assert list(extractor._modules) == []


@parametrize("loaded", [False, True])
def test_a_scripted_submodule_that_works_in_place(loaded: bool) -> None:
    """It answers for ``inplace`` in a way of its own."""
    leaf = torch.jit.script(nn.ReLU(inplace=True))
    if loaded:
        file = io.BytesIO()
        torch.jit.save(leaf, file)
        leaf = torch.jit.load(io.BytesIO(file.getvalue()))
    model = Sequential(linear(), leaf)
    features = exact(model, ["0", "1"])(X)
    assert equal(features["0"], model[0](X))
    assert features["0"].min() < 0


def test_a_property_that_raises() -> None:
    class Leaf(nn.Module):
        @property
        def inplace(self) -> bool:
            raise AttributeError("nobody knows")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    model = net(lambda self, x: self.leaf(x) * 2, leaf=Leaf())
    assert equal(feature(model, "mul", tracer_kwargs={"leaf_modules": [Leaf]}), model(X))


@parametrize(
    "find",
    [
        lambda y: y.max(1, keepdim=True).values,
        lambda y: torch.topk(y, 2).values,
        lambda y: torch.max(y, 1, keepdim=True)[0],
    ],
)
def test_a_write_into_a_part_of_a_named_tuple(find: Any) -> None:
    def forward(self: Any, x: Any) -> Any:
        found = find(self.fc(x))
        before = found + 0
        found.add_(1)
        return before.sum() + found

    model = net(forward, fc=linear())
    for mended in (False, True):
        assert equal(feature(model, exact=mended), model(X))


@parametrize(
    ("parts", "writes"),
    [
        ([nn.ReLU(inplace=True)], True),
        ([nn.Identity(), nn.ReLU(inplace=True)], True),
        ([nn.Flatten(0), Sequential(nn.ReLU(inplace=True))], True),
        ([nn.Tanh(), nn.ReLU(inplace=True)], False),
        ([nn.ReLU(), nn.Identity()], False),
        ([nn.Identity(), nn.Flatten(0)], False),
    ],
)
def test_a_sequence_that_is_a_leaf_writes_what_its_parts_write(parts: list[nn.Module], writes: bool) -> None:
    def forward(self: Any, x: Any) -> Any:
        y = x - 0.5
        return self.leaf(y), y + 1

    model = net(forward, leaf=Sequential(*parts))
    extractor = extract(model, "add", tracer_kwargs={"leaf_modules": [Sequential]})
    assert equal(extractor(X)["add"], model(X)[1])
    assert list(extractor._modules) == (["leaf"] if writes else [])
