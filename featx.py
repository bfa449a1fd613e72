# SPDX-FileCopyrightText: 2026 The featx developers
# SPDX-License-Identifier: BSD-3-Clause
# To vendor featx, copy this one file; it needs the standard library and torch, 1.13 or newer.
"""Feature extraction for PyTorch in one file.

featx traces a model with ``torch.fx``, gives every operation a stable name, and cuts from the model an extractor that
returns the values asked for and runs nothing that they do not need.

>>> import torch, featx
>>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
>>> featx.get_graph_node_names(model).eval
['input', '0', '1', '2']
>>> extractor = featx.create_feature_extractor(model, {"1": "hidden"})
>>> {key: tuple(value.shape) for key, value in extractor(torch.rand(3, 4)).items()}
{'hidden': (3, 8)}

How names are made:

1. A call of a leaf module is named by the module's path; any other node by its scope (the path of the module whose
   forward is running), a dot and the name that torch.fx gave it.
2. A trailing ``_<digits>`` is removed, since torch.fx counts over the whole graph.
3. If that name, or a numbered form of it, was given out before, the number after the most recently given one is
   appended: ``relu``, ``relu_1``, ``relu_2``.
4. No name is given twice: where rule 3 would repeat one, the next free number is taken.
5. With ``exact=True`` the paths of all modules count as given out from the start. The first call of a module has its
   path as name, as it is; rules 3 and 4 name the others. Buffers are nodes.

Names, values and keys are those of ``torchvision.models.feature_extraction``, but where that returns something else
than was asked for, runs more than is needed, crashes, or changes the caller's model; the README lists each difference.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import difflib
import functools
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
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Sequence, Union

import torch
from torch import fx, nn

# Private to torch; tried on 1.13.1, 2.2.2, 2.5.1 and 2.14.1.
from torch.fx._symbolic_trace import _assert_is_none, _Patcher
from torch.fx.node import _get_qualified_name, map_aggregate, map_arg
from torch.jit import is_scripting  # type: ignore[attr-defined]
from torch.jit._recursive import create_script_module, infer_methods_to_compile
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

__version__ = "0.1.0"
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


# ---- errors


class NodeNameError(ValueError):
    """A query that matches no node.

    Attributes:
        query: what was asked for.
        mode: ``"train"`` or ``"eval"``, the mode whose graph lacks it.
        suggestions: the closest names, best first.
        hint: why it may have been expected to match, and what to do, or ``""``.
    """

    def __init__(self, query: str, mode: str, suggestions: Sequence[str] = (), hint: str = "") -> None:
        super().__init__(query, mode, suggestions, hint)
        self.query, self.mode, self.suggestions, self.hint = query, mode, list(suggestions), hint

    def __str__(self) -> str:
        closest = f" The closest: {', '.join(map(repr, self.suggestions))}." if self.suggestions else ""
        return (
            f"no node of the {self.mode} graph is named {self.query!r} or lies below it."
            f"{self.hint and ' ' + self.hint}{closest} get_graph_node_names(model) lists all names."
        )


class UntraceableError(fx.proxy.TraceError):
    """A model that torch.fx cannot trace; chained from the original error.

    Attributes:
        path: the path of the module whose forward failed, ``""`` for the model itself.
        module_type: the class of that module.
        reason: what happened, and in which line of the model's source.
        traceable: the children that can be traced, where the model's own forward failed.
    """

    def __init__(
        self, path: str, module_type: type[nn.Module], reason: str = "", traceable: Sequence[str] = ()
    ) -> None:
        super().__init__(path, module_type, reason, traceable)
        self.path, self.module_type, self.reason, self.traceable = path, module_type, reason, list(traceable)

    def __str__(self) -> str:
        name = self.module_type.__name__
        where = f"{name} at {self.path!r}" if self.path else f"the model's own forward ({name})"
        leaf = f" leaf_modules=[{name}] makes each {name} one operation (non_leaf_modules win);" if self.path else ""
        children = f"\nIts children {', '.join(self.traceable)} can be traced by themselves." if self.traceable else ""
        return (
            f"torch.fx cannot trace {where}: {self.reason}\nWhat helps, in tracer_kwargs:{leaf}"
            " autowrap_functions=(function,) does so with the calls of a function of your own (builtins such as int and"
            " len have to be called inside one). concrete_args={'argument': value} fixes an argument that decides which"
            f" way the code goes.{children}"
        )


class FeatureWarning(UserWarning):
    """A feature is something else than its query says, or than the model computes."""


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
) -> NodeNames:
    """List the names of a model's nodes, in execution order, in train mode and in eval mode.

    Args:
        model: any module that torch.fx can trace. It comes back as it was.
        tracer_kwargs: arguments of :class:`NodePathTracer`. What is given for ``leaf_modules`` and
            ``autowrap_modules`` is added to the defaults: ``math`` and, if the process has imported
            it, ``torchvision.ops``.
        suppress_diff_warning: do not warn when the two modes differ.
        concrete_args: values for arguments of ``forward`` that are fixed while tracing.
        exact: name by rule 5 as well: the path of a module means that module. A forward that draws
            random numbers, or changes the grad mode or autocast, is not traceable.
        auto_leaf: where the forward of a submodule is not traceable, make its class a leaf and try
            again; a warning lists the classes.

    Returns:
        A named tuple ``(train, eval)`` of two lists of strings.

    Raises:
        UntraceableError: torch.fx cannot trace the model.
        ValueError: ``concrete_args`` has an argument that ``forward`` lacks.
        TypeError: an argument is something else than it should be.

    >>> get_graph_node_names(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())).train
    ['input', '0', '1']
    """
    with _unchanged(model) as restore:
        tracers = _trace_both(restore, model, tracer_kwargs, concrete_args, exact, auto_leaf)
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
) -> DualGraphModule:
    """Cut from a model a module that returns intermediate values and runs only what they need.

    A query matches the names that equal it or begin with it and a dot; its value is that of the
    last such node. The query ``"output"``, where no node has that name, is the model's own output.

    By default names and values are torchvision's, and a :class:`FeatureWarning` says where a feature
    is something else than its query says, is overwritten in place, or is not what the model computes.
    ``exact=True`` gives what each module or operation returned in eager execution, or raises an error.

    Args:
        model: any module that torch.fx can trace. It comes back as it was; the extractor shares
            its parameters.
        return_nodes: the queries for both modes: a mapping query -> key, any iterable of queries,
            which are their own keys, or one query.
        train_return_nodes, eval_return_nodes: in place of ``return_nodes``, queries for each mode.
        tracer_kwargs, suppress_diff_warning, concrete_args, auto_leaf: as in :func:`get_graph_node_names`.
        exact: a query that is the path of a module gives what its first call returned, in its own
            structure; ``path_1`` is the second call. What may be overwritten later is cloned before.

    Returns:
        A module with the model's signature that returns a dict key -> value in execution order. It
        starts in the model's mode and follows ``train()`` and ``eval()``.

    Raises:
        NodeNameError: a query matches no node.
        UntraceableError: torch.fx cannot trace the model.
        ValueError: two queries have one key, the queries are given in no way or in two, ``forward``
            lacks one of ``concrete_args``, or what a module returned is nothing that a graph can hold.
        TypeError: an argument is something else than it should be.

    >>> extractor = create_feature_extractor(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), ["0", "output"])
    >>> {key: tuple(value.shape) for key, value in extractor(torch.rand(2, 4)).items()}
    {'0': (2, 8), 'output': (2, 8)}
    """
    # 1. What is asked for: for each mode query -> key.
    keys = _queries_by_mode(return_nodes, train_return_nodes, eval_return_nodes)
    with _unchanged(model) as restore:
        # 2. Trace in both modes, and find the value of each query.
        tracers = _trace_both(restore, model, tracer_kwargs, concrete_args, exact, auto_leaf)
        features = {mode: _find_features(tracers, mode, keys[mode]) for mode in tracers}
        # 3. Cut each graph down to what its features need.
        hazards = [_prune(tracers[mode], features[mode], keys[mode]) for mode in tracers]
        # 4. Make one module of the two graphs.
        extractor = DualGraphModule(model, tracers["train"].graph, tracers["eval"].graph, type(model).__name__)
    # 5. Say where the modes differ, and which features are not what they seem.
    if not suppress_diff_warning:
        _warn_graph_differences(tracers["train"], tracers["eval"])
    _warn_hazards(*hazards)
    _warn_baked(tracers)
    return extractor


# ---- tracers


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
        leaf_modules: Iterable[type[nn.Module]] = (),
        non_leaf_modules: Iterable[type[nn.Module]] = (),
        **kwargs: Any,
    ) -> None:
        self.leaf_modules, self.non_leaf_modules = tuple(leaf_modules), tuple(non_leaf_modules)
        super().__init__(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether calls of ``m`` are recorded as one operation."""
        if isinstance(m, self.non_leaf_modules):
            return False
        return isinstance(m, self.leaf_modules) or super().is_leaf_module(m, module_qualified_name)


class _Feature(NamedTuple):
    """What can be asked for: a node, or nodes and constants in the structure in which a module returned them."""

    value: Any
    after: fx.Node | None  # the last node that had run when it was there


class NodePathTracer(LeafModuleAwareTracer):
    """A tracer that names each node after the place in the model where it was recorded.

    Args:
        exact: name by rule 5 as well: the path of a module means that module.
        args, kwargs: as for :class:`LeafModuleAwareTracer`.

    Attributes:
        node_to_qualname: node -> name, in execution order. Constants that are arguments and the
            graph's output have no name.
        current_module_qualname: the scope, the path of the module whose forward is running.

    >>> tracer = NodePathTracer()
    >>> graph = tracer.trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU()))
    >>> list(tracer.node_to_qualname.values())
    ['input', '0', '1']
    """

    def __init__(self, *args: Any, exact: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.node_to_qualname: dict[fx.Node, str] = {}
        self.current_module_qualname = ""
        self.proxy_buffer_attributes = exact or self.proxy_buffer_attributes
        self._exact = exact
        self._namer = _Namer()
        self._returned: dict[str, _Feature] = {}  # the first call of a module -> what it returned
        self._baked: dict[Any, dict[str, str]] = {}  # node -> the warnings of what tracing loses

    @property
    def names(self) -> list[str]:
        """The names of the nodes, in execution order."""
        return list(self.node_to_qualname.values())

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace a module; see ``torch.fx.Tracer.trace``."""
        self._training = getattr(root, "training", False)
        if self._exact and isinstance(root, nn.Module):
            self._namer = _Namer(path for path, _ in root.named_modules(remove_duplicate=False) if path)
        watch = self._watch = _Watch(self)
        with _Patcher() as patcher, watch:
            for kind in (torch.enable_grad, torch.set_grad_enabled):  # where gradients are enabled no state shows it
                patcher.patch_method(kind, "__enter__", watch.counting(kind.__enter__, 1))
                patcher.patch_method(kind, "__exit__", watch.counting(kind.__exit__, -1))
            if "forward" in vars(root):
                code = getattr(root.forward, "__code__", None)
                where = f" ({code.co_filename}, line {code.co_firstlineno})" if code else ""
                watch.next = watch.bake(_REPLACED.format(where))
            graph = super().trace(root, concrete_args)
            watch.left(self.root)
        self._baked[next(iter(reversed(graph.nodes)))] = watch.next
        return graph

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record the call of a leaf module, or trace through the module with its path as scope."""
        if self._watch.thread != threading.get_ident():  # torch.fx has nn.Module patched for other threads as well
            return forward(*args, **kwargs)
        self._watch.look()
        path, outer = self.path_of_module(m), self.current_module_qualname
        self.current_module_qualname = path
        try:
            if self.is_leaf_module(m, path):
                value = self.create_proxy("call_module", path, args, kwargs)
                name = self.node_to_qualname[value.node] if self._exact else path
            else:
                value = forward(*args, **kwargs)
                self._watch.left(m)
                name = self._namer.name(path, None) if self._exact else path
            if name not in self._returned:
                self._returned[name] = self._as_returned(value)
            return value
        except Exception as error:
            vars(error).setdefault("featx_path", path)  # of the innermost module that it left
            raise
        finally:
            self.current_module_qualname = outer

    def _as_returned(self, value: Any) -> _Feature:
        """What a module returned, as it is now."""
        try:
            value = self.create_arg(value) if self._exact or type(value) is fx.Proxy else None
        except Exception as error:  # the classes of what is returned are anybody's
            value = error
        return _Feature(value, next(iter(reversed(self.graph.nodes)), None))

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Record the use of a parameter, and if exact of a buffer."""
        if self._watch.thread != threading.get_ident():
            return attr_val
        value = super().getattr(attr, attr_val, parameter_proxy_cache)
        if isinstance(value, fx.Proxy) and value.node not in self.node_to_qualname:  # with param_shapes_constant
            self.proxy(value.node)
        return value

    def create_arg(self, a: Any) -> Any:
        """Make of a value an argument of a node."""
        kind = type(a)
        if kind is fx.Proxy:  # by far the most
            return a.node
        if kind is tuple:
            return tuple([self.create_arg(item) for item in a])
        if kind in (bool, float, int, str, type(None)) or (kind is dict and not a):
            return a
        argument = super().create_arg(a)
        if id(a) in self._watch.made:
            self._baked[argument] = self._watch.made[id(a)][1]
        return argument

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Name the node of an operation."""
        if isinstance(node.type, str):
            node.type = {"float": float, "int": int, "bool": bool}.get(node.type)
        watch = self._watch
        watch.look()
        if watch.blocks or watch.next:
            self._baked[node] = {**watch.blocks, **watch.next}
        own = None if node.op == "call_module" else node.name
        self.node_to_qualname[node] = self._namer.name(self.current_module_qualname, own)
        return super().proxy(node)


# What tracing leaves out, or makes a constant of.
_AUTOCAST = "runs a part under torch.autocast, which tracing leaves out"
_GRAD_MODE = "changes the grad mode, which tracing leaves out"
_BUFFERS = "computes from buffers, which tracing makes a constant that does not follow load_state_dict"
_ASSIGNED = "assigns a buffer, which tracing leaves out"
_RANDOM = "draws random numbers, which tracing makes the same at each call"
_REPLACED = "was replaced on the instance{}, which tracing ignores, but not in nn.Sequential(model)"


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees in a forward, in its own thread, what torch.fx does not record: blocks, and computing without proxies.

    If the tracer is exact, that is an error, else a warning for the nodes that depend on it, as kind -> text.
    """

    def __init__(self, tracer: NodePathTracer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracer, self.thread = tracer, threading.get_ident()
        self.depth = 0  # of blocks that enable gradients
        self.start = self.state = self.modes()
        self.blocks: dict[str, str] = {}  # for each node while a block is open
        self.next: dict[str, str] = {}  # for all that come next
        self.made: dict[int, tuple[torch.Tensor, dict[str, str]]] = {}  # id of a tensor -> it, and for who takes it

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True, the default, imports torch._dynamo

    @functools.cached_property
    def buffers(self) -> dict[int, torch.Tensor]:
        """The model's buffers of floating point, by id."""
        return {
            id(buffer): buffer
            for buffer in self.tracer.root.buffers()
            if buffer.is_floating_point() or buffer.is_complex()
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        value = func(*args, **(kwargs or {}))
        baked = self.bake(_RANDOM) if torch.Tag.nondeterministic_seeded in func.tags else {}
        for tensor in _tensors((args, kwargs)):
            if id(tensor) in self.made:
                baked = {**baked, **self.made[id(tensor)][1]}
            elif id(tensor) in self.buffers:
                baked = {**baked, **self.bake(_BUFFERS)}
        made = _tensors(value)
        if func._schema.is_mutable:  # through a view into what it is a view of
            made += [tensor._base for tensor in made if tensor._base is not None]
        self.made.update({id(tensor): (tensor, baked) for tensor in made if baked})
        self.next.update({} if made else baked)  # a number may decide which way the code goes
        return value

    def counting(self, method: Callable[..., Any], by: int) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            self.depth += by * (threading.get_ident() == self.thread)
            return method(*arguments)

        return counted

    def modes(self) -> tuple[Any, ...]:
        """How deep in blocks of autocast, and in which grad mode, this thread is."""
        torch.autocast_increment_nesting()
        return torch.autocast_decrement_nesting(), (torch.is_grad_enabled(), self.depth)

    def look(self) -> None:
        state = self.modes()
        if state != self.state:
            self.state, self.blocks = state, {}
            for what, now, start in zip((_AUTOCAST, _GRAD_MODE), state, self.start):
                self.blocks.update(self.bake(what) if now != start else {})

    def left(self, module: nn.Module) -> None:
        if fx.Proxy in map(type, module._buffers.values()):
            self.next.update(self.bake(_ASSIGNED))

    def bake(self, what: str) -> dict[str, str]:
        """The warning of what the forward that runs does; if the tracer is exact, an error."""
        if self.tracer._exact:
            raise fx.proxy.TraceError(f"its forward {what}")
        path = self.tracer.current_module_qualname
        where = f"the forward of the module {path!r}" if path else "the model's own forward"
        line = _source_line(traceback.walk_stack(None))
        return {what: f"{where} {what}; exact=True, with auto_leaf=True, is right or raises an error{line}"}


def _tensors(value: Any) -> list[torch.Tensor]:
    return [item for item in tree_flatten(value)[0] if isinstance(item, torch.Tensor)]


def _warn_baked(tracers: Mapping[str, NodePathTracer]) -> None:
    """Warn once of each kind of what tracing lost of the nodes that stay."""
    found: dict[str, str] = {}
    for lost in itertools.chain.from_iterable(tracer._baked.values() for tracer in tracers.values()):
        found = {**lost, **found}
    for message in found.values():
        _warn(message, FeatureWarning)


def _trace_both(
    restore: Callable[..., None], model: nn.Module, tracer_kwargs: Any, concrete_args: Any, exact: bool, auto_leaf: bool
) -> dict[str, NodePathTracer]:
    """Trace in both modes; tensors and modules that a forward makes stay on the model."""
    arguments = {"exact": exact, **_tracer_arguments(tracer_kwargs)}
    _check_concrete_args(model, concrete_args)
    leaves: list[type[nn.Module]] = []
    while True:
        try:
            tracers = {}
            for mode in ("train", "eval"):
                tracers[mode] = _trace(model, mode, arguments, concrete_args)
                restore(keep=(torch.Tensor, nn.Module))
            break
        except UntraceableError as error:
            if not auto_leaf or not error.path or error.module_type in leaves:
                raise
            restore()
            leaves.append(error.module_type)
            arguments["leaf_modules"] = (*arguments["leaf_modules"], error.module_type)
    if leaves:
        listed = ", ".join(f"{leaf.__module__}.{leaf.__qualname__}" for leaf in leaves)
        _warn(f"what torch.fx cannot trace became leaves: tracer_kwargs={{'leaf_modules': [{listed}]}} does the same.")
    return tracers


def _trace(model: nn.Module, mode: str, arguments: dict[str, Any], concrete_args: Any) -> NodePathTracer:
    tracer = NodePathTracer(**arguments)
    try:
        getattr(model, mode)()
        with torch.enable_grad():
            tracer.trace(model, concrete_args)
        return tracer
    except Exception as error:
        path = vars(error).get("featx_path", "")
        module_type = type(_at(model, path)) if path else type(model)
        reason = f"{type(error).__name__}: {error}{_source_line(reversed([*traceback.walk_tb(error.__traceback__)]))}"
        children = [] if path else [name for name, child in model.named_children() if _can_trace(child, arguments)]
        raise UntraceableError(path, module_type, reason, children) from error


def _can_trace(model: nn.Module, arguments: dict[str, Any]) -> bool:
    """Whether a module that has something inside can be traced."""
    try:
        NodePathTracer(**arguments).trace(model)
        return any(model.children())
    except Exception:
        return False


def _tracer_arguments(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The caller's ``tracer_kwargs`` with the defaults added; nothing of the caller's is written to."""
    arguments = {**(given or {})}
    # As in torchvision, where it is in use.
    ops = sys.modules.get("torchvision.ops")
    leaves = [cls for cls in vars(ops).values() if inspect.isclass(cls) and issubclass(cls, nn.Module)] if ops else []
    arguments["autowrap_modules"] = (math, *([ops] if ops else []), *arguments.get("autowrap_modules", ()))
    for name, default in (("leaf_modules", leaves), ("non_leaf_modules", [])):
        added = arguments.get(name, ())
        arguments[name] = (*default, *(added if isinstance(added, Iterable) else [added]))
        if not all(map(inspect.isclass, arguments[name])):
            raise TypeError(f"tracer_kwargs[{name!r}] takes a list of classes, not {added!r}")
    return arguments


def _check_concrete_args(model: nn.Module, concrete_args: Mapping[str, Any] | None) -> None:
    """Refuse what ``forward`` lacks, and values for which torch.fx would change the signature."""
    known = list(inspect.signature(type(model).forward).parameters)[1:]
    for name, value in {**(concrete_args or {})}.items():
        if str(name).lstrip("*") not in known:
            raise ValueError(f"concrete_args has {name!r}; the arguments of forward are {', '.join(known)}")
        if isinstance(value, (dict, list, tuple)):
            raise ValueError(f"concrete_args has {value!r} for {name!r}; it takes single values")


def _source_line(frames: Iterable[tuple[Any, int]]) -> str:
    """Where in the model's source something is: the first of these lines outside torch and this file."""
    for frame, line in frames:
        module, code = frame.f_globals.get("__name__", ""), frame.f_code
        if module != __name__ and module.split(".")[0] != "torch":
            text = linecache.getline(code.co_filename, line).strip()
            return f'\n  File "{code.co_filename}", line {line}, in {code.co_name}\n    {text}'
    return ""


def _warn_graph_differences(train_tracer: NodePathTracer, eval_tracer: NodePathTracer) -> None:
    """Warn if the two modes have different names, and say which."""
    train, evaluation = train_tracer.names, eval_tracer.names
    if train == evaluation:
        return
    said = []
    for mode, names, others in (("train", train, set(evaluation)), ("eval", evaluation, set(train))):
        only = ", ".join(name for name in names if name not in others)
        said += [f"only in {mode} mode: {textwrap.shorten(only, 200, placeholder=' …')}"] if only else []
    _warn(
        f"the train graph and the eval graph differ: {'; '.join(said) or 'the order of the nodes'}. A query without a"
        " match in one of them needs train_return_nodes and eval_return_nodes; suppress_diff_warning=True silences it."
    )


def _warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line that called the public function."""
    warnings.warn(message, category, stacklevel=4)


# ---- names


class _Namer:
    """Gives out names by the rules of the module's docstring; for rule 5 it takes the paths of all modules."""

    def __init__(self, paths: Iterable[str] = ()) -> None:
        self._next: dict[str, int] = {}  # stem -> the number after the most recently given form
        self._given: dict[str, int] = {}  # a name given out -> the number to try after it
        self._uncalled = set(paths)
        for path in self._uncalled:
            self._next[path], self._given[path] = 1, (_split_number(path)[1] or 0) + 1
        self._exact = bool(self._uncalled)

    def name(self, scope: str, own: str | None) -> str:
        """The name of the next node: ``own`` is torch.fx's name for it, None for a call of a module."""
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


def _split_number(name: str) -> tuple[str, int | None]:
    """``"relu_12"`` -> ``("relu", 12)``; without such an ending ``(name, None)``."""
    head, _, digits = name.rpartition("_")
    if head and digits.isascii() and digits.isdigit():
        return head, int(digits)
    return name, None


# ---- selection


def _queries_by_mode(both: Any, train: Any, evaluation: Any) -> dict[str, dict[str, str]]:
    if (both is None) == (train is None) or (train is None) != (evaluation is None):
        raise ValueError("pass either return_nodes, or both train_return_nodes and eval_return_nodes")
    given = {"train": train, "eval": evaluation} if both is None else {"train": both, "eval": both}
    return {mode: _as_mapping(queries) for mode, queries in given.items()}


def _as_mapping(queries: Any) -> dict[str, str]:
    """``{query: key}`` from a mapping, an iterable of queries or one query."""
    if isinstance(queries, (nn.Module, bytes)) or not isinstance(queries, Iterable):
        raise TypeError(f"return_nodes takes a dict, a list of queries or one query, not a {type(queries).__name__}")
    if isinstance(queries, Mapping):
        mapping = {str(query): str(key) for query, key in queries.items()}
    else:
        mapping = {str(query): str(query) for query in ([queries] if isinstance(queries, str) else queries)}
    owners: dict[str, str] = {}
    for query, key in mapping.items():
        if owners.setdefault(key, query) != query:
            raise ValueError(f"both {owners[key]!r} and {query!r} are put under the key {key!r}")
    return mapping


def _select(names: Sequence[str], queries: Iterable[str]) -> dict[str, int]:
    """The position of the last name that equals a query or lies below it, where there is one."""
    last = {prefix: position for position, name in enumerate(names) for prefix in _prefixes(name)}
    return {query: last[query] for query in queries if query in last}


def _prefixes(name: str) -> Iterator[str]:
    """``"a.b.c"`` -> ``"a"``, ``"a.b"``, ``"a.b.c"``."""
    return itertools.accumulate(name.split("."), "{}.{}".format)


def _find_features(tracers: dict[str, NodePathTracer], mode: str, queries: Iterable[str]) -> dict[str, _Feature]:
    """The values by query, in execution order."""
    tracer = tracers[mode]
    names, nodes = tracer.names, list(tracer.node_to_qualname)
    positions = _select(names, queries)
    found: dict[str, _Feature] = {}
    for query in queries:
        if tracer._exact and query in tracer._returned:
            feature = found[query] = tracer._returned[query]
            if isinstance(feature.value, Exception):
                what = f"what the module {query!r} returned cannot be a feature, ask for what is inside"
                raise ValueError(f"{what}: {feature.value}") from feature.value
        elif query in positions:
            node = nodes[positions[query]]
            found[query] = _Feature(node, node)
        elif query == "output":
            output = next(iter(reversed(tracer.graph.nodes)))
            found[query] = _Feature(output.args[0], output)
        else:
            raise NodeNameError(query, mode, _suggestions(_known(tracer), query), _hint(tracers, mode, query))
    place = {node: index for index, node in enumerate(tracer.graph.nodes)}
    turn = {name: index for index, name in enumerate(tracer._returned)}  # of several that return after one node
    order = sorted(found, key=lambda query: (place.get(found[query].after, -1), turn.get(query, -1)))
    return {query: found[query] for query in order}


def _known(tracer: NodePathTracer) -> list[str]:
    return [*tracer.names, *(tracer._returned if tracer._exact else ())]


def _suggestions(names: Iterable[str], query: str) -> list[str]:
    """The closest of the names and of their prefixes, best first."""
    candidates = dict.fromkeys(prefix for name in names for prefix in _prefixes(name))
    return difflib.get_close_matches(query, list(candidates), n=3)


def _hint(tracers: dict[str, NodePathTracer], mode: str, query: str) -> str:
    """Why a query that matches nothing may have been expected to match."""
    tracer, other = tracers[mode], "eval" if mode == "train" else "train"
    if _select(_known(tracers[other]), [query]):
        return f"It is in the {other} graph only: pass train_return_nodes and eval_return_nodes."
    modules = dict(tracer.root.named_modules(remove_duplicate=False))
    leaves = {node.target for node in tracer.node_to_qualname if node.op == "call_module"}
    if query in leaves:
        return "Its call has another name; exact=True gives what it returned."
    for path in leaves.intersection(_prefixes(query)):
        leaf = type(modules[path]).__name__
        opened = f"tracer_kwargs={{'non_leaf_modules': [{leaf}]}} opens it."
        return f"It lies inside the leaf module {path!r} ({leaf}); {opened}"
    return f"It is a module of the model in which no operation runs in {mode} mode." * (query in modules)


# ---- pruning


class _Operation(NamedTuple):
    """What pruning knows of a node; other nodes are given by their positions."""

    inputs: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()  # the inputs into whose memory it writes
    views: tuple[int, ...] = ()  # the inputs with which its value may share memory
    kind: str = ""  # "placeholder", "assert" or nothing special


def _staying(
    operations: Sequence[_Operation], requested: Iterable[int], reads: Iterable[tuple[int, int]] = ()
) -> list[int]:
    """The positions of the operations that must run for the requested ones to have their values.

    A requested value is what its operation returned; a read ``(position, after)`` is the value of one
    as it is after another. Nothing after the last of these runs. Before it, an operation stays if it
    is requested or an assert, if one that stays takes its value, or if it writes into memory that a
    read, or a later one that stays, reads. Placeholders always stay.
    """
    memory = _memories(operations)
    needed: set[int] = set(requested)
    read_after: dict[int, list[int]] = collections.defaultdict(list)
    for position, after in reads:
        read_after[after].append(position)
    cut = max(needed.union(read_after), default=-1)
    read: set[int] = set()  # the memories that are read later
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
    operations: Sequence[_Operation], staying: Iterable[int], reads: Iterable[tuple[int, int]]
) -> dict[tuple[int, int], int]:
    """The reads of values that change afterwards, and the position of the first operation that changes each."""
    memory = _memories(operations)
    writers: dict[int, list[int]] = collections.defaultdict(list)
    for position in staying:
        for written in operations[position].writes:
            writers[memory[written]].append(position)
    later = {read: [writer for writer in writers.get(memory[read[0]], ()) if writer > read[1]] for read in reads}
    return {read: found[0] for read, found in later.items() if found}


def _memories(operations: Sequence[_Operation]) -> list[int]:
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


def _prune(tracer: NodePathTracer, features: dict[str, _Feature], keys: Mapping[str, str]) -> dict[str, list[str]]:
    """Cut a traced graph down to what the features need, make them its output, and say what they are not.

    If the tracer is exact, what may be overwritten later is cloned before.
    """
    graph, nodes = tracer.graph, list(tracer.graph.nodes)
    place = {node: position for position, node in enumerate(nodes)}
    operations = _describe(tracer, nodes, place)
    requested: set[int] = set()
    reads: set[tuple[int, int]] = set()
    for feature in features.values():
        for node in _nodes_in(feature.value):
            if tracer._exact or (feature.after or node).op == "output":
                reads.add((place[node], place[feature.after or node]))
            else:
                requested.add(place[node])
    staying = set(_staying(operations, requested, reads))
    asked = reads.union(zip(requested, requested))
    changes = {
        (nodes[taken], nodes[after]): nodes[writer]
        for (taken, after), writer in _overwritten(operations, sorted(staying), asked).items()
    }
    kept = staying.union(after for _, after in reads)
    tracer._baked = {node: lost for node, lost in tracer._baked.items() if place[node] in kept}
    hazards = {} if tracer._exact else _hazards(tracer, features, changes)
    clones = {read: _clone_after(graph, *read) for read in changes} if tracer._exact else {}
    for position in reversed(range(len(nodes))):
        if nodes[position].op == "output" or position not in staying:
            graph.erase_node(nodes[position])
    values = {}
    for query, (value, after) in features.items():
        values[keys[query]] = map_arg(value, lambda node: clones.get((node, after), node))  # noqa: B023
    graph.output(values)
    return hazards


def _clone_after(graph: fx.Graph, node: fx.Node, after: fx.Node) -> fx.Node:
    following = after.next
    while following.op == "placeholder":
        following = following.next
    with graph.inserting_before(following):
        return graph.call_function(_clone, (node,))


def _clone(value: torch.Tensor) -> torch.Tensor:  # TorchScript takes what has no type for a tensor
    """What is kept of a value that is overwritten later: of nested ones, all tensors."""
    return value.clone() if is_scripting() else _clone_nested(value)


def _clone_nested(value: Any) -> Any:
    kinds = (torch.Tensor, fx.Proxy)  # which stands for a tensor where an extractor is traced again
    clone = tree_map(lambda item: item.clone() if isinstance(item, kinds) else item, value)
    return value if isinstance(value, torch.Size) else clone


# ---- hazards


def _hazards(
    tracer: NodePathTracer, features: dict[str, _Feature], changes: Mapping[Any, fx.Node]
) -> dict[str, list[str]]:
    """By query, where a value is not what the query says; changes are (node, after) -> what changes it."""
    hazards: dict[str, list[str]] = collections.defaultdict(list)
    for query, feature in features.items():
        if _misleads(tracer, query, feature.value):
            really = _described(tracer, feature.value, query)
            hazards[query].append(f"is the value of {really}, not what the module {query!r} returns")
        pairs = [(node, feature.after) for node in _nodes_in(feature.value)]
        writers = [changes[pair] for pair in pairs if pair in changes]
        if writers:
            hazards[query].append(f"is overwritten in place by {_described(tracer, writers[0])}")
    return hazards


def _misleads(tracer: NodePathTracer, query: str, node: Any) -> bool:
    """Whether a node is not the value of the module whose path its query is."""
    if not isinstance(node, fx.Node):
        return False
    returned = tracer._returned.get(query)
    if returned is None:  # the module is not called, or under another path
        named = tracer.node_to_qualname.get(node) == query
        return named and query in dict(tracer.root.named_modules(remove_duplicate=False))
    # An operation in place gives back what it wrote into, so a module that ends with one returns either of two nodes.
    same = node is returned.after and returned.value in _effects(tracer, node)[0]
    return returned.value is not node and not same


def _described(tracer: NodePathTracer, node: fx.Node, query: str = "") -> str:
    if node.op == "call_module":
        return f"{'a later call of ' * (node.target == query)}the module {str(node.target)!r}"
    return f"the operation {tracer.node_to_qualname.get(node, node.name)!r}"


def _warn_hazards(train: dict[str, list[str]], evaluation: dict[str, list[str]]) -> None:
    """Warn once for each query."""
    for query in {**train, **evaluation}:
        said = dict.fromkeys([*train.get(query, []), *evaluation.get(query, [])])
        _warn(f"the feature {query!r} {', and '.join(said)}; exact=True gives its own value", FeatureWarning)


# ---- effects


def _describe(tracer: NodePathTracer, nodes: Sequence[fx.Node], place: Mapping[fx.Node, int]) -> list[_Operation]:
    """What each node reads, writes and shares, as plain data."""
    fetched: dict[Any, int] = {}  # the path of a parameter or buffer -> the first node that fetches it
    operations = []
    for node in nodes:
        inputs = [place[taken] for taken in node.all_input_nodes]
        writes, views = ([place[taken] for taken in effect] for effect in _effects(tracer, node))
        if node.op == "get_attr":
            views = [fetched.setdefault(node.target, place[node])]
        elif node.op == "call_module":  # it also reads its own parameters and buffers
            inputs += [at for path, at in fetched.items() if f"{path}.".startswith(f"{node.target}.")]
        kind = node.op if node.op == "placeholder" else "assert" if node.target in _ASSERTS else ""
        operations.append(_Operation(tuple(inputs), tuple(writes), tuple(views), kind))
    return operations


_ASSERTS = (torch._assert, _assert_is_none)
# What can return its input, or a view of it, though torch's schemas do not say so.
_VIEW_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten, _DropoutNd)
_VIEW_FUNCTIONS = frozenset(
    "atleast_1d atleast_2d atleast_3d broadcast_tensors data dropout einsum getitem meshgrid pos type_as".split()
)


def _effects(tracer: NodePathTracer, node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """The inputs into whose memory a node writes, and those that its value may share memory with.

    Torch's own operations do what torch declares. Of anything else it is believed that it writes if
    nobody takes its value or a part of it works in place; if the tracer is exact, it always writes.
    """
    inputs = node.all_input_nodes
    if node.op == "call_module":
        effect = _module_effect(_at(tracer.root, str(node.target)), tracer._training or tracer._exact)
        writing, viewing = effect or (tracer._exact or not node.users, True)
        return inputs * writing, inputs * viewing
    if node.op not in ("call_function", "call_method") or node.target in (*_ASSERTS, _clone):
        return [], []
    if "out" in node.kwargs:
        return (_nodes_in(node.kwargs["out"]),) * 2
    library = str(getattr(node.target, "__module__", None) or "torch").split(".")[0]  # methods are a tensor's
    if library == "_operator" and node.target not in (operator.getitem, operator.pos):
        return [], []
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    parameters = getattr(getattr(node.target, "__code__", None), "co_varnames", ())
    told = {**dict(zip(parameters, node.args)), **node.kwargs}.get("inplace") is True
    if told or name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
        written = _nodes_in(node.args[:1]) or inputs
        return written, written
    if not isinstance(node.target, str) and library not in ("torch", "_operator", "math", "builtins"):
        return inputs if tracer._exact or not node.users else [], inputs
    packet = getattr(node.target, "overloadpacket", node.target)
    aliases = _aliases(getattr(packet, "_qualified_op_name", f"aten::{name}"))
    if aliases is None or name in _VIEW_FUNCTIONS:
        return [], inputs
    arguments: dict[Any, Any] = {**dict(enumerate(node.args)), **node.kwargs}
    writes, views = (_nodes_in([arguments[at] for at in alias if at in arguments]) for alias in aliases)
    return writes, views


def _module_effect(module: nn.Module, training: bool) -> tuple[bool, bool] | None:
    """Whether a leaf writes into its inputs, and whether it may return them; None if nobody says so."""
    if getattr(module, "inplace", None) is True:
        return training or not isinstance(module, _DropoutNd), True
    if getattr(type(module), "forward", None) is nn.Sequential.forward:
        effects = [_module_effect(child, training) for child in module.children()]
        # A child that writes does so into the module's input if those before it may return their inputs.
        for effect in effects:
            if effect is None or effect[0] or not effect[1]:
                return effect
        return False, True
    package = type(module).__module__
    if package.split(".")[0] in ("torch", "torchvision"):
        return False, isinstance(module, _VIEW_MODULES) or not package.startswith("torch.nn")
    return (True, True) if any(getattr(part, "inplace", None) is True for part in module.modules()) else None


@functools.lru_cache(maxsize=None)
def _aliases(operator_name: str) -> tuple[frozenset[Any], frozenset[Any]] | None:
    """By position and name, what an operator writes to and what it may return a view of; None without a schema."""
    schemas = torch._C._jit_get_schemas_for_operator(operator_name)
    writes: set[Any] = set()
    views: set[Any] = set()
    for position, argument in itertools.chain.from_iterable(enumerate(schema.arguments) for schema in schemas):
        # Of "Tensor[](a!) self" the list itself is written to.
        if argument.alias_info is None or str(argument.type) not in ("Tensor", "Optional[Tensor]"):
            continue
        places = {argument.name} if argument.kwarg_only else {argument.name, position}
        views |= places
        writes |= places if argument.alias_info.is_write else set()
    return (frozenset(writes), frozenset(views)) if schemas else None


def _nodes_in(arguments: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    map_arg(arguments, found.append)
    return found


# ---- the two-mode module


class DualGraphModule(fx.GraphModule):
    """A module with a graph for each mode; calling it runs the graph of the mode that it is in.

    Both graphs are compiled once, as two methods, and ``forward`` picks by ``self.training``. So all
    follows the mode, however it is set: ``torch.compile``, ``torch.jit.script``, copies and pickles.

    Args:
        root: the module from which the graphs' modules, parameters and buffers are taken; they are
            shared, under the same paths. The new module starts in its mode.
        train_graph, eval_graph: the graphs. Change them as any ``fx.Graph`` and call ``recompile()``.
        class_name: the name of the new module's class.

    Raises:
        AttributeError: a graph refers to something that ``root`` does not have.
    """

    # TorchScript would compile properties; these are for Python alone.
    __jit_unused_properties__ = ["graph", "code", "_graph", "_code", "_boxed_call"]
    _lineno_map = _prologue_start = None  # torch.compile asks for them

    def __init__(
        self, root: nn.Module, train_graph: fx.Graph, eval_graph: fx.Graph, class_name: str = "GraphModule"
    ) -> None:
        # fx.GraphModule's own __init__ knows one graph; what it sets up is set up here.
        nn.Module.__init__(self)
        type(self).__name__ = class_name
        self.meta: dict[str, Any] = {}
        self.training = root.training
        self.train_graph, self.eval_graph = train_graph, eval_graph
        for node in itertools.chain(train_graph.nodes, eval_graph.nodes):
            if node.op in ("call_module", "get_attr"):
                _share(root, self, str(node.target))
        self.recompile()

    @property
    def graph(self) -> fx.Graph:
        """The graph of the mode that the module is in; setting it recompiles."""
        return self.train_graph if self.training else self.eval_graph

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        setattr(self, "train_graph" if self.training else "eval_graph", graph)
        self.recompile()

    @property
    def code(self) -> str:
        """The Python source of the mode that the module is in."""
        return self._featx_codes[not self.training].src

    _graph, _code = graph, code  # what the methods of fx.GraphModule read

    def recompile(self) -> _Code:  # type: ignore[override]
        """Compile both graphs again, as is needed after one was changed; gives the active mode's code."""
        self.train_graph.owning_module = self.eval_graph.owning_module = self
        train, evaluation = _generate(self.train_graph), _generate(self.eval_graph)
        if train == evaluation:
            _define(self, "forward", train)
        else:
            _define(self, "_featx_train", train)
            _define(self, "_featx_eval", evaluation)
            _define(self, "forward", _dispatcher(self.train_graph, train))
        self._featx_codes = train, evaluation
        return self._featx_codes[not self.training]

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles: both modes or, where that fails, the active one."""
        with contextlib.suppress(RuntimeError):
            create_script_module(self, infer_methods_to_compile)  # type: ignore[no-untyped-call]
            return self
        _warn(f"TorchScript cannot compile both modes, and gets the {'train' if self.training else 'eval'} mode only")
        one = copy.copy(self)
        one.train_graph = one.eval_graph = one.graph
        one.recompile()
        return one

    def __getstate__(self) -> dict[str, Any]:
        skipped = ("_featx_codes", "_compiled_call_impl")  # nn.Module.compile() made this, for this module
        state = {name: value for name, value in vars(self).items() if name not in skipped}
        state.update({name: copy.copy(value) for name, value in state.items() if isinstance(value, dict)})
        graphs = {"train_graph": _pack(self.train_graph), "eval_graph": _pack(self.eval_graph)}
        return {**state, **graphs, "_class_name": type(self).__name__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        graphs = {name: _unpack(state[name]) for name in ("train_graph", "eval_graph")}
        super().__setstate__({**state, **graphs})  # type: ignore[no-untyped-call]
        type(self).__name__ = vars(self).pop("_class_name")
        self.recompile()

    def __reduce__(self) -> tuple[Any, ...]:
        # Each instance has a class of its own; below it is the real one.
        return fx.GraphModule.__new__, (type(self).__mro__[1],), self.__getstate__()

    __copy__ = __deepcopy__ = None  # type: ignore[assignment]  # fx.GraphModule's know one graph; copy goes by __reduce__


def _share(root: nn.Module, new: nn.Module, target: str) -> None:
    """Put what lies at a path of ``root`` at the same path of ``new``."""
    *path, name = target.split(".")
    value = _at(root, target)
    for part in path:
        root, parent = _at(root, part), new
        if parent._modules.get(part) is root:
            return  # a leaf that holds it
        if part not in parent._modules:
            parent._modules[part] = nn.Module()  # for a container, which is not called
            parent._modules[part].training = root.training  # type: ignore[union-attr]
        new = parent._modules[part]  # type: ignore[assignment]
    if isinstance(value, nn.Module):
        new._modules[name] = value
    elif isinstance(value, torch.Tensor):
        held: dict[str, Any] = new._parameters if isinstance(value, nn.Parameter) else new._buffers
        held[name] = value
        new._non_persistent_buffers_set.update({name} & root._non_persistent_buffers_set)
    else:
        setattr(new, name, value)


def _at(root: nn.Module, target: str) -> Any:
    """What lies at a path, also where an attribute of the class hides it."""
    found: Any = root
    for name in target.split("."):
        found = found._modules[name] if name in found._modules else getattr(found, name)
    return found


class _Code(NamedTuple):
    src: str  # what is shown, torch.fx's own
    run: str  # what runs, line by line the same, but by dicts: in a tenth of the time of nn.Module.__getattr__
    globals: dict[str, Any]


def _generate(graph: fx.Graph) -> _Code:
    """The code of a graph, in which a path is never more than a path."""
    fetching = [node for node in graph.nodes if node.op in ("call_module", "get_attr")]
    targets = [str(node.target) for node in fetching]
    try:
        for number, node in enumerate(fetching):
            node.target = f"_featx_{number}_"
        code = graph.python_code("self")
    finally:
        for node, target in zip(fetching, targets):
            node.target = target

    def written(in_dicts: bool) -> str:
        return re.sub(r"self\._featx_(\d+)_", lambda match: _fetch(fetching[int(match[1])], in_dicts), code.src)

    return _Code(written(in_dicts=False), written(in_dicts=True), code.globals)


def _fetch(node: fx.Node, in_dicts: bool) -> str:
    """An expression for what lies at a path."""
    *path, name = str(node.target).split(".")
    if not in_dicts:
        return functools.reduce(_attribute, [*path, name], "self")
    source = "self" + "".join(f"._modules[{part!r}]" for part in path)
    return f"{source}._modules[{name!r}]" if node.op == "call_module" else _attribute(source, name)


def _attribute(source: str, name: str) -> str:
    is_plain = name.isascii() and name.isidentifier() and not keyword.iskeyword(name)
    return f"{source}.{name}" if is_plain else f"getattr({source}, {name!r})"


def _dispatcher(graph: fx.Graph, code: _Code) -> _Code:
    """A ``forward`` that picks the method of the mode; graph and code are those of one."""
    head = next(line for line in code.src.splitlines() if line.startswith("def "))
    call = ", ".join(str(node.target) for node in graph.nodes if node.op == "placeholder")
    body = f"    if self.training:\n        return self._featx_train({call})\n    return self._featx_eval({call})"
    return _Code(f"{head}\n{body}", f"{head}\n{body}", code.globals)


_file_numbers = itertools.count()


def _define(module: DualGraphModule, method: str, code: _Code) -> None:
    """Make code a method of the module's own class; while the module lives, tracebacks find what is shown."""
    filename = f"<featx {next(_file_numbers)}>"
    shown, run = (source.replace("def forward(", f"def {method}(", 1) for source in (code.src, code.run))
    linecache.cache[filename] = (len(shown), None, shown.splitlines(True), filename)
    weakref.finalize(module, linecache.cache.pop, filename, None)
    namespace = dict(code.globals)
    exec(compile(run, filename, "exec", dont_inherit=True), namespace)
    setattr(type(module), method, namespace[method])


class _Reference(str):
    """Stands in a packed graph for the node of this name, or for what torch has under it."""


def _pack(graph: fx.Graph) -> tuple[Any, ...]:
    """A graph as plain data that can be copied and pickled."""
    nodes: list[Any] = []
    for node in graph.nodes:
        target, arguments = node.target, map_arg((node.args, node.kwargs), lambda taken: _Reference(taken.name))
        with contextlib.suppress(Exception):  # pickle cannot find all of torch's functions
            name = _get_qualified_name(target).partition("torch.")[2]
            target = _Reference(name) if operator.attrgetter(name)(torch) is target else target
        nodes.append((node.op, target, arguments, node.name, node.type, node.meta))
    return tuple(nodes)


def _unpack(packed: tuple[Any, ...]) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for op, target, arguments, name, type_expr, meta in packed:
        target = operator.attrgetter(target)(torch) if isinstance(target, _Reference) else target
        args, kwargs = map_aggregate(arguments, lambda item: nodes[item] if isinstance(item, _Reference) else item)
        nodes[name] = graph.create_node(op, target, args, kwargs, name, type_expr)
        nodes[name].meta = copy.copy(meta)
    return graph


# ---- guards

_tracing = threading.RLock()  # torch.fx replaces methods of nn.Module for the whole process


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[Callable[..., None]]:
    """Leave the model and the CPU's random state as they were; gives what restores modes and attributes in between."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model takes a torch.nn.Module, not {model!r}")
    with _tracing, torch.random.fork_rng(devices=[]), contextlib.ExitStack() as undo:
        for buffer in model.buffers():
            with contextlib.suppress(RuntimeError, ValueError):  # of lazy ones, and types without a copy
                if not buffer.is_inference():  # data: what autograd has saved of a buffer stays valid
                    undo.callback(buffer.data.copy_, buffer.detach().clone())
        for parameter in model.parameters():  # which some models freeze in their train()
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
        restore = _snapshot(model)
        undo.callback(restore)
        yield restore


def _snapshot(model: nn.Module) -> Callable[..., None]:
    """Note modes, attributes and the dicts and lists in them, however deep; gives what restores them.

    New attributes go, but for those of the classes ``keep``.
    """
    modes = [(module, module.training) for module in model.modules()]
    held: list[Any] = [vars(module) for module, _ in modes]
    seen = set(map(id, held))
    for container in held:  # which grows
        for item in container.values() if isinstance(container, dict) else container:
            if type(item) in _CONTAINERS and id(item) not in seen:
                seen.add(id(item))
                held.append(item)
    nothing: Any = {}
    noted = [(container, container.copy() if container else nothing) for container in held]  # most are empty

    def restore(keep: tuple[type, ...] = ()) -> None:
        for module, training in modes:
            if module.training != training:  # by the method: some do more in it than set the attribute
                getattr(module, "train" if training else "eval")()
        for container, before in noted:
            if not isinstance(container, dict):
                container[:] = before
            elif container or before:
                if container.keys() != before.keys():
                    for name in [name for name in container if name not in before]:
                        if not isinstance(container[name], keep):
                            del container[name]
                container.update(before)

    return restore


_CONTAINERS = frozenset([dict, list, collections.OrderedDict, collections.defaultdict])


# ---- command line


def _main(arguments: Sequence[str] | None = None) -> int:
    """List the nodes of a model, or compute the values of some of them.

    model            what builds it, as PACKAGE.MODULE:CALLABLE
    queries          the features, each as QUERY or QUERY=KEY; without any, all nodes
    --kwargs         arguments of the callable, a JSON object
    --checkpoint     a file whose state dict is loaded, with weights_only=True
    --image          the input: a file with a photograph; needs pillow
    --input          the input: random numbers of a shape such as 1,3,224,224
    --device         where to compute, such as cuda
    --train          use train mode in place of eval mode
    --exact          compute what each module or operation itself returned
    --auto-leaf      make leaves of what cannot be traced
    --json           print for machines: the features, or the names of both modes
    --check          a file of --json to compare the names with
    --plot           a file to draw the features in, such as features.png; needs matplotlib
    --debug          show the traceback of an error

    The exit code is 1 if --check finds a difference, 2 for wrong input, 130 after an interrupt.
    """
    parser = _parser()
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
        reason = f"{type(error).__name__}: {error}"
        parser.error(textwrap.shorten(reason, 300))
    return 1 if text and options.check else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "featx",
        usage=argparse.SUPPRESS,  # an error is one line
        description=inspect.getdoc(_main),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model")
    parser.add_argument("queries", nargs="*")
    for option in "kwargs checkpoint image input device check plot".split():
        parser.add_argument(f"--{option}")
    for flag in "train exact auto-leaf json debug".split():
        parser.add_argument(f"--{flag}", action="store_true")
    return parser


# What is to be said of a feature, by the repr of its query.
_notes: dict[str, str] = collections.defaultdict(str)


def _show(message: Warning | str, *_: Any) -> None:
    """In place of ``warnings.showwarning``."""
    said = re.match(r"the feature (.+?['\"]) (.+); exact=True", str(message))
    if said:
        _notes[said[1]] += f"{said[2]}. "
    else:
        print("featx: warning:", *str(message).split(), file=sys.stderr)


def _run(options: argparse.Namespace) -> str:
    """What is to be printed."""
    model = _model(options)
    if options.check is not None:
        return _differences(model, options)
    found: Any = _names(model, options)
    if options.queries or not options.json:
        found = _rows(model, found, options)
    if options.json:
        return json.dumps(found, indent=1)
    return _align(found)


def _model(options: argparse.Namespace) -> nn.Module:
    module, _, attribute = options.model.rpartition(":")
    build = operator.attrgetter(attribute)(importlib.import_module(module))
    torch.manual_seed(0)  # for the weights of a model that is built without any
    model: nn.Module = build(**json.loads(options.kwargs or "{}"))
    if options.checkpoint:
        state = torch.load(options.checkpoint, map_location="cpu", weights_only=True)
        model.load_state_dict(state)
    model.to(options.device)
    return model.train(options.train)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """How both public functions are to trace."""
    return {
        "suppress_diff_warning": True,
        "exact": options.exact,
        "auto_leaf": options.auto_leaf,
    }


def _names(model: nn.Module, options: argparse.Namespace) -> dict[str, Any]:
    names = get_graph_node_names(model, **_settings(options))
    return {"model": options.model, "exact": options.exact, **names._asdict()}


def _differences(model: nn.Module, options: argparse.Namespace) -> str:
    """How the names differ from those in a file."""
    expected = json.loads(pathlib.Path(options.check).read_bytes())
    options.exact = expected["exact"]
    found = _names(model, options)
    lines: list[str] = []
    for mode in ("train", "eval"):
        lines += difflib.unified_diff(
            expected[mode],
            found[mode],
            f"{mode}: {options.check}",
            f"{mode}: {options.model}",
            n=1,
            lineterm="",
        )
    return "\n".join(lines)


def _rows(
    model: nn.Module, names: dict[str, Any], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """What there is to be said of the features, or of all nodes of a mode."""
    mode = "train" if options.train else "eval"
    shared = set(names["train"]).intersection(names["eval"])
    for name in shared.symmetric_difference(names[mode]):
        _notes[repr(name)] += f"{mode} only. "
    # "layer4=deep" gives {"layer4": "deep"}, and "layer1" gives {"layer1": "layer1"}.
    asked = options.queries or names[mode]
    pairs = [f"{query}={query}" for query in asked]
    queries = dict(pair.split("=")[:2] for pair in pairs)
    modes = (queries, ()) if options.train else ((), queries)
    extractor = create_feature_extractor(model, None, *modes, **_settings(options))
    values = _values(extractor, options)
    if options.plot:
        _plot(values, options.plot)
    *_, output = extractor.graph.nodes
    rows = []
    for query, key in queries.items():
        row = {
            "name": key,
            **_operation(extractor, output.args[0][key]),
            **_statistics(values.get(key)),
            "note": _notes[repr(query)],
        }
        rows.append(row)
    return rows


def _operation(extractor: nn.Module, node: Any) -> dict[str, str]:
    """The operation that computes a feature, if it is one."""
    if not isinstance(node, fx.Node):
        return {}
    if getattr(node.target, "__module__", None) == __name__:  # a clone of what is meant
        return _operation(extractor, node.args[0])
    target = node._pretty_print_target(node.target)
    if node.op == "call_module":
        target = type(extractor.get_submodule(target)).__name__
    return {"operation": node.op, "target": target}


@torch.no_grad()
def _values(extractor: nn.Module, options: argparse.Namespace) -> Any:
    """The features, if there is an input."""
    if options.image:
        given = _photograph(options.image)
    elif options.input:
        given = torch.rand(*map(int, options.input.split(",")))
    else:
        return {}
    return extractor(given.to(options.device))


def _photograph(path: str) -> torch.Tensor:
    """``(1, 3, 224, 224)``, normalized as torchvision's classifiers expect it.

    Their presets make the short side 256 long and take the middle 224 x 224. This takes the middle
    first, 14/16 of the short side, and makes that 224 long: the same but for parts of a pixel, since
    they round the middle to whole pixels.
    """
    from PIL import Image, ImageOps

    # https://pytorch.org/vision/stable/models.html
    mean = torch.tensor([0.485, 0.456, 0.406])
    std = torch.tensor([0.229, 0.224, 0.225])
    with Image.open(path) as file:
        upright = ImageOps.exif_transpose(file).convert("RGB")
    bilinear = Image.Resampling.BILINEAR
    image = ImageOps.fit(upright, (224, 224), bilinear, bleed=1 / 16)
    levels = torch.tensor(list(image.tobytes()))
    pixels = levels.reshape(224, 224, 3) / 255
    normalized = (pixels - mean) / std
    return normalized.permute(2, 0, 1)[None]


def _statistics(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, torch.Tensor):
        shapes = tree_map(lambda part: getattr(part, "shape", part), value)
        return {"value": str(shapes)}
    row: dict[str, Any] = {
        "shape": list(value.shape),
        "dtype": str(value.dtype),
    }
    # Integers have no mean; empty, complex, sparse and meta tensors have none of these.
    with contextlib.suppress(RuntimeError):
        for name in ("min", "max", "mean", "std"):
            number = getattr(value, name)().item()
            row[name] = float(f"{number:.5g}")
    return row


def _align(rows: list[dict[str, Any]]) -> str:
    columns = []
    for title in dict.fromkeys(itertools.chain(*rows)):
        texts = [str(row.get(title, "")) for row in rows]
        cells = [title, *texts]
        width = max(map(len, cells))
        columns.append([f"{cell:{width}}" for cell in cells])
    lines = map("  ".join, zip(*columns))
    return "\n".join(map(str.rstrip, lines))


def _plot(values: dict[str, Any], path: str) -> None:
    from matplotlib.figure import Figure

    drawn = [key for key in values if getattr(values[key], "ndim", 0) > 1]
    size = 9, 1.3 * len(drawn)
    figure = Figure(figsize=size, layout="constrained")
    for place, key in enumerate(drawn, 1):
        panel = figure.add_subplot(len(drawn), 1, place, title=key)
        picture = _picture(values[key].float().cpu())
        panel.imshow(picture.numpy(), aspect="auto")
        panel.axis("off")
    figure.savefig(path)
    print(f"featx: note: {path} shows {len(drawn)} of {len(values)} features: maps and matrices")


def _picture(value: torch.Tensor) -> torch.Tensor:
    """A matrix, or eight channels of maps side by side, of the first input."""
    maps = value[None].flatten(0, -3)
    framed = nn.functional.pad(maps[:8], (0, 1), value=math.nan)
    return torch.hstack([*framed])


if __name__ == "__main__":
    sys.exit(_main())
