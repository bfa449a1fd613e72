"""What several files of tests do: extractors, records of eager execution, comparisons, other processes."""

from __future__ import annotations

import collections
import contextlib
import copy
import io
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterable, Iterator

import pytest
import torch
from torch import fx, nn

from tests import featx

ROOT = Path(__file__).parent.parent
X = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
INPUTS = (X, X - 0.5, 1 - 2 * X)

parametrize = pytest.mark.parametrize
zoo = pytest.mark.zoo
MODES = (True, False)
in_both_modes = parametrize("mode", MODES)


def feature_extraction() -> Any:
    """torchvision's file; where it is absent, the test is skipped."""
    return pytest.importorskip("torchvision.models.feature_extraction")


# --- featx ---


def extract(model: nn.Module, *queries: Any, **options: Any) -> Any:
    """An extractor; that the modes differ is another test's, any other warning is an error."""
    return featx.create_feature_extractor(model, *queries, **{"suppress_diff_warning": True, **options})


def in_its_mode(model: nn.Module, queries: Any) -> tuple[Any, Any, Any]:
    """Arguments with queries for the mode that a model is in, and none for the other."""
    return (None, queries, []) if model.training else (None, [], queries)


def extract_quietly(model: nn.Module, *queries: Any, **options: Any) -> Any:
    """An extractor; what it warns of is another test's."""
    with ignored_warnings():
        return extract(model, *queries, **options)


def feature(model: nn.Module, query: str = "output", **options: Any) -> Any:
    """The value of one feature."""
    return extract(model, query, **options)(X.clone())[query]


def exact(model: nn.Module, *queries: Any, **options: Any) -> Any:
    """An extractor of exact features."""
    return extract(model, *queries, exact=True, **options)


def as_leaves(model: nn.Module, queries: Any = "output") -> Any:
    """An exact extractor in which what cannot be traced became leaves."""
    return extract_quietly(model, queries, exact=True, auto_leaf=True)


def refused(model: nn.Module, path: str, match: str | None = None, **options: Any) -> Any:
    """The error, where a model has no exact names; the module with this path is to blame."""
    with pytest.raises(featx.UntraceableError, match=match) as raised:
        node_names(model, **{"exact": True, **options})
    assert raised.value.path == path
    assert raised.value.module_type is type(model.get_submodule(path))
    return raised.value


def node_names(model: Any, *arguments: Any, **options: Any) -> Any:
    """The names in train mode and in eval mode; that they differ is another test's."""
    return featx.get_graph_node_names(model, *arguments, **{"suppress_diff_warning": True, **options})


def eval_names(model: Any, *arguments: Any, **options: Any) -> list[str]:
    return node_names(model, *arguments, **options)[1]


# What is private has other names one day; then only this changes.


def traced(model: nn.Module, buffers: bool = False, **options: Any) -> tuple[Any, fx.GraphModule]:
    """The tracer of a model in its mode, as both public functions use it, and the whole graph as a module."""
    tracer = featx.NodePathTracer(**options, **featx._set_default_tracer_kwargs(None))
    tracer.proxy_buffer_attributes = buffers
    with featx._unchanged(model):
        return tracer, fx.GraphModule(model, tracer.trace(model))


@contextlib.contextmanager
def both_traced(
    model: nn.Module, example: Any = None, exact: bool = False, tracer_kwargs: Any = None
) -> Iterator[dict[str, Any]]:
    """The tracers of both modes; what the model holds of the graphs stays until the end of the block."""
    arguments = featx._set_default_tracer_kwargs(tracer_kwargs, exact=exact, example_inputs=example)
    with featx._unchanged(model) as restore:
        yield featx._trace_both(model, restore, arguments, None, False)


@contextlib.contextmanager
def traced_already(tracers: dict[str, Any]) -> Iterator[None]:
    """In the block extractors are cut from the graphs of these tracers, instead of tracing again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(featx, "_trace_both", lambda *arguments: tracers)
        yield


def given_names(calls: Iterable[tuple[str, str | None]], paths: Iterable[str] = ()) -> list[str]:
    """The names of calls, each a scope and torch.fx's name, or the path of a leaf and None."""
    namer = featx._Namer(paths)
    return [namer.name(*call) for call in calls]


def without_number(name: str) -> str:
    return featx._split_number(name)[0]


def select(names: list[str]) -> dict[str, int]:
    places = range(len(names))
    tracer = SimpleNamespace(node_to_qualname=dict(enumerate(names)), places=places, exact=False)
    return {query: feature.value for query, feature in featx._answers(tracer).items()}


def operations_of(tracer: Any, mode: str) -> dict[fx.Node, Any]:
    """What pruning knows of each node."""
    return featx._operations(tracer, training=mode == "train")


def effects(tracer: Any, node: fx.Node) -> Any:
    return featx._effects(tracer, node)


def prefixes(name: str) -> list[str]:
    """``"a.b.c"`` -> ``"a"``, ``"a.b"``, ``"a.b.c"``."""
    return list(featx._prefixes(name))


def suggestions(names: list[str], query: str) -> list[str]:
    return featx._suggestions(select(names), query)


def operations(nodes: Iterable[dict[str, Any]]) -> dict[int, Any]:
    """Nodes of the vectors as featx has them; what they call state is fetched by a ``get_attr``."""
    found = [featx._Operation(**{**node, "kind": node["kind"].replace("state", "get_attr")}) for node in nodes]
    return dict(enumerate(found))


def by_end(reads: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    """From pairs of a value's position and the one after which it is read: the first by the second."""
    found = collections.defaultdict(list)
    for at, after in reads:
        found[after].append(at)
    return found


def staying(operations: dict[int, Any], reads: Iterable[tuple[int, int]]) -> list[int]:
    stays, missed = featx._staying(operations, by_end(reads))
    assert missed is None, "no operation of these was replaced"
    return sorted(stays)


def overwritten(
    operations: dict[int, Any], stays: Iterable[int], reads: Iterable[tuple[int, int]]
) -> dict[tuple[int, int], int]:
    found, _ = featx._overwritten(operations, set(stays), by_end(reads))
    return found


def queries_by_mode(*arguments: Any) -> dict[str, dict[str, str]]:
    return featx._queries_by_mode(*arguments)


def prune(tracer: Any, reads: Iterable[tuple[int, int]]) -> fx.Graph:
    """What a graph is cut down to by what is read; keys are numbers."""
    nodes = list(tracer.graph.nodes)
    features = {str(number): featx._Feature(nodes[at], after) for number, (at, after) in enumerate(reads)}
    plan = featx._make_plan(tracer, features, training=True)
    return featx._cut(tracer, features, dict(zip(features, features)), plan)


# --- eager execution ---


def seeded(module: Callable[..., Any], x: Any) -> Any:
    """A call whose random numbers are the same each time."""
    torch.manual_seed(1)
    return module(x)


def run(module: Callable[..., Any], x: torch.Tensor = X) -> Any:
    """The same without gradients, and with a copy of the input."""
    with torch.no_grad():
        return seeded(module, snapshot(x))


def verdict(create: Callable[..., Any], model: nn.Module, query: str = "output", inputs: Any = INPUTS) -> str:
    """What becomes of a model: whether values and state are those of eager execution, and whether a warning comes."""
    eager = copy.deepcopy(model)
    ours = copy.deepcopy(model)
    with heard() as caught:
        try:
            cut = create(ours, [query])
        except featx.UntraceableError:
            return "refused"
    said = [warning for warning in caught if warning.category is featx.FeatureWarning]
    assert create not in (extract, exact) or set(cut.state_dict()) <= set(model.state_dict())
    values = [run(cut, x)[query] for x in inputs]
    expected = [run(eager, x) for x in inputs]
    if same(values, expected) and same(ours.state_dict(), eager.state_dict()):
        return "said idly" if said else "right"
    return "said" if said else "wrong"


def outcome(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a call returns or, if it fails, the error."""
    try:
        return function(*copy.deepcopy(arguments))
    except Exception as error:
        return error


def agree(extractor: nn.Module, model: nn.Module, *arguments: Any) -> bool:
    """Whether an extractor gives the model's output; else both fail, or a guard refuses."""
    found, expected = outcome(extractor, *arguments), outcome(model, *arguments)
    if isinstance(found, Exception):
        # An error that only the model catches is as good as a guard.
        assert isinstance(found, (AssertionError, IndexError)) or isinstance(expected, type(found)), found
        return False
    assert same(found["output"], expected)
    return True


@contextlib.contextmanager
def recording(model: nn.Module, keep: Callable[[Any], Any] | None = None) -> Iterator[list[tuple[str, Any]]]:
    """The path of each module that is called in the block, with what it returned: a clone, if nothing else is said."""
    calls: list[tuple[str, Any]] = []

    def hook_of(path: str) -> Callable[..., None]:
        return lambda module, inputs, value: calls.append((path, (keep or snapshot)(value)))

    with contextlib.ExitStack() as hooks:
        for path, module in model.named_modules():
            hooks.callback(module.register_forward_hook(hook_of(path)).remove)
        yield calls


def as_it_is(value: Any) -> Any:
    return value


def returned(model: nn.Module, x: torch.Tensor = X) -> dict[str, list[Any]]:
    """What each call of each module returned in eager execution, and at "" what the model did."""
    seen = collections.defaultdict(list)
    with recording(model) as calls:
        run(model, x)
    for path, value in calls:
        seen[path].append(value)
    return dict(seen)


class Snapshots(fx.Interpreter):
    """Runs a graph and keeps a clone of every node's value, taken when it was made."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.seen[n.name] = snapshot(value)
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        plain = [list(value) if isinstance(value, list) else value for value in args]  # a graph's cannot be changed
        return super().call_function(target, tuple(plain), kwargs)


def truth(model: nn.Module, x: torch.Tensor = X) -> dict[str, Any]:
    """Name -> what the node's value was when it was made, from an independent run of the whole graph."""
    tracer, module = traced(model)
    interpreter = Snapshots(module)
    run(interpreter.run, x)
    return {name: interpreter.seen[node.name] for node, name in tracer.node_to_qualname.items()}


# --- warnings ---


@contextlib.contextmanager
def ignored_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def heard() -> Iterator[list[warnings.WarningMessage]]:
    """All warnings of the block, none of which is an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def texts(caught: Iterable[warnings.WarningMessage]) -> list[str]:
    return [str(warning.message) for warning in caught]


# --- values ---


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


def snapshot(value: Any) -> Any:
    """The value as it is now: later in-place writes do not reach it."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, tuple):
        items = [snapshot(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, list):
        return [snapshot(item) for item in value]
    if isinstance(value, dict):
        return type(value)((key, snapshot(item)) for key, item in value.items())
    return value


def same(a: Any, b: Any) -> bool:
    """Bit-equal values of the same structure."""
    if isinstance(a, torch.Tensor):
        if not (isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape):
            return False
        if a.is_quantized:
            a = a.dequantize()
            b = b.dequantize()
        return torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return bool(a == b)


def picture(model: nn.Module) -> dict[str, Any]:
    """All that a user can see of a model and of the process, as plain data with identities."""

    def shown(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return id(value), value.detach().clone()
        if isinstance(value, dict):
            return [(key, id(item)) for key, item in value.items()]
        if isinstance(value, (list, set)):
            return [id(item) for item in value]
        return value if isinstance(value, (bool, int, str)) else id(value)

    modules = {}
    for path, module in model.named_modules():
        modules[path] = [(name, shown(value)) for name, value in vars(module).items()]
    return {
        "modules": modules,
        "state": snapshot(dict(model.state_dict())),
        "grad": torch.is_grad_enabled(),
        "rng": torch.get_rng_state(),
        "call": id(nn.Module.__call__),
        "getattr": id(nn.Module.__getattr__),
        "filters": list(warnings.filters),
    }


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """After the block the model and the process are what they were."""
    before = picture(model)
    yield
    assert same(picture(model), before)


def differ(a: Any, b: Any) -> bool:
    """Whether no tensor of the one is that in its place in the other."""
    pairs = list(zip(tensors(a), tensors(b)))
    return bool(pairs) and not any(torch.equal(x, y) for x, y in pairs)


def check_flips(actual: Callable[[], Any], expected: Callable[[], Any], *modules: Any) -> None:
    """Both give the same in each mode of the modules, and something else in the other mode."""
    seen = []
    for mode in (True, False, True):
        for module in modules:
            module.train(mode)
        seen.append(actual())
        assert same(seen[-1], expected()), mode
    assert differ(seen[0], seen[1]), "the modes do not differ, so this shows nothing"


# --- copies and processes ---


def by_pickle(module: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(module))


def by_torch_save(module: nn.Module) -> Any:
    """The module as it comes out of a file."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": by_pickle,
    "torch.save": by_torch_save,
    "twice": lambda module: copy.copy(by_pickle(copy.deepcopy(module))),
}


def python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own."""
    return subprocess.run(
        [sys.executable, *arguments],
        **{"cwd": ROOT, "capture_output": True, "text": True, **options},
    )
