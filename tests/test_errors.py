"""Errors: of the documented type, with their ingredients, in words that say what was given and what to do."""

from __future__ import annotations

import pickle
import random
import re
import warnings
from typing import Any, Dict

import pytest
import torch
from torch import fx, nn

from tests import featx, nets
from tests.nets import net


def extract(model: nn.Module, query: Any, **options: Any) -> nn.Module:
    return featx.create_feature_extractor(model, query, suppress_diff_warning=True, **options)


def test_the_types_are_builtins_too() -> None:
    assert issubclass(featx.NodeNameError, ValueError)
    assert issubclass(featx.UntraceableError, fx.proxy.TraceError)


def test_a_typo() -> None:
    with pytest.raises(featx.NodeNameError) as raised:
        extract(nn.Sequential(nets.Block(), nets.Block()), "1.frist")
    error = raised.value
    assert (error.query, error.mode, error.suggestions[:1]) == ("1.frist", "train", ["1.first"])
    assert str(error).startswith(
        "no node of the train graph is named '1.frist' or lies below it. The closest: '1.first', "
    )
    assert str(error).endswith("get_graph_node_names(model) lists all names.")


def test_a_module_whose_calls_are_named_otherwise() -> None:
    model = nets.net(lambda self, x: self.fc_2(self.fc_1(x)), fc_1=nn.Linear(4, 4), fc_2=nn.Linear(4, 4))
    with pytest.raises(featx.NodeNameError, match="exact=True gives what it returned") as raised:
        extract(model, "fc_2")
    assert raised.value.suggestions == ["fc_1", "fc"]
    with pytest.raises(featx.NodeNameError) as raised:
        featx.create_feature_extractor(model, "fc_3", exact=True)
    assert set(raised.value.suggestions) == {"fc_1", "fc_2"}


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["resnet18", "swin_t", "vit_b_32"])
def test_letters_that_are_swapped_lead_to_the_right_name_first(name: str, rng: random.Random) -> None:
    names = featx.get_graph_node_names(nets.build_on_meta(name), suppress_diff_warning=True).eval
    known = sorted({prefix for name in names for prefix in featx._prefixes(name)})
    tried = 0
    while tried < 50:
        right = rng.choice(known)
        places = [i for i in range(len(right) - 1) if right[i : i + 2].isalpha() and right[i] != right[i + 1]]
        if len(right) > 4 and places:
            i = rng.choice(places)
            typo = right[:i] + right[i + 1] + right[i] + right[i + 2 :]
            assert typo in known or featx._suggestions(names, typo)[0] == right
            tried += typo not in known


def test_the_whole_texts() -> None:
    def text(call: Any) -> str:
        with pytest.raises(ValueError if call is typo else featx.UntraceableError) as raised:
            call()
        return re.sub(r'File ".*", line \d+', 'File "…", line 0', str(raised.value))

    def typo() -> None:
        extract(nn.Sequential(nn.Linear(4, 4)), "00")

    def untraceable() -> None:
        extract(nn.Sequential(Bad()), "0")

    def own() -> None:
        def forward(self: Any, x: Any) -> Any:
            return self.part(x) if x.sum() > 0 else x

        extract(net(forward, part=nn.Sequential(nn.Linear(4, 4))), "part")

    assert text(typo) == (
        "no node of the train graph is named '00' or lies below it. The closest: '0'."
        " get_graph_node_names(model) lists all names."
    )
    remedies = (
        "autowrap_functions=(function,) does so with the calls of a function of your own (builtins such as int and len"
        " have to be called inside one). concrete_args={'argument': value} fixes an argument that decides which way"
        " the code goes."
    )
    reason = "TraceError: symbolically traced variables cannot be used as inputs to control flow"
    assert text(untraceable) == (
        f"torch.fx cannot trace Bad at '0': {reason}\n"
        '  File "…", line 0, in forward\n    return x if x.sum() > 0 else -x\n'
        f"What helps, in tracer_kwargs: leaf_modules=[Bad] makes each Bad one operation (non_leaf_modules win);"
        f" {remedies}"
    )
    assert text(own) == (
        f"torch.fx cannot trace the model's own forward (Net): {reason}\n"
        '  File "…", line 0, in forward\n    return self.part(x) if x.sum() > 0 else x\n'
        f"What helps, in tracer_kwargs: {remedies}\n"
        "Its children part can be traced by themselves."
    )


def test_a_name_of_the_other_mode() -> None:
    with pytest.raises(featx.NodeNameError, match="in the train graph only: pass train_return_nodes and") as raised:
        extract(nets.Modes(), "aux")
    assert raised.value.mode == "eval"
    with pytest.raises(featx.NodeNameError, match="in the eval graph only") as raised:
        extract(nets.Modes(), "mul")
    assert raised.value.mode == "train"


def test_a_module_inside_of_a_leaf() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 4))
    with pytest.raises(featx.NodeNameError, match=r"inside the leaf module '0' \(TransformerEncoderLayer\)") as raised:
        extract(model, "0.self_attn")
    assert "tracer_kwargs={'non_leaf_modules': [TransformerEncoderLayer]} opens it" in str(raised.value)


def test_a_module_that_never_runs() -> None:
    model = net(lambda self, x: self.used(x), used=nn.Linear(4, 4), unused=nn.Sequential(nn.Linear(4, 4)))
    for query in ("unused", "unused.0"):
        with pytest.raises(featx.NodeNameError, match="a module of the model in which no operation runs in train mode"):
            extract(model, query)


def test_errors_can_be_pickled() -> None:
    error = featx.NodeNameError("a", "train", ["b"], "Hint.")
    twin = pickle.loads(pickle.dumps(error))
    assert (str(twin), twin.query, twin.mode, twin.suggestions) == (str(error), "a", "train", ["b"])
    error = featx.UntraceableError("a.b", nn.Linear, "reason")
    twin = pickle.loads(pickle.dumps(error))
    assert (str(twin), twin.path, twin.module_type) == (str(error), "a.b", nn.Linear)


class Bad(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


class Wrong(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("of its own")


@pytest.mark.parametrize(
    ("model", "path", "kind", "cause"),
    [
        (Bad(), "", Bad, fx.proxy.TraceError),
        (nn.Sequential(Bad()), "0", Bad, fx.proxy.TraceError),
        (nn.Sequential(nn.Sequential(nets.Block(), Wrong())), "0.1", Wrong, RuntimeError),
        (nn.Sequential(net(lambda self, x: int(x))), "0", None, TypeError),
        (net(lambda self, x: nn.Linear(4, 4)(x)), "", None, NameError),
    ],
)
def test_what_cannot_be_traced(model: nn.Module, path: str, kind: Any, cause: Any) -> None:
    for call in (featx.get_graph_node_names, lambda m: extract(m, "x")):
        with pytest.raises(featx.UntraceableError) as raised:
            call(model)
        error = raised.value
        assert error.path == path
        assert error.module_type is type(model.get_submodule(path))
        assert kind in (None, error.module_type)
        assert isinstance(error.__cause__, cause)
        assert f"{type(error.__cause__).__name__}: {error.__cause__}" in str(error)
        assert (f"leaf_modules=[{error.module_type.__name__}]" in str(error)) == bool(path)
        assert 'test_errors.py", line' in str(error)


def test_a_builtin_is_recorded_only_inside_a_function_of_ones_own() -> None:
    for model in (net(lambda self, x: x * int(x.sum())), net(lambda self, x: x * len(x))):
        with pytest.raises(featx.UntraceableError, match="such as int and len have to be called inside one"):
            featx.get_graph_node_names(model, {"autowrap_functions": (int, len)})
    names = featx.get_graph_node_names(net(lambda self, x: x * rows(x)), {"autowrap_functions": (rows,)}).eval
    assert names == ["x", "rows", "mul"]


def rows(x: torch.Tensor) -> int:
    return int(len(x))


def test_an_error_that_a_forward_handles_is_not_where_the_next_one_was() -> None:
    def forward(self: Any, x: Any) -> Any:
        try:
            return self.wrong(x)
        except RuntimeError:
            return x if x.sum() > 0 else -x

    with pytest.raises(featx.UntraceableError, match="own forward") as raised:
        featx.get_graph_node_names(net(forward, wrong=Wrong()))
    assert raised.value.path == ""


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"leafs": []}, "unexpected keyword argument 'leafs'"),
        ({"leaf_modules": [nn.ReLU()]}, r"'leaf_modules'\] takes a list of classes, not \[ReLU\(\)\]"),
        ({"non_leaf_modules": "ReLU"}, r"'non_leaf_modules'\] takes a list of classes, not 'ReLU'"),
        ({"leaf_modules": None}, r"'leaf_modules'\] takes a list of classes, not None"),
        (["leaf_modules"], "'list' object is not a mapping"),
    ],
)
def test_tracer_kwargs(kwargs: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        featx.get_graph_node_names(nn.Sequential(), kwargs)


def test_concrete_args() -> None:
    model = net(lambda self, x, flag=True: x)
    with pytest.raises(ValueError, match="concrete_args has 'falg'; the arguments of forward are x, flag"):
        featx.get_graph_node_names(model, concrete_args={"falg": True})
    with pytest.raises(TypeError, match="'list' object is not a mapping"):
        featx.get_graph_node_names(model, concrete_args=[1])
    with pytest.raises(ValueError, match=r"concrete_args has \(1, 2\) for 'flag'; it takes single values"):
        featx.get_graph_node_names(model, concrete_args={"flag": (1, 2)})


@pytest.mark.parametrize("query", [("0", "key"), ["0"], None])
def test_queries_are_read_as_strings(query: Any) -> None:
    with pytest.raises(featx.NodeNameError) as raised:
        extract(nn.Sequential(nn.ReLU()), [query])
    assert raised.value.query == str(query)


def test_bytes_are_no_query() -> None:
    with pytest.raises(TypeError, match="return_nodes takes a dict, .* not a bytes"):
        extract(nn.Sequential(nn.ReLU()), b"0")


def test_two_queries_under_one_key() -> None:
    with pytest.raises(ValueError, match="both '0' and '1' are put under the key 'a'"):
        featx.create_feature_extractor(nn.Sequential(nn.ReLU(), nn.ReLU()), None, {"0": "a", "1": "a"}, ["0"])


def test_the_warning_says_what_differs_and_points_here() -> None:
    for call in (featx.get_graph_node_names, lambda model: featx.create_feature_extractor(model, ["body"])):
        with pytest.warns(UserWarning, match="differ") as caught:
            call(nets.Modes())
        (warning,) = caught
        assert warning.filename == __file__
        assert "only in train mode: aux, mean, add; only in eval mode: mul." in str(warning.message)
        assert "train_return_nodes and eval_return_nodes" in str(warning.message)
        assert "suppress_diff_warning=True" in str(warning.message)


def test_the_warning_is_short() -> None:
    def forward(self: Any, x: Any) -> Any:
        for layer in self.layers if self.training else ():
            x = layer(x)
        return x

    with pytest.warns(UserWarning, match=r"only in train mode: layers.0, [^;]{170,190}, …\. A query"):
        featx.get_graph_node_names(net(forward, layers=nn.ModuleList(nn.Linear(4, 4) for _ in range(50))))


def test_no_warning_where_the_modes_agree_or_it_is_suppressed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        featx.get_graph_node_names(nets.Block())
        featx.get_graph_node_names(nets.Modes(), suppress_diff_warning=True)
        featx.create_feature_extractor(nets.Modes(), ["body"], suppress_diff_warning=True)


def test_the_warning_function_itself() -> None:
    tracers: Dict[bool, Any] = {}
    for mode in (True, False):
        tracers[mode] = featx.NodePathTracer()
        tracers[mode].trace(nets.Modes().train(mode))
    with pytest.warns(UserWarning, match="only in train"):
        featx._warn_graph_differences(tracers[True], tracers[False])
