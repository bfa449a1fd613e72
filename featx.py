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
5. With ``exact=True`` the paths of all modules count as given out from the start. The first call of
   a module has its path as name, as it is; rules 3 and 4 name the others.

Names, values and keys are those of ``torchvision.models.feature_extraction``. featx differs where
that returns something else than was asked for, runs more than is needed, crashes, or changes the
caller's model; the README lists every difference.
"""

import argparse
import ast
import bisect
import builtins
import collections
import contextlib
import copy
import dataclasses
import difflib
import functools
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import keyword
import linecache
import math
import operator
import os
import pickle
import random
import re
import shutil
import sys
import textwrap
import threading
import traceback
import types
import warnings
import weakref
from typing import (
    Any,
    Callable,
    Dict,
    FrozenSet,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    NoReturn,
    Optional,
    Sequence,
    Set,
    Tuple,
    Type,
    Union,
    get_type_hints,
)

import torch
from torch import fx, nn

# Private to torch; tried on 1.13.1, 2.2.2, 2.5.1 and 2.14.1.
from torch.fx._symbolic_trace import _assert_is_none
from torch.fx.node import _get_qualified_name, map_aggregate
from torch.jit import is_scripting  # type: ignore[attr-defined]
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_unflatten

_operator_schemas = torch._C._jit_get_schemas_for_operator

__version__ = "0.1.0"
__all__ = [
    "DualGraphModule",
    "LeafModuleAwareTracer",
    "NodeNameError",
    "NodeNames",
    "NodePathTracer",
    "UntraceableError",
    "create_feature_extractor",
    "get_graph_node_names",
]

ReturnNodes = Union[str, Mapping[str, str], Iterable[str]]


# ------------------------------------------------------------------------------------- errors


class NodeNameError(ValueError):
    """A query that matches no node.

    Attributes:
        query: what was asked for.
        mode: ``"train"`` or ``"eval"``, the mode whose graph lacks it.
        suggestions: the closest names, best first; may be empty.
    """

    def __init__(self, query: str, mode: str, suggestions: Sequence[str] = (), hint: str = "") -> None:
        self.query, self.mode, self.suggestions = query, mode, list(suggestions)
        closest = f" The closest: {', '.join(map(repr, self.suggestions))}." if suggestions else ""
        super().__init__(
            f"no node of the {mode} graph is named {query!r} or lies below it."
            f"{hint and ' ' + hint}{closest} get_graph_node_names(model) lists all names."
        )
        self._ingredients = (query, mode, tuple(suggestions), hint)

    def __reduce__(self) -> Tuple[Any, ...]:
        return type(self), self._ingredients


class UntraceableError(fx.proxy.TraceError):
    """A model that torch.fx cannot trace; chained from the original error.

    Attributes:
        path: the path of the module whose forward failed, ``""`` for the model itself.
        module_type: the class of that module.
        traceable: where the model's own forward failed, the paths of its children that can be traced.
    """

    def __init__(
        self, path: str, module_type: Type[nn.Module], reason: str = "", traceable: Sequence[str] = ()
    ) -> None:
        self.path, self.module_type, self.traceable = path, module_type, list(traceable)
        name = module_type.__name__
        where = f"{name} at {path!r}" if path else f"the model's own forward ({name})"
        leaf = f" leaf_modules=[{name}] records each {name} as one operation;" if path else ""
        children = f"\nThese of its children can be traced by themselves: {', '.join(traceable)}." if traceable else ""
        super().__init__(
            f"torch.fx cannot trace {where}: {reason}\n"
            f"What helps, in tracer_kwargs:{leaf} autowrap_functions=(function,) records the calls of"
            " a function that fails as single operations. What helps as an argument of its own:"
            f" concrete_args={{'argument': value}} fixes an argument that decides which way the code goes.{children}"
        )
        self._ingredients = (path, module_type, reason, tuple(traceable))

    def __reduce__(self) -> Tuple[Any, ...]:
        return type(self), self._ingredients


# --------------------------------------------------------------------------- public functions


class NodeNames(NamedTuple):
    """The names of a model's nodes in execution order, for both modes."""

    train: List[str]
    eval: List[str]


def get_graph_node_names(
    model: nn.Module,
    tracer_kwargs: Optional[Mapping[str, Any]] = None,
    suppress_diff_warning: bool = False,
    concrete_args: Optional[Dict[str, Any]] = None,
    *,
    exact: bool = False,
    auto_leaf: bool = False,
) -> NodeNames:
    """List the names of a model's nodes, in execution order, in train mode and in eval mode.

    Args:
        model: any module that torch.fx can trace. It comes back as it was.
        tracer_kwargs: arguments of :class:`NodePathTracer`. What is given for ``leaf_modules`` and
            ``autowrap_modules`` is added to the defaults: ``math`` and, if the process has imported
            it, ``torchvision.ops``.
        suppress_diff_warning: do not warn when the two modes differ.
        concrete_args: values for arguments of ``forward`` that are fixed while tracing.
        exact: name by rule 5 as well: the path of a module means that module.
        auto_leaf: where the forward of a submodule cannot be traced, make its class a leaf and try
            again; a warning lists the classes.

    Returns:
        A named tuple ``(train, eval)`` of two lists of strings.

    Raises:
        UntraceableError: torch.fx cannot trace the model.
        ValueError: ``concrete_args`` has an argument that ``forward`` lacks.
        TypeError: ``model``, ``tracer_kwargs`` or ``concrete_args`` is something else than it should be.

    >>> get_graph_node_names(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())).train
    ['input', '0', '1']
    """
    # 1. Trace in both modes; the model is restored, whatever happens.
    with _unchanged(model) as keeper:
        tracers = _trace_both(keeper, model, tracer_kwargs, concrete_args, exact, auto_leaf)
    # 2. Say where the modes differ, since one list of queries may then not do for both.
    if not suppress_diff_warning:
        _warn_graph_differences(tracers["train"], tracers["eval"])
    return NodeNames(tracers["train"].names, tracers["eval"].names)


def create_feature_extractor(
    model: nn.Module,
    return_nodes: Optional[ReturnNodes] = None,
    train_return_nodes: Optional[ReturnNodes] = None,
    eval_return_nodes: Optional[ReturnNodes] = None,
    tracer_kwargs: Optional[Mapping[str, Any]] = None,
    suppress_diff_warning: bool = False,
    concrete_args: Optional[Dict[str, Any]] = None,
    *,
    exact: bool = False,
    auto_leaf: bool = False,
) -> "DualGraphModule":
    """Cut from a model a module that returns intermediate values and runs only what they need.

    A query matches the names that equal it or begin with it and a dot; its value is that of the
    last such node. The query ``"output"``, where no node has that name, is the model's own output.

    By default names and values are torchvision's, and a warning says where that misleads: where the
    path of a module is the name of another node, where a module returns something else than its
    last operation, and where a later operation overwrites the value in place. ``exact=True`` gives
    what each module or operation returned in eager execution.

    Args:
        model: any module that torch.fx can trace. It comes back as it was; the extractor shares
            its parameters.
        return_nodes: the queries for both modes: a mapping query -> key, any iterable of queries,
            which are their own keys, or one query.
        train_return_nodes, eval_return_nodes: in place of ``return_nodes``, queries for each mode.
        tracer_kwargs, suppress_diff_warning, concrete_args, auto_leaf: as in :func:`get_graph_node_names`.
        exact: a query that is the path of a module gives what its first call returned, in its own
            structure; ``path_1`` is the second call. What is overwritten later is cloned before.

    Returns:
        A module with the model's signature that returns a dict key -> value in execution order. It
        starts in the model's mode and follows ``train()`` and ``eval()``.

    Raises:
        NodeNameError: a query matches no node.
        UntraceableError: torch.fx cannot trace the model.
        ValueError: two queries have one key, the queries are given in no way or in two,
            ``concrete_args`` has an argument that ``forward`` lacks, or a module whose output is asked
            for returned an object that a graph cannot hold.
        TypeError: an argument is something else than it should be.

    >>> extractor = create_feature_extractor(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), ["0", "output"])
    >>> {key: tuple(value.shape) for key, value in extractor(torch.rand(2, 4)).items()}
    {'0': (2, 8), 'output': (2, 8)}
    """
    # 1. What is asked for: {mode: {query: key}}.
    _check_model(model)
    queries = _queries_by_mode(return_nodes, train_return_nodes, eval_return_nodes)
    with _unchanged(model) as keeper:
        # 2. Trace in both modes, and find the value of each query.
        tracers = _trace_both(keeper, model, tracer_kwargs, concrete_args, exact, auto_leaf)
        features = {mode: _find_features(tracers, mode, queries[mode]) for mode in tracers}
        # 3. Cut each graph down to what its features need.
        cuts = {mode: _prune(tracers[mode], features[mode], queries[mode]) for mode in tracers}
        # 4. Make one module of the two graphs.
        extractor = DualGraphModule(model, cuts["train"].graph, cuts["eval"].graph, type(model).__name__)
    # 5. Say where the modes differ, and which features are not what they seem.
    if not suppress_diff_warning:
        _warn_graph_differences(tracers["train"], tracers["eval"])
    if not exact:
        _warn_hazards(tracers, features, {mode: cut.overwritten for mode, cut in cuts.items()})
    return extractor


# ------------------------------------------------------------------------------------ tracers


class LeafModuleAwareTracer(fx.Tracer):
    """A tracer whose leaf modules can be chosen by class.

    Args:
        leaf_modules: classes whose instances are recorded as single calls, besides torch.nn's own.
        non_leaf_modules: classes that are traced through; they win over every rule for leaves.
        args, kwargs: as for ``torch.fx.Tracer``.
    """

    def __init__(
        self,
        *args: Any,
        leaf_modules: Iterable[Type[nn.Module]] = (),
        non_leaf_modules: Iterable[Type[nn.Module]] = (),
        **kwargs: Any,
    ) -> None:
        self.leaf_modules = tuple(leaf_modules)
        self.non_leaf_modules = tuple(non_leaf_modules)
        super().__init__(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether calls of ``m`` are recorded as one operation."""
        if isinstance(m, self.non_leaf_modules):
            return False
        return isinstance(m, self.leaf_modules) or super().is_leaf_module(m, module_qualified_name)

    def trace(self, root: Any, concrete_args: Optional[Dict[str, Any]] = None) -> fx.Graph:
        """Trace a module; see ``torch.fx.Tracer.trace``."""
        self._thread = threading.get_ident()
        return super().trace(root, concrete_args)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Tuple[Any, ...], kwargs: Dict[str, Any]
    ) -> Any:
        """Record the call of a leaf module, or trace through the module."""
        if not self._is_tracing():
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Dict[str, Any]) -> Any:
        """Record the use of a parameter."""
        return super().getattr(attr, attr_val, parameter_proxy_cache) if self._is_tracing() else attr_val

    def _is_tracing(self) -> bool:
        """Whether it is this thread that traces: torch.fx has nn.Module patched for those that run models as well."""
        return threading.get_ident() == self._thread


class NodePathTracer(LeafModuleAwareTracer):
    """A tracer that names each node after the place in the model where it was recorded.

    Args:
        exact: name by rule 5 as well: the path of a module means that module.
        args, kwargs: as for :class:`LeafModuleAwareTracer`.

    Attributes:
        node_to_qualname: node -> name, in execution order. Constants that are arguments and the
            graph's output have no name.

    >>> tracer = NodePathTracer()
    >>> graph = tracer.trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU()))
    >>> list(tracer.node_to_qualname.values())
    ['input', '0', '1']
    """

    def __init__(self, *args: Any, exact: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.node_to_qualname: Dict[fx.Node, str] = {}
        self._exact = exact
        self._training = False
        self._scope = ""
        self._namer = _Namer()
        self._returned: Dict[str, _Feature] = {}  # what the calls of modules returned, in that order
        self._failure: Optional[Tuple[BaseException, str, Type[nn.Module]]] = None

    @property
    def names(self) -> List[str]:
        """The names of the nodes, in execution order."""
        return list(self.node_to_qualname.values())

    def trace(self, root: Any, concrete_args: Optional[Dict[str, Any]] = None) -> fx.Graph:
        """Trace a module; see ``torch.fx.Tracer.trace``."""
        if isinstance(root, nn.Module):
            self._training = root.training
            if self._exact:
                self._namer = _Namer(path for path, _ in root.named_modules(remove_duplicate=False) if path)
        return super().trace(root, concrete_args)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Tuple[Any, ...], kwargs: Dict[str, Any]
    ) -> Any:
        """Record the call of a leaf module, or trace through the module with its path as scope."""
        if not self._is_tracing():
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        outer, self._scope = self._scope, path
        try:
            if self.is_leaf_module(m, path):
                value = self.create_proxy("call_module", path, args, kwargs)
                name = self.node_to_qualname[value.node] if self._exact else path
                self._returned.setdefault(name, _Feature(value.node, value.node))
            else:
                value = forward(*args, **kwargs)
                name = self._namer.name(path, None) if self._exact else path
                self._returned.setdefault(name, self._as_returned(value))
            return value
        except Exception as error:
            if self._failure is None or self._failure[0] is not error:
                self._failure = (error, path, type(m))
            raise
        finally:
            self._scope = outer

    def _as_returned(self, value: Any) -> "_Feature":
        after = next(iter(reversed(self.graph.nodes)), None)
        if isinstance(value, fx.Proxy) and not isinstance(value, fx.proxy.Attribute):
            return _Feature(value.node, after)
        if self._exact:  # as it is now, since the model may go on to change it
            with contextlib.suppress(Exception):  # which classes of anybody's may raise
                value = _map_nested(lambda item: item, value)
        return _Feature(value, after)

    def create_arg(self, a: Any) -> Any:
        """Turn what an operation was called with into arguments of a node."""
        kind = type(a)
        if kind is fx.Proxy:  # by far the most; torch.fx asks a dozen questions before it comes to these
            return a.node
        if kind is tuple:
            return tuple([self.create_arg(item) for item in a])
        return a if kind in _PLAIN_TYPES or (kind is dict and not a) else super().create_arg(a)

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: Tuple[Any, ...],
        kwargs: Dict[str, Any],
        name: Optional[str] = None,
        type_expr: Optional[Any] = None,
        proxy_factory_fn: Optional[Callable[[fx.Node], fx.Proxy]] = None,
    ) -> fx.Proxy:
        """Record an operation and give its node a name."""
        if isinstance(type_expr, str):  # as under "from __future__ import annotations"
            type_expr = _annotation(type(self.root), str(target))
        proxy = super().create_proxy(kind, target, args, kwargs, name, type_expr, proxy_factory_fn)
        node = proxy.node
        given = self._namer.name(self._scope, None if kind == "call_module" else node.name)
        self.node_to_qualname[node] = given
        return proxy

    def _where_failed(self, error: BaseException, model: nn.Module) -> Tuple[str, Type[nn.Module]]:
        """The path and the class of the innermost module whose forward raised ``error``."""
        if self._failure is not None and self._failure[0] is error:
            return self._failure[1:]
        return "", type(model)


_PLAIN_TYPES = frozenset([bool, float, int, str, type(None)])


def _annotation(model_type: Type[nn.Module], parameter: str) -> Any:
    """The type that a string in the signature of ``forward`` means; None if that cannot be found out."""
    try:
        return get_type_hints(model_type.forward).get(parameter)
    except Exception:  # it may name what is imported for type checkers only, and is evaluated like any code
        return None


def _trace_both(
    keeper: "_Keeper",
    model: nn.Module,
    tracer_kwargs: Optional[Mapping[str, Any]] = None,
    concrete_args: Optional[Dict[str, Any]] = None,
    exact: bool = False,
    auto_leaf: bool = False,
) -> Dict[str, NodePathTracer]:
    """Trace in train mode, then in eval mode; afterwards each submodule has the mode it had."""
    arguments = {**_tracer_arguments(tracer_kwargs), "exact": exact}
    _check_concrete_args(model, concrete_args)
    modes = {module: module.training for module in keeper.modules}
    try:
        if auto_leaf:
            return _trace_with_leaves(keeper, model, arguments, concrete_args)
        return _trace_modes(keeper, model, arguments, concrete_args)
    finally:
        # By the methods first: some models, such as those that merge weights, do more in them than set the attribute.
        for module, training in modes.items():
            if module.training == training:
                continue
            if module is model:
                getattr(model, "train" if training else "eval")()
            else:
                module.train(training)
        for module, training in modes.items():
            module.training = training


def _trace_with_leaves(
    keeper: "_Keeper", model: nn.Module, arguments: Dict[str, Any], concrete_args: Optional[Dict[str, Any]]
) -> Dict[str, NodePathTracer]:
    """Trace again and again, each time with the class that failed as another leaf."""
    classes: List[Type[nn.Module]] = []
    before = set(vars(model))
    while True:
        try:
            leaves = (*arguments["leaf_modules"], *classes)
            tracers = _trace_modes(keeper, model, {**arguments, "leaf_modules": leaves}, concrete_args)
        except UntraceableError as error:
            if not error.path or issubclass(error.module_type, arguments["non_leaf_modules"]):
                raise
            classes.append(error.module_type)
            for constant in set(vars(model)) - before:  # of the mode that could be traced
                del vars(model)[constant]
        else:
            break
    if classes:
        listed = ", ".join(f"{cls.__module__}.{cls.__qualname__}" for cls in classes)
        _warn(f"what torch.fx cannot trace became leaves: tracer_kwargs={{'leaf_modules': [{listed}]}} does the same.")
    return tracers


def _trace_modes(
    keeper: "_Keeper", model: nn.Module, arguments: Dict[str, Any], concrete_args: Optional[Dict[str, Any]]
) -> Dict[str, NodePathTracer]:
    tracers = {}
    for mode in ("train", "eval"):
        getattr(model, mode)()
        tracers[mode] = _trace(keeper, model, arguments, concrete_args)
    return tracers


def _trace(
    keeper: "_Keeper", model: nn.Module, arguments: Dict[str, Any], concrete_args: Optional[Dict[str, Any]]
) -> NodePathTracer:
    """Trace in the mode that the model is in; of what its forward does to it, what the graph fetches stays."""
    tracer = NodePathTracer(**arguments)
    restore = keeper.note()
    fetched: Dict[str, Any] = {}
    try:
        graph = tracer.trace(model, concrete_args=concrete_args)
        fetched = {str(node.target): _at(model, str(node.target)) for node in graph.nodes if node.op == "get_attr"}
    except Exception as error:
        path, module_type = tracer._where_failed(error, model)
        reason = f"{type(error).__name__}: {error}{_source_line(error)}"
        if issubclass(module_type, arguments["non_leaf_modules"]):
            reason += "\nIt was opened by non_leaf_modules, without which it is one operation."
        traceable = [] if path else [name for name, child in model.named_children() if _is_traceable(child, arguments)]
        raise UntraceableError(path, module_type, reason, traceable) from error
    finally:
        restore()
        for target, value in fetched.items():
            _put(model, target, value)
    return tracer


def _put(model: nn.Module, target: str, value: Any) -> None:
    """Make sure that the path ``target`` leads to ``value``: a constant, or what a forward made for itself."""
    path, _, name = target.rpartition(".")
    module = _at(model, path) if path else model
    for registered in (module._parameters, module._buffers, module._modules, vars(module)):
        if name in registered:
            registered[name] = value
            return
    (module._parameters if isinstance(value, nn.Parameter) else vars(module))[name] = value


def _is_traceable(model: nn.Module, arguments: Dict[str, Any]) -> bool:
    """Whether a module that has something inside can be traced, in the mode that it is in."""
    try:
        return any(model.children()) and bool(NodePathTracer(**arguments).trace(model).nodes)
    except Exception:
        return False


def _tracer_arguments(given: Optional[Mapping[str, Any]]) -> Dict[str, Any]:
    """The caller's ``tracer_kwargs`` with the defaults added; nothing of the caller's is written to."""
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"tracer_kwargs takes a dict of arguments for the tracer, not {given!r}")
    known = {"leaf_modules", "non_leaf_modules"} | set(inspect.signature(fx.Tracer.__init__).parameters) - {"self"}
    arguments = dict(given or {})
    if not known.issuperset(arguments):
        unknown = ", ".join(repr(name) for name in arguments if name not in known)
        raise TypeError(f"tracer_kwargs has {unknown}; the tracer takes {', '.join(sorted(known))}")
    # torchvision's operators are single operations wherever torchvision is in use, as they are there.
    ops = sys.modules.get("torchvision.ops")
    classes = list(filter(_is_module_class, vars(ops).values())) if ops else []
    expected: Dict[str, Tuple[Sequence[Any], str, Callable[[Any], bool]]] = {
        "leaf_modules": (classes, "classes of modules", _is_module_class),
        "non_leaf_modules": ((), "classes of modules", _is_module_class),
        "autowrap_modules": ((math, ops) if ops else (math,), "Python modules", inspect.ismodule),
        "autowrap_functions": ((), "functions", callable),
    }
    for name, (defaults, wanted, is_wanted) in expected.items():
        values = arguments.get(name, ())
        values = tuple(values) if isinstance(values, Iterable) else (values,)
        for value in values:
            if not is_wanted(value):
                raise TypeError(f"tracer_kwargs[{name!r}] takes {wanted}, not {value!r}")
        arguments[name] = (*defaults, *values)
    return arguments


def _is_module_class(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def _check_concrete_args(model: nn.Module, concrete_args: Any) -> None:
    if concrete_args is None or isinstance(concrete_args, tuple):
        return
    if not isinstance(concrete_args, Mapping):
        raise TypeError(f"concrete_args takes a dict argument -> value, not {concrete_args!r}")
    known = list(inspect.signature(type(model).forward).parameters)[1:]
    for name in concrete_args:
        if str(name).lstrip("*") not in known:
            raise ValueError(f"concrete_args has {name!r}; the arguments of forward are {', '.join(known)}")


def _source_line(error: BaseException) -> str:
    """Where in the model's source an error came from: the last line outside torch and this file."""
    torch_files = os.path.dirname(torch.__file__) + os.sep
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename != _FILE and not frame.filename.startswith(torch_files):
            return f'\n  File "{frame.filename}", line {frame.lineno}, in {frame.name}\n    {frame.line}'
    return ""


def _warn_graph_differences(train_tracer: NodePathTracer, eval_tracer: NodePathTracer) -> None:
    """Warn if the graphs of the two modes have different names, and say which."""
    train, evaluation = (list(t.node_to_qualname.values()) for t in (train_tracer, eval_tracer))
    if train == evaluation:
        return
    in_train, in_eval = set(train), set(evaluation)
    only_train = _shorten([name for name in train if name not in in_eval])
    only_eval = _shorten([name for name in evaluation if name not in in_train])
    only = [f"only in {mode} mode: {names}" for mode, names in (("train", only_train), ("eval", only_eval)) if names]
    _warn(
        f"the nodes of the train graph and of the eval graph differ: {'; '.join(only) or 'their order does'}."
        " A query that has no match in one of the modes needs train_return_nodes and eval_return_nodes;"
        " suppress_diff_warning=True silences this."
    )


def _shorten(names: List[str], most: int = 6) -> str:
    shown = ", ".join(names[:most])
    return f"{shown}, … ({len(names)} in all)" if len(names) > most else shown


def _warn(message: str) -> None:
    """Warn at the line that called into this file."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename == _FILE:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


_FILE = _shorten.__code__.co_filename


# -------------------------------------------------------------------------------------- names


class _Namer:
    """Gives out names by the rules of the module's docstring; knows strings only.

    Args:
        paths: those of all modules for rule 5; none for rules 1 to 4 alone.
    """

    def __init__(self, paths: Iterable[str] = ()) -> None:
        self._next: Dict[str, int] = {}  # stem -> the number after the most recently given form
        self._given: Dict[str, int] = {}  # a name given out -> the number to try after it
        self._uncalled = set(paths)
        for path in self._uncalled:
            self._next[path], self._given[path] = 1, (_split_number(path)[1] or 0) + 1
        self._exact = bool(self._uncalled)

    def name(self, scope: str, own: Optional[str]) -> str:
        """The name of the next node: ``own`` is torch.fx's name for it, None for a call of a module.

        >>> namer = _Namer()
        >>> [namer.name("layer1.0", own) for own in ("relu_4", "add_2", "relu_5")]
        ['layer1.0.relu', 'layer1.0.add', 'layer1.0.relu_1']
        >>> namer = _Namer(["ln_1", "relu"])
        >>> [namer.name(scope, own) for scope, own in (("", "relu"), ("ln_1", None), ("relu", None))]
        ['relu_1', 'ln_1', 'relu']
        """
        place = scope if own is None else f"{scope}.{own}" if scope else own
        if own is None and place in self._uncalled:
            self._uncalled.remove(place)
            return place
        stem = place if own is None and self._exact else _split_number(place)[0]
        number = self._next.get(stem, 0)
        name = first = f"{stem}_{number}" if number else stem
        while name in self._given:
            number = self._given[name]
            name = f"{stem}_{number}"
        self._given[first] = number + 1
        # A given name counts as a form of itself and, where it ends in a number, of what is before.
        head, last = _split_number(name)
        self._next[name] = self._given[name] = 1
        if last is not None:
            self._next[head] = self._given[name] = last + 1
        return name


def _split_number(name: str) -> Tuple[str, Optional[int]]:
    """``"relu_12"`` -> ``("relu", 12)``; without such an ending ``(name, None)``."""
    head, _, digits = name.rpartition("_")
    if head and digits.isascii() and digits.isdigit():
        return head, int(digits)
    return name, None


# ---------------------------------------------------------------------------------- selection


def _queries_by_mode(both: Any, train: Any, evaluation: Any) -> Dict[str, Dict[str, str]]:
    if both is None and train is None and evaluation is None:
        raise ValueError("no queries were given: pass return_nodes, or train_return_nodes and eval_return_nodes")
    if both is not None and not (train is None and evaluation is None):
        raise ValueError("queries were given twice: pass return_nodes, or the other two, not both")
    if both is None and (train is None or evaluation is None):
        given, lacking = ("train", "eval") if evaluation is None else ("eval", "train")
        raise ValueError(f"{given}_return_nodes was given without {lacking}_return_nodes: pass both")
    if both is not None:
        queries = _as_mapping(both, "return_nodes")
        return {"train": queries, "eval": queries}
    return {
        "train": _as_mapping(train, "train_return_nodes"),
        "eval": _as_mapping(evaluation, "eval_return_nodes"),
    }


def _as_mapping(queries: Any, argument: str) -> Dict[str, str]:
    """``{query: key}`` from a mapping, an iterable of queries or one query."""
    if isinstance(queries, str):
        queries = [queries]
    if isinstance(queries, (nn.Module, bytes)) or not isinstance(queries, Iterable):
        given = type(queries).__name__
        raise TypeError(f"{argument} takes a dict query -> key, a list of queries or a query, not a {given}")
    pairs = list(queries.items() if isinstance(queries, Mapping) else ((query, query) for query in queries))
    for name in itertools.chain.from_iterable(pairs):
        if not isinstance(name, (str, int)):
            raise TypeError(f"{argument} has {name!r}; queries and keys are strings")
    mapping = {str(query): str(key) for query, key in pairs}
    owners: Dict[str, str] = {}
    for query, key in mapping.items():
        if owners.setdefault(key, query) != query:
            raise ValueError(f"{argument} puts both {owners[key]!r} and {query!r} under the key {key!r}")
    return mapping


def _select(names: Sequence[str], queries: Iterable[str]) -> Dict[str, int]:
    """The position of the last name that equals a query or lies below it, for each query that has one.

    >>> _select(["x", "layer1.conv", "layer1.relu", "fc"], ["layer1", "fc", "lay"])
    {'layer1': 2, 'fc': 3}
    """
    last = {prefix: position for position, name in enumerate(names) for prefix in _prefixes(name)}
    return {query: last[query] for query in queries if query in last}


def _prefixes(name: str) -> Iterator[str]:
    """``"a.b.c"`` -> ``"a"``, ``"a.b"``, ``"a.b.c"``."""
    return itertools.accumulate(name.split("."), "{}.{}".format)


_Read = Tuple[fx.Node, fx.Node]


class _Feature(NamedTuple):
    """A value that can be asked for."""

    value: Any  # a node, or what a module returned: proxies, nodes and constants in its own structure
    after: Optional[fx.Node]  # the node after which it is there; None if it is there from the start

    @property
    def is_output(self) -> bool:
        """Whether it is what the model itself returns."""
        return self.after is not None and self.after.op == "output"

    @property
    def reads(self) -> List[_Read]:
        """What is read for it, and after which node."""
        assert self.after is not None, "what is there from the start has been put into the graph"
        taken = [self.after] if self.is_output else _nodes_in(_leaves(self.value))
        return [(node, self.after) for node in taken]


def _find_features(tracers: Dict[str, NodePathTracer], mode: str, queries: Iterable[str]) -> Dict[str, _Feature]:
    """The values by query, in execution order."""
    tracer = tracers[mode]
    names, nodes = tracer.names, list(tracer.node_to_qualname)
    positions = _select(names, queries)
    found: Dict[str, _Feature] = {}
    for query in queries:
        if tracer._exact and query in tracer._returned:
            found[query] = tracer._returned[query]
        elif query in positions:
            node = nodes[positions[query]]
            found[query] = _Feature(node, node)
        elif query == "output":
            found[query] = _own_output(tracer.graph)
        else:
            known = [*names, *tracer._returned] if tracer._exact else names
            raise NodeNameError(query, mode, _suggestions(known, query), _hint(tracers, mode, query))
    place = {node: index for index, node in enumerate(tracer.graph.nodes)}
    turn = {name: index for index, name in enumerate(tracer._returned)}  # of modules that return after the same node
    ordered = sorted(found, key=lambda query: (place.get(found[query].after, -1), turn.get(query, -1)))
    return {query: found[query] for query in ordered}


def _own_output(graph: fx.Graph) -> _Feature:
    """What the model itself returns, in its own structure."""
    output = next(iter(reversed(graph.nodes)))
    value, pytree_info = output.args[0], getattr(graph._codegen, "pytree_info", None)
    if pytree_info is not None and pytree_info.out_spec is not None:
        value = tree_unflatten(list(value), pytree_info.out_spec)
    return _Feature(value, output)


def _warn_hazards(
    tracers: Dict[str, NodePathTracer],
    features: Dict[str, Dict[str, _Feature]],
    overwritten: Dict[str, Dict[str, fx.Node]],
) -> None:
    """Warn, once for each query, where a feature is something else than its query says."""
    found: Dict[str, Dict[str, List[str]]] = {}  # query -> what is to be said -> the modes of which it is true
    for mode, tracer in tracers.items():
        for query, feature in features[mode].items():
            texts = []
            if _misleads(tracer, query, feature.value):
                texts.append(
                    f"is the value of {_described(tracer, feature.value, query)}, not what the module {query!r} returns"
                )
            if query in overwritten[mode]:
                texts.append(f"is overwritten in place by {_described(tracer, overwritten[mode][query])}")
            for text in texts:
                found.setdefault(query, {}).setdefault(text, []).append(mode)
    for query, said in found.items():
        text = ", and ".join(text if len(modes) == 2 else f"{text} in {modes[0]} mode" for text, modes in said.items())
        _warn(f"the feature {query!r} {text}; exact=True gives its own value")


def _misleads(tracer: NodePathTracer, query: str, node: Any) -> bool:
    """Whether a node is not the value of the module whose path its query is."""
    returned = tracer._returned.get(query)
    if not isinstance(node, fx.Node):
        return _is_path(tracer.root, query)
    if returned is None:  # the module is not called, or under another path
        return tracer.node_to_qualname.get(node) == query and _is_path(tracer.root, query)
    if returned.value is node:
        return False
    # An operation in place gives back what it wrote into, so a module that ends with one returns either of two nodes.
    same = returned.after is node and returned.value in _effects(tracer.root, node)[0]
    return not same or node.target in (operator.setitem, operator.delitem)


def _is_path(root: nn.Module, query: str) -> bool:
    module: Optional[nn.Module] = root
    for name in query.split("."):
        module = module._modules.get(name) if module is not None else None
    return module is not None


def _described(tracer: NodePathTracer, node: Any, query: str = "") -> str:
    if not isinstance(node, fx.Node):
        return "the model's own output"
    if node.op == "call_module":
        return f"{'a later call of' * (node.target == query)} the module {str(node.target)!r}".strip()
    return f"the operation {tracer.node_to_qualname.get(node, node.name)!r}"


def _suggestions(names: Sequence[str], query: str) -> List[str]:
    """The closest of the names and of their prefixes, best first."""
    candidates = list(dict.fromkeys(prefix for name in names for prefix in _prefixes(name)))
    return difflib.get_close_matches(query, candidates, n=3)


def _hint(tracers: Dict[str, NodePathTracer], mode: str, query: str) -> str:
    """Why a query that matches nothing may have been expected to match."""
    tracer, other = tracers[mode], "eval" if mode == "train" else "train"
    if _select(tracers[other].names, [query]) or (tracer._exact and query in tracers[other]._returned):
        return f"It is in the {other} graph only: pass train_return_nodes and eval_return_nodes."
    modules = dict(tracer.root.named_modules(remove_duplicate=False))
    if not query or query not in modules:
        return ""
    first = tracer.path_of_module(modules[query])
    if first != query:
        return f"It is the same module as {first!r}, after which its calls are named."
    called: Dict[Any, str] = {}  # path -> the name of the first call
    for node, name in tracer.node_to_qualname.items():
        if node.op == "call_module":
            called.setdefault(node.target, name)
    if query in tracer._returned:
        why = f"Its first call is named {called[query]!r}" if query in called else "It runs no operation of its own"
        return f"{why}; with exact=True its value is what it returns."
    for path in _prefixes(query):
        if path in called:
            leaf = type(modules[path]).__name__
            return (
                f"It lies inside the leaf module {path!r} ({leaf}), which is one operation;"
                f" tracer_kwargs={{'non_leaf_modules': [{leaf}]}} opens it."
            )
    return f"It is a module of the model in which no operation runs in {mode} mode."


# ------------------------------------------------------------------------------------ pruning


class _Operation(NamedTuple):
    """What pruning knows of a node; other nodes are given by their positions."""

    inputs: Tuple[int, ...] = ()
    writes: Tuple[int, ...] = ()  # the inputs into whose memory it writes
    views: Tuple[int, ...] = ()  # the inputs with which its value may share memory
    kind: str = ""  # "placeholder", "assert" or nothing special


def _staying(
    operations: Sequence[_Operation], requested: Iterable[int], reads: Iterable[Tuple[int, int]] = ()
) -> List[int]:
    """The positions of the operations that must run for the requested ones to have their values.

    A requested value is what its operation returned; a read ``(position, after)`` is the value of one
    as it is after another. Nothing after the last of these runs. Before it, an operation stays if it
    is requested or an assert, if one that stays takes its value, or if it writes into memory that a
    read, or a later one that stays, reads. Placeholders always stay.

    >>> operations = [_Operation(kind="placeholder"), _Operation((0,)), _Operation((1,), writes=(1,), views=(1,)),
    ...               _Operation((1,)), _Operation((3,))]
    >>> _staying(operations, [3]), _staying(operations, [1]), _staying(operations, [], [(1, 2)])
    ([0, 1, 2, 3], [0, 1], [0, 1, 2])
    """
    memory = _memories(operations)
    needed: Set[int] = set(requested)
    read_after: Dict[int, List[int]] = collections.defaultdict(list)
    for position, after in reads:
        read_after[after].append(position)
    cut = max(needed.union(read_after), default=-1)
    read: Set[int] = set()  # the memories that are read later
    staying = []
    for position in range(len(operations) - 1, -1, -1):
        operation = operations[position]
        needed.update(read_after.get(position, ()))
        read.update(memory[taken] for taken in read_after.get(position, ()))
        if operation.kind != "placeholder":
            if position > cut:
                continue
            writes = not read.isdisjoint(memory[written] for written in operation.writes)
            if not (position in needed or operation.kind == "assert" or writes):
                continue
        staying.append(position)
        needed.update(operation.inputs)
        read.update(memory[taken] for taken in operation.inputs)
    return staying[::-1]


def _overwritten(
    operations: Sequence[_Operation], staying: Iterable[int], reads: Iterable[Tuple[int, int]]
) -> Dict[Tuple[int, int], int]:
    """The reads of values that change afterwards, and the position of the first operation that changes each.

    >>> operations = [_Operation(kind="placeholder"), _Operation((0,)), _Operation((1,), writes=(1,), views=(1,))]
    >>> _overwritten(operations, [0, 1, 2], [(0, 0), (1, 1), (2, 2)])
    {(1, 1): 2}
    """
    memory = _memories(operations)
    writers: Dict[int, List[int]] = collections.defaultdict(list)
    for position in staying:
        for written in operations[position].writes:
            writers[memory[written]].append(position)
    found = {}
    for taken, after in reads:
        later = writers.get(memory[taken], [])
        index = bisect.bisect_right(later, after)
        if index < len(later):
            found[taken, after] = later[index]
    return found


def _memories(operations: Sequence[_Operation]) -> List[int]:
    """For each position the memory that its value lies in: values that may share it have one number."""
    parent = list(range(len(operations)))

    def find(position: int) -> int:
        while parent[position] != position:
            parent[position] = position = parent[parent[position]]
        return position

    for position, operation in enumerate(operations):
        for viewed in operation.views:
            parent[find(position)] = find(viewed)
    return [find(position) for position in range(len(operations))]


class _Cut(NamedTuple):
    graph: fx.Graph
    overwritten: Dict[str, fx.Node]  # the queries whose value, or what it was cloned from, an operation overwrites


def _prune(tracer: NodePathTracer, features: Dict[str, _Feature], keys: Dict[str, str]) -> _Cut:
    """Cut a traced graph down to what the features need, and make them its output.

    If the tracer is exact, what is overwritten later is cloned before.
    """
    graph = tracer.graph
    features = {query: _with_constants(tracer, query, feature) for query, feature in features.items()}
    plan = _plan(tracer, features.values())
    clones = {read: _clone_after(graph, *read) for read in plan.overwritten} if tracer._exact else {}
    values = {keys[query]: _as_argument(tracer, query, feature, clones) for query, feature in features.items()}
    for node in reversed(graph.nodes):
        if node in plan.leaving:
            graph.erase_node(node)
    graph.output(values)
    pytree_info = getattr(graph._codegen, "pytree_info", None)
    if pytree_info is not None:  # the features are returned as they are, not packed like the model's own output
        graph._codegen.pytree_info = pytree_info._replace(out_spec=None)  # type: ignore[attr-defined]
    writers = {
        query: plan.overwritten[read]
        for query in features
        for read in features[query].reads
        if read in plan.overwritten
    }
    return _Cut(graph, writers)


def _with_constants(tracer: NodePathTracer, query: str, feature: _Feature) -> _Feature:
    """The same feature, in which proxies are nodes, and so are tensors that a module returned as they are."""
    if isinstance(feature.value, fx.Node) or feature.is_output:
        return feature
    graph = tracer.graph
    following = feature.after.next if feature.after else next(iter(graph.nodes))

    def as_argument(item: Any) -> Any:
        if isinstance(item, fx.proxy.Attribute):  # has no node before it is used, and then one that comes too late
            return graph.call_function(getattr, (as_argument(item.root), item.attr))
        return item if isinstance(item, fx.Node) else tracer.create_arg(item)

    with _cannot_be_a_feature(query), graph.inserting_before(following):
        return _Feature(_map_nested(as_argument, feature.value), following.prev)


class _Plan(NamedTuple):
    leaving: Set[fx.Node]  # what need not run, and the output of the traced graph
    overwritten: Dict[_Read, fx.Node]  # the reads whose value changes later, and what changes it


def _plan(tracer: NodePathTracer, features: Iterable[_Feature]) -> _Plan:
    """Find out what must run, and what is overwritten by it."""
    nodes = list(tracer.graph.nodes)
    position = {node: index for index, node in enumerate(nodes)}
    reads = [(position[taken], position[after]) for feature in features for taken, after in feature.reads]
    requested = [] if tracer._exact else [taken for taken, _ in reads]
    foreign: Set[int] = set()  # calls of what is not torch's own

    def describe(opaque: _Opaque, modes: Sequence[bool] = ()) -> List[_Operation]:
        return _describe(tracer, nodes, position, opaque, modes)

    def plan(operations: Sequence[_Operation]) -> Tuple[List[int], Dict[Tuple[int, int], int]]:
        staying = _staying(operations, requested, reads if tracer._exact else [])
        return staying, _overwritten(operations, staying, reads)

    def noting(root: nn.Module, node: fx.Node) -> _Effects:
        foreign.add(position[node])
        return _believed(root, node)

    operations = describe(noting)
    staying, overwritten = plan(operations)
    suspected = list(operations)
    for index in foreign:
        writes, views = (tuple(map(position.__getitem__, effect)) for effect in _suspected(tracer.root, nodes[index]))
        suspected[index] = operations[index]._replace(writes=writes + operations[index].writes, views=views)
    if overwritten or foreign and plan(suspected) != (staying, {}):  # then look closely
        look = functools.lru_cache(maxsize=None)(_seen_inside)
        staying, _ = plan(describe(functools.partial(_looked_into, look, (True, False), _believed)))
        # A clone is for what may happen, a warning for what does, in this mode.
        modes, otherwise = ((True, False), _suspected) if tracer._exact else ((tracer._training,), _believed)
        opaque = functools.partial(_looked_into, look, modes, otherwise)
        overwritten = _overwritten(describe(opaque, modes), staying, reads)
    leaving = {nodes[-1], *nodes} - {nodes[index] for index in staying if index < len(nodes) - 1}
    changes = {(nodes[taken], nodes[after]): nodes[writer] for (taken, after), writer in overwritten.items()}
    return _Plan(leaving, changes)


def _clone_after(graph: fx.Graph, node: fx.Node, after: fx.Node) -> fx.Node:
    following = after.next
    while following.op == "placeholder":
        following = following.next
    with graph.inserting_before(following):
        return graph.call_function(_clone_list if _is_list(node) else _clone, (node,))


def _is_list(node: fx.Node) -> bool:
    """Whether torch declares an operation to give a list of tensors, as ``chunk``."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    schemas = _operator_schemas(_operator_name(node, name)) if node.op in ("call_function", "call_method") else []
    return any([str(value.type) for value in schema.returns] == ["List[Tensor]"] for schema in schemas)


# TorchScript takes what has no type for a tensor, and does not look into the second branches.


def _clone(value: torch.Tensor) -> torch.Tensor:
    """What a feature is before it is overwritten; of nested values, all tensors."""
    # A tensor at once: torch.export of old torch cannot follow the rest.
    return value.clone() if is_scripting() or isinstance(value, torch.Tensor) else _clone_nested(value)


def _clone_list(value: List[torch.Tensor]) -> List[torch.Tensor]:
    return [item.clone() for item in value] if is_scripting() else _clone_nested(value)


def _clone_nested(value: Any) -> Any:
    if isinstance(value, fx.Proxy):  # traced again, this stays one operation
        return value.tracer.create_proxy("call_function", _clone, (value,), {})
    return _map_nested(lambda item: item.clone() if isinstance(item, torch.Tensor) else item, value)


def _as_argument(tracer: NodePathTracer, query: str, feature: _Feature, clones: Dict[_Read, fx.Node]) -> Any:
    """A feature's value as an argument of the output node."""
    if feature.is_output:
        return feature.value

    def final(item: Any) -> Any:
        if isinstance(item, fx.Node):
            return fx.Proxy(clones.get((item, feature.after or item), item), tracer)
        return item

    with _cannot_be_a_feature(query):  # as a dataclass with torch 1.13
        return tracer.create_arg(_map_nested(final, feature.value))


@contextlib.contextmanager
def _cannot_be_a_feature(query: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the classes of what is returned are anybody's
        message = f"what the module {query!r} returned cannot be a feature, ask for what is inside: {error}"
        raise ValueError(message) from error


def _map_nested(function: Callable[[Any], Any], value: Any) -> Any:
    """The same structure of dicts, lists, tuples and dataclasses, with the function's value of each item.

    >>> _map_nested(abs, {"a": [-1, (-2,)]})
    {'a': [1, (2,)]}
    """
    if isinstance(value, (list, tuple)):
        items = [_map_nested(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        new: Any = copy.copy(value)
        for key, item in value.items():
            new[key] = _map_nested(function, item)
        return new
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        new = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(new, field.name, _map_nested(function, getattr(value, field.name)))
        return new
    return function(value)


def _leaves(value: Any) -> Iterator[Any]:
    """The items of nested dicts, lists, tuples and dataclasses."""
    if isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _leaves(getattr(value, field.name))
    else:
        yield value


# ------------------------------------------------------------------------------------ effects

_Effects = Tuple[List[fx.Node], List[fx.Node]]  # the inputs that are written to, those that are viewed
_Opaque = Callable[[nn.Module, fx.Node], _Effects]  # judges calls of what is not torch's own


def _describe(
    tracer: fx.Tracer,
    nodes: Sequence[fx.Node],
    position: Dict[fx.Node, int],
    opaque: _Opaque,
    modes: Sequence[bool] = (),
) -> List[_Operation]:
    """What each node reads, writes and shares, as plain data.

    Given modes (``True`` for train mode), it is what torch's own modules do in these, else what they may do.
    """
    memory = {node: _memory_of(_at(tracer.root, str(node.target))) for node in nodes if node.op == "get_attr"}
    fetched: Dict[int, int] = {}  # the memory of a parameter or buffer -> the first node that fetches it
    for node, at in memory.items():
        fetched.setdefault(at, position[node])
    operations = []
    for node in nodes:
        inputs = [position[taken] for taken in node.all_input_nodes]
        writes, views = ([position[taken] for taken in effect] for effect in _effects(tracer.root, node, opaque, modes))
        if node.op == "get_attr":
            views = [fetched[memory[node]]]
        elif node.op == "call_module" and fetched:  # a module also reads its own parameters and buffers
            for part in _at(tracer.root, str(node.target)).modules():
                own = itertools.chain(part._parameters.values(), part._buffers.values())
                inputs += [fetched[at] for at in map(_memory_of, own) if at in fetched]
                writes += [fetched[at] for at in map(_memory_of, _updated(part, modes)) if at in fetched]
        kind = node.op if node.op == "placeholder" else "assert" if node.target in _ASSERTS else ""
        operations.append(_Operation(tuple(inputs), tuple(writes), tuple(views), kind))
    return operations


def _memory_of(value: Any) -> int:
    """A number that tensors have in common if they share memory."""
    try:
        return getattr(value, "untyped_storage", value.storage)().data_ptr() or id(value)
    except (AttributeError, NotImplementedError, RuntimeError):  # no tensor, or one without storage
        return id(value)


def _updated(module: nn.Module, modes: Sequence[bool]) -> Iterator[Any]:
    """What a module may write into of its own: statistics in train mode, embeddings with ``max_norm``."""
    if not isinstance(module, _NormBase) or tuple(modes) != (False,):
        yield from module._buffers.values()
    if _attribute(module, "max_norm") is not None:
        yield from module.parameters()


def _attribute(module: nn.Module, name: str) -> Any:
    """An attribute, or None. Where there is none, nn.Module itself takes long to say so."""
    is_usual = type(module).__getattr__ is nn.Module.__getattr__ and not hasattr(type(module), name)
    if is_usual and name not in vars(module) and name not in module._parameters and name not in module._buffers:
        return None
    return getattr(module, name, None)


_ASSERTS = (torch._assert, _assert_is_none)
_SAFE = (*_ASSERTS, _clone, _clone_list)  # what neither changes nor shares anything

# Modules of torch.nn that can return their input, or a view of it.
_VIEW_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten)
# Functions and methods that can return their input, or a view of it, though their schemas do not say so.
_VIEW_FUNCTIONS = frozenset(
    "atleast_1d atleast_2d atleast_3d broadcast_tensors cartesian_prod chain_matmul data einsum meshgrid type_as"
    " unsafe_chunk unsafe_split unsafe_split_with_sizes alpha_dropout dropout feature_alpha_dropout feature_dropout"
    " conj_physical dequantize getitem pos resize resize_as sum_to_size to_dense".split()
)
# Attributes of tensors that share no memory with them.
_PLAIN_ATTRIBUTES = frozenset(
    "device dtype grad_fn is_cpu is_cuda is_leaf is_meta is_nested is_quantized is_sparse itemsize layout names nbytes"
    " ndim output_nr requires_grad shape".split()
)
_IN_PLACE_OPERATORS = frozenset(
    "delitem iadd iand iconcat ifloordiv ilshift imatmul imod imul ior ipow irshift isub itruediv ixor setitem".split()
)
# Of lists and dicts, which functions that are recorded as single operations may return.
_IN_PLACE_METHODS = frozenset(
    "__setitem__ append clear extend insert pop popitem remove reverse setdefault update".split()
)
_STATEFUL_FUNCTIONS = frozenset("batch_norm embedding embedding_bag instance_norm".split())
_PURE = ("_operator", "math")  # Python modules whose functions, but for those above, change and share nothing


def _effects(root: nn.Module, node: fx.Node, opaque: Optional[_Opaque] = None, modes: Sequence[bool] = ()) -> _Effects:
    """The inputs into whose memory a node writes, and those that its value may share memory with."""
    opaque = opaque or _believed
    inputs = node.all_input_nodes
    if node.op not in ("call_module", "call_function", "call_method") or node.target in _SAFE:
        return [], []
    if node.op == "call_module":
        module = _at(root, str(node.target))
        effect = None if _is_hooked(module) else _module_effect(module, modes)
        return opaque(root, node) if effect is None else (inputs * effect.writes, inputs * effect.views)
    if node.target is getattr:
        return [], [] if node.args[1] in _PLAIN_ATTRIBUTES else inputs
    if not _is_torch(node.target):
        return opaque(root, node)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if "out" in node.kwargs:
        written = _nodes_in([node.kwargs["out"]])
        return written, written
    if _writes_first_argument(node, name):
        written = _nodes_in(node.args[:1]) or inputs
        return written, written if name.endswith("_") else inputs  # a list shares memory with what is put into it
    if name in _STATEFUL_FUNCTIONS:
        return _written_state(node, name), []
    if name in _VIEW_FUNCTIONS:
        return [], inputs
    aliases = _aliases(_operator_name(node, name))
    if aliases is None:
        return ([], []) if getattr(node.target, "__module__", "") in _PURE else opaque(root, node)
    arguments: Dict[Any, Any] = {**dict(enumerate(node.args)), **node.kwargs}
    writes, views = (_nodes_in(arguments[at] for at in alias if at in arguments) for alias in aliases)
    return writes, views


def _written_state(node: fx.Node, name: str) -> List[fx.Node]:
    """The inputs, other than the first, into which a function writes, though its schema does not say so."""
    if name.endswith("norm"):
        training = node.kwargs.get("training", node.kwargs.get("use_input_stats", [*node.args, *[True] * 6][5]))
        return node.all_input_nodes[1:] if training is not False else []
    max_norm = node.kwargs.get("max_norm", [*node.args, *[None] * 4][3])
    return node.all_input_nodes[1:2] if max_norm is not None else []


class _Effect(NamedTuple):
    writes: bool
    views: bool


def _module_effect(module: nn.Module, modes: Sequence[bool] = ()) -> Optional[_Effect]:
    """Whether a leaf writes into its inputs and whether it may return them; None if it is opaque."""
    if isinstance(module, _dropping_modules()) and _is_library(type(module).forward):
        drops = True in modes and bool(module.p != 0)
        keeps = False in modes or not drops  # gives back its very input
        writes = _is_inplace(module) and (drops or not modes)
        return _Effect(writes, views=writes or keeps)
    if _is_inplace(module):
        return _Effect(writes=True, views=True)
    if getattr(type(module), "forward", None) is nn.Sequential.forward:
        writes, views = False, True
        for child in module.children():
            effect = _module_effect(child, modes)
            if effect is None or _is_hooked(child):
                return None
            writes, views = writes or (views and effect.writes), views and effect.views
        return _Effect(writes, views)
    if _is_torch(type(module)) and not any(module._modules.values()):
        return _Effect(writes=False, views=isinstance(module, _VIEW_MODULES))
    return None


def _dropping_modules() -> Tuple[Type[nn.Module], ...]:
    """The classes of modules that in eval mode, or with p = 0, return their input itself."""
    return _dropping_among(sys.modules.get("torchvision.ops"))


@functools.lru_cache(maxsize=None)
def _dropping_among(ops: Any) -> Tuple[Type[nn.Module], ...]:
    names = ("StochasticDepth", "DropBlock2d", "DropBlock3d")
    return (_DropoutNd, *(vars(ops)[name] for name in names if hasattr(ops, name)))


def _is_inplace(module: nn.Module) -> bool:
    inplace = _attribute(module, "inplace")
    return isinstance(inplace, (bool, int)) and bool(inplace)


# Calls of what is not torch's own may return their inputs, and may write into them.


def _suspected(root: nn.Module, node: fx.Node) -> _Effects:
    """All that may be."""
    return node.all_input_nodes, node.all_input_nodes


def _believed(root: nn.Module, node: fx.Node) -> _Effects:
    """It writes if its name, a part of it or its source says so, or if nobody takes its value: it is there for that."""
    inputs = node.all_input_nodes
    if node.op == "call_module":
        module = _at(root, str(node.target))
        effect = _module_effect(module)
        if effect is not None:  # of torch's own, whose hooks are believed to look on
            return inputs * effect.writes, inputs * effect.views
        if any(map(_is_inplace, module.modules())):
            return inputs, inputs
    if not node.users or _writes_first_argument(node, getattr(node.target, "__name__", "")):
        return inputs, inputs
    return _said_by_source(root, node)


def _said_by_source(root: nn.Module, node: fx.Node) -> _Effects:
    """It writes what its source plainly writes, and returns that or anything."""
    inputs, args = node.all_input_nodes, node.args
    function: Any = node.target
    if node.op == "call_module":
        args, function = (None, *args), getattr(type(_at(root, str(node.target))), "forward", None)
    names, returned = _plain_effects(_code_of(function))
    if not names:
        return [], inputs
    try:
        arguments = inspect.signature(function).bind_partial(*args, **node.kwargs).arguments
    except TypeError:  # a decorator takes others than its source says
        return inputs, inputs
    return _nodes_in(map(arguments.get, names)), _nodes_in(map(arguments.get, returned)) if returned else inputs


def _looked_into(
    look: Callable[..., Optional[_Effects]], modes: Sequence[bool], otherwise: _Opaque, root: nn.Module, node: fx.Node
) -> _Effects:
    """What it does in the modes (``True`` is train mode), or ``otherwise`` if that cannot be seen."""
    seen = [look(root, node, training) for training in modes]
    if None in seen:
        return otherwise(root, node)
    writes, views = (list(itertools.chain(*effect)) for effect in zip(*filter(None, seen)))
    if len(modes) > 1:  # all that may happen, so also on the ways that were not taken
        writes += _said_by_source(root, node)[0]
    return writes, views


def _code_of(function: Any) -> Optional[types.CodeType]:
    """What caches may be keyed by: unlike a function, its code keeps no model alive."""
    return getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None


def _parameters(code: types.CodeType) -> Tuple[str, ...]:
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


@functools.lru_cache(maxsize=None)
def _plain_effects(code: Optional[types.CodeType]) -> Tuple[FrozenSet[Any], FrozenSet[Any]]:
    """The parameters into which a function plainly writes; those it plainly returns, if it returns nothing else.

    ``a[...] = b``, ``a += b`` and ``a.add_(b)`` are plain where ``a`` stands for nothing else in the source.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))  # type: ignore[arg-type]
    except (OSError, TypeError, ValueError, SyntaxError):  # of C, or otherwise without source
        return frozenset(), frozenset()
    assert code is not None, "what has source has code"
    names: Set[Any] = set(_parameters(code))
    written, returned = [], []
    for part in ast.walk(tree):
        if isinstance(part, ast.AugAssign):
            written.append(_base(part.target))
        elif isinstance(part, (ast.Subscript, ast.Attribute)) and isinstance(part.ctx, ast.Store):
            written.append(_base(part))
        elif isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute) and _is_inplace_name(part.func.attr):
            written.append(_base(part.func))
        elif isinstance(part, ast.Return):
            returned.append(part.value.id if isinstance(part.value, ast.Name) else None)
        elif isinstance(part, ast.Assign):
            names.difference_update(target.id for target in part.targets if isinstance(target, ast.Name))
    return frozenset(names.intersection(written)), frozenset(returned if names.issuperset(returned) else ())


def _base(expression: Any) -> Optional[str]:
    """The name that an expression starts with: ``a`` of ``a[0].b(c)``."""
    while isinstance(expression, (ast.Subscript, ast.Attribute, ast.Call)):
        expression = expression.func if isinstance(expression, ast.Call) else expression.value
    return expression.id if isinstance(expression, ast.Name) else None


def _seen_inside(root: nn.Module, node: fx.Node, training: bool) -> Optional[_Effects]:
    """The effects of an opaque call in a mode, found by tracing it alone; None if it cannot be traced."""
    inputs = node.all_input_nodes
    target: Any = _at(root, str(node.target)) if node.op == "call_module" else node.target
    is_module = isinstance(target, nn.Module)
    # What others' functions keep cannot be restored, and hooks of modules that are not opened do not run.
    if any(map(_is_hooked, target.modules())) if is_module else not _is_library(target):
        return None

    def call(*values: Any) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), dict(zip(inputs, values)).__getitem__)
        return target(*args, **kwargs)

    names = ", ".join(f"value_{index}" for index in range(len(inputs)))  # fx reads the arguments off the code
    alone = type("_Alone", (nn.Module,), {"forward": eval(f"lambda self, {names}: call({names})", {"call": call})})()
    if is_module:
        alone.target = target
    tracer, modules = _InnerTracer(leaf_modules=_dropping_modules()), list(alone.modules())
    restore = _note(_find_containers(modules))  # of attributes; tensors are restored with the whole model's
    try:
        for module in modules:
            module.training = training
        nodes = list(tracer.trace(alone).nodes)
        operations = _describe(tracer, nodes, {node: at for at, node in enumerate(nodes)}, _believed, (training,))
    except Exception:  # its code may be anybody's
        return None
    finally:
        restore()
    memory = _memories(operations)
    written = {memory[at] for operation in operations for at in operation.writes}
    returned = {memory[at] for at in operations[-1].inputs}
    memories = dict(zip(inputs, memory))  # the placeholders come first, in the order of the inputs
    return [i for i in inputs if memories[i] in written], [i for i in inputs if memories[i] in returned]


class _InnerTracer(LeafModuleAwareTracer):
    """A tracer for what fx does not look into otherwise, which may assign to items."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _ItemProxy(node, self)


class _ItemProxy(fx.Proxy):
    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


def _recorded(method: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda self, other: self.tracer.create_proxy("call_method", method, (self, other), {})


for _name in "add and floordiv lshift mod mul or pow rshift sub truediv xor".split():  # fx takes a += b for a = a + b
    setattr(_ItemProxy, f"__i{_name}__", _recorded(f"{_name}_"))


def _writes_first_argument(node: fx.Node, name: str) -> bool:
    if node.op == "call_module":
        return False
    if node.op == "call_function":
        if name in _IN_PLACE_OPERATORS and getattr(node.target, "__module__", "") == "_operator":
            return True
        place = _inplace_position(node.target)
        inplace = node.kwargs.get("inplace", node.args[place] if 0 <= place < len(node.args) else False)
        if inplace:
            training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
            return "dropout" not in name or bool(training)
    if node.op == "call_method" and name in _IN_PLACE_METHODS:
        return True
    return _is_inplace_name(name)


def _is_inplace_name(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _inplace_position(function: Any) -> int:
    """The position of a function's parameter ``inplace``; -1 if there is none."""
    code = _code_of(function)
    names = _parameters(code) if code else ()
    return names.index("inplace") if "inplace" in names else -1


def _is_hooked(module: nn.Module) -> bool:
    """Whether somebody but torch does something at each call of a module."""
    if not (module._forward_pre_hooks or module._forward_hooks):
        return False
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return not all(map(_is_library, hooks))


def _is_library(target: Any) -> bool:
    """Whether something is torch's or torchvision's, which keep nothing of what they are called with."""
    return _is_torch(target) or str(target.__module__).split(".")[0] == "torchvision"


def _is_torch(target: Any) -> bool:
    module = getattr(target, "__module__", None) or "torch"
    return isinstance(target, str) or module.split(".")[0] in ("torch", "_operator", "math")


def _operator_name(node: fx.Node, name: str) -> str:
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "_qualified_op_name", f"aten::{name}"))


@functools.lru_cache(maxsize=None)
def _aliases(operator_name: str) -> Optional[Tuple[FrozenSet[Any], FrozenSet[Any]]]:
    """The arguments that an operator writes to and those it may return a view of, by position and by name.

    From the schemas that torch declares for all overloads; None where there are none.

    >>> [sorted(map(str, alias)) for alias in _aliases("aten::relu_")]
    [['0', 'self'], ['0', 'self']]
    """
    schemas = _operator_schemas(operator_name)
    writes: Set[Any] = set()
    views: Set[Any] = set()
    for schema, argument, position in ((s, a, i) for s in schemas for i, a in enumerate(s.arguments)):
        if argument.alias_info is None:
            continue
        # The tensors of a list, as "Tensor(a!)[] self"; of "Tensor[](a!) self" the list itself is written to.
        is_tensor = str(argument.type) in ("Tensor", "Optional[Tensor]")
        if not (is_tensor or f")[] {argument.name}" in str(schema)):
            continue
        places = {argument.name} if argument.kwarg_only else {argument.name, position}
        views |= places
        writes |= places if argument.alias_info.is_write else set()
    return (frozenset(writes), frozenset(views)) if schemas else None


def _nodes_in(arguments: Iterable[Any]) -> List[fx.Node]:
    found: List[fx.Node] = []
    fx.node.map_arg(tuple(arguments), found.append)
    return found


# -------------------------------------------------------------------------- the two-mode module


class _Children(collections.OrderedDict):  # type: ignore[type-arg]
    """The ``_modules`` of a module, whose children also stand in the module's ``__dict__``.

    The compiled code walks ``self.a.b.c`` for each call. What stands in ``__dict__`` is found at once;
    for all else Python makes an AttributeError and then asks ``nn.Module.__getattr__``, which takes
    15 times as long. Whatever changes a module's children writes into ``_modules``, so both agree.
    """

    owner: Callable[[], Optional[nn.Module]] = staticmethod(lambda: None)  # of a copy, nobody

    def __setitem__(self, name: str, child: Optional[nn.Module]) -> None:
        before = self.get(name)
        super().__setitem__(name, child)
        self.show(name, before)

    def __delitem__(self, name: str) -> None:
        before = self.get(name)
        super().__delitem__(name)
        self.show(name, before)

    def show(self, name: str, before: Optional[nn.Module]) -> None:
        """Put what is here now in the place of what was before."""
        owner, child = self.owner(), self.get(name)
        if owner is None or owner._modules is not self:
            return
        if before is not None and vars(owner).get(name) is before:
            del vars(owner)[name]
        if child is not None and not _is_hidden(owner, name):
            vars(owner)[name] = child

    # From Python 3.11 on, these methods of OrderedDict do without the two above.

    def pop(self, name: str, *default: Any) -> Any:
        if default and name not in self:
            return default[0]
        child = self[name]
        del self[name]
        return child

    def popitem(self, last: bool = True) -> Tuple[str, Optional[nn.Module]]:
        for name in reversed(self) if last else iter(self):
            return name, self.pop(name)
        raise KeyError("there are no children")

    def clear(self) -> None:
        for name in list(self):
            del self[name]

    def __reduce__(self) -> Tuple[Any, ...]:
        return collections.OrderedDict, (), None, None, iter(self.items())


class _Walkable(nn.Module):
    """A module whose children also stand in its ``__dict__``."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self._modules = {}

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "_modules":
            super().__setattr__(name, value)
            return
        before, children = self._modules, _Children(value)
        children.owner = weakref.ref(self)
        vars(self)[name] = children
        for given, child in before.items():
            children.show(given, child)
        for given in children:
            children.show(given, None)

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._modules = self._modules


class DualGraphModule(_Walkable, fx.GraphModule):
    """A module with a graph for each mode; calling it runs the graph of the mode that it is in.

    Both graphs are compiled once, as two methods, and ``forward`` picks by ``self.training``. So
    everything follows the mode: ``train()`` and ``eval()`` of the module or of a parent, setting
    ``training`` by hand, ``torch.compile``, ``torch.jit.script``, copies and pickles.

    Args:
        root: the module from which the graphs' modules, parameters and buffers are taken; they are
            shared, under the same paths. The new module starts in its mode.
        train_graph, eval_graph: the graphs. Change them as any ``fx.Graph`` and call ``recompile()``.
        class_name: the name of the new module's class.

    Raises:
        ValueError: a graph refers to something that ``root`` does not have.
    """

    # TorchScript would compile properties; these are for Python alone.
    __jit_unused_properties__ = ["graph", "code", "_graph", "_code", "_boxed_call"]

    def __init__(
        self, root: nn.Module, train_graph: fx.Graph, eval_graph: fx.Graph, class_name: str = "GraphModule"
    ) -> None:
        # fx.GraphModule's own __init__ knows one graph; everything that it sets up is set up here.
        _Walkable.__init__(self)
        type(self).__name__ = class_name
        self.meta: Dict[str, Any] = {}
        self._tracer_cls = None
        self.training = root.training
        self.train_graph, self.eval_graph = train_graph, eval_graph
        train_graph.owning_module = eval_graph.owning_module = self
        for target in dict.fromkeys(node.target for node in self._fetching()):
            _share(root, self, target)
        self.recompile()

    @property
    def graph(self) -> fx.Graph:
        """The graph of the mode that the module is in; setting it recompiles."""
        return self.train_graph if self.training else self.eval_graph

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        setattr(self, "train_graph" if self.training else "eval_graph", graph)
        graph.owning_module = self
        self.recompile()

    @property
    def code(self) -> str:
        """The Python source of the mode that the module is in."""
        return self._featx_codes["train" if self.training else "eval"].src

    _graph, _code = graph, code  # what the methods of fx.GraphModule read

    def recompile(self) -> fx.graph.PythonCode:
        """Compile both graphs again, as is needed after one was changed; gives the active mode's code."""
        train = evaluation = _generate(self, self.train_graph)
        if not _are_alike(self.train_graph, self.eval_graph):
            evaluation = _generate(self, self.eval_graph)
        if _head(train.src) != _head(evaluation.src):
            raise ValueError(f"the graphs take different arguments: {_head(train.src)} {_head(evaluation.src)}")
        self._featx_codes = {"train": train, "eval": evaluation}
        same = (train.src, train.globals) == (evaluation.src, evaluation.globals)
        # torch.compile looks up the nodes of lines in these.
        self._lineno_map = getattr(train, "_lineno_map", None) if same else None
        self._prologue_start = getattr(train, "_prologue_start", None) if same else None
        if same:
            _define(self, "forward", train.src, train.globals)
        else:
            _define(self, "_train_forward", train.src, train.globals)
            _define(self, "_eval_forward", evaluation.src, evaluation.globals)
            _define(self, "forward", _dispatcher(train.src), train.globals)
        return self._featx_codes["train" if self.training else "eval"]

    def delete_all_unused_submodules(self) -> None:
        """Delete the submodules that neither graph uses."""
        used = {prefix for node in self._fetching() for prefix in _prefixes(node.target)}
        called = {node.target for node in self._fetching() if node.op == "call_module"}
        for path in [path for path, _ in self.named_modules() if path]:
            if path not in used and called.isdisjoint(_prefixes(path)):
                self.delete_submodule(path)

    def _fetching(self) -> Iterator[Any]:
        """The nodes whose targets are paths."""
        for node in itertools.chain(self.train_graph.nodes, self.eval_graph.nodes):
            if node.op in ("call_module", "get_attr"):
                yield node

    def __getstate__(self) -> Dict[str, Any]:
        # The last is what nn.Module.compile() made of this module, and would run this one in a copy.
        state = {name: vars(self)[name] for name in vars(self) if name not in ("_featx_codes", "_compiled_call_impl")}
        return {**state, "train_graph": _pack(self.train_graph), "eval_graph": _pack(self.eval_graph)}

    def __setstate__(self, state: Dict[str, Any]) -> None:
        graphs = {name: _unpack(state[name]) for name in ("train_graph", "eval_graph")}
        _Walkable.__setstate__(self, {**state, **graphs})
        for graph in graphs.values():
            graph.owning_module = self
        self.recompile()

    def __reduce__(self) -> Tuple[Any, ...]:
        # Each instance has a class of its own, made by fx.GraphModule; below it is the real one.
        return _blank, (type(self).__mro__[1], type(self).__name__), self.__getstate__()

    def __copy__(self) -> "DualGraphModule":
        new = _blank(type(self).__mro__[1], type(self).__name__)
        state = self.__getstate__().items()
        new.__setstate__({name: copy.copy(value) if isinstance(value, dict) else value for name, value in state})
        new._annotate(self)
        return new

    def __deepcopy__(self, memo: Dict[int, Any]) -> "DualGraphModule":
        memo[id(self)] = new = _blank(type(self).__mro__[1], type(self).__name__)
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        new._annotate(self)
        return new

    def _annotate(self, other: "DualGraphModule") -> None:
        """Take over what was noted at the nodes of a module with the same graphs, as shapes."""
        for mine, theirs in ((self.train_graph, other.train_graph), (self.eval_graph, other.eval_graph)):
            for node, noted in zip(mine.nodes, theirs.nodes):
                node.meta = copy.copy(noted.meta)


def _blank(base: Type[DualGraphModule], class_name: str) -> DualGraphModule:
    new = base.__new__(base)
    type(new).__name__ = class_name
    return new


class _Container(_Walkable):
    """Stands for a module that is not called itself, on the path of those that are."""

    def _get_name(self) -> str:
        return "Module"


def _share(root: nn.Module, new: nn.Module, target: str) -> None:
    """Put what lies at the path ``target`` of ``root`` at the same path of ``new``."""
    *path, name = target.split(".")
    for part in path:
        root, parent = _registered(root, part, target), new
        if parent._modules.get(part) is root:
            return  # a leaf that is there already holds the target
        if part not in parent._modules:
            parent._modules[part] = _Container()
            parent._modules[part].training = root.training  # type: ignore[union-attr]
        new = parent._modules[part]  # type: ignore[assignment]
    value = _registered(root, name, target)
    if isinstance(value, nn.Module):
        new._modules[name] = value
    elif isinstance(value, nn.Parameter):
        new._parameters[name] = value
    elif isinstance(value, torch.Tensor):
        new._buffers[name] = value
        if name in root._non_persistent_buffers_set:
            new._non_persistent_buffers_set.add(name)
    else:
        setattr(new, name, value)


def _at(root: nn.Module, target: str) -> Any:
    """What lies at the path ``target`` of ``root``."""
    return functools.reduce(lambda module, name: _registered(module, name, target), target.split("."), root)


def _registered(module: nn.Module, name: str, target: str) -> Any:
    """What a module holds under a name, also where an attribute of its class hides it."""
    try:
        return module._modules[name] if name in module._modules else getattr(module, name)
    except AttributeError:
        message = f"the model has nothing at the path {target!r}; a name in it may have a dot, which paths cannot have"
        raise ValueError(message) from None


def _are_alike(train: fx.Graph, evaluation: fx.Graph) -> bool:
    """Whether two graphs plainly have the same code, so that it is generated once; in doubt they have not."""
    return (
        len(train.nodes) == len(evaluation.nodes)
        and type(train._codegen) is type(evaluation._codegen)
        and repr(vars(train._codegen)) == repr(vars(evaluation._codegen))
        and all(map(_are_alike_nodes, train.nodes, evaluation.nodes))
    )


def _are_alike_nodes(node: fx.Node, other: fx.Node) -> bool:
    described, others = ((n.name, n.op, n.target, n.type) for n in (node, other))
    return described == others and _are_alike_arguments((node.args, node.kwargs), (other.args, other.kwargs))


def _are_alike_arguments(value: Any, other: Any) -> bool:
    if type(value) is not type(other):
        return False
    if isinstance(value, fx.Node):
        return bool(value.name == other.name)
    if isinstance(value, dict):
        value, other = list(value.items()), list(other.items())
    if isinstance(value, (list, tuple)):
        return len(value) == len(other) and all(map(_are_alike_arguments, value, other))
    return value is other or (type(value) in _PLAIN_TYPES and repr(value) == repr(other))


def _generate(module: DualGraphModule, graph: fx.Graph) -> fx.graph.PythonCode:
    """The source of a graph, in which no path is anything but a path, whatever its characters are."""
    original: Dict[str, Tuple[fx.Node, str]] = {}
    for node in graph.nodes:
        if node.name == "self":  # as that of a call of a module "self"; torch.fx would assign to it
            node.name = graph._graph_namespace.create_name("self_", None)
        if node.op in ("call_module", "get_attr") and not _is_plain(module, str(node.target)):
            original[f"_featx_path_{len(original)}_"] = (node, str(node.target))
    try:
        for stand_in, (node, _) in original.items():
            node.target = stand_in
        code = graph.python_code("self")
    finally:
        for node, target in original.values():
            node.target = target
    for stand_in, (_, target) in original.items():
        code.src = code.src.replace(f"self.{stand_in}", _fetch(module, target))
    if hasattr(graph._codegen, "pytree_info"):
        _, module._in_spec, module._out_spec = graph._codegen.pytree_info
        if module._out_spec is None:
            code.src = _without_unpacking(code.src)
    return code


def _without_unpacking(source: str) -> str:
    """The source that returns the output as it is: old torch unpacks it even where nothing packed it.

    >>> _without_unpacking("    return pytree.tree_unflatten({'a': x}, self._out_spec)")
    "    return {'a': x}"
    """
    return re.sub(r"^    return pytree\.tree_unflatten\((.*), self\._out_spec\)$", r"    return \1", source, flags=re.M)


def _is_plain(module: DualGraphModule, target: str) -> bool:
    """Whether torch.fx writes a path into source correctly."""
    return all(_is_plain_name(part) and not hidden for part, hidden in _parts(module, target))


def _parts(module: DualGraphModule, target: str) -> List[Tuple[str, bool]]:
    """The parts of a path, and whether something hides what is registered under each."""
    first, *rest = target.split(".")
    return [(first, _is_hidden(module, first)), *((part, hasattr(_Container, part)) for part in rest)]


def _is_hidden(module: nn.Module, name: str) -> bool:
    """Whether something of the module's class or of its own hides what is registered as ``name``."""
    if not any(name in registered for registered in (module._modules, module._parameters, module._buffers)):
        return False
    child = module._modules.get(name)
    return name in _METHODS or hasattr(type(module), name) or vars(module).get(name, child) is not child


_METHODS = ("_train_forward", "_eval_forward")  # what a DualGraphModule may get once its code is there


@functools.lru_cache(maxsize=4096)
def _is_plain_name(name: str) -> bool:
    # torch.fx puts what is no identifier between double quotes, and forgets that keywords are none.
    # Outside of ASCII, Python reads some identifiers as others.
    quotable = name.isprintable() and not set(name) & set('"\\')
    return name.isascii() and not keyword.iskeyword(name) and (name.isidentifier() or quotable)


def _fetch(module: DualGraphModule, target: str) -> str:
    """An expression for what lies at a path that torch.fx would not write correctly."""
    source = "self"
    for part, hidden in _parts(module, target):
        source = f"{source}.__getattr__({part!r})" if hidden else f"getattr({source}, {part!r})"
    return source


def _head(source: str) -> str:
    """The line that defines ``forward``."""
    return next(line for line in source.splitlines() if line.startswith("def forward("))


def _dispatcher(source: str) -> str:
    r"""The source of a ``forward`` with the signature of the given one that picks by ``self.training``.

    >>> print(_dispatcher("def forward(self, x, *rest):\n    return x"))
    def forward(self, x, *rest):
        if self.training:
            return self._train_forward(x, *rest)
        return self._eval_forward(x, *rest)
    """
    head = _head(source)
    function = ast.parse(head + " pass").body[0]
    assert isinstance(function, ast.FunctionDef), "torch.fx's source has a line that defines forward"
    given = function.args
    names = [argument.arg for argument in (*given.args[1:], *given.kwonlyargs)]
    names += [f"*{given.vararg.arg}"] if given.vararg else []
    names += [f"**{given.kwarg.arg}"] if given.kwarg else []
    call = ", ".join(names)
    return (
        f"{head}\n    if self.training:\n        return self._train_forward({call})\n"
        f"    return self._eval_forward({call})"
    )


_file_numbers = itertools.count()


def _define(module: DualGraphModule, method: str, source: str, names: Dict[str, Any]) -> None:
    """Make the ``forward`` of a source a method of the module's own class.

    Tracebacks and TorchScript find the source while the module lives.
    """
    filename = f"<featx {next(_file_numbers)}>"
    source = source.replace("def forward(", f"def {method}(", 1)
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    weakref.finalize(module, linecache.cache.pop, filename, None)
    namespace = dict(names)
    try:
        exec(compile(source, filename, "exec"), namespace)
    except SyntaxError as error:  # torch.fx does so for some concrete_args
        raise ValueError(f"torch.fx writes code for this model that is no Python: {error}") from error
    setattr(type(module), method, namespace[method])


class _Reference:
    """Stands for a node in the arguments of a packed graph."""

    def __init__(self, name: str) -> None:
        self.name = name


def _pack(graph: fx.Graph) -> Tuple[Any, ...]:
    """A graph as plain data that can be copied and pickled; torch's own way keeps one mode only."""

    def refer(value: Any) -> Any:
        return _Reference(value.name) if isinstance(value, fx.Node) else value

    nodes = [
        (
            node.op,
            _qualified(node.target) if node.op == "call_function" else node.target,
            map_aggregate(node.args, refer),
            map_aggregate(node.kwargs, refer),
            node.name,
            node.type,
        )
        for node in graph.nodes
    ]
    return nodes, graph._codegen


def _unpack(packed: Tuple[Any, ...]) -> fx.Graph:
    graph = fx.Graph()
    nodes: Dict[str, fx.Node] = {}

    def resolve(value: Any) -> Any:
        return nodes[value.name] if isinstance(value, _Reference) else value

    described, graph._codegen = packed
    for op, target, args, kwargs, name, type_expr in described:
        target = _named(target[0]) if isinstance(target, tuple) else target
        args, kwargs = map_aggregate(args, resolve), map_aggregate(kwargs, resolve)
        nodes[name] = graph.create_node(op, target, args, kwargs, name, type_expr)
    return graph


def _qualified(function: Any) -> Any:
    """``(name,)`` for a function that can be found by its name: pickle itself cannot find all of torch's."""
    try:
        name = _get_qualified_name(function)
        return (name,) if _named(name) is function else function
    except (AttributeError, ImportError, RuntimeError):
        return function


def _named(name: str) -> Any:
    """``"torch.nn.functional.relu"`` -> the function."""
    if "." not in name:
        return getattr(builtins, name)
    path, *rest = name.split(".")
    found = importlib.import_module(path)
    for part in rest:
        path = f"{path}.{part}"
        found = getattr(found, part) if hasattr(found, part) else importlib.import_module(path)
    return found


# ------------------------------------------------------------------------------------- guards

_tracing = threading.RLock()  # torch.fx replaces methods of nn.Module for the whole process


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator["_Keeper"]:
    """Leave the model and the process's random and gradient state as they were, whatever happens inside."""
    _check_model(model)
    grad = torch.set_grad_enabled(torch.is_grad_enabled())
    with _tracing, torch.random.fork_rng(devices=[]), grad, _without_fast_attention():
        python_random, keeper = random.getstate(), _Keeper(model)
        restore = keeper.note()
        try:
            yield keeper
        finally:
            restore()
            keeper.restore_tensors()
            random.setstate(python_random)


@contextlib.contextmanager
def _without_fast_attention() -> Iterator[None]:
    """Let nn.TransformerEncoderLayer take the way that can be traced, where torch (2.5, not 2.2) lets one choose."""
    switch = getattr(torch.backends, "mha", None)
    if switch is None:
        yield
        return
    fast = switch.get_fastpath_enabled()
    switch.set_fastpath_enabled(False)
    try:
        yield
    finally:
        switch.set_fastpath_enabled(fast)


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model takes a torch.nn.Module, not {model!r}")


class _Keeper:
    """Knows what there is to a model that a forward or a change of mode may touch, and restores it.

    That is: all attributes, what lists, dicts, sets and deques among them hold, however deep, the
    values of buffers, since what a forward counts there it also counts while tracing, and which
    parameters require gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.modules())
        self._containers = _find_containers(self.modules)
        self._gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._buffers = [
            (buffer, buffer._version, content)
            for buffer in model.buffers()
            if not (nn.parameter.is_lazy(buffer) or buffer.is_inference()) and (content := _copied(buffer)) is not None
        ]

    def note(self) -> Callable[[], None]:
        """Note how the attributes are now; what comes back restores them."""
        return _note(self._containers)

    def restore_tensors(self) -> None:
        """Give the buffers the values and the parameters the ``requires_grad`` that they had at first."""
        for parameter, requires_grad in self._gradients:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
        with torch.no_grad():
            for buffer, version, content in self._buffers:
                if buffer._version != version or _differs(buffer, content):
                    buffer.copy_(content)


def _note(containers: Sequence[Any]) -> Callable[[], None]:
    """Note what dicts, lists, sets and deques hold; what comes back restores that."""
    empty = [container for container in containers if not container]  # nearly all are hooks of nobody
    filled = [container for container in containers if container]
    sizes, items = list(map(len, filled)), _flat(filled)

    def restore() -> None:
        for container in filter(None, empty):
            container.clear()
        if sizes == list(map(len, filled)) and all(map(operator.is_, _flat(filled), items)):
            return
        noted = iter(items)
        for container, size in zip(filled, sizes):
            content: Any = list(itertools.islice(noted, size))
            if isinstance(container, dict):
                content = dict(zip(content, list(itertools.islice(noted, size))))
            if len(container) != size or not all(map(operator.is_, _flat([container]), _flat([content]))):
                container.clear()
                container.update(content) if hasattr(container, "update") else container.extend(content)

    return restore


def _copied(buffer: torch.Tensor) -> Optional[torch.Tensor]:
    """The values of a buffer; None if torch cannot copy them, as those of less than a byte."""
    try:
        return buffer.detach().clone()
    except RuntimeError:  # in new torch NotImplementedError, which is one
        return None


def _differs(buffer: torch.Tensor, content: torch.Tensor) -> bool:
    """Whether values changed that the version counter does not know of, as through ``data``; NaN equals NaN."""
    if type(buffer) is not torch.Tensor or buffer.layout is not torch.strided or buffer.is_meta:
        return False
    try:
        return not (torch.equal(buffer, content) or bool(((buffer == content) | (buffer != buffer)).all()))
    except RuntimeError:  # of types that cannot be compared
        return False


_CONTAINERS = frozenset(
    [dict, list, set, tuple, collections.OrderedDict, collections.defaultdict, collections.deque, _Children]
)


def _find_containers(modules: Iterable[nn.Module]) -> List[Any]:
    """The attributes of all modules as dicts, and the containers among them, however deep."""
    waiting: List[Any] = list(map(vars, modules))
    found: Dict[int, Any] = dict(zip(map(id, waiting), waiting))
    while waiting:
        held = itertools.chain.from_iterable(c.values() if isinstance(c, dict) else c for c in waiting)
        inside = {id(item): item for item in held if type(item) in _CONTAINERS}
        waiting = [container for key, container in inside.items() if container and key not in found]
        found.update(inside)
    return [container for container in found.values() if type(container) is not tuple]


def _flat(containers: Iterable[Any]) -> List[Any]:
    """What the containers hold, of dicts keys and then values, in one list: many would busy the garbage collector."""
    return list(
        itertools.chain.from_iterable(
            itertools.chain(container, container.values()) if isinstance(container, dict) else container
            for container in containers
        )
    )


# ------------------------------------------------------------------------------- command line


def _main(arguments: Optional[Sequence[str]] = None) -> int:
    """``python -m featx``; gives the exit code.

    0, 1 if ``--check`` finds a difference, 2 for wrong input, 130 if it was interrupted.
    """
    parser = _parser()
    options = parser.parse_intermixed_args(arguments)
    with warnings.catch_warnings(record=True) as caught:
        try:
            _check_options(options)
            sys.path.insert(0, os.getcwd())
            code, text = _run(options)
            _print(text)
        except KeyboardInterrupt:
            return 130
        except BaseException as error:  # the model is anybody's code: it may even exit
            parser.error(_in_one_line(error) + _advice(error))
    for warning in caught:
        _say(f"featx: warning: {_in_one_line(warning.message)}\n")
    return code


def _advice(error: BaseException) -> str:
    """What an error that speaks of arguments means on the command line."""
    if isinstance(error, SystemExit):
        return " (SystemExit): the model's own code wants to exit"
    if isinstance(error, UntraceableError) and error.path:
        return " On the command line, --auto-leaf makes leaves of such classes."
    if isinstance(error, NodeNameError) and "graph only" in str(error):
        return " On the command line, --train chooses the train graph, and its absence the eval graph."
    return ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _say(f"featx: error: {_in_one_line(message)}\n")  # which knows of streams that are closed
        self.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("featx", description="List the nodes of a model, or compute the values of some of them.")
    parser.add_argument("model", metavar="PACKAGE.MODULE:CALLABLE", help="what builds the model")
    parser.add_argument("queries", nargs="*", metavar="QUERY[=KEY]", help="the nodes to compute; none: list them all")
    group = parser.add_argument_group("the model")
    group.add_argument("--kwargs", type=_json_object, default={}, metavar="JSON", help="arguments of the callable")
    group.add_argument("--checkpoint", type=_given, metavar="FILE", help="load this state dict (weights_only=True)")
    group.add_argument("--device", type=_given, default="cpu", help="where to compute, such as cuda")
    group.add_argument("--train", action="store_true", help="use train mode in place of eval mode")
    group.add_argument("--exact", action="store_true", help="give what each module or operation itself returned")
    group.add_argument("--auto-leaf", action="store_true", help="make leaves of the classes that cannot be traced")
    group = parser.add_argument_group("the input, one tensor")
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--image", type=_given, metavar="FILE", help="a photograph, as torchvision's classifiers see it"
    )
    source.add_argument("--input", type=_shape, metavar="1,3,224,224", help="random numbers in this shape")
    group = parser.add_argument_group("the output")
    group.add_argument("--json", action="store_true", help="for machines: the names of both modes, or the features")
    group.add_argument(
        "--check", type=_given, metavar="FILE", help="compare the names with such a file; 1 if they differ"
    )
    group.add_argument("--save", type=_given, metavar="FILE.pt", help="save the extractor with torch.save")
    group.add_argument("--plot", type=_given, metavar="FILE.png", help="draw the features")
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def _json_object(text: str) -> Dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'takes a JSON object such as {{"num_classes": 10}}, not {text!r}')
    return value


def _given(text: str) -> str:
    if not text:  # as from a variable of the shell that is not set
        raise argparse.ArgumentTypeError("takes a value that is not empty")
    return text


def _shape(text: str) -> List[int]:
    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError:
        sizes = [-1]
    if not all(0 <= size < 2**31 for size in sizes):
        raise argparse.ArgumentTypeError(f"takes sizes such as 1,3,224,224, not {text!r}")
    return sizes


def _check_options(options: argparse.Namespace) -> None:
    """Refuse what does not go together before anything takes time."""
    has_input = bool(options.image or options.input)
    if options.check and (options.queries or options.json):
        raise ValueError("--check compares all names and takes no queries and no --json")
    if options.queries and not (has_input or options.save):
        raise ValueError("computing features needs --image FILE or --input SHAPE")
    for option in ("save", "plot"):
        if getattr(options, option) and not options.queries:
            raise ValueError(f"--{option} needs at least one query")
    if options.plot and not has_input:
        raise ValueError("--plot needs --image FILE or --input SHAPE")
    if options.plot:
        known = _figure().canvas.get_supported_filetypes()
        if os.path.splitext(options.plot)[1][1:] not in known:
            raise ValueError(f"--plot takes a file of a type among {', '.join(known)}, not {options.plot!r}")


def _run(options: argparse.Namespace) -> Tuple[int, str]:
    """The exit code and what is to be printed."""
    with _progress("building the model"):
        torch.manual_seed(0)  # for the weights of a model that is built without any
        model = _build(options.model, options.kwargs)
        if options.checkpoint:
            _load_checkpoint(model, options.checkpoint)
        model.to(options.device).train(options.train)
        image = _read_image(options.image) if options.image else None
        inputs = torch.rand(*options.input) if options.input else image
        inputs = None if inputs is None else inputs.to(options.device)
    if options.queries:
        return 0, _features(model, inputs, options)
    if options.check or options.json:
        return _names(model, options)
    return 0, _table(model, inputs, options)


def _build(name: str, kwargs: Dict[str, Any]) -> nn.Module:
    module, _, attribute = name.partition(":")
    if not (module and attribute):
        raise ValueError(f"the model is given as PACKAGE.MODULE:CALLABLE, not {name!r}")
    build: Any = importlib.import_module(module)
    for part in attribute.split("."):
        build = getattr(build, part, None)
    if not callable(build):
        raise ValueError(f"{module} has no callable {attribute!r}")
    model = build(**kwargs)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} gives {type(model).__name__}, not a torch.nn.Module")
    return model


def _load_checkpoint(model: nn.Module, path: str) -> None:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{path} cannot be loaded: {str(error).partition('. ')[0] or type(error).__name__}") from error
    held = state.items() if isinstance(state, dict) else [("", None)]
    if not all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in held):
        keys = f" with the keys {_shorten(list(map(str, state)))}" if isinstance(state, dict) else ""
        raise ValueError(f"{path} holds a {type(state).__name__}{keys}; --checkpoint takes a state dict")
    model.load_state_dict(state)


def _read_image(path: str) -> torch.Tensor:
    """A photograph as torchvision's classification presets see it: (1, 3, 224, 224), normalized."""
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("--image needs Pillow: python3 -m pip install pillow") from None
    with Image.open(path) as file:
        image = file.convert("RGB")
    spare = [max(0, (side - 16 * min(image.size)) // 2) for side in image.size]  # what is off the middle of a strip
    image = image.crop((spare[0], spare[1], image.width - spare[0], image.height - spare[1]))
    # https://pytorch.org/vision/stable/models.html: the short side to 256, the middle 224 x 224.
    scale = 256 / min(image.size)
    width, height = (max(256, int(side * scale)) for side in image.size)
    left, top = (width - 224) // 2, (height - 224) // 2
    image = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + 224, top + 224))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(224, 224, 3)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((pixels / 255 - mean) / std).permute(2, 0, 1)[None]


def _features(model: nn.Module, inputs: Optional[torch.Tensor], options: argparse.Namespace) -> str:
    """The features' keys, shapes, dtypes and statistics; saves the extractor and draws the features if asked to."""
    return_nodes: Dict[str, str] = {}
    for query, _, key in (given.partition("=") for given in options.queries):
        if query in return_nodes:
            raise ValueError(f"the query {query!r} was given twice")
        return_nodes[query] = key or query
    with _progress("tracing"):
        extractor = _extractor(model, return_nodes, options)
    saved = io.BytesIO()
    if options.save:
        torch.save(extractor, saved)
    found: List[Dict[str, Any]] = []
    if inputs is not None:
        with _progress("computing"), torch.no_grad():
            features = [item for key, value in extractor(inputs).items() for item in _items(key, value)]
            found = [_statistics(key, value) for key, value in features]
        if options.plot:
            _plot(features, options.plot)
    if options.save:  # now that all else is done
        with open(options.save, "wb") as file:
            file.write(saved.getbuffer())
    if options.json:
        return "[{}]".format(",".join(f"\n{json.dumps(row)}" for row in found) + "\n")
    if inputs is None:
        return f"saved as {options.save}; load it with torch.load({options.save!r}, weights_only=False)"
    header = ("key", "shape", "dtype", "mean", "std", "min", "max")
    shown = [{"shape": row["value"], **row} if "value" in row else row for row in found]
    return _align([header, *([_cell(row.get(column)) for column in header] for row in shown)])


def _extractor(model: nn.Module, return_nodes: Dict[str, str], options: argparse.Namespace) -> nn.Module:
    """An extractor for both modes; where the other mode lacks a query, for the one that is asked for."""

    def create(train: ReturnNodes, evaluation: ReturnNodes) -> nn.Module:
        return create_feature_extractor(
            model, None, train, evaluation, None, True, exact=options.exact, auto_leaf=options.auto_leaf
        )

    mode = "train" if options.train else "eval"
    try:
        return create(return_nodes, return_nodes)
    except NodeNameError as error:
        if error.mode == mode:
            raise
    if options.save:
        _warn(f"what was saved returns features in {mode} mode only: the other mode lacks some of the queries")
    return create(return_nodes, []) if options.train else create([], return_nodes)


def _items(key: str, value: Any) -> Iterator[Tuple[str, Any]]:
    """A feature, or what is inside of one that is nested, under its key and place."""
    pairs: List[Tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        pairs = list(value.items())
    elif isinstance(value, (list, tuple)):
        pairs = list(enumerate(value))
    for place, item in pairs:
        yield from _items(f"{key}[{place}]", item)
    if not pairs:
        yield key, value


def _statistics(key: str, value: Any) -> Dict[str, Any]:
    if not isinstance(value, torch.Tensor):
        return {"key": key, "value": _in_one_line(value)}
    row: Dict[str, Any] = {"key": key, "shape": list(value.shape), "dtype": str(value.dtype).replace("torch.", "")}
    if not value.is_meta:
        numbers = _numbers(value).double() if value.numel() else torch.tensor(math.nan)
        found = {"mean": numbers.mean(), "std": numbers.std(unbiased=False), "min": numbers.min(), "max": numbers.max()}
        row.update((name, float(number) if number.isfinite() else None) for name, number in found.items())
    return row


def _numbers(value: torch.Tensor) -> torch.Tensor:
    """The values of any tensor as real numbers, one for each."""
    value = value.dequantize() if value.is_quantized else value.abs() if value.is_complex() else value
    return value if value.layout is torch.strided else value.to_dense()


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return "x".join(map(str, value)) or "scalar"
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _figure(rows: int = 1) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("--plot needs matplotlib: python3 -m pip install matplotlib") from None
    return Figure(figsize=(9, 1.3 * rows))


def _plot(features: Sequence[Tuple[str, Any]], path: str) -> None:
    """Draw for each feature of the first input up to eight maps; vectors as curves, other values not at all."""
    tensors = [(key, value) for key, value in features if isinstance(value, torch.Tensor) and not value.is_meta]
    drawn = [(key, _maps(value[0])) for key, value in tensors if value.dim() > 1 and value.numel()]
    if not drawn:
        raise ValueError("--plot has nothing to draw: no feature has a batch dimension and another one")
    figure = _figure(len(drawn))
    grid = figure.subplots(len(drawn), 8, squeeze=False)
    figure.subplots_adjust(0.01, 0.01, 0.99, 1 - 0.2 / len(drawn), 0.08, 0.25)
    for row, (key, maps) in zip(grid, drawn):
        row[0].set_title(key, loc="left", fontsize=8, parse_math=False)
        for axes, values in itertools.zip_longest(row, maps):
            axes.set_axis_off()
            if values is not None and values.dim() == 2:
                axes.imshow(values, aspect="equal" if values.shape[0] == values.shape[1] else "auto")
            elif values is not None:
                axes.plot(values, linewidth=0.5)
    figure.savefig(path, dpi=150)


def _maps(value: torch.Tensor) -> List[torch.Tensor]:
    """Up to eight pictures of one input's feature: channels, the middle frame of a video, or all of a matrix."""
    value = _numbers(value).float().cpu().squeeze()
    value = value if value.dim() else value[None]
    while value.dim() > 3:
        value = value[:, value.shape[1] // 2]
    if value.dim() < 3:
        return [value]
    if value.shape[0] == value.shape[1] != value.shape[2]:  # such as Swin's, whose channels come last
        value = value.permute(2, 0, 1)
    return list(value[:8])


def _names(model: nn.Module, options: argparse.Namespace) -> Tuple[int, str]:
    """The names of both modes as JSON, or how they differ from those in a file."""
    with _progress("tracing"):
        names = get_graph_node_names(model, None, True, exact=options.exact, auto_leaf=options.auto_leaf)
    found = {"model": options.model, "exact": options.exact, **names._asdict()}
    if not options.check:
        return 0, json.dumps(found, indent=1)
    try:
        with open(options.check, encoding="utf-8-sig") as file:
            expected = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{options.check} is no JSON: {error}") from error
    if not isinstance(expected, dict) or not all(isinstance(expected.get(mode), list) for mode in names._fields):
        raise ValueError(f"{options.check} holds no names; --json writes such a file")
    if bool(expected.get("exact")) != options.exact:
        raise ValueError(f"{options.check} was written with{'out' if options.exact else ''} --exact")
    lines: List[str] = []
    for mode in names._fields:
        old, new = list(map(str, expected[mode])), found[mode]
        lines += difflib.unified_diff(
            old, new, f"{mode}: {options.check}", f"{mode}: {options.model}", n=1, lineterm=""
        )
    return bool(lines), "\n".join(lines) or f"all names are those of {options.check}"


def _table(model: nn.Module, inputs: Optional[torch.Tensor], options: argparse.Namespace) -> str:
    """All nodes: name, operation, module class or function, shape where there is an input, notes."""
    with _progress("tracing"), _unchanged(model) as keeper:
        tracers = _trace_both(keeper, model, exact=options.exact, auto_leaf=options.auto_leaf)
        notes = {mode: _notes(tracer) for mode, tracer in tracers.items()}
        whole = DualGraphModule(model, tracers["train"].graph, tracers["eval"].graph)
    mode, other = ("train", "eval") if options.train else ("eval", "train")
    with _progress("computing"):
        shapes = {} if inputs is None else _shapes(whole, inputs)
    rows = [("name", "operation", "target", "shape", "note")]
    for shown, compared in ((mode, other), (other, mode)):
        elsewhere = set(tracers[compared].names)
        for node, name in tracers[shown].node_to_qualname.items():
            if shown == mode or name not in elsewhere:
                note = ", ".join(([] if name in elsewhere else [f"{shown} only"]) + notes[shown].get(node, []))
                rows.append((name, node.op, _target_name(whole, node), shapes.get(node, ""), note))
    return _align(rows)


def _notes(tracer: NodePathTracer) -> Dict[fx.Node, List[str]]:
    """What each node really is and what overwrites it, if all are asked for; nothing with exact=True."""
    notes: Dict[fx.Node, List[str]] = collections.defaultdict(list)
    if tracer._exact:
        return notes
    names = tracer.node_to_qualname
    for node, name in names.items():
        if _misleads(tracer, name, node):
            notes[node].append(f"really {_described(tracer, node)}".replace(" the ", " "))
    for (node, _), writer in _plan(tracer, [_Feature(node, node) for node in names]).overwritten.items():
        notes[node].append(f"overwritten by {names[writer]}")
    return notes


def _target_name(model: nn.Module, node: fx.Node) -> str:
    """The class of a called module, the name of a function or method, the path of an attribute."""
    if node.op == "call_module":
        return type(_at(model, str(node.target))).__name__
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _shapes(model: DualGraphModule, inputs: torch.Tensor) -> Dict[fx.Node, str]:
    shapes: Dict[fx.Node, str] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, torch.Tensor):
                shapes[n] = _cell(list(value.shape))
            return value

        def call_function(self, target: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Any:
            # The lists of a graph refuse to be changed, which some functions of torchvision try.
            plain = (list(value) if isinstance(value, list) else value for value in args)
            return super().call_function(target, tuple(plain), kwargs)

    with torch.no_grad():
        Recorder(model).run(inputs)
    return shapes


def _align(rows: Sequence[Sequence[str]]) -> str:
    """Columns; on a terminal they fit its width, and the header stands out."""
    rows = [[_printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    if _is_terminal(sys.stdout):
        free = shutil.get_terminal_size().columns - 2 * (len(widths) - 1)
        weights = [1, *[2] * (len(widths) - 2), 1]  # the first and the last column say most
        while sum(widths) > free and max(widths) > 8:
            widest = max(range(len(widths)), key=lambda column: widths[column] * weights[column])
            widths[widest] -= 1
    lines = ["  ".join(_fit(cell, width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    if _is_terminal(sys.stdout) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
        lines[0] = f"\033[1m{lines[0]}\033[0m"
    return "\n".join(lines)


def _fit(cell: str, width: int) -> str:
    if len(cell) > width:
        cell = f"{cell[: width // 2 - 1]}…{cell[-(width - width // 2) :]}"  # both ends of a path matter
    return cell.ljust(width)


def _printable(text: str) -> str:
    """The text without power over a terminal."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _is_terminal(stream: Any) -> bool:
    return stream is not None and stream.isatty()  # a stream that was closed is None


def _print(text: str) -> None:
    if hasattr(sys.stdout, "reconfigure"):  # names may have characters that the encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        print(text, flush=True)
    except BrokenPipeError:  # whoever read this has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _say(text: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(text)
        sys.stderr.flush()


def _in_one_line(message: Any) -> str:
    """The message, or the type of an error that has none, without line breaks and what torch adds of its own inside."""
    try:
        text = str(message)
    except Exception:  # anybody's code again
        text = ""
    for appendix in ("\nException raised from", "\n\nWhile executing"):
        text = text.partition(appendix)[0]
    return _printable(" ".join(text.split())) or type(message).__name__


@contextlib.contextmanager
def _progress(doing: str) -> Iterator[None]:
    """On a terminal, say on stderr what takes longer than two seconds; also say there what the model prints."""
    done = threading.Event()
    shown = threading.Event()

    def show() -> None:
        seconds = 2
        while not done.wait(1 if shown.is_set() else 2):
            shown.set()
            _say(f"\r{doing} … {seconds} s")
            seconds += 1

    thread = threading.Thread(target=show, daemon=True)
    if _is_terminal(sys.stderr) and os.environ.get("TERM") != "dumb":
        thread.start()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        done.set()
        if thread.ident is not None:
            thread.join()
        if shown.is_set():
            _say("\r\033[K")


if __name__ == "__main__":  # run it as a module of its own name, so that what it saves can be loaded
    if __spec__:
        _module = importlib.import_module(__spec__.name)
    else:
        _name = os.path.splitext(os.path.basename(__file__))[0]
        _spec = importlib.util.spec_from_file_location(_name, __file__)
        assert _spec, "a file of Python can be loaded"
        _module = sys.modules[_name] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(_module)  # type: ignore[union-attr]
    sys.exit(_module._main())
