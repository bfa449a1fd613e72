"""Errors: of the documented type, with their ingredients, in words that say what was given and what to do."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import Sequential

from tests import featx
from tests.helpers import by_pickle, eval_names, extract, node_names, parametrize, refused, select, suggestions, zoo
from tests.nets import Block, Modes, blocks, build_on_meta, linear, net


def test_the_types_are_those_of_others_too() -> None:
    assert issubclass(featx.NodeNameError, ValueError)
    assert issubclass(featx.UntraceableError, fx.proxy.TraceError)
    assert issubclass(featx.LeafModuleAwareTracer, fx.Tracer)
    assert issubclass(featx.NodePathTracer, featx.LeafModuleAwareTracer)
    assert issubclass(featx.DualGraphModule, fx.GraphModule)
    assert set(featx.__all__) <= set(dir(featx))


def test_a_typo() -> None:
    with pytest.raises(featx.NodeNameError) as raised:
        extract(blocks(), "1.frist")
    error = raised.value
    assert error.query == "1.frist"
    assert error.mode == "train"
    assert error.suggestions[:1] == ["1.first"]


def test_a_module_whose_calls_are_named_otherwise() -> None:
    model = net(lambda self, x: self.fc_2(self.fc_1(x)), fc_1=linear(), fc_2=linear())
    with pytest.raises(featx.NodeNameError, match="exact=True gives what it returned") as raised:
        extract(model, "fc_2")
    assert raised.value.suggestions == ["fc_1", "fc"]
    with pytest.raises(featx.NodeNameError) as raised:
        extract(model, "fc_3", exact=True)
    assert set(raised.value.suggestions) == {"fc_1", "fc_2"}


@zoo
@parametrize("name", ["resnet18", "swin_t", "vit_b_32"])
def test_letters_that_are_swapped_lead_to_the_right_name_first(name: str, rng: random.Random) -> None:
    names = eval_names(build_on_meta(name))
    known = sorted(select(names))
    tried = 0
    while tried < 50:
        right = rng.choice(known)
        at = rng.randrange(len(right))
        pair = right[at : at + 2]
        if len(right) < 5 or not pair.isalpha() or len(set(pair)) < 2:
            continue
        typo = right[:at] + pair[::-1] + right[at + 2 :]
        if typo not in known:
            assert suggestions(names, typo)[0] == right
            tried += 1


def text_of(model: nn.Module, query: str) -> str:
    with pytest.raises((featx.NodeNameError, featx.UntraceableError)) as raised:
        extract(model, query)
    return re.sub(r'File ".*", line \d+', 'File "…", line 0', str(raised.value))


REMEDIES = """\
- autowrap_functions=(function,), in tracer_kwargs, makes each call of a function of your own one
  operation (builtins such as int and len have to be called inside one)
- concrete_args={'argument': value} fixes an argument that decides which way the code goes"""
EXAMPLE = "- example_inputs=(x,) answers it as for these inputs"
REASON = "TraceError: its control flow depends on its inputs"


def test_the_whole_text_of_a_typo() -> None:
    assert text_of(Sequential(linear()), "00") == (
        "no node of the train graph is named '00' or lies below it. The closest: '0'."
        " get_graph_node_names(model) lists all names."
    )


def test_the_whole_text_of_what_cannot_be_traced() -> None:
    assert text_of(Sequential(Bad()), "0") == (
        f"torch.fx cannot trace tests.test_errors.Bad at '0': {REASON}\n"
        '  File "…", line 0, in forward\n    return x if x.sum() > 0 else -x\n'
        f"What helps:\n{EXAMPLE}\n- leaf_modules=[tests.test_errors.Bad], in tracer_kwargs, makes each "
        f"tests.test_errors.Bad one operation\n{REMEDIES}"
    )


def test_the_whole_text_of_an_own_forward() -> None:
    def forward(self: Any, x: Any) -> Any:
        return self.part(x) if x.sum() > 0 else x

    assert text_of(net(forward, part=Sequential(linear())), "part") == (
        f"torch.fx cannot trace the model's own forward (tests.nets.Net): {REASON}\n"
        '  File "…", line 0, in forward\n    return self.part(x) if x.sum() > 0 else x\n'
        f"What helps:\n{EXAMPLE}\n{REMEDIES}\n"
        "Its children part can be traced by themselves."
    )


def test_a_name_of_the_other_mode() -> None:
    with pytest.raises(featx.NodeNameError, match="in the train graph only: pass train_return_nodes and") as raised:
        extract(Modes(), "aux")
    assert raised.value.mode == "eval"
    with pytest.raises(featx.NodeNameError, match="in the eval graph only") as raised:
        extract(Modes(), "mul")
    assert raised.value.mode == "train"


def test_a_module_inside_of_a_leaf() -> None:
    model = Sequential(nn.TransformerEncoderLayer(4, 2, 4))
    path = "torch.nn.modules.transformer.TransformerEncoderLayer"
    with pytest.raises(featx.NodeNameError, match=re.escape(f"inside the leaf module '0' ({path})")) as raised:
        extract(model, "0.self_attn")
    assert f"tracer_kwargs={{'non_leaf_modules': [{path}]}} opens it" in str(raised.value)


def test_a_module_that_never_runs() -> None:
    model = net(lambda self, x: self.used(x), used=linear(), unused=Sequential(linear()))
    for query in ("unused", "unused.0"):
        with pytest.raises(featx.NodeNameError, match="is a module that is not called in train mode, or returns"):
            extract(model, query)


def test_errors_can_be_pickled() -> None:
    error = featx.NodeNameError("a", "train", ["b"], "Hint.")
    twin = by_pickle(error)
    assert str(twin) == str(error)
    assert (twin.query, twin.mode, twin.suggestions) == ("a", "train", ["b"])
    error = featx.UntraceableError("a.b", nn.Linear, "reason")
    twin = by_pickle(error)
    assert str(twin) == str(error)
    assert (twin.path, twin.module_type) == ("a.b", nn.Linear)


class Bad(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


class Wrong(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("of its own")


@parametrize(
    ("model", "path", "kind", "cause"),
    [
        (Bad(), "", Bad, fx.proxy.TraceError),
        (Sequential(Bad()), "0", Bad, fx.proxy.TraceError),
        (Sequential(Sequential(Block(), Wrong())), "0.1", Wrong, RuntimeError),
        (Sequential(net(lambda self, x: int(x))), "0", None, fx.proxy.TraceError),
        (net(lambda self, x: nn.Linear(4, 4)(x)), "", None, NameError),
    ],
)
def test_what_cannot_be_traced(model: nn.Module, path: str, kind: Any, cause: Any) -> None:
    for call in (node_names, lambda m: extract(m, "x")):
        with pytest.raises(featx.UntraceableError) as raised:
            call(model)
        error = raised.value
        assert error.path == path
        assert error.module_type is type(model.get_submodule(path))
        assert kind in (None, error.module_type)
        assert isinstance(error.__cause__, cause)
        assert f"{type(error.__cause__).__name__}: {error.__cause__}" in str(error)
        whole = f"{error.module_type.__module__}.{error.module_type.__qualname__}"
        assert (f"leaf_modules=[{whole}]" in str(error)) == bool(path)
        assert 'test_errors.py", line' in str(error)


def test_a_builtin_is_recorded_only_inside_a_function_of_ones_own() -> None:
    for forward in (lambda self, x: x * int(x.sum()), lambda self, x: x * len(x)):
        with pytest.raises(featx.UntraceableError, match="such as int and len have to be called inside one"):
            node_names(net(forward), {"autowrap_functions": (int, len)})
    model = net(lambda self, x: x * rows(x))
    assert eval_names(model, {"autowrap_functions": (rows,)}) == ["x", "rows", "mul"]


def rows(x: torch.Tensor) -> int:
    return int(len(x))


def test_an_error_that_a_forward_handles_is_not_where_the_next_one_was() -> None:
    def forward(self: Any, x: Any) -> Any:
        try:
            return self.wrong(x)
        except RuntimeError:
            return x if x.sum() > 0 else -x

    refused(net(forward, wrong=Wrong()), "", "own forward", exact=False)


@parametrize(
    ("kwargs", "message"),
    [
        ({"leafs": []}, "unexpected keyword argument 'leafs'"),
        ({"leaf_modules": [nn.ReLU()]}, r"a leaf or non-leaf module is given by its class, not ReLU\(\)"),
        ({"non_leaf_modules": "ReLU"}, "a leaf or non-leaf module is given by its class, not 'R"),
        ({"leaf_modules": None}, "a leaf or non-leaf module is given by its class, not None"),
        (["leaf_modules"], "'list' object is not a mapping"),
    ],
)
def test_tracer_kwargs(kwargs: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        node_names(Sequential(), kwargs)


def test_concrete_args() -> None:
    model = net(lambda self, x, flag=True: x)
    with pytest.raises(ValueError, match=r"concrete_args has {'falg'}; the arguments of forward are \['x', 'flag'\]"):
        node_names(model, concrete_args={"falg": True})
    with pytest.raises(TypeError, match="is not a mapping"):
        node_names(model, concrete_args=[1])


@parametrize("query", [("0", "key"), ["0"], None])
def test_queries_are_read_as_strings(query: Any) -> None:
    with pytest.raises(featx.NodeNameError) as raised:
        extract(Sequential(nn.ReLU()), [query])
    assert raised.value.query == str(query)


def test_bytes_are_no_query() -> None:
    with pytest.raises(TypeError, match="return_nodes takes a dict, .* not a bytes"):
        extract(Sequential(nn.ReLU()), b"0")


def test_two_queries_under_one_key() -> None:
    with pytest.raises(ValueError, match="both '0' and '1' are put under the key 'a'"):
        extract(Sequential(nn.ReLU(), nn.ReLU()), None, {"0": "a", "1": "a"}, ["0"])


def test_the_warning_says_what_differs_and_points_here() -> None:
    for call in (featx.get_graph_node_names, lambda model: featx.create_feature_extractor(model, ["body"])):
        with pytest.warns(UserWarning, match="differ") as caught:
            call(Modes())
        (warning,) = caught
        assert warning.filename == __file__
        for part in (
            "only in train mode: aux, mean, add; only in eval mode: mul.",
            "train_return_nodes and eval_return_nodes",
            "suppress_diff_warning=True",
        ):
            assert part in str(warning.message)


def test_the_warning_is_short() -> None:
    def forward(self: Any, x: Any) -> Any:
        for layer in self.layers if self.training else ():
            x = layer(x)
        return x

    with pytest.warns(UserWarning, match=r"only in train mode: layers.0, [^;]{170,190}, …\. A query"):
        featx.get_graph_node_names(net(forward, layers=nn.ModuleList(linear() for _ in range(50))))


def test_no_warning_where_the_modes_agree_or_it_is_suppressed() -> None:
    featx.get_graph_node_names(Block())
    featx.get_graph_node_names(Modes(), suppress_diff_warning=True)
    featx.create_feature_extractor(Modes(), ["body"], suppress_diff_warning=True)


def test_the_warning_function_itself() -> None:
    train = featx.NodePathTracer()
    evaluation = featx.NodePathTracer()
    train.trace(Modes())
    evaluation.trace(Modes().eval())
    with pytest.warns(UserWarning, match="only in train"):
        featx._warn_graph_differences(train, evaluation)
