# SPDX-FileCopyrightText: 2026 The featx developers
# SPDX-License-Identifier: BSD-3-Clause
# To vendor featx, copy this one file; it needs the standard library and torch, 1.13 or newer.
"""Feature extraction for PyTorch in one file.

featx traces a model with ``torch.fx``, gives every operation a stable name, and cuts from the
model an extractor that returns the values asked for and runs nothing that they do not need.

>>> import torch, featx
>>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
>>> featx.get_graph_node_names(model).eval
['input', '0', '1', '2']
>>> extractor = featx.create_feature_extractor(model, {"1": "hidden"})
>>> {key: tuple(value.shape) for key, value in extractor(torch.rand(3, 4)).items()}
{'hidden': (3, 8)}

How names are made:

1. A call of a leaf module is named by the module's path; any other node by its scope (the path of
   the module whose forward is running), a dot and the name that torch.fx gave it.
2. A trailing ``_<digits>`` is removed, since torch.fx counts over the whole graph.
3. If that name, or a numbered form of it, was given out before, the number after the most recently
   given one is appended: ``relu``, ``relu_1``, ``relu_2``.
4. No name is given twice: where rule 3 would repeat one, the next free number is taken.
5. With ``exact=True`` the paths of all modules are names that rule 4 does not repeat. The first
   call of a module has its path as name, as it is; rules 3 and 4 name the others. Buffers are
   nodes.

Names, values and keys are those of ``torchvision.models.feature_extraction``, except where that
returns something else than was asked for, runs more than is needed, crashes, or changes the
caller's model; the README lists each difference.

How the parts call each other::

    create_feature_extractor
      _queries_by_mode    what is asked for: query -> key
      _trace_both         for each mode a NodePathTracer: the graph, names, losses
      _find_features      query -> the value that is meant, and where in the graph it is read
      _make_plan          what stays, and which reads are overwritten
      _cut                copies what stays into a graph of its own
      _find_flaws         what the caller is told
      DualGraphModule     one module of the two graphs

What featx replaces of torch.fx: ``Tracer`` gives names to nodes, and notes what it would lose
without a word; ``GraphModule`` holds one graph, which it compiles again at each change, and copies
alone; its generated code looks modules up at ten times the cost, and takes their names as code.
"""

from __future__ import annotations

import argparse
import builtins
import collections
import contextlib
import copy
import dataclasses
import difflib
import dis
import functools
import gc
import importlib
import inspect
import itertools
import json
import keyword
import linecache
import math
import operator
import pathlib
import re
import sys
import textwrap
import threading
import traceback
import warnings
import weakref
from typing import (
    Any,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    NamedTuple,
    Sequence,
    Tuple,
    Union,
)

import torch
from torch import fx, nn

# Private to torch; tried on 1.13.1, 2.2.2, 2.5.1 and 2.14.1.
from torch.fx import _symbolic_trace
from torch.fx._symbolic_trace import PH, _assert_is_none, _find_proxy, _Patcher
from torch.fx.graph_module import _copy_attr
from torch.fx.node import _get_qualified_name, map_aggregate, map_arg
from torch.jit import is_scripting  # type: ignore[attr-defined]
from torch.jit._recursive import create_script_module, infer_methods_to_compile
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

__version__ = "1.0.0"
__all__ = [
    "DualGraphModule",
    "FeatureWarning",
    "LeafModuleAwareTracer",
    "NodeNameError",
    "NodeNames",
    "NodePathTracer",
    "UntraceableError",
    "create_feature_extractor",
    "get_graph_node_names",
]

ReturnNodes = Union[str, Mapping[str, str], Iterable[str]]
Example = Union[Tuple[Any, ...], Mapping[str, Any]]


# ---- errors


@dataclasses.dataclass(eq=False)
class NodeNameError(ValueError):
    """A query that matches no node.

    Attributes:
        query: what was asked for.
        mode: ``"train"`` or ``"eval"``, the mode whose graph lacks it.
        suggestions: the closest names, best first.
        hint: why it may have been expected to match, and what to do, or ``""``.
    """

    query: str
    mode: str
    suggestions: Sequence[str] = ()
    hint: str = ""

    def __str__(self) -> str:
        text = f"no node of the {self.mode} graph is named {self.query!r} or lies below it."
        if self.hint:
            text += f" {self.hint}"
        if self.suggestions:
            text += f" The closest: {', '.join(map(repr, self.suggestions))}."
        return f"{text} get_graph_node_names(model) lists all names."


@dataclasses.dataclass(eq=False)
class UntraceableError(fx.proxy.TraceError):
    """A model that torch.fx cannot trace; chained from the original error.

    Attributes:
        path: the path of the module whose forward failed, ``""`` for the model itself.
        module_type: the class of that module.
        reason: what happened, and in which line of the model's source.
        traceable: where the model's own forward failed, its children that have children of their
            own and can be traced.
    """

    path: str
    module_type: type[nn.Module]
    reason: str = ""
    traceable: Sequence[str] = ()

    def __call__(self) -> None:
        """Raise it: what a graph does whose mode could not be traced."""
        raise self.with_traceback(None)  # else that of each call before would stay

    __name__ = "untraceable"  # which the code of a graph calls it

    def __str__(self) -> str:
        name = _class_path(self.module_type)
        where = f"{name} at {self.path!r}" if self.path else f"the model's own forward ({name})"
        lines = [f"torch.fx cannot trace {where}: {self.reason}", "What helps:"]
        if _ASKED in self.reason:
            lines.append("- example_inputs=(x,) answers it as for these inputs")
        if self.path and self.module_type.__call__ is nn.Module.__call__:
            lines.append(
                f"- leaf_modules=[{name}], in tracer_kwargs, makes each {name} one operation"
            )
        elif self.path:
            lines.append(
                f"- a change of {name}: its __call__ is its own, so leaf_modules and auto_leaf do"
                " nothing for it"
            )
        lines.append(_REMEDIES)
        if self.traceable:
            lines.append(f"Its children {', '.join(self.traceable)} can be traced by themselves.")
        return "\n".join(lines)


def _class_path(cls: type) -> str:
    """Whole, since others have classes of the names of torch's."""
    return f"{cls.__module__}.{cls.__qualname__}"


_REMEDIES = """\
- autowrap_functions=(function,), in tracer_kwargs, makes each call of a function of your own one
  operation (builtins such as int and len have to be called inside one)
- concrete_args={'argument': value} fixes an argument that decides which way the code goes"""


class FeatureWarning(UserWarning):
    """A feature is something else than its query says, or than the model computes."""


def _frames_inside() -> Iterator[tuple[Any, int]]:
    """The frames of a forward that is traced, innermost first."""
    code = NodePathTracer.trace.__code__  # what called it is no line of the model's
    frames = traceback.walk_stack(sys._getframe(1))
    return itertools.takewhile(lambda at: at[0].f_code is not code, frames)


def _is_of_model(frame: Any) -> bool:
    """Whether what runs is no code of torch, of inspect or of this file."""
    module = frame.f_globals.get("__name__", "")
    return module != __name__ and module.split(".")[0] not in ("torch", "inspect")


def _model_line(frames: Iterable[tuple[Any, int]]) -> traceback.FrameSummary:
    """The first line of the model's own code; without a file name if there is none."""
    for frame, line in frames:
        if _is_of_model(frame):
            code = frame.f_code
            return traceback.FrameSummary(code.co_filename, line, code.co_name)
    return traceback.FrameSummary("", 0, "")


def _source_line(frames: Iterable[tuple[Any, int]]) -> str:
    """Where in the model's source something is."""
    at = _model_line(frames)
    place = f'\n  File "{at.filename}", line {at.lineno}, in {at.name}\n    {at.line}'
    return place if at.filename else ""


# ---- public functions


class NodeNames(NamedTuple):
    """The names of a model's nodes in execution order, for both modes."""

    train: list[str]
    eval: list[str]


def get_graph_node_names(
    model: nn.Module,
    tracer_kwargs: Mapping[str, Any] | None = None,
    suppress_diff_warning: bool = False,
    concrete_args: dict[str, Any] | None = None,
    *,
    exact: bool = False,
    auto_leaf: bool = False,
    example_inputs: Example | None = None,
) -> NodeNames:
    """List the names of a model's nodes, in execution order, in train mode and in eval mode.

    Args:
        model: any module that torch.fx can trace. It comes back as it was.
        tracer_kwargs: arguments of :class:`NodePathTracer`. What is given for ``leaf_modules`` and
            ``autowrap_modules`` is added to the defaults: ``math`` and, if the process has
            imported it, ``torchvision.ops``.
        suppress_diff_warning: do not warn when the two modes differ.
        concrete_args: values for arguments of ``forward`` that are fixed while tracing.
        exact: name by rule 5 as well: the path of a module means that module. What tracing would
            lose is refused: a forward that draws random numbers, runs a part under autocast,
            assigns buffers or takes tensors of an earlier call; hooks of the model itself.
        auto_leaf: where the forward of a submodule is not traceable, make its class a leaf and try
            again; a warning lists the classes.
        example_inputs: for models that ask about their inputs, what they are called with: a tuple
            of positional arguments, or a mapping argument -> value. These become the arguments,
            all others have their defaults. What is asked (``if x.ndim == 3``) is answered as for
            the example, and an assert sees to it that other inputs would be answered so too. What
            is asked and the asserts are nodes with names.

    Returns:
        A named tuple ``(train, eval)`` of two lists of strings.

    Raises:
        UntraceableError: torch.fx cannot trace the model in the mode that it is in. Where only the
            other mode fails, a warning says so, and its names are ``[]``.
        ValueError: ``concrete_args`` has an argument that ``forward`` lacks, or is given beside
            ``example_inputs``.
        TypeError: an argument is something else than it should be, or the example does not fit.

    >>> get_graph_node_names(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())).train
    ['input', '0', '1']
    """
    with _unchanged(model) as restore:
        arguments = _set_default_tracer_kwargs(
            tracer_kwargs, exact=exact, example_inputs=example_inputs
        )
        tracers = _trace_both(model, restore, arguments, concrete_args, auto_leaf)
    if not suppress_diff_warning:
        _warn_graph_differences(tracers["train"], tracers["eval"])
    return NodeNames(tracers["train"].names, tracers["eval"].names)


def create_feature_extractor(
    model: nn.Module,
    return_nodes: ReturnNodes | None = None,
    train_return_nodes: ReturnNodes | None = None,
    eval_return_nodes: ReturnNodes | None = None,
    tracer_kwargs: Mapping[str, Any] | None = None,
    suppress_diff_warning: bool = False,
    concrete_args: dict[str, Any] | None = None,
    *,
    exact: bool = False,
    auto_leaf: bool = False,
    example_inputs: Example | None = None,
) -> DualGraphModule:
    """Cut from a model a module that returns intermediate values and runs only what they need.

    A query matches the names that equal it or begin with it and a dot; its value is that of the
    last such node. With ``exact=True`` it is one of the names, or a module's path. The query
    ``"output"``, where no node has that name, is the model's own output.

    By default names and values are torchvision's, and a :class:`FeatureWarning` says where a
    feature is something else than its query says, is overwritten in place, or is not what the
    model computes. ``exact=True`` gives what each module or operation returned in eager execution,
    or raises an error.

    Args:
        model: any module that torch.fx can trace. It comes back as it was; the extractor shares
            its parameters.
        return_nodes: the queries for both modes: a mapping query -> key, any iterable of queries,
            which are their own keys, or one query.
        train_return_nodes, eval_return_nodes: in place of ``return_nodes``, queries for each mode.
        tracer_kwargs, suppress_diff_warning, concrete_args, auto_leaf, example_inputs: as in
            :func:`get_graph_node_names`.
        exact: a query that is the path of a module gives what its first call returned, in its own
            structure; ``path_1`` is the second call. What may be overwritten later is cloned
            before.

    Returns:
        A module that returns a dict key -> value in execution order. Its arguments are the model's
        or those of the example. It starts in the model's mode and follows ``train()`` and
        ``eval()``; in a mode that cannot be traced it raises the UntraceableError.

    Raises:
        NodeNameError: a query matches no node.
        UntraceableError: torch.fx cannot trace the model.
        ValueError: two queries have one key, the queries are given in no way or in two, or
            ``forward`` lacks one of ``concrete_args``.
        TypeError: an argument is something else than it should be.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    >>> extractor = create_feature_extractor(model, ["0", "output"])
    >>> {key: tuple(value.shape) for key, value in extractor(torch.rand(2, 4)).items()}
    {'0': (2, 8), 'output': (2, 8)}
    """
    # 1. What is asked for: for each mode query -> key.
    keys = _queries_by_mode(return_nodes, train_return_nodes, eval_return_nodes)
    with _unchanged(model) as restore:
        # 2. Trace in both modes.
        arguments = _set_default_tracer_kwargs(
            tracer_kwargs, exact=exact, example_inputs=example_inputs
        )
        tracers = _trace_both(model, restore, arguments, concrete_args, auto_leaf)
        # 3. For each mode plan what stays, and copy that into a graph of its own; once if one trace
        #    serves both, and both return the same.
        is_one = tracers["train"] is tracers["eval"] and keys["train"] == keys["eval"]
        features, plans, graphs = {}, {}, []
        for mode in ["train"] if is_one else ["train", "eval"]:
            tracer = tracers[mode]
            if tracer.error:  # its graph does nothing but raise it
                graphs.append(tracer.graph)
                continue
            features[mode] = _find_features(tracers, mode, keys[mode])
            plans[mode] = _make_plan(tracer, features[mode], mode == "train")
            graph = _cut(tracer, features[mode], keys[mode], plans[mode])
            graphs.append(graph)
        flaws = _find_flaws(tracers, features, plans)
        # 4. Make one module of them.
        extractor = DualGraphModule(model, graphs[0], graphs[-1], type(model).__name__)
    # 5. Say where the modes differ, and which features are not what they seem.
    if not suppress_diff_warning and not (exact and _run_alike(tracers, plans)):
        _warn_graph_differences(tracers["train"], tracers["eval"])
    for flaw in flaws:
        warnings.warn(flaw, FeatureWarning, stacklevel=2)
    return extractor


# ---- leaf modules, and stand-ins


class LeafModuleAwareTracer(fx.Tracer):
    """A tracer whose leaf modules can be chosen by class.

    Args:
        leaf_modules: classes whose instances are recorded as single calls, besides torch.nn's own;
            not those that have a ``__call__`` of their own.
        non_leaf_modules: classes that are traced through; they win over every rule for leaves.
        args, kwargs: as for ``torch.fx.Tracer``.
    """

    def __init__(
        self,
        *args: Any,
        leaf_modules: Iterable[type[nn.Module]] = (),
        non_leaf_modules: Iterable[type[nn.Module]] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.leaf_modules = tuple(leaf_modules)
        self.non_leaf_modules = tuple(non_leaf_modules)
        for item in (*self.leaf_modules, *self.non_leaf_modules):
            if not inspect.isclass(item):
                raise TypeError(f"a leaf or non-leaf module is given by its class, not {item!r}")

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether calls of ``m`` are recorded as one operation."""
        has_own_call = type(m).__call__ is not nn.Module.__call__  # which runs around the leaf
        if has_own_call or isinstance(m, self.non_leaf_modules):
            return False
        is_chosen = isinstance(m, (*self.leaf_modules, torch.jit.ScriptModule))
        return is_chosen or super().is_leaf_module(m, module_qualified_name)


def _text(stand_in: Any, write: Callable[..., str], *form: str) -> str:
    """What str, repr or format makes of a stand-in.

    The text of a number, a dtype or a device decides something, such as which key is looked up: it
    is the example's, with a guard. The texts of shapes and tensors mostly are messages: there, and
    without an example, it is the node's name.
    """
    node = stand_in.node
    value = stand_in._value
    is_many = isinstance(value, (tuple, list, dict)) or getattr(value, "ndim", False)
    if is_many or value is NotImplemented:
        return write(node, *form)
    stand_in.tracer.note_asked(stand_in)
    return stand_in.tracer.compute(write, stand_in, *form)  # type: ignore[no-any-return]


class _Proxy(fx.Proxy):
    """The stand-in for the value of a node.

    It records what torch.fx loses: operators in place, and assigned items and attributes. With an
    example it has a value, and what Python asks about that is answered by it.
    """

    tracer: Any
    _value: Any = NotImplemented  # the value for the example
    _own = "node", "tracer", "_value"  # what is set on the stand-in itself
    __getitem__: Callable[..., Any]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._own:
            object.__setattr__(self, name, value)
        else:
            self.tracer.record(setattr, self, name, value)

    def __setitem__(self, index: Any, value: Any) -> None:
        # Of x[i] += y the operator needs no memory of its own.
        self.tracer.replaced.discard(getattr(value, "node", None))
        self.tracer.record(operator.setitem, self, index, value)

    def __getattr__(self, name: str) -> Any:
        attribute = _Attribute(self, name)
        if self._value is NotImplemented:
            return attribute
        is_tensor = isinstance(self._value, torch.Tensor)
        if name == "__array__" and not is_tensor:
            return lambda *_, **__: sys.modules["numpy"].asarray(self.tracer.answer(self))
        if name.startswith("__"):  # other protocols
            raise AttributeError(name)
        if name in ("get", "items", "values") and isinstance(self._value, Mapping):
            return functools.partial(self._call_of_dict, name)
        try:
            value = self.tracer.compute(getattr, self, name)
        except AttributeError:
            if not is_tensor:
                bool(self.tracer.record(hasattr, self, name))
            raise
        attribute._value = value
        if isinstance(value, str):
            return self.tracer.answer(attribute)
        is_of_object = not is_tensor and not callable(value)
        is_in_block = isinstance(value, torch.Tensor) and self.tracer.note_block()
        # None has a guard, another object may be assigned, and what is computed in a block of a
        # grad mode belongs there: each is read here, and not where it is used.
        if value is None or is_of_object or is_in_block:
            return self.tracer.record(getattr, self, name)
        return attribute

    def _call_of_dict(self, name: str, *args: Any) -> Any:
        items = {key: self[key] for key in self.keys()}
        return getattr(items, name)(*args)

    def __iter__(self) -> Iterator[Any]:
        # Torch.fx's own makes a cycle with the frame of its caller, which keeps what that holds.
        caller = sys._getframe(1)
        operation, count = caller.f_code.co_code[caller.f_lasti :][:2]
        if isinstance(self._value, Mapping):
            return iter(self.keys())
        if dis.opname[operation] == "UNPACK_SEQUENCE":  # a, b = x
            return iter([self[position] for position in range(count)])
        return self.tracer.iter(self)  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return self.tracer.answer(self, len)  # type: ignore[no-any-return]

    def __int__(self) -> int:
        return int(self.tracer.answer(self))

    def __float__(self) -> float:
        return float(self.tracer.answer(self))

    def __index__(self) -> int:
        return operator.index(self.tracer.answer(self))

    def __contains__(self, item: Any) -> bool:
        return bool(self.tracer.record(operator.contains, self, item))

    __str__ = functools.partialmethod(_text, str)
    __repr__ = functools.partialmethod(_text, repr)
    __format__ = functools.partialmethod(_text, format)

    def __divmod__(self, other: Any) -> Any:
        return self.tracer.record(divmod, self, other)

    def __round__(self, *digits: Any) -> Any:
        return self.tracer.record(round, self, *digits)

    def __hash__(self) -> int:
        if self._value is NotImplemented or isinstance(self._value, torch.Tensor):
            return object.__hash__(self)
        self.tracer.hashed.append(weakref.ref(self))
        return hash(self.tracer.answer(self))


class _Attribute(fx.proxy.Attribute, _Proxy):
    """The stand-in for an attribute, such as ``x.T``; it may be called as a method."""

    _own = "root", "attr", "tracer", "_node", "_value"  # type: ignore[assignment]


def _operate(self: Any, name: str, other: Any) -> Any:
    """What ``+=`` and its like do: if exact work in place, else make a new value and note it."""
    if self.tracer.exact:
        return self.tracer.create_proxy(
            "call_function",
            getattr(operator, f"i{name}"),
            (self, other),
            {},
            name,
        )
    proxy = getattr(operator, f"__{name}__")(self, other)
    self.tracer.replaced.add(proxy.node)
    return proxy


# Without matmul, which torch does not do in place.
_OPERATORS = "add sub mul truediv floordiv mod pow and or xor lshift rshift".split()
for _operator in _OPERATORS:
    setattr(_Proxy, f"__i{_operator}__", functools.partialmethod(_operate, _operator))


# ---- answers from an example


def _plain(value: Any) -> Any:
    """A tensor as a number; anything else as it is."""
    return value.item() if isinstance(value, torch.Tensor) else value


class _AnsweringTracer(LeafModuleAwareTracer):
    """The half of :class:`NodePathTracer` that answers from an example what a forward asks.

    Beside each node its value for the example is computed, *aside*: as if nothing were traced. It
    lives on the stand-in: what the forward lets go is let go. Where other inputs could be answered
    otherwise, the graph gets a guard, an assert that they are answered so too.

    Args:
        exact: without an example, arguments whose default is None, a bool or a str have it.
        example_inputs: a tuple of positional arguments, or a mapping argument -> value.
        args, kwargs: as for :class:`LeafModuleAwareTracer`.
    """

    _thread: int | None = None  # the one that traces
    _writes = 0  # how many so far: what was asked before them is asked again
    raised: Exception | None = None  # it ends the trace, also if the forward catches it

    def __init__(
        self, *args: Any, exact: bool = False, example_inputs: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.exact = exact
        self.example = _as_call(example_inputs)
        self.given: dict[str, Any] = {}  # argument -> its value for the example, or its default
        # Node -> the name of the first node that has the same value for all inputs, so that
        # x.shape[0] == 3, asked twice, has one guard; "" for what does not depend on the inputs.
        self._same_as: dict[fx.Node, str] = {}
        self._first: dict[str, str] = {}  # how a value is computed -> the first node of it
        self.containers: set[fx.Node] = set()  # the nodes of what is no tensor, and may be written
        self._guards: set[tuple[str, Any, str]] = set()
        self.pending: list[Any] = []  # what has no guard yet: see note_asked
        self.hashed: list[Any] = []  # weak references to what was looked up by its value

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[[], Any], list[Any]]:
        """Make the placeholders, with an example for what it gives; see ``torch.fx.Tracer``."""
        if not is_module or (self.example is None and not self.exact):
            return super().create_args_for_root(root_fn, is_module, concrete_args)
        self._parameters = inspect.signature(root_fn).parameters
        _, *parameters = self._parameters.values()
        args, kwargs = self.example or _default_call(parameters, concrete_args or {})
        names = [item.name for item in parameters if item.kind < item.VAR_POSITIONAL]
        names += [f"args_{position}" for position in range(len(names), len(args))]
        positional = list(map(self._argument, names, args))
        in_order = sorted(kwargs, key=[*self._parameters, *kwargs].index)
        keywords = {name: self._argument(name, kwargs[name]) for name in in_order}

        def run() -> Any:
            returned = root_fn(self.root, *positional, **keywords)
            self.guard_pending()
            return returned

        return run, []

    def _argument(self, name: str, value: Any) -> Any:
        """Make a placeholder; gives what the forward gets for it: a stand-in or a constant."""
        self.given[name] = value
        is_constant = type(value) in _DECIDING if self.example else value is not PH
        parameter = self._parameters.get(name, _UNNAMED)
        default: tuple[Any, ...] = ()
        if self.example is None and parameter.default is not parameter.empty:
            default = (value if type(value) in _CONSTANTS else parameter.default,)
        kind = None if parameter.annotation is parameter.empty else parameter.annotation
        stand_in = self.create_proxy("placeholder", name, default, {}, type_expr=kind)
        if not is_constant:
            if self.example and parameter.default is None:
                is_given = self.record(operator.is_not, stand_in, None)
                self.record(torch._assert, is_given, _GIVEN)
            return stand_in
        if type(value) in _CONSTANTS:
            said = f"the argument {name!r} was {value!r} while tracing"
            self.record(torch._assert, stand_in == value, said)
        return value

    def record(self, function: Callable[..., Any], *args: Any) -> Any:
        """Record the call of a function."""
        return self.create_proxy("call_function", function, args, {})

    def compute(self, function: Callable[..., Any], *args: Any) -> Any:
        """What a function gives for the example, without recording it."""
        return self.evaluate("call_function", function, args, {})

    def evaluate(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        """What a node gives for the example, without gradients, as if nothing were traced."""
        thread, self._thread = self._thread, None  # so that torch.fx's patches step aside
        try:
            with torch.no_grad():
                if kind == "placeholder":
                    return tree_map(_copied, self.given[target])
                if kind == "get_attr":
                    return operator.attrgetter(target)(self.root)
                args, kwargs = tree_map(_example_of, (args, kwargs))
                if kind == "call_method":
                    return getattr(args[0], target)(*args[1:], **kwargs)
                if kind == "call_module":
                    target = self.root.get_submodule(target)
                return target(*args, **kwargs)
        except (TypeError, AttributeError):  # kinds raise them, for any input: it may be caught
            raise
        except Exception as error:
            self.raised = error
            raise
        finally:
            self._thread = thread

    def note_value(self, proxy: Any, value: Any) -> None:
        """Put the value of a new node on its stand-in."""
        proxy._value = value
        node = proxy.node
        is_tensor = isinstance(value, torch.Tensor)
        if not is_tensor and type(value) not in _CONSTANTS:
            self.containers.add(node)
        # Nobody takes its value yet: so of an opaque call it is believed that it writes.
        if _effects(self, node)[0]:  # type: ignore[arg-type]
            self._writes += 1
        formula = self._formula(node, is_tensor)
        self._same_as[node] = formula and self._first.setdefault(formula, node.name)

    def _formula(self, node: fx.Node, is_tensor: bool) -> str:
        """A text that only values share which are equal for all inputs: one guard serves them.

        It says how a number is computed; a tensor has the name of its node. It is "" for what no
        input changes: the model's state, constants, and their shapes. A number that is read in the
        state is none of these, since it may be another one at a later call.
        """
        if node.op == "get_attr":
            return ""
        if is_tensor or node.op in ("placeholder", "call_module"):
            return node.name
        taken = node.all_input_nodes
        if any(map(self._same_as.get, taken)):
            arguments = map_arg((node.args, node.kwargs), self._formula_of)
            return f"{self._writes} {node.target}{arguments}"
        is_of_state = any(argument.op == "get_attr" for argument in taken)
        return node.name if is_of_state and node.target not in _PARTS else ""

    def _formula_of(self, node: fx.Node) -> str:
        return self._same_as.get(node) or node.name

    def answer(self, stand_in: Any, function: Any = None, read: Any = _plain) -> Any:
        """What is read of a stand-in, or of a function of it, with a guard."""
        if self.example is None:
            raise fx.proxy.TraceError(_ASKED)
        if function is not None:
            stand_in = self.record(function, stand_in)
        value = self.note_asked(stand_in, read)
        self.guard_pending()
        return value

    def note_asked(self, stand_in: Any, read: Any = _plain) -> Any:
        """What is read of a stand-in, which has to be the same for other inputs."""
        value = self.compute(read, stand_in)
        self.pending.append((stand_in, value, read, _guard_text(value)))
        return value

    def guard_pending(self) -> None:
        """See to it that what was asked is answered so for other inputs.

        Equal guards are one, and what does not depend on the inputs needs none.
        """
        pending, self.pending = self.pending, []
        for stand_in, value, read, said in pending:
            node = stand_in.node
            formula = self._same_as[node]
            if isinstance(stand_in._value, torch.Tensor):
                formula = f"{self._writes} {node.name}"  # also of parameters and buffers
            guard = formula, read, repr(value)
            if not formula or guard in self._guards:
                continue
            self._guards.add(guard)
            condition = stand_in
            if read is not bool:
                condition = stand_in == value
            elif not value:
                condition = self.record(operator.not_, stand_in)
            self.record(torch._assert, condition, said)

    def settle_pending(self, target: Any, values: Any) -> None:
        """Guard what was asked before an operation that is recorded next.

        What only the message of an assert says decides nothing; while a message is made of shapes
        and items, it is not known yet.
        """
        if target is torch._assert:
            message = str(values[1:])
            self.pending = [item for item in self.pending if str(item[1]) not in message]
        elif target not in _PARTS:
            self.guard_pending()

    def guard_none(self, stand_in: Any) -> None:
        """See to it that what is None for the example is so for other inputs."""
        node = stand_in.node
        source = node.args[0] if node.target is operator.getitem else node
        if not self._calls_torch(source):
            self.answer(stand_in)

    def _calls_torch(self, node: fx.Node) -> bool:
        """Whether it calls a leaf of torch's own, of which the arguments say what it returns."""
        if node.op != "call_module":
            return False
        leaf = self.root.get_submodule(str(node.target))
        return type(leaf).__module__.startswith("torch.")

    def to_bool(self, obj: Any) -> bool:
        """The truth of a stand-in."""
        return self.answer(obj, read=bool)  # type: ignore[no-any-return]

    def iter(self, obj: Any) -> Iterator[Any]:
        """The items of a stand-in, each a stand-in."""
        if self.example and not hasattr(obj._value, "__getitem__"):  # a set, or a generator
            obj = self.record(list, obj)
        return iter([obj[position] for position in range(len(obj))])

    def keys(self, obj: Any) -> Any:
        """The keys of a stand-in for a mapping."""
        if self.example is None:
            return super().keys(obj)
        return self.answer(obj, list)

    def leave_caches(self) -> None:
        """Clear functools' caches of stand-ins; in others they would break the eager model."""
        if self.hashed:
            gc.collect()
        for reference in self.hashed:
            for holder in _key_holders(reference()):
                owners = gc.get_referrers(holder)
                caches = [item for item in owners if type(item) is functools._lru_cache_wrapper]
                for cache in caches:
                    cache.cache_clear()
                if not caches:
                    text = "its forward keeps what it looks up in a cache of its own"
                    raise fx.proxy.TraceError(text)

    def _is_aside(self) -> bool:
        """Whether this is no part of the forward: another thread, or a value of the example."""
        return self._thread != threading.get_ident()

    def patch_questions(self, patcher: _Patcher) -> None:
        """Let Python's and torch's functions answer for stand-ins while the forward runs."""
        is_instance = isinstance

        def known(item: Any) -> Any:
            if not is_instance(item, _Proxy):
                return item
            node = item.node
            is_operation = node.op in ("call_function", "call_method") and node.target not in _PARTS
            is_computed = is_operation or self._calls_torch(node)
            if not (is_computed and is_instance(item._value, torch.Tensor)):
                self.answer(item, _kind)
            return item._value

        def answer_isinstance(item: Any, kinds: Any) -> bool:
            if _is_of_model(sys._getframe(1)):
                item = known(item)
            return is_instance(item, kinds)

        def answering(function: Any) -> Any:
            return lambda item: function(known(item))

        for name in _CHECKS.intersection(vars(torch)):
            check = functools.partial(self._answer_check, getattr(torch, name))
            patcher.patch(vars(torch), name, check)
        patcher.patch(vars(builtins), "isinstance", answer_isinstance)
        patcher.patch(vars(builtins), "callable", answering(callable))
        patcher.patch(vars(torch), "is_tensor", answering(torch.is_tensor))
        for name in _FACTORIES:
            factory = getattr(torch, name)
            patcher.patch(vars(torch), name, self.recorded(factory))
        # Torch.fx's own expects that a function which it wraps never returns None. It sets an
        # attribute on what it patches in, which a bound method does not bear.
        patcher.patch(
            vars(_symbolic_trace), "_create_wrapped_func", functools.partial(self.recorded)
        )

    def _answer_check(self, check: Callable[..., Any], *arguments: Any) -> Any:
        condition = _find_proxy(arguments)
        if condition is None:
            return check(*arguments)
        if isinstance(condition._value, torch.Tensor):
            condition = condition.all()
        torch._assert(bool(condition), f"{check.__name__} fails for the example")
        return None

    def recorded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Of a function one that is recorded where a stand-in is among its arguments."""

        @functools.wraps(function, updated=())
        def recorded(*args: Any, **kwargs: Any) -> Any:
            if _find_proxy(args, kwargs) is None:
                return function(*args, **kwargs)
            return self.create_proxy("call_function", function, args, kwargs)

        return recorded


_CONSTANTS = frozenset([bool, float, int, str, type(None)])
# Arguments of these kinds decide which way a forward goes: while tracing they are constants.
_DECIDING = (type(None), bool, str)
# For C takes no stand-ins: these are recorded as calls where one is among their arguments.
_FACTORIES = (
    "arange as_tensor empty eye finfo full iinfo is_autocast_enabled linspace ones rand randn"
    " tensor zeros"
).split()
# Functions of torch of which an argument has to be true.
_CHECKS = frozenset(
    "_check _check_index _check_not_implemented _check_tensor_all _check_tensor_all_with"
    " _check_type _check_value _check_with".split()
)
# What asks for no number in a tensor.
_PARTS = (getattr, operator.getitem, len, "dim", "numel", "size")
_GIVEN = "an argument that the example gives is None"
_ASKED = "its control flow depends on its inputs"


def _guard_text(answer: Any) -> str:
    """What a guard says, of the line of the model that runs."""
    at = _model_line(_frames_inside())
    file = pathlib.Path(at.filename).name
    return f"forward went one way because ({at.line}) was {answer!r} ({file}, line {at.lineno})"


def _kind(value: Any) -> str:
    """What isinstance may ask; all tensors are one kind."""
    if isinstance(value, torch.Tensor):
        return "Tensor"
    return _class_path(type(value))


def _copied(item: Any) -> Any:
    """A copy of a part of the example, since models write into their inputs."""
    if isinstance(item, torch.Tensor):
        return item.clone()
    with contextlib.suppress(Exception):
        return copy.deepcopy(item)
    return item


def _as_call(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """An example as positional and keyword arguments."""
    if example is None:
        return None
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, tuple):
        return example, {}
    kind = type(example).__name__
    raise TypeError(f"example_inputs takes a tuple such as (x,), or a mapping, not a {kind}")


# What stands for the parameter of an argument that has no name in the signature.
_UNNAMED = inspect.Parameter("unnamed", inspect.Parameter.KEYWORD_ONLY)


def _default_call(
    parameters: Sequence[inspect.Parameter], concrete_args: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a forward gets without an example; ``fx.PH`` stands for what stays an argument."""
    values = {}
    for parameter in parameters:
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            value = parameter.default if type(parameter.default) in _DECIDING else PH
            values[parameter.name] = concrete_args.get(parameter.name, value)
    call = inspect.BoundArguments(inspect.Signature(parameters), values)
    return call.args, call.kwargs


def _key_holders(item: Any) -> Iterator[Any]:
    """The dicts and sets that have it as a key, by itself or in a tuple."""
    holders = [] if item is None else gc.get_referrers(item)
    for holder in holders:
        if type(holder) is tuple:
            yield from _key_holders(holder)
        elif type(holder) in (dict, set) and any(key is item for key in list(holder)):
            yield holder


def _example_of(item: Any) -> Any:
    """The value of a stand-in; anything else as it is."""
    if isinstance(item, _Proxy):
        return item._value
    if isinstance(item, slice):
        return map_aggregate(item, _example_of)
    return item


# ---- what tracing names and notes


class _Feature(NamedTuple):
    """What can be asked for: a value, and the position in the graph after which it is read."""

    value: Any  # a node, or nodes and constants in the structure in which a module returned them
    after: int


class NodePathTracer(_AnsweringTracer):
    """A tracer that names each node after the place in the model where it was recorded.

    Args:
        exact: name by rule 5 as well: the path of a module means that module.
        example_inputs: what answers where the forward asks about its inputs.
        args, kwargs: as for :class:`LeafModuleAwareTracer`.

    Attributes:
        node_to_qualname: node -> name, in execution order. Tensors that the forward makes and the
            graph's output have no name.
        current_module_qualname: the scope, the path of the module whose forward is running.
        exact: as given.
        example: the example, as positional and keyword arguments.
        given: argument -> its value for the example, or if exact its default.
        error: why the mode could not be traced.
        asked_mode: whether the forward asked for the mode of a module, or might have.
        returned: what modules returned, if a graph can hold it; by default only values of nodes.
            The first call of a module is under its path; with exact=True the second is under the
            name ``path_1``.
        losses: what tracing left out, by kind -> the position of the first node that it concerns,
            and the text of the warning.
        replaced: the nodes of operators in place, such as ``+=``, that torch.fx makes new values.
        watch: what sees the tensors outside of the graph.
        auto_leaves: the classes of which auto_leaf=True made leaves -> the reason.

    >>> tracer = NodePathTracer()
    >>> graph = tracer.trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU()))
    >>> list(tracer.node_to_qualname.values())
    ['input', '0', '1']
    """

    current_module_qualname = ""
    asked_mode = False
    error: UntraceableError | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.node_to_qualname: dict[fx.Node, str] = {}
        self.returned: dict[str, _Feature] = {}
        self.losses: dict[str, tuple[int, str]] = {}
        self.replaced: set[fx.Node] = set()
        self.auto_leaves: dict[type[nn.Module], str] = {}
        self._autowrapped = kwargs.get("autowrap_functions", ())
        self.proxy_buffer_attributes = self.exact or self.proxy_buffer_attributes

    @property
    def names(self) -> list[str]:
        """The names of the nodes, in execution order."""
        return list(self.node_to_qualname.values())

    @functools.cached_property
    def paths(self) -> set[str]:
        """The paths of all modules of the model; several may lead to one module."""
        return {path for path, _ in self.root.named_modules(remove_duplicate=False) if path}

    @functools.cached_property
    def places(self) -> dict[fx.Node, int]:
        """Node -> its position in the graph, as it was traced."""
        return {node: position for position, node in enumerate(self.graph.nodes)}

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace a module; see ``torch.fx.Tracer.trace``."""
        self.root = root if isinstance(root, nn.Module) else nn.Module()
        self._thread = threading.get_ident()
        self._outer_autocast = _autocast_depth()
        self._enabling = 0  # how many blocks that enable gradients the forward is in
        parameters = self.root.named_parameters()
        self._parameter_paths = {id(parameter): path for path, parameter in parameters}
        self.watch = _Watch(self)
        self._namer = _Namer(self.paths if self.exact else ())
        if self.example:
            if any(map(nn.parameter.is_lazy, self.root.parameters())):
                raise fx.proxy.TraceError("it has lazy modules: call it once before")
            for buffer in self.root.buffers():  # a batch norm does not declare what it writes
                self.watch.keep(buffer)
            for parameter in self.root.parameters():
                self.watch.memories.append((parameter, parameter.data))
        undo = contextlib.ExitStack()
        grad = torch.enable_grad()  # so that a block that switches them off shows
        with undo, grad, self._noting_mode(), self.watch, _Patcher() as patcher:
            undo.callback(self.watch.put_back)
            for block in (torch.enable_grad, torch.set_grad_enabled):
                for name in ("__enter__", "__exit__"):
                    patcher.patch_method(block, name, self._noting_block(getattr(block, name)))
            # torch.fx wraps neither _function() nor module.function().
            for function in self._autowrapped:
                namespace = getattr(function, "__globals__", {})
                if function.__name__ in namespace:
                    patcher.patch(namespace, function.__name__, self.recorded(function))
            if self.example:
                self.patch_questions(patcher)
            buffers = {**self.root._buffers}
            graph = super().trace(root, concrete_args)
            self._check_buffers(self.root, buffers)
        self._check_root(graph)
        return graph

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Record the call of a leaf module, or trace through the module with its path as scope."""
        if self._is_aside():
            return forward(*args, **kwargs)
        self.note_block()  # before the scope changes: a block here is the caller's
        try:
            path = self.path_of_module(m)
        except NameError:  # a module that is not part of the model is traced through
            return forward(*args, **kwargs)
        outer = self.current_module_qualname
        self.current_module_qualname = path
        try:
            if self.is_leaf_module(m, path):
                return self.create_proxy("call_module", path, args, kwargs)
            buffers = {**m._buffers}
            value = forward(*args, **kwargs)
            name = self._namer.name(path) if self.exact else path
            self._check_buffers(m, buffers)
        except Exception as error:
            vars(error).setdefault("featx_module", (path, type(m)))  # the innermost wins
            raise
        finally:
            self.current_module_qualname = outer
        if type(m).__call__ is nn.Module.__call__:  # else that decides what is returned
            self._note_returned(name, value)
        return value

    def _note_returned(self, name: str, value: Any) -> None:
        is_wanted = self.exact or type(value) is _Proxy  # of an attribute there is no node yet
        if name in self.returned or not is_wanted:
            return
        try:
            argument = self.create_arg(value)
        except Exception:  # the classes of what is returned are anybody's
            return
        last = len(self.graph.nodes) - 1
        self.returned[name] = _Feature(argument, last)

    def getattr(
        self,
        attr: str,
        attr_val: Any,
        parameter_proxy_cache: dict[str, Any],
    ) -> Any:
        """Record the use of a parameter, and if exact of a buffer."""
        if self._is_aside():
            return attr_val
        path = self._parameter_paths.get(id(attr_val))
        if path is None or self.param_shapes_constant:
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        if path not in parameter_proxy_cache:  # torch.fx searches the model for each parameter
            parameter_proxy_cache[path] = self.create_proxy("get_attr", path, (), {})
        return parameter_proxy_cache[path]

    def create_proxy(self, *args: Any, proxy_factory_fn: Any = None, **kwargs: Any) -> Any:
        """Record an operation, and name its node.

        Gives the stand-in for its value, or None where the example's value is None.
        """
        block = self.note_block()
        kind, target, values, *_ = args
        self.settle_pending(target, values)
        kwargs["proxy_factory_fn"] = proxy_factory_fn  # torch.fx looks whether it is taken
        value = NotImplemented  # which no example gives
        if self.example:
            value = self.evaluate(*args[:4])
        proxy = super().create_proxy(*args, **kwargs)
        node = proxy.node
        if self.example:
            self.note_value(proxy, value)
        for first in values[:1]:  # the operation's first argument, or the default of an argument
            is_tensor = isinstance(first, torch.Tensor)
            if is_tensor and kind == "placeholder":
                raise fx.proxy.TraceError(f"its argument {target!r} has a tensor as default")
            if is_tensor and _is_in_place(node):
                self.watch.note_written(node, first)
        if isinstance(node.type, str):  # a postponed annotation
            node.type = _NUMBERS.get(node.type)
        if block:
            node.meta["featx_block"] = block
        self._name_node(node, proxy)
        if value is not None or kind == "placeholder":
            return proxy
        if target not in (torch._assert, operator.setitem, setattr):
            self.guard_none(proxy)
        return None

    def _name_node(self, node: fx.Node, proxy: Any) -> None:
        own = None if node.op == "call_module" else node.name
        name = self._namer.name(self.current_module_qualname, own)
        self.node_to_qualname[node] = name
        if own is None:  # by default under its path, where the first call counts
            self._note_returned(name if self.exact else str(node.target), proxy)

    def note_block(self) -> str:
        """Note what is lost of the block in which an operation is recorded.

        Gives the code of its grad mode if exact, else "": by default that is lost. Autocast always
        is, which raises an error if exact.
        """
        if _autocast_depth() != self._outer_autocast:
            self.lose(_AUTOCAST)
        if not torch.is_grad_enabled():
            block = "torch.no_grad()"
        elif self._enabling:
            block = "torch.enable_grad()"
        else:
            return ""
        if self.exact:
            return block
        self.lose(_GRAD_MODE)
        return ""

    def _noting_block(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Of the method that enters or leaves an enabling block one that notes it.

        Where gradients are enabled already, their state does not show such a block.
        """

        def noting(block: Any, *arguments: Any) -> Any:
            if not self._is_aside():
                step = -1 if arguments else 1  # it leaves, or enters
                self._enabling += step * getattr(block, "mode", True)
            return method(block, *arguments)

        return noting

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """The stand-in for a node's value."""
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        """Make of a value an argument of a node; what is most frequent is answered at once."""
        kind = type(a)
        if kind is _Proxy:
            return a.node
        if kind is tuple:
            return tuple([self.create_arg(item) for item in a])
        if kind in _CONSTANTS or (kind is dict and not a):
            return a
        if kind is type and a in _DTYPES:
            return _DTYPES[a]
        if kind.__module__ == "numpy" and a.ndim == 0:  # of which code could not be made
            return a.item()
        if isinstance(a, torch.Tensor):
            self.watch.taken[id(a)] = a
            if a.grad_fn is not None or self.watch.is_of_example(a):
                self.lose(_EARLIER)
        try:
            return super().create_arg(a)
        except NotImplementedError as error:
            raise fx.proxy.TraceError(f"takes or returns a {_class_path(kind)}") from error

    def lose(self, kind: str, position: int | None = None) -> None:
        """Note what the running forward does and tracing leaves out; if exact, refuse it.

        It concerns the nodes from a position on, by default those that come next.
        """
        if self.exact:
            self.raised = fx.proxy.TraceError(f"its forward {kind}")
            raise self.raised
        if kind in self.losses:
            return
        path = self.current_module_qualname
        where = f"the forward of the module {path!r}" if path else "the model's own forward"
        remedy = "exact=True, with auto_leaf=True, is right or raises an error"
        if position is None:
            position = len(self.graph.nodes)
        self.losses[kind] = position, f"{where} {kind}; {remedy}{_source_line(_frames_inside())}"

    def _check_buffers(self, module: nn.Module, before: Mapping[str, Any]) -> None:
        """See whether the forward of a module assigned to one of its buffers."""
        for name, buffer in before.items():
            value = module._buffers.get(name)
            if getattr(value, "_value", value) is buffer:  # of a stand-in what its to() gave back
                continue
            node = getattr(value, "node", None)
            while node and node.args and _is_in_place(node):  # self.n += 1 works on the buffer
                node = node.args[0]
            if node is None or node.op != "get_attr":
                self.lose(_ASSIGNED, 0)

    @contextlib.contextmanager
    def _noting_mode(self) -> Iterator[None]:
        """See whether the forward asks for the mode of a module."""
        classes = set(map(type, self.root.modules()))
        self.asked_mode = any(map(_may_ask_mode, classes))

        def get(module: nn.Module) -> Any:
            self.asked_mode |= not self._is_aside()
            if "training" not in vars(module):
                raise AttributeError("training")
            return vars(module)["training"]

        def set_to(module: nn.Module, training: bool) -> None:
            vars(module)["training"] = training

        outer = vars(nn.Module).get("training")  # of a trace around this one
        nn.Module.training = property(get, set_to)  # type: ignore[assignment]
        try:
            yield
        finally:
            del nn.Module.training
            if outer is not None:
                nn.Module.training = outer

    def _check_root(self, graph: fx.Graph) -> None:
        """See what of the model's own forward and of what surrounds it is left out."""
        if self.raised is not None:
            text = "its forward goes on after an error, which other inputs may not raise: "
            raise fx.proxy.TraceError(f"{text}{self.raised!r}")
        for node in graph.nodes:
            is_optional = node.op == "placeholder" and node.args == (None,)
            if is_optional and not node.users and not self.exact:
                self.lose(_UNASKED.format(node.target), 0)
        is_hooked = self.root._forward_hooks or self.root._forward_pre_hooks
        is_called_so = type(self.root).__call__ is nn.Module.__call__
        if is_hooked or "forward" in vars(self.root) or not is_called_so:
            self.lose(_AROUND, 0)


_DTYPES = {int: torch.int64, float: torch.float64, bool: torch.bool}
_NUMBERS = {"float": float, "int": int, "bool": bool}  # what TorchScript needs to know


# ---- what tracing leaves out

_AUTOCAST = "runs a part under torch.autocast, which tracing leaves out"
_GRAD_MODE = "changes the grad mode, which tracing leaves out"
_BUFFERS = (
    "computes from buffers, or from what it writes into, which tracing makes a constant that"
    " follows neither load_state_dict nor what is written"
)
_ASSIGNED = "assigns or writes into a buffer, a view or a constant, which tracing leaves out"
_EARLIER = "takes a tensor of an earlier call, or of a hook, which tracing makes a constant"
_UNASKED = (
    "does not use its argument {0!r}, or has asked whether it is None, which is never so while"
    " tracing: concrete_args={{{0!r}: None}} or example_inputs says what it is"
)
_RANDOM = "draws random numbers, which tracing makes the same at each call"
_NOT_IN_PLACE = "works in place, of which tracing makes a new value, and its memory is read later"
_AROUND = (
    "was replaced on the instance, or stands inside of hooks or a __call__ of the model's own,"
    " which tracing leaves out, but not in nn.Sequential(model)"
)


def _may_ask_mode(kind: Any) -> bool:
    """Whether modules of a class have a mode of their own, or read it in ways that nobody sees."""
    for name in ("train", "eval", "__getattribute__"):
        if getattr(kind, name) is not getattr(nn.Module, name):
            return True
    code = getattr(inspect.getattr_static(kind, "forward"), "__code__", None)
    names = getattr(code, "co_names", ())
    return hasattr(kind, "training") or "vars" in names or "__dict__" in names


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees what is computed outside of the graph while a forward is traced.

    The forward computes without stand-ins what torch.fx makes constants of; and every value is
    computed for the example. What that writes into the model or into constants is undone.

    Attributes:
        watched: by id buffers and views of them, of which the forward should compute nothing.
        written: the ids of tensors that nodes write into, of which it should not either.
        taken: by id the tensors that nodes take as constants.
        computed: by id what was computed for the example in memory of its own, while it lives.
        kept: by id tensors that are written into, with what they were.
        memories: parameters, with the tensors that were their data.
    """

    def __init__(self, tracer: NodePathTracer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracer = tracer
        self.watched = {id(buffer): buffer for buffer in tracer.root.buffers()}
        self.written: set[int] = set()
        self.taken: dict[int, torch.Tensor] = {}
        self.computed: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self.kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.memories: list[tuple[torch.Tensor, torch.Tensor]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True, the default, imports torch._dynamo

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Where a value of the example is computed, a tensor that is no such value is foreign: of
        # the model, or a constant. What is written into it is put back.
        arguments, _ = tree_flatten((args, kwargs))
        first = next(iter(arguments), None)  # mostly, into this one it writes
        is_aside = self.tracer._is_aside()
        is_foreign = is_aside and not self.is_of_example(first)
        is_known = id(first) in self.watched or id(first) in self.written
        if func._schema.is_mutable and (is_foreign or is_known):
            self.keep(first)
        value = func(*args, **(kwargs or {}))
        is_view = any(returned.alias_info for returned in func._schema.returns)
        if not is_aside:
            self._note_constant(func, arguments, value, is_view)
        elif not (is_view and is_foreign):
            for tensor in tree_flatten(value)[0]:
                if isinstance(tensor, torch.Tensor):
                    self.computed[id(tensor)] = tensor
        return value

    def _note_constant(self, func: Any, arguments: Any, value: Any, is_view: bool) -> None:
        """Note what the forward computes without stand-ins, and what is lost by it.

        Random numbers become the same at each call, and what is written into a buffer, a view of
        one or a constant is left out. A view of a buffer is watched as the buffer is. What is
        computed of floats in a buffer, or of what a node writes into, is soon out of date; of
        integers, as indices and masks, constants are made.
        """
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.tracer.lose(_RANDOM)
        found = [item for item in arguments if id(item) in self.watched]
        is_written = not self.written.isdisjoint(map(id, arguments))
        if func._schema.is_mutable:
            target = id(arguments[0])
            if target in self.watched or target in self.taken:
                self.tracer.lose(_ASSIGNED, 0)  # the next call lacks it, from the first node on
                return
        elif found and is_view and not is_written:
            for view in tree_flatten(value)[0]:
                self.watched[id(view)] = view
            return
        is_of_floats = any(item.is_floating_point() or item.is_complex() for item in found)
        if is_written or is_of_floats:
            self.tracer.lose(_BUFFERS)

    def note_written(self, node: fx.Node, tensor: torch.Tensor) -> None:
        """A node writes into a tensor that is no proxy: what is computed from it is out of date."""
        is_view = id(tensor) in self.watched or tensor._base is not None
        if is_view and _is_constant(node.all_input_nodes[0]):
            self.tracer.lose(_ASSIGNED, 0)
        self.written.add(id(tensor))

    def is_of_example(self, tensor: Any) -> bool:
        """Whether a tensor was computed for the example, in memory of its own."""
        return self.computed.get(id(tensor)) is tensor

    def keep(self, tensor: Any) -> None:
        """Note what a tensor is before something is written into it."""
        if isinstance(tensor, torch.Tensor) and id(tensor) not in self.kept:
            self.kept[id(tensor)] = tensor, tensor.detach().clone()

    def put_back(self) -> None:
        """Undo what was written into what is kept."""
        for tensor, before in self.kept.values():
            tensor.data.copy_(before)  # by data: what autograd has saved of it stays valid
        for parameter, memory in self.memories:
            if parameter.data_ptr() != memory.data_ptr():
                parameter.data = memory


def _autocast_depth() -> int:
    """How deep in blocks of autocast this thread is."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


# ---- tracing both modes


def _trace_both(
    model: nn.Module,
    restore: Callable[..., None],
    arguments: dict[str, Any],
    concrete_args: Any,
    auto_leaf: bool,
) -> dict[str, NodePathTracer]:
    """Trace in both modes, once if the forward does not ask; the own one has to be traceable."""
    _check_arguments(model, concrete_args, _as_call(arguments["example_inputs"]))
    own, other = "train", "eval"
    if not model.training:
        own, other = other, own
    leaves: dict[type[nn.Module], str] = {}
    tracers: dict[str, NodePathTracer] = {}
    while len(tracers) < 2:
        mode = other if tracers else own
        traced = tracers.get(own)
        tracer = NodePathTracer(**arguments)  # what is wrong in them is no fault of the model
        try:
            if traced is None or traced.asked_mode:
                _trace(model, mode, restore, tracer, concrete_args)
                traced = tracer
            traced.auto_leaves = leaves
            tracers[mode] = traced
            if traced.example:
                _check_example(model, mode, traced)
        except Exception as cause:
            error = _untraceable(model, cause, arguments)
            if auto_leaf and error.path and error.module_type not in leaves:
                tracers.clear()
                leaves[error.module_type] = error.reason
                arguments["leaf_modules"] += (error.module_type,)
            elif mode == own:
                raise error from cause
            else:
                error.__cause__ = cause
                tracers[mode] = _refusing(error, tracers[own])
                _warn(f"in {mode} mode an extractor will raise an error: {error}")
    if leaves:
        listed = ", ".join(map(_class_path, leaves))
        kwargs = f"tracer_kwargs={{'leaf_modules': [{listed}]}}"
        _warn(f"what torch.fx cannot trace became leaves: {kwargs} does the same.")
    return tracers


def _check_arguments(model: nn.Module, concrete_args: Any, example: Any) -> None:
    signature = inspect.signature(model.forward)
    known = [*signature.parameters]
    unknown = {**(concrete_args or {})}.keys() - known
    if unknown:
        raise ValueError(f"concrete_args has {unknown}; the arguments of forward are {known}")
    if example is None:
        return
    if concrete_args:
        raise ValueError("example_inputs says what concrete_args would: pass one of them")
    args, kwargs = example
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"example_inputs does not fit forward{signature}: {error}") from None


def _trace(
    model: nn.Module,
    mode: str,
    restore: Callable[..., None],
    tracer: NodePathTracer,
    concrete_args: Any,
) -> None:
    try:
        _set_mode(model, mode)
        with _unchanged_random_state():
            tracer.trace(model, concrete_args)
    finally:  # tensors and modules that a forward makes stay until all is done, for the graphs
        restore(keep=(torch.Tensor, nn.Module))


def _set_mode(model: nn.Module, mode: str) -> None:
    if model.training != (mode == "train"):  # what is frozen in the model's mode stays frozen
        getattr(model, mode)()


def _refusing(error: UntraceableError, traced: NodePathTracer) -> NodePathTracer:
    """In place of the tracer of a mode that cannot be traced: its graph raises the error."""
    tracer = NodePathTracer()
    tracer.error = error
    tracer.graph = fx.Graph()
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            tracer.graph.node_copy(node)
    tracer.graph.output(tracer.graph.call_function(error))
    return tracer


def _untraceable(model: nn.Module, error: Exception, arguments: dict[str, Any]) -> UntraceableError:
    frames = reversed([*traceback.walk_tb(error.__traceback__)])
    reason = f"{type(error).__name__}: {error}{_source_line(frames)}"
    model_itself = "", type(model)
    path, module_type = vars(error).get("featx_module", model_itself)
    code = getattr(module_type.forward, "__code__", None)
    if code and hasattr(module_type.forward, "__wrapped__"):
        where = f"{code.co_name} ({code.co_filename}, line {code.co_firstlineno})"
        reason += f"\nIts forward is wrapped by {where}, which torch.fx may not see through."
    children = [] if path else model.named_children()
    traceable = [name for name, child in children if _can_trace(child, arguments)]
    return UntraceableError(path, module_type, reason, traceable)


def _can_trace(model: nn.Module, arguments: dict[str, Any]) -> bool:
    """Whether a module that has something inside can be traced."""
    with contextlib.suppress(Exception):
        NodePathTracer(**{**arguments, "example_inputs": None}).trace(model)
        return any(model.children())
    return False


def _set_default_tracer_kwargs(given: Mapping[str, Any] | None, **own: Any) -> dict[str, Any]:
    """The caller's ``tracer_kwargs`` with the defaults added; the caller's are not written to.

    What they have of featx's ``own`` arguments goes before.
    Programs written for torchvision's file import this name, and the next.
    """
    ops = sys.modules.get("torchvision.ops")
    defaults: dict[str, list[Any]] = {
        "autowrap_modules": [math, ops] if ops else [math],
        "leaf_modules": _get_leaf_modules_for_ops(),
        "non_leaf_modules": [],
    }
    arguments = {**own, **(given or {})}
    for name, default in defaults.items():
        added: Any = arguments.get(name, ())
        if not isinstance(added, Iterable):
            added = [added]
        arguments[name] = (*default, *added)
    return arguments


def _get_leaf_modules_for_ops() -> list[type[nn.Module]]:
    """The modules of ``torchvision.ops``, if the process has imported it."""
    ops = sys.modules.get("torchvision.ops")
    if ops is None:
        return []
    classes = filter(inspect.isclass, vars(ops).values())
    return [cls for cls in classes if issubclass(cls, nn.Module)]


# ---- the check on the example


def _check_example(model: nn.Module, mode: str, tracer: NodePathTracer) -> None:
    """See that the graph gives for the example what the model gives, bit for bit."""
    tracer.leave_caches()
    difference = _first_difference(model, mode, tracer, ())
    if difference:  # once more, to see where it begins
        difference = _first_difference(model, mode, tracer, _leaf_paths(tracer)) or difference
        text = "with the example its graph gives something else than it does"
        raise fx.proxy.TraceError(f"{text}: {difference}")


def _leaf_paths(tracer: NodePathTracer) -> set[str]:
    """The paths of the leaves that are called."""
    return {str(node.target) for node in tracer.graph.nodes if node.op == "call_module"}


def _first_difference(
    model: nn.Module, mode: str, tracer: NodePathTracer, paths: Iterable[str]
) -> str:
    """Where a model and its graph differ: in a module with one of the paths, or in the output."""
    traced = DualGraphModule(model, tracer.graph, tracer.graph)
    values: list[list[tuple[str, Any]]] = []
    calls = {model: tracer.example, traced: ((), tracer.given)}
    for module, arguments in calls.items():
        seen: list[tuple[str, Any]] = []
        values.append(seen)
        args, kwargs = tree_map(_copied, arguments)
        with _unchanged(model), torch.no_grad(), contextlib.ExitStack() as undo:
            undo.callback(tracer.watch.put_back)
            _set_mode(model, mode)
            for path in paths:
                hook = functools.partial(_note_call, seen, path)
                undo.callback(model.get_submodule(path).register_forward_hook(hook).remove)
            returned = module(*args, **kwargs)
            seen.append(("the output", _clone_nested(returned)))  # before memory is put back
    for (path, expected), (_, found) in zip(*values):
        difference = _difference(expected, found)
        if difference:
            return f"{path}: {difference}"
    return ""


def _note_call(seen: list[tuple[str, Any]], path: str, *call: Any) -> None:
    seen.append((f"the module {path!r}", _clone_nested(call[-1])))


def _difference(expected: Any, found: Any) -> str:
    """How two values differ, whatever the classes of mappings and sequences are."""
    if isinstance(expected, fx.Proxy):
        return "a stand-in, which the forward has left somewhere"
    if _are(torch.Tensor, expected, found):
        try:
            torch.testing.assert_close(
                found,
                expected,
                rtol=0,
                atol=0,
                equal_nan=True,
            )
        except AssertionError as error:
            return str(error)
        return ""
    if _are(Mapping, expected, found):
        expected = [*expected.items()]
        found = [*found.items()]
    if _are((list, tuple), expected, found):
        if len(expected) != len(found):
            return f"{len(found)} values in place of {len(expected)}"
        return next(filter(None, map(_difference, expected, found)), "")
    if type(expected) is type(found) and hasattr(expected, "__dict__"):
        return _difference(vars(expected), vars(found))
    is_known = type(expected) in _CONSTANTS or isinstance(expected, torch.Tensor)
    if not is_known or repr(expected) == repr(found):
        return ""
    return f"{found!r} in place of {expected!r}"


def _are(kind: Any, *values: Any) -> bool:
    return all(isinstance(value, kind) for value in values)


# ---- names


class _Namer:
    """Gives out names by the rules of the module's docstring.

    Args:
        paths: for rule 5, the paths of all modules.
    """

    def __init__(self, paths: Iterable[str] = ()) -> None:
        self._uncalled = set(paths)
        self._exact = bool(self._uncalled)
        # Stem -> the number after the most recently given form.
        self._next_number = dict.fromkeys(self._uncalled, 1)
        # A name that is given out -> the number from which to search where it would be repeated.
        self._retry = dict.fromkeys(self._uncalled, 0)

    def name(self, scope: str, own: str | None = None) -> str:
        """The name of the next node.

        Args:
            scope: the path of the module whose forward is running, or that is called.
            own: torch.fx's name for the node; None for a call of a module.
        """
        place = scope
        if own is not None:
            place = f"{scope}.{own}" if scope else own
        elif scope in self._uncalled:
            self._uncalled.remove(scope)
            return scope
        elif self._exact:
            return self._number(scope)
        stem, _ = _split_number(place)
        return self._number(stem)

    def _number(self, stem: str) -> str:
        """Give out the next free form of a stem."""
        number = self._next_number.get(stem, 0)
        name = first = f"{stem}_{number}" if number else stem
        while name in self._retry:
            number = max(number + 1, self._retry[name])
            name = f"{stem}_{number}"
        # So that the next search begins where this one ends.
        self._retry[first] = self._retry[name] = number + 1
        # A name counts as a form of itself and, if it ends in a number, of what is before.
        self._next_number[name] = 1
        head, last = _split_number(name)
        self._next_number[head] = last + 1
        return name


def _split_number(name: str) -> tuple[str, int]:
    """``"relu_12"`` -> ``("relu", 12)``; without such an ending ``(name, 0)``."""
    head, _, digits = name.rpartition("_")
    if head and digits.isascii() and digits.isdigit():
        return head, int(digits)
    return name, 0


# ---- selection


def _queries_by_mode(
    both: Any,
    train: Any,
    evaluation: Any,
) -> dict[str, dict[str, str]]:
    """For each mode what is asked for, as query -> key."""
    if both is not None and train is None and evaluation is None:
        train = evaluation = both
    elif both is not None or train is None or evaluation is None:
        raise ValueError(
            "pass either return_nodes, or both train_return_nodes and eval_return_nodes"
        )
    return {"train": _as_mapping(train), "eval": _as_mapping(evaluation)}


def _as_mapping(queries: Any) -> dict[str, str]:
    """``{query: key}`` from a mapping, an iterable of queries or one query."""
    if isinstance(queries, str):
        queries = [queries]
    is_iterable = isinstance(queries, Iterable) and not isinstance(queries, (nn.Module, bytes))
    if not is_iterable:
        kind = type(queries).__name__
        raise TypeError(f"return_nodes takes a dict, a list of queries or one query, not a {kind}")
    if not isinstance(queries, Mapping):
        queries = {str(query): query for query in queries}
    mapping = {str(query): str(key) for query, key in queries.items()}
    owners: dict[str, str] = {}
    for query, key in mapping.items():
        owner = owners.setdefault(key, query)
        if owner != query:
            raise ValueError(f"both {owner!r} and {query!r} are put under the key {key!r}")
    return mapping


def _find_features(
    tracers: dict[str, NodePathTracer], mode: str, queries: Mapping[str, str]
) -> dict[str, _Feature]:
    """The value of each query, in execution order."""
    tracer = tracers[mode]
    answers = _answers(tracer)
    *_, output = tracer.graph.nodes
    returned, *_ = output.args
    whole = _Feature(returned, tracer.places[output])
    known = {**answers, "output": answers.get("output", whole)}
    for query in queries:
        if query not in known:
            hint = _hint(tracers, mode, query)
            raise NodeNameError(query, mode, _suggestions(answers, query), hint)
    # Of what is read after one node, the order is that of the answers.
    features = [(query, known[query]) for query in known if query in queries]
    return dict(sorted(features, key=lambda item: item[1].after))


def _answers(tracer: NodePathTracer) -> dict[str, _Feature]:
    """All queries that have a value, and their values."""
    answers = {}
    for node, name in tracer.node_to_qualname.items():
        feature = _Feature(node, tracer.places[node])
        for query in [name] if tracer.exact else _prefixes(name):
            answers[query] = feature  # that of the last name which equals it or lies below
    if tracer.exact:
        answers.update(tracer.returned)
    return answers


def _prefixes(name: str) -> Iterator[str]:
    """``"a.b.c"`` -> ``"a"``, ``"a.b"``, ``"a.b.c"``."""
    return itertools.accumulate(name.split("."), "{}.{}".format)


def _suggestions(answers: Iterable[str], query: str) -> list[str]:
    """The three closest of the queries that have a value, best first."""
    return difflib.get_close_matches(query, answers)


def _hint(tracers: dict[str, NodePathTracer], mode: str, query: str) -> str:
    """Why a query that matches nothing may have been expected to match."""
    tracer = tracers[mode]
    other = "eval" if mode == "train" else "train"
    if query in _answers(tracers[other]):
        return f"It is in the {other} graph only: pass train_return_nodes and eval_return_nodes."
    leaves = _leaf_paths(tracer)
    if query in leaves:
        return "Its call has another name; exact=True gives what it returned."
    for path in leaves.intersection(_prefixes(query)):
        leaf = type(tracer.root.get_submodule(path))
        remedy = f"tracer_kwargs={{'non_leaf_modules': [{_class_path(leaf)}]}} opens it."
        if leaf in tracer.auto_leaves:
            remedy = f"auto_leaf=True made it a leaf: {tracer.auto_leaves[leaf]}"
        return f"It lies inside the leaf module {path!r} ({_class_path(leaf)}); {remedy}"
    if query in tracer.paths:
        path = tracer.path_of_module(tracer.root.get_submodule(query))
        if path != query:
            return f"It is the module {path!r}; a second call of that is {path + '_1'!r}."
        return f"It is a module that is not called in {mode} mode, or returns what no graph holds."
    return ""


# ---- pruning


class _Operation(NamedTuple):
    """What pruning knows of a node: at the node itself it does not look."""

    inputs: Sequence[fx.Node] = ()
    writes: Sequence[fx.Node] = ()  # the inputs into whose memory it writes
    views: Sequence[fx.Node] = ()  # the inputs with which its value may share memory
    # "placeholder", "assert", "get_attr" of state, "constant", "replaced" where it should write
    # into its first input and makes a new value; any other is nothing special.
    kind: str = ""


class _Plan(NamedTuple):
    """What becomes of a graph."""

    stays: set[fx.Node]
    missed: fx.Node | None  # the first replaced operator in place whose write is read
    # A value and the position after which it is read -> the first that changes it afterwards.
    overwritten: dict[tuple[fx.Node, int], fx.Node]
    alone: dict[fx.Node, bool]  # whether it is read once, and shares memory with no other there


def _make_plan(tracer: NodePathTracer, features: dict[str, _Feature], training: bool) -> _Plan:
    operations = _operations(tracer, training)
    reads = collections.defaultdict(set)
    for value, after in features.values():
        reads[after].update(_nodes_in(value))
    stays, missed = _staying(operations, reads)
    for node in stays:
        if operations[node].kind == "constant":  # _cut clones it if it is written into later
            reads[tracer.places[node]].add(node)
    overwritten, alone = _overwritten(operations, stays, reads)
    return _Plan(stays, missed, overwritten, alone)


class _Memory:
    """The values that may share one memory, and the reads of them that nothing has changed."""

    def __init__(self, value: fx.Node) -> None:
        self.values = [value]
        self.reads: list[tuple[fx.Node, int]] = []


def _join(
    memory: dict[fx.Node, _Memory],
    node: fx.Node,
    views: Iterable[fx.Node],
) -> None:
    """From now on a value shares memory with others; ``memory`` is value -> its memory."""
    for viewed in views:
        both = memory[node], memory[viewed]
        small, large = sorted(both, key=lambda shared: len(shared.values))
        if small is not large:
            large.values += small.values
            large.reads += small.reads
            memory.update(dict.fromkeys(small.values, large))


def _staying(
    operations: Mapping[fx.Node, _Operation], reads: Mapping[int, Iterable[fx.Node]]
) -> tuple[set[fx.Node], fx.Node | None]:
    """The operations that must run, and the first of the replaced ones whose write is missed.

    ``reads`` has the values that are asked for, by the position after which each is read: an
    operation may write into a value that came before.
    Nothing after the last read runs. Before it, an operation stays if it is an assert, if its value
    is read or one that stays takes it, or if it writes into memory that is read later, that a later
    one which stays takes, or that is state of the model. Placeholders always stay.
    """
    memory = {node: _Memory(node) for node in operations}
    for node, operation in operations.items():  # whatever stays
        _join(memory, node, operation.views)
    end = max(reads, default=-1)
    stays: set[fx.Node] = set()
    # The memories that are read later; the next call reads the model's state.
    live = {memory[node] for node in operations if operations[node].kind == "get_attr"}
    changing: set[_Memory] = set()  # the memories that are written into later

    def require(values: Iterable[fx.Node]) -> None:
        stays.update(values)
        live.update(memory[value] for value in values)

    missed = None
    for position, node in reversed([*enumerate(operations)]):
        inputs, writes, _, kind = operations[node]
        if position > end and kind != "placeholder":
            continue
        require(reads.get(position, ()))
        changing.update(memory[written] for written in writes)
        if kind == "replaced":
            shared = memory[inputs[0]]
            if shared in live or (shared in changing and node in stays):
                missed = node
            changing.add(shared)
        is_kept = kind in ("placeholder", "assert")
        is_live = any(memory[written] in live for written in writes)
        if is_kept or is_live or node in stays:
            stays.add(node)
            require(inputs)
    return stays, missed


def _overwritten(
    operations: Mapping[fx.Node, _Operation],
    stays: set[fx.Node],
    reads: Mapping[int, Iterable[fx.Node]],
) -> tuple[dict[tuple[fx.Node, int], fx.Node], dict[fx.Node, bool]]:
    """The reads of values that change later, with what changes each first; which values are alone.

    An operation changes the values that share the memory into which it writes when it runs. A value
    is alone if an operation made it, it is read once, and there it shares memory with no other.
    """
    memory = {node: _Memory(node) for node in operations}
    changed: dict[tuple[fx.Node, int], fx.Node] = {}
    alone: dict[fx.Node, bool] = {}
    for position, (node, operation) in enumerate(operations.items()):
        if node in stays:
            for written in operation.writes:
                unchanged = memory[written].reads
                changed.update(dict.fromkeys(unchanged, node))
                unchanged.clear()
            _join(memory, node, operation.views)
        for value in reads.get(position, ()):
            shared = memory[value]
            shared.reads.append((value, position))
            is_made = bool(operations[value].inputs)
            alone[value] = value not in alone and is_made and shared.values == [value]
    return changed, alone


def _cut(
    tracer: NodePathTracer, features: dict[str, _Feature], keys: Mapping[str, str], plan: _Plan
) -> fx.Graph:
    """A graph of what stays, copied from the traced one, that returns the features.

    Constants that are written into are made anew at each call: all that takes one takes a clone. If
    the tracer is exact, a feature that is overwritten later is cloned before: of ``h = conv(x);
    y = relu_(h)`` the feature ``h`` is what conv gave, if it is alone, and relu_ gets the clone; of
    ``h = x.t()`` the feature is the clone, since relu_ shall write into x.
    """
    cloned = collections.defaultdict(list)  # by the position after which it is read
    for node, after in plan.overwritten:
        if tracer.exact or _is_constant(node):
            cloned[after].append(node)
    graph = fx.Graph()
    current: dict[fx.Node, fx.Node] = {}  # node -> what the operations that follow take for it
    taken: dict[tuple[fx.Node, int], fx.Node] = {}  # a read -> what the feature takes instead
    renewed: dict[Any, fx.Node] = {}  # the path of a constant -> its clone
    asked: set[tuple[fx.Node, int]] = set()  # the reads of the features
    for value, after in features.values():
        asked.update((node, after) for node in _nodes_in(value))
    for node in tracer.places:
        if node.op == "placeholder":
            current[node] = graph.node_copy(node)
    for node, position in tracer.places.items():
        if node in plan.stays and node not in current:
            copied = renewed.get(node.target)
            current[node] = copied or graph.node_copy(node, current.__getitem__)
        for value in cloned[position]:
            original = current[value]
            if value is node and _is_constant(node):
                if node.target not in renewed:  # else it is fetched once more
                    renewed[node.target] = graph.call_function(_clone, (original,))
                original = current[node] = renewed[node.target]
                if (value, position) not in asked:
                    continue
            clone = graph.call_function(_clone, (original,))
            if plan.alone[value]:  # so gradients of what comes later reach the feature
                current[value] = clone
                taken[value, position] = original
            else:
                taken[value, position] = clone
    values = {}
    for query, (value, after) in features.items():
        values[keys[query]] = map_arg(
            value,
            lambda node: taken.get((node, after), current[node]),  # noqa: B023
        )
    graph.output(values)
    return graph


def _clone(value: torch.Tensor) -> torch.Tensor:  # TorchScript takes what has no type for a tensor
    """What is kept of a value that is overwritten later: of nested ones, all tensors."""
    return value.clone() if is_scripting() else _clone_nested(value)


def _clone_nested(value: Any) -> Any:
    # A proxy stands for a tensor where an extractor is traced again. torch.compile of torch 2.5
    # does not know which attributes a tensor has.
    def clone(item: Any) -> Any:
        can_be_cloned = isinstance(item, (torch.Tensor, fx.Proxy))
        return item.clone() if can_be_cloned else item

    return tree_map(clone, value)


# ---- effects

# What can return its input, or a view of it, though torch's schemas do not say so.
_VIEW_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten, _DropoutNd)
_VIEW_FUNCTIONS = frozenset(
    "atleast_1d atleast_2d atleast_3d broadcast_tensors data dropout einsum getitem meshgrid pos"
    " type_as".split()
)


# Of operators, and of the methods behind them.
_WRITING = {"setitem", "__setitem__"}
for _operator in _OPERATORS:
    _WRITING.update((f"i{_operator}", f"__i{_operator}__"))


def _operations(tracer: NodePathTracer, training: bool) -> dict[fx.Node, _Operation]:
    """What each node reads, writes and shares."""
    fetched: dict[Any, fx.Node] = {}  # the path of a parameter or buffer -> the first node of it
    operations = {}
    for node in tracer.places:
        kind = node.op
        writes, views = _effects(tracer, node, training)
        if kind == "get_attr":
            views = [fetched.setdefault(node.target, node)]
        if _is_constant(node):
            kind = "constant"
        elif node.target in (torch._assert, _assert_is_none):
            kind = "assert"
        elif node in tracer.replaced:
            kind = "replaced"
        operations[node] = _Operation(node.all_input_nodes, writes, views, kind)
    return operations


def _is_constant(node: fx.Node) -> bool:
    """Whether a node fetches a tensor that the forward made, and no state of the model."""
    return node.op == "get_attr" and str(node.target).startswith("_tensor_constant")


def _effects(
    tracer: NodePathTracer, node: fx.Node, training: bool = True
) -> tuple[list[fx.Node], list[fx.Node]]:
    """The inputs into whose memory a node writes, and those that its value may share memory with.

    Torch's own operations do what torch declares. Of an opaque call, about which nobody says
    anything, it is believed that it writes if nobody takes its value; if exact, it always writes.
    """
    inputs = node.all_input_nodes
    effects: tuple[list[fx.Node], list[fx.Node]] | None = [], []
    if node.op == "call_module":
        module = operator.attrgetter(str(node.target))(tracer.root)
        effects = _module_effects(module, inputs, training or tracer.exact)
    elif node.op in ("call_function", "call_method"):
        effects = _function_effects(node, tracer.containers)
    if effects is None:
        may_write = tracer.exact or not node.users
        return (inputs if may_write else []), inputs
    return effects


def _module_effects(
    module: nn.Module, inputs: list[fx.Node], training: bool
) -> tuple[list[fx.Node], list[fx.Node]] | None:
    """What the call of a leaf writes and views, if somebody says it."""
    writes = inputs, inputs
    hands_on: tuple[list[fx.Node], list[fx.Node]] = [], inputs
    in_place = [part for part in module.modules() if getattr(part, "inplace", None) is True]
    if module in in_place and (training or not isinstance(module, _DropoutNd)):
        return writes
    if getattr(type(module), "forward", None) is nn.Sequential.forward:
        parts = (_module_effects(part, inputs, training) for part in module.children())
        # The first part that does not just hand on its input decides.
        return next((effects for effects in parts if effects != hands_on), hands_on)
    package = f"{type(module).__module__}."
    if package.startswith("torch.nn.") and not isinstance(module, _VIEW_MODULES):
        return [], []
    if package.startswith(("torch.", "torchvision.")):
        return hands_on
    return writes if in_place else None


def _function_effects(
    node: fx.Node, containers: set[fx.Node]
) -> tuple[list[fx.Node], list[fx.Node]] | None:
    """What the call of a function or method writes and views, if somebody says it."""
    inputs = node.all_input_nodes
    first = _nodes_in(node.args[:1]) or inputs
    target: Any = getattr(node.target, "overloadpacket", node.target)
    name = _name(target)
    # Of what is built into torch the module is None; methods are a tensor's.
    library = str(getattr(target, "__module__", None) or "torch").split(".")[0]
    is_of_tensor = hasattr(torch.Tensor, name) and containers.isdisjoint(first)
    is_unknown = isinstance(target, str) and not is_of_tensor
    is_shape = target is getattr and node.args[1] == "shape"
    if is_shape or target is _kind:
        return [], []
    if "out" in node.kwargs:
        written = _nodes_in(node.kwargs["out"])
        return written, written
    if is_unknown or target is setattr:  # such as a dict's update; what is put in is shared
        return first, inputs
    if _is_in_place(node):
        return first, first
    if library not in ("torch", "_operator", "math", "builtins"):
        return None
    if name in _VIEW_FUNCTIONS:
        return [], inputs
    if library == "_operator":
        return [], []
    declared = getattr(target, "_qualified_op_name", f"aten::{name}")
    writes, views = _declared(declared)
    written = inputs if writes else []
    viewed = first if views else []
    return written, viewed


def _is_in_place(node: fx.Node) -> bool:
    """Whether a function or method writes into its first argument, as its name or inplace= says."""
    name = _name(node.target)
    code = getattr(node.target, "__code__", None)
    parameters = getattr(code, "co_varnames", ())
    arguments = {**dict(zip(parameters, node.args)), **node.kwargs}
    # The underscore of operator.and_ means nothing.
    ends_so = re.search("[^_]_$", name) and not hasattr(operator, name)
    return name in _WRITING or bool(ends_so) or arguments.get("inplace") is True


def _name(target: Any) -> str:
    target = getattr(target, "overloadpacket", target)
    return getattr(target, "__name__", str(target))


@functools.lru_cache(maxsize=None)
def _declared(operator_name: str) -> tuple[bool, bool]:
    """Whether an operator writes into tensors, and whether it may return a view of one.

    A schema such as ``aten::relu_(Tensor(a!) self) -> Tensor(a!)`` marks what is written with "!".
    """
    schemas = torch._C._jit_get_schemas_for_operator(operator_name)
    lines = "\n".join(map(str, schemas))
    # What follows "*" is given by keyword; out= is looked at by name.
    positional = re.sub(r"(\*,|\) -> ).*", "", lines)
    # Of "Tensor[](a!) self" the list itself is written to.
    marks = re.findall(r"[( ]Tensor\(\w+(!?)", positional)
    return "!" in marks, bool(marks) or not schemas


def _nodes_in(arguments: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    map_arg(arguments, found.append)
    return found


# ---- what is said


def _find_flaws(
    tracers: dict[str, NodePathTracer],
    features: dict[str, dict[str, _Feature]],
    plans: dict[str, _Plan],
) -> list[str]:
    """What the features are not, once for each query and for each kind of loss."""
    flaws: dict[str, dict[str, None]] = collections.defaultdict(dict)
    losses: dict[str, str] = {}
    for mode, plan in plans.items():
        tracer = tracers[mode]
        asked = features[mode]
        for query, text in _feature_flaws(tracer, asked, plan):
            flaws[query][text] = None
        for kind, (position, text) in tracer.losses.items():
            if any(position <= feature.after for feature in asked.values()):
                losses.setdefault(kind, text)
        if plan.missed is not None:
            text = f"{_described(tracer, plan.missed)} {_NOT_IN_PLACE}; exact=True works in place"
            losses.setdefault(_NOT_IN_PLACE, text)
    own = "exact=True gives its own value, or an error"
    texts = [f"the feature {query!r} {', and '.join(flaws[query])}; {own}" for query in flaws]
    return [*texts, *losses.values()]


def _feature_flaws(
    tracer: NodePathTracer, features: dict[str, _Feature], plan: _Plan
) -> Iterator[tuple[str, str]]:
    """Each query whose value is not what it says, and why; none if the tracer is exact."""
    if tracer.exact:
        return
    for query, feature in features.items():
        if _is_misleading(tracer, query, feature):
            really = _described(tracer, feature.value, query)
            yield query, f"is the value of {really}, not what the module {query!r} returns"
        for node in _nodes_in(feature.value):
            writer = plan.overwritten.get((node, feature.after))
            if writer is not None:
                yield query, f"is overwritten in place by {_described(tracer, writer)}"
                break


def _is_misleading(tracer: NodePathTracer, query: str, feature: _Feature) -> bool:
    """Whether a query is the path of a module that returned something else, or was not called."""
    node, after = feature
    if not isinstance(node, fx.Node):
        return False
    if query not in tracer.returned:  # it was not called, or returned no single value of a node
        return query in tracer.paths
    returned, returned_after = tracer.returned[query]
    if returned is node:
        return False
    # The module's last operation may have written into what it returned: that is its value, too.
    written, _ = _effects(tracer, node)
    return returned_after != after or returned not in written


def _described(tracer: NodePathTracer, node: fx.Node, query: str = "") -> str:
    if node.op != "call_module":
        return f"the operation {tracer.node_to_qualname.get(node, node.name)!r}"
    if node.target == query:
        return f"a later call of the module {query!r}"
    return f"the module {node.target!r}"


def _run_alike(tracers: dict[str, NodePathTracer], plans: dict[str, _Plan]) -> bool:
    """Whether after the cut both modes run nodes of the same names."""
    names = []
    for mode, plan in plans.items():
        named = tracers[mode].node_to_qualname.items()
        names.append([name for node, name in named if node in plan.stays])
    return names[0] == names[-1]


def _warn_graph_differences(train_tracer: NodePathTracer, eval_tracer: NodePathTracer) -> None:
    """Warn if the two modes have different names, and say which."""
    train, evaluation = train_tracer.names, eval_tracer.names
    if train == evaluation or train_tracer.error or eval_tracer.error:
        return
    said = []
    train_only = "train", train, set(evaluation)
    eval_only = "eval", evaluation, set(train)
    for mode, names, others in (train_only, eval_only):
        only = ", ".join(name for name in names if name not in others)
        if only:
            said.append(f"only in {mode} mode: {textwrap.shorten(only, 200, placeholder=' …')}")
    difference = "; ".join(said) or "the order of the nodes"
    _warn(
        f"the train graph and the eval graph differ: {difference}. A query without a match in one"
        " of them needs train_return_nodes and eval_return_nodes; suppress_diff_warning=True"
        " silences it."
    )


def _warn(message: str) -> None:
    """Warn at the line that called the public function."""
    warnings.warn(message, stacklevel=4)


# ---- the two-mode module


def _graph_property(name: str) -> Any:
    """The graph of a mode. Until somebody asks for it, a copy's is packed, or serves both modes."""

    def get(self: DualGraphModule) -> Any:
        graphs = vars(self)
        graph = graphs[name]
        if isinstance(graph, _Packed):
            set_to(self, _unpack(graph))
        elif graphs["_train_graph"] is graphs["_eval_graph"]:
            set_to(self, copy.deepcopy(graph))
        return graphs[name]

    def set_to(self: DualGraphModule, graph: fx.Graph) -> None:
        vars(self)[name] = graph
        graph.owning_module = self

    return property(get, set_to)


class DualGraphModule(fx.GraphModule):
    """A module with a graph for each mode; calling it runs the graph of the mode that it is in.

    Both graphs are compiled once, as two methods, and ``forward`` picks by ``self.training``; if
    their code is the same, as one. So all follows the mode, however it is set: ``torch.compile``,
    ``torch.jit.script``, copies and pickles.

    Args:
        root: the module from which the graphs' modules, parameters and buffers are taken; they are
            shared, under the same paths. The new module starts in its mode.
        train_graph, eval_graph: the graphs. Change them as any ``fx.Graph`` and call
            ``recompile()``.
        class_name: the name of the new module's class.

    Raises:
        AttributeError: a graph refers to something that ``root`` does not have.
    """

    # TorchScript would compile properties; these are for Python alone.
    __jit_unused_properties__ = "train_graph eval_graph graph code _graph _code _boxed_call".split()
    # torch.compile asks for these; with annotations TorchScript would, too.
    _lineno_map = _prologue_start = None  # type: ignore[assignment]

    def __init__(
        self,
        root: nn.Module,
        train_graph: fx.Graph,
        eval_graph: fx.Graph,
        class_name: str = "GraphModule",
    ) -> None:
        # fx.GraphModule's own __init__ knows one graph; what it sets up is set up here.
        nn.Module.__init__(self)
        type(self).__name__ = class_name
        for graph in dict.fromkeys([train_graph, eval_graph]):
            for node in _fetching(graph):
                _copy_attr(root, self, str(node.target))
            graph.owning_module = self  # once: torch 1.13 counts
        for path, module in self.named_modules():
            if type(module) in (nn.Module, type(self)):  # made here; the others are shared
                source = root.get_submodule(path)
                module.training = source.training
                made = module._buffers.keys() - source._buffers.keys()  # constants are no state
                module._non_persistent_buffers_set |= made | source._non_persistent_buffers_set
        # By the dict, since a module of the model may have the name "meta".
        vars(self).update(_train_graph=train_graph, _eval_graph=eval_graph, meta={})
        self.recompile()

    train_graph = _graph_property("_train_graph")
    eval_graph = _graph_property("_eval_graph")

    @property
    def graph(self) -> fx.Graph:
        """The graph of the mode that the module is in; setting it recompiles."""
        graph: fx.Graph = self.train_graph if self.training else self.eval_graph
        return graph

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        setattr(self, "train_graph" if self.training else "eval_graph", graph)
        self.recompile()

    @property
    def code(self) -> str:
        """The Python source of the mode that the module is in."""
        return _generate(self.graph).src

    _graph, _code = graph, code  # what the methods of fx.GraphModule read

    def recompile(self) -> _Code:  # type: ignore[override]
        """Compile both graphs, as is needed after a change; gives the active mode's code."""
        graph = vars(self)["_train_graph"]
        if graph is vars(self)["_eval_graph"]:
            train = evaluation = _generate(graph)
        else:
            train, evaluation = map(_generate, (self.train_graph, self.eval_graph))
        methods = {"forward": train}
        if train != evaluation:
            methods = {"_featx_train": train, "_featx_eval": evaluation}
            methods["forward"] = _dispatcher(self.train_graph, train)
        for name, code in methods.items():
            setattr(type(self), name, _compiled(name, code))
        return train if self.training else evaluation

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles: both modes or, where that fails, the active one."""
        with contextlib.suppress(RuntimeError):
            create_script_module(self, infer_methods_to_compile)  # type: ignore[no-untyped-call]
            return self
        mode = "train" if self.training else "eval"
        _warn(f"TorchScript cannot compile both modes, and gets the {mode} mode only")
        one = copy.copy(self)
        one.train_graph = one.eval_graph = one.graph
        one.recompile()
        return one

    def __copy__(self) -> DualGraphModule:
        """Of a class of its own, which has the same methods until it is compiled again."""
        own = type(self)
        kind = type(own.__name__, own.__bases__, dict(vars(own)))
        copied: DualGraphModule = object.__new__(kind)
        state = copied.__dict__ = {**vars(self)}
        state.pop("_compiled_call_impl", None)  # nn.Module.compile() made it for this module
        for name, value in state.items():
            if isinstance(value, fx.Graph):
                state[name] = _pack(value)
            elif isinstance(value, dict):
                state[name] = copy.copy(value)
        return copied

    def __deepcopy__(self, memo: Any) -> DualGraphModule:
        copied: DualGraphModule
        copied = memo[id(self)] = copy.copy(self)
        copied.__dict__ = copy.deepcopy(vars(copied), memo)
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        # Each instance has a class of its own; below it is the real one.
        state = dict(vars(copy.copy(self)), class_name=type(self).__name__)
        return fx.GraphModule.__new__, type(self).__bases__, state

    def __setstate__(self, state: dict[str, Any]) -> None:
        type(self).__name__ = state.pop("class_name")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.recompile()


def _fetching(graph: fx.Graph) -> list[fx.Node]:
    """The nodes whose target is a path."""
    return [node for node in graph.nodes if node.op in ("call_module", "get_attr")]


class _Code(NamedTuple):
    """The generated code of a graph, in two forms that are the same line by line."""

    src: str  # torch.fx's own, which is shown, and which TorchScript compiles
    run: str  # what runs: it finds modules in dicts, at a tenth of nn.Module.__getattr__'s cost
    globals: dict[str, Any]


def _generate(graph: fx.Graph) -> _Code:
    """The code of a graph, in which a path is never more than a path."""
    fetching = _fetching(graph)
    targets = [node.target for node in fetching]
    try:
        for number, node in enumerate(fetching):
            node.target = f"_featx_{number}_"
        code = graph.python_code("self")
    finally:
        for node, target in zip(fetching, targets):
            node.target = target

    # Torch.fx writes "x += y;  iadd = x", after which a number x is another one. That becomes
    # "iadd = x;  iadd += y"; items are set so, too, and each line begins with its node's name.
    pattern, replacement = r"(?m)^    (\w+)((?: \W+=|\[).*?);  (\w+) = \1\b", r"    \3 = \1;  \3\2"
    plain = re.sub(pattern, replacement, code.src)

    plain = _with_blocks(plain, graph)

    def with_paths(source: Callable[[fx.Node], str]) -> str:
        return re.sub(
            r"self\._featx_(\d+)_",
            lambda match: source(fetching[int(match[1])]),
            plain,
        )

    return _Code(with_paths(_shown_source), with_paths(_fast_source), code.globals)


def _with_blocks(source: str, graph: fx.Graph) -> str:
    """Each line in the block of the grad mode in which its node was recorded."""
    blocks = {
        node.name: f"with {node.meta['featx_block']}: "
        for node in graph.nodes
        if "featx_block" in node.meta
    }
    return re.sub(
        r"(?m)^    (?=(\w+))",
        lambda match: f"    {blocks.get(match[1], '')}",
        source,
    )


def _shown_source(node: fx.Node) -> str:
    return functools.reduce(_attribute, str(node.target).split("."), "self")


def _fast_source(node: fx.Node) -> str:
    *path, name = str(node.target).split(".")
    parent = "self" + "".join(f"._modules[{part!r}]" for part in path)
    if node.op == "call_module":
        return f"{parent}._modules[{name!r}]"
    return _attribute(parent, name)


def _attribute(source: str, name: str) -> str:
    if name.isascii() and name.isidentifier() and not keyword.iskeyword(name):
        return f"{source}.{name}"
    return f"getattr({source}, {name!r})"


def _dispatcher(graph: fx.Graph, code: _Code) -> _Code:
    """A ``forward`` that picks the method of the mode; graph and code are those of one."""
    head = re.findall("(?m)^def .*", code.src)[0]
    arguments = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
    call = ", ".join(arguments)
    source = f"""{head}
    if self.training:
        return self._featx_train({call})
    return self._featx_eval({call})"""
    return _Code(source, source, code.globals)


_file_numbers = itertools.count()


def _compiled(name: str, code: _Code) -> Any:
    """Code as a method; while it is in use, tracebacks find the source that is shown."""
    filename = f"<featx {next(_file_numbers)}>"
    lines = code.src.splitlines(keepends=True)
    linecache.cache[filename] = (len(code.src), None, lines, filename)
    namespace = dict(code.globals)
    exec(compile(code.run, filename, "exec", dont_inherit=True), namespace)
    method = namespace["forward"]
    method.__name__ = name  # by which TorchScript calls it
    weakref.finalize(method, linecache.cache.pop, filename, None)
    return method


class _Packed(tuple):  # type: ignore[type-arg]
    """A graph as plain data that can be pickled; copies share it, since nothing changes it."""

    def __deepcopy__(self, memo: Any) -> _Packed:
        return self


class _Reference(str):
    """Stands in a packed graph for the node of this name, or for what torch has under it."""


def _pack(graph: fx.Graph) -> _Packed:
    nodes = []
    for node in graph.nodes:
        target = _packed_target(node.target)
        call = node.op, target, node.args, node.kwargs, node.name, node.type
        packed = map_arg(call, lambda argument: _Reference(argument.name))
        nodes.append((packed, node.name, node.meta))
    return _Packed(nodes)


def _packed_target(target: Any) -> Any:
    """By name what pickle cannot find by itself, as torch.ops and functional.max_pool2d."""
    with contextlib.suppress(Exception):
        name = _get_qualified_name(target)
        if _of_torch(name) is target:
            return _Reference(name)
    return target


def _of_torch(name: str) -> Any:
    """What has this name, which begins with ``torch.``."""
    return operator.attrgetter(name.partition("torch.")[2])(torch)


def _unpack(packed: _Packed) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}

    def referred(item: Any) -> Any:
        if isinstance(item, _Reference):
            return nodes.get(item) or _of_torch(item)
        return item

    for call, name, meta in packed:
        node = graph.create_node(*map_aggregate(call, referred))
        node.meta = copy.copy(meta)
        nodes[name] = node
    return graph


# ---- the model as it was

_tracing = threading.RLock()  # torch.fx replaces methods of nn.Module for the whole process


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[Callable[..., None]]:
    """Leave the model and the random state as they were.

    Gives what restores modes and attributes in between.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model takes a torch.nn.Module, not {model!r}")
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        raise TypeError(
            f"{type(model).__name__} holds compiled code:"
            " hand in the module that it was made from (_orig_mod)"
        )
    with _tracing, _unchanged_random_state():
        restore = _snapshot(model)
        try:
            yield restore
        finally:
            restore()


def _unchanged_random_state() -> Any:
    """Leave the random state of the CPU and, where it is in use, of CUDA as it was."""
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if in_use else ()
    return torch.random.fork_rng(devices)


_CONTAINERS = frozenset([dict, list, collections.OrderedDict, collections.defaultdict])


def _snapshot(model: nn.Module) -> Callable[..., None]:
    """Note modes, which parameters are frozen, attributes, and dicts and lists in them and classes.

    Gives what restores them: new attributes go, but for those of the classes ``keep``.
    """
    modes = [(module, module.training) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    contents: dict[int, tuple[Any, Any]] = {}

    def note(container: Any) -> None:
        contents[id(container)] = container, container.copy()
        for item in container.values() if isinstance(container, dict) else container:
            if type(item) in _CONTAINERS and id(item) not in contents:
                note(item)

    def restore(keep: tuple[type, ...] = ()) -> None:
        for module, training in modes:
            if module.training != training:  # by the method, since some do more in it
                module.train(training)
        for parameter, requires_grad in trained:  # some models freeze theirs in train()
            parameter.requires_grad = requires_grad
        for container, before in contents.values():
            if not isinstance(container, dict):
                container[:] = before
                continue
            if before:  # most are empty
                container.update(before)
            if len(container) > len(before):
                for name in container.keys() - before:
                    if not isinstance(container[name], keep):
                        del container[name]

    kinds: set[type] = set()
    for module, _ in modes:
        note(vars(module))
        kinds.update(type(module).__mro__)
    for kind in kinds:
        note([*vars(kind).values()])  # the attributes of a class stay; what they hold is restored
    return restore


# ---- command line


def _main(arguments: Sequence[str] | None = None) -> int:
    """List the nodes of a model, or compute the values of some of them.

    model            what builds it, as PACKAGE.MODULE:CALLABLE
    queries          the features, each as QUERY or QUERY=KEY; without any, all nodes
    --kwargs         arguments of the callable, a JSON object
    --checkpoint     a file whose state dict is loaded, with weights_only=True
    --image          the input: a file with a photograph; needs pillow
    --input          the input: random numbers of a shape such as 1,3,224,224
    --example        trace with the input as example: for models that ask about it
    --device         where to compute, such as cuda
    --train          use train mode in place of eval mode
    --exact          compute what each module or operation itself returned
    --auto-leaf      make leaves of what cannot be traced
    --json           print for machines: the features, or the names of both modes
    --check          a file of --json to compare the names with
    --plot           a file to draw the features in, such as features.png: maps and matrices;
                     needs matplotlib
    --debug          show the traceback of an error

    The exit code is 1 if --check finds a difference, 2 for wrong input, 130 after an interrupt.
    """
    parser = argparse.ArgumentParser(
        "featx",
        usage=argparse.SUPPRESS,  # an error is one line
        description=_main.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model")
    parser.add_argument("queries", nargs="*")
    for option in "kwargs checkpoint image input device check plot".split():
        parser.add_argument(f"--{option}")
    for flag in "train exact auto-leaf example json debug".split():
        parser.add_argument(f"--{flag}", action="store_true")
    options = parser.parse_intermixed_args(arguments)
    warnings.showwarning = _show  # type: ignore[assignment]
    warnings.simplefilter("once", UserWarning)  # the model is traced more than once
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what the model prints is no output
            text = _run(options)
        print(text, flush=True)
    except (BrokenPipeError, KeyboardInterrupt):
        sys.stdout = None  # nobody reads it, and Python would complain when it closes it
        return 130
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        parser.error(textwrap.shorten(f"{type(error).__name__}: {error}", 300))
    return 1 if text and options.check else 0


# What is to be said of a feature, by its query.
_notes: dict[str, str] = collections.defaultdict(str)


def _show(message: Warning | str, *_: Any) -> None:
    """In place of ``warnings.showwarning``."""
    said = re.match(r"the feature ['\"](.+?)['\"] (.+); exact=True", str(message))
    if said:
        _notes[said[1]] += f"{said[2]}. "
    else:
        print("featx: warning:", *str(message).split())  # to stderr, as all that _run prints


@torch.no_grad()
def _run(options: argparse.Namespace) -> str:
    """What is to be printed."""
    model = _model(options)
    recorded = "model exact input image".split()
    if options.check is not None:
        expected = json.loads(pathlib.Path(options.check).read_bytes())
        for name in expected.keys() & recorded:  # as when it was written
            setattr(options, name, expected[name])
    given = _input(options)
    settings = {
        "suppress_diff_warning": True,
        "exact": options.exact,
        "auto_leaf": options.auto_leaf,
        "example_inputs": (given,) if options.example else None,
    }
    names = get_graph_node_names(model, **settings)
    queries = _queries(names, options)
    modes = (queries, ()) if options.train else ((), queries)
    extractor = create_feature_extractor(model, None, *modes, **settings)
    values = {} if given is None else extractor(given)
    if options.plot:
        _plot(values, options.plot)
    rows = [*_rows(extractor, queries, values)]
    found = {name: vars(options)[name] for name in recorded}
    found.update(names._asdict())
    if given is not None:
        found["shapes"] = [f"{row['name']} {row.get('shape')}" for row in rows]
    if options.check is not None:
        lines: list[str] = []
        for part in ("train", "eval", *expected.keys() & {"shapes"}):
            lines += difflib.unified_diff(
                expected[part], found[part], options.check, part, lineterm=""
            )
        return "\n".join(lines)
    if options.json:
        return json.dumps(rows if options.queries else found, indent=1)
    return _table(rows)


def _model(options: argparse.Namespace) -> nn.Module:
    module, _, attribute = options.model.rpartition(":")
    build = operator.attrgetter(attribute)(importlib.import_module(module))
    torch.manual_seed(0)  # for the weights of a model that is built without any
    model: nn.Module = build(**json.loads(options.kwargs or "{}"))
    if options.checkpoint:
        state = torch.load(
            options.checkpoint,
            map_location="cpu",
            weights_only=True,
        )
        model.load_state_dict(state)
    return model.to(options.device).train(options.train)


def _queries(names: NodeNames, options: argparse.Namespace) -> dict[str, str]:
    """What is asked for, query -> key: ``layer4=deep``, or all names of the mode."""
    own, other = names if options.train else reversed(names)
    for name in set(own).difference(other):
        _notes[name] += "in this mode only. "
    queries = {}
    for asked in options.queries or own:
        query, _, key = asked.partition("=")
        queries[query] = key or query
    return queries


def _input(options: argparse.Namespace) -> torch.Tensor | None:
    if options.image:
        return _photograph(options.image).to(options.device)
    if options.input:
        return torch.rand(json.loads(f"[{options.input}]"), device=options.device)
    return None


def _photograph(path: str) -> torch.Tensor:
    """``(1, 3, 224, 224)``, normalized as torchvision's classifiers expect it.

    Their presets make the short side 256 long and take the middle 224 x 224. This takes the
    middle first, 14/16 of the short side, and makes that 224 long: the same but for parts of a
    pixel, since they round the middle to whole pixels.
    """
    from PIL import Image, ImageOps

    # https://pytorch.org/vision/stable/models.html
    mean = torch.tensor([0.485, 0.456, 0.406])
    std = torch.tensor([0.229, 0.224, 0.225])
    with Image.open(path) as file:
        upright = ImageOps.exif_transpose(file).convert("RGB")
    image = ImageOps.fit(
        upright,
        (224, 224),
        Image.Resampling.BILINEAR,
        bleed=1 / 16,
    )
    pixels = torch.tensor(list(image.tobytes())).reshape(224, 224, 3) / 255
    return ((pixels - mean) / std).permute(2, 0, 1)[None]


def _rows(
    extractor: DualGraphModule, queries: dict[str, str], values: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """What there is to be said of each feature, as far as it goes.

    A structure has no operation, and what is no tensor no shape. Integers have no mean; empty,
    complex, sparse and meta tensors have no statistics.
    """
    *_, output = extractor.graph.nodes
    for query, key in queries.items():
        node = output.args[0][key]
        value: Any = values.get(key)
        row: dict[str, Any] = {"name": key}
        with contextlib.suppress(AttributeError, RuntimeError):
            row["operation"] = node.op
            row["target"] = node._pretty_print_target(node.target)
            if node.op == "call_module":
                row["target"] = type(extractor.get_submodule(node.target)).__name__
            row["shape"] = list(value.shape)
            row["dtype"] = str(value.dtype)
            for name in "min max mean std".split():
                number = getattr(value, name)().item()
                row[name] = float(f"{number:.5g}")
        row["note"] = _notes[query]
        yield row


def _table(rows: list[dict[str, Any]]) -> str:
    columns = []
    for title in dict.fromkeys(itertools.chain(*rows)):
        texts = [title, *(str(row.get(title, "")) for row in rows)]
        width = max(map(len, texts))
        columns.append([f"{text:{width}}" for text in texts])
    lines = map("  ".join, zip(*columns))
    return "\n".join(map(str.rstrip, lines))


def _plot(values: dict[str, Any], path: str) -> None:
    """Draw matrices, and of maps the first eight channels side by side."""
    from matplotlib.figure import Figure

    figure = Figure((7, len(values)), layout="constrained")
    panels = figure.subplots(len(values), squeeze=False)
    for panel, key in zip(panels.flat, values):
        maps = values[key][None].float().flatten(0, -3)
        framed = nn.functional.pad(maps[:8], [0, 2], value=math.nan)
        picture = torch.hstack([*framed])
        panel.imshow(picture.tolist(), aspect="auto")
        panel.set_title(key)
        panel.axis("off")
    figure.savefig(path)
    print(f"featx: note: {path} shows the features")


if __name__ == "__main__":
    sys.exit(_main())
