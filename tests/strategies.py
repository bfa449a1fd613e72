"""Models as plain data, for hypothesis: a plan is drawn, printed when something fails, and built.

A plan is a :class:`Net`. ``build`` makes a module of it, ``record`` runs that module without torch.fx and without
featx, and notes every operation with a clone of its value: what featx should have found. All values are (2, 4).
"""

from __future__ import annotations

import collections
import contextlib
import operator
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import fx, nn

from tests.helpers import snapshot
from tests.nets import linear


class Net(NamedTuple):
    """A module: its members, what its forward does in turn, and what it returns.

    A member is another Net, the kind of a leaf (a key of ``LEAVES``) or of a tensor (of ``TENSORS``), a tuple of kinds
    of leaves for a Sequential, or the number of a module that was built before. Operands count back from the newest
    value.
    """

    members: Tuple[Tuple[str, Any], ...]
    steps: Tuple[Tuple[Any, ...], ...]
    returns: Tuple[str, int] = ("one", 0)
    arguments: str = "x"


# ------------------------------------------------------------------------------ what plans are made of


class Scale(nn.Module):
    """A leaf that is not torch's own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input * 2


class Doubling(nn.Module):
    """The same in place, and says so: what a leaf writes otherwise is not known."""

    inplace = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input.mul_(2)


class Silent(nn.Module):
    """Writes into its input and returns nothing."""

    def forward(self, input: torch.Tensor) -> None:
        input.add_(1)


class Pair(nn.Module):
    """Returns a tuple, half of which is its input."""

    def forward(self, input: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        return input, input + 1


LEAVES: Dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: linear(),
    "sigmoid": nn.Sigmoid,
    "relu": nn.ReLU,
    "relu_": lambda: nn.ReLU(inplace=True),
    "norm": lambda: nn.BatchNorm1d(4),
    "dropout": lambda: nn.Dropout(1.0),  # in train mode all zeros, whatever the random state is
    "dropout_": lambda: nn.Dropout(1.0, inplace=True),
    "identity": nn.Identity,
    "scale": Scale,
    "doubling": Doubling,
    "silent": Silent,
    "pair": Pair,
}
LEAF_CLASSES = (Scale, Doubling, Silent, Pair)
SCRIPTABLE = ("linear", "sigmoid", "relu", "relu_", "norm", "dropout", "dropout_", "identity", "scale", "doubling")

PURE_LEAVES = ("linear", "sigmoid", "relu", "norm", "dropout", "identity", "scale")

TENSORS = ("buffer", "unsaved", "parameter")  # "unsaved" is a buffer that is not persistent

# Each a chain: torch.fx's name for it -> function of the value so far and of a second one.
Chain = Dict[str, Callable[[Any, Any], Any]]
PURE: Dict[str, Chain] = {
    "add": {"add": lambda a, b: a + b},
    "sigmoid": {"sigmoid": lambda a, b: torch.sigmoid(a)},
    "relu": {"relu": lambda a, b: F.relu(a)},
    "tanh": {"tanh": lambda a, b: a.tanh()},
    "neg": {"neg": lambda a, b: -a},
    "sub": {"sub": lambda a, b: torch.sub(a, b, alpha=0.5)},
    "where": {
        "gt": lambda a, b: a > 0,
        "where": lambda a, b: torch.where(a, b, 0.5 * torch.ones(4)),
    },
    "constant": {"add": lambda a, b: a + torch.tensor([1.0, 2.0, 3.0, 4.0])},
    "sort": {
        "sort": lambda a, b: torch.sort(a, dim=1),
        "getattr": lambda a, b: a.values,
        "mul": operator.mul,
    },
    "size": {
        "size": lambda a, b: a.size(0),
        "mul": lambda a, b: b * a,
    },
}
VIEWS: Dict[str, Chain] = {
    "getitem": {"getitem": lambda a, b: a[:]},
    "view": {"view": lambda a, b: a.view(2, 4)},
    "twice": {
        "view": lambda a, b: a.view(-1),
        "unflatten": lambda a, b: a.unflatten(0, (2, 4)),
    },
    "transposed": {
        "t": lambda a, b: a.t(),
        "transpose": lambda a, b: a.transpose(0, 1),
    },
    "squeeze": {
        "unsqueeze": lambda a, b: a.unsqueeze(0),
        "squeeze": lambda a, b: torch.squeeze(a, 0),
    },
    "dropped": {"dropout": lambda a, b: F.dropout(a, 0.5, False)},
    "contiguous": {"contiguous": lambda a, b: a.contiguous()},
    "same": {"to": lambda a, b: a.to(torch.float32)},
    "detach": {"detach": lambda a, b: a.detach()},
}
WRITES: Dict[str, Chain] = {
    "add_": {"add_": lambda a, b: a.add_(1)},
    "copy_": {"copy_": lambda a, b: a.copy_(b)},
    "relu_": {"relu_": lambda a, b: torch.relu_(a)},
    "inplace": {"relu": lambda a, b: F.relu(a, inplace=True)},
    "position": {"hardtanh": lambda a, b: F.hardtanh(a, -0.1, 0.1, True)},
    "column": {
        "getitem": lambda a, b: a[:, 0],
        "fill_": lambda a, b: a.fill_(7),
    },
    "flat": {
        "view": lambda a, b: a.view(-1),
        "mul_": lambda a, b: a.mul_(3),
    },
    "data": {
        "getattr": lambda a, b: a.data,
        "sub_": lambda a, b: a.sub_(1),
    },
    "out": {"neg": lambda a, b: torch.neg(b, out=a)},
}
OPERATIONS = {**PURE, **VIEWS, **WRITES}
BLOCKS: Dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}
LOST = {"compute", "number", "draw", "chance", *BLOCKS}  # what tracing would leave out, or make a constant
CUTTING = {"detach", "data", "copy_", "out", "where", "size", "check", "update"}  # gradients do not pass all of these


# TorchScript of torch 1.13 reads no postponed annotations.
Named = collections.namedtuple("Named", "first second")


class Dice:
    """What a plan draws is that of this seed, however much else was drawn."""

    seed = 0

    @classmethod
    def draw(cls) -> torch.Tensor:
        torch.manual_seed(cls.seed)
        return torch.rand(4)


# What a forward does with a value v, another one w, a dict that it is given, and what is its own.
MET = (
    "v += w",
    "u = v; u *= w",
    "u = v[:, :2]; u -= 1",
    "u = v.T; u /= 2",
    "v[0] = w[1]",
    "v[0] += w[1]",
    "v.data = w * 2",
    "v = torch.zeros(2, 4); v += w",
    "v = torch.ones(2, 4); v[:1] = w[:1]",
    "v = w * torch.zeros(2, 4).add_(v)",
    "v = v + self.mean",
    "v = v / self.steps",
    "v = v + self.keeper.kept",
    "v = self.keeper(v)",
    "self.mean.copy_(v[0])",
    "self.mean.lerp_(v[0], 0.5)",
    "self.mean += v[0]",
    "self.mean[0] = v[0, 1]",
    "self.mean[0] = 0.5",
    "self.mean[:2].add_(v[0, :2])",
    "self.mean.data.mul_(0.5)",
    "self.mean = self.mean + v[0]",
    "self.steps += 1",
    "self.steps.add_(1)",
    "self.steps = self.steps + 1",
    "box.update(k=v)",
    "v = box.setdefault('k', v) * 1",
    "box['k'] = v",
    "v = box['k'] * 1",
    "v = box['l'][0] * 1",
    "box['l'].append(v)",
    "box['l'].insert(0, v)",
    "box['l'].reverse()",
    "box['l'].append(box['l'].pop(0))",
    "v = F.dropout(v, 1.0, self.training)",
    "v = part.forward(v)",
)


class Failure(Exception):
    """What a plan's forward raises if it is told to."""


# --------------------------------------------------------------------------------------- building


class Entry(NamedTuple):
    """One thing that eager execution did: an operation, or the call of a module (``own`` is None)."""

    scope: str
    own: Optional[str]
    value: Any
    module: Optional[nn.Module] = None

    @property
    def is_node(self) -> bool:
        """Whether torch.fx records it as a node."""
        return not isinstance(self.module, (Built, nn.Sequential))


def pick(values: List[Any], operand: int) -> Any:
    """Counted from the newest."""
    return values[-1 - operand % len(values)]


class Built(nn.Module):
    """What is built of a plan."""

    def __init__(self, plan: Net) -> None:
        super().__init__()
        self._plan = plan
        self._path = ""
        self._log: Optional[List[Entry]] = None

    def _run(self, x: Any) -> Any:
        values = [x]
        self._take(self._plan.steps, values)
        kind, operand = self._plan.returns
        pair = pick(values, operand), values[0]
        if kind == "one":
            return pair[0]
        structures = {
            "tuple": pair,
            "list": list(pair),
            "dict": dict(zip("ab", pair)),
            "named": Named(*pair),
        }
        return structures[kind]

    def _take(self, steps: Tuple[Any, ...], values: List[Any]) -> None:
        for kind, *arguments in steps:
            if kind == "mode":
                self._take(arguments[0 if self.training else 1], values)
            else:
                getattr(self, f"_step_{kind}")(values, *arguments)

    def _note(self, own: str, value: Any) -> Any:
        if self._log is not None:
            self._log.append(Entry(self._path, own, snapshot(value)))
        return value

    def _step_apply(self, values: List[Any], operation: str, first: int, second: int, assigned: bool) -> None:
        value = pick(values, first)
        other = pick(values, second)
        for own, function in OPERATIONS[operation].items():
            value = self._note(own, function(value, other))
        if assigned and operation not in ("column", "flat"):
            values.append(value)

    def _step_use(self, values: List[Any], number: int, operand: int, keyword: bool) -> None:
        if not self._plan.members:
            return
        name, plan = self._plan.members[number % len(self._plan.members)]
        value = pick(values, operand)
        if plan == "parameter":
            values.append(self._note("mul", value * self._parameters[name]))
        elif plan in ("buffer", "unsaved"):
            values.append(self._note("add", value + self._buffers[name]))
        else:
            self._call(self._modules[name], values, value, keyword)

    def _call(self, module: Any, values: List[Any], value: Any, keyword: bool) -> None:
        argument = "x" if isinstance(module, Built) else "input"
        result = module(**{argument: value}) if keyword else module(value)
        if isinstance(module, Pair):
            values += [self._note("getitem", result[0]), self._note("getitem", result[1])]
        elif isinstance(result, (tuple, list)):
            values += result
        elif isinstance(result, dict):
            values += result.values()
        elif not isinstance(module, Silent):
            values.append(result)

    def _step_update(self, values: List[Any], number: int, operand: int) -> None:
        """Write into a buffer; what is written must come from the input, else torch.fx does not see it."""
        if self._buffers:
            mean = self._note("mean", pick(values, operand).mean(0))
            detached = self._note("detach", mean.detach())
            self._note("add_", pick(list(self._buffers.values()), number).add_(detached))

    def _step_split(self, values: List[Any], operand: int) -> None:
        parts = self._note("chunk", pick(values, operand).chunk(2, 1))
        halves = [self._note("getitem", parts[1]), self._note("getitem", parts[0])]
        values.append(self._note("cat", torch.cat(halves, dim=1)))

    def _step_check(self, values: List[Any], operand: int) -> None:
        shape = self._note("getattr", pick(values, operand).shape)
        rows = self._note("getitem", shape[0])
        holds = self._note("eq", rows == 2)
        self._note("_assert", torch._assert(holds, "two rows"))

    def _step_block(self, values: List[Any], kind: str, steps: Tuple[Any, ...]) -> None:
        before = len(values)
        with BLOCKS[kind]():
            self._take(steps, values)
        if kind == "autocast":  # what comes later takes no bfloat16
            values[before:] = [value.float() for value in values[before:]]

    def _step_draw(self, values: List[Any], operand: int) -> None:
        values.append(pick(values, operand) + Dice.draw())

    def _step_chance(self, values: List[Any], steps: Tuple[Any, ...]) -> None:
        if Dice.draw()[0] < 0.5:
            self._take(steps, values)

    def _step_compute(self, values: List[Any], number: int, operand: int) -> None:
        values.append(pick(values, operand) * self._buffer(number).sqrt())

    def _step_number(self, values: List[Any], number: int, operand: int) -> None:
        values.append(pick(values, operand) * self._buffer(number).mean().item())

    def _step_do(self, values: List[Any], text: str, first: int, second: int) -> None:
        modules = list(self._modules.values())
        names = {"self": self, "torch": torch, "F": F, "box": self._box, "part": pick(modules, second)}
        names.update(v=pick(values, first), w=pick(values, second))
        exec(text, names)
        values.append(names["v"])

    def _buffer(self, number: int) -> Any:
        """As a forward gets it: by its attribute."""
        return getattr(self, pick(list(self._buffers), number)) if self._buffers else torch.ones(4)

    def _step_touch(self, values: List[Any]) -> None:
        """What a careless forward does to itself."""
        self._seen = [*getattr(self, "_seen", []), len(values)]
        self.__dict__.setdefault("_memory", {}).setdefault("values", []).append(values[-1])
        torch.rand(1)

    def _step_fail(self, values: List[Any], how: str) -> None:
        if how == "raise":
            raise Failure("on purpose")
        if how == "assign":
            values[-1][0] = 1
        elif values[-1].sum() > 1e9:
            values.append(values[0])


class BuiltPlain(Built):
    def forward(self, x: torch.Tensor) -> Any:
        return self._run(x)


class BuiltScaled(Built):
    def forward(self, x: torch.Tensor, scale: float = 0.5) -> Any:
        return self._run(self._note("mul", x * scale))


class BuiltShifted(Built):
    def forward(self, x: torch.Tensor, *, shift: float = 1.5) -> Any:
        return self._run(self._note("add", x + shift))


class BuiltMet(Built):
    """It has buffers, and a leaf whose hook keeps what it returned."""

    def __init__(self, plan: Net) -> None:
        super().__init__(plan)
        self.register_buffer("mean", torch.ones(4))
        self.register_buffer("steps", torch.tensor(1))
        self.keeper = linear()
        self.keeper.register_forward_hook(self.keep)
        self.keep(self.keeper, (), self.mean)

    def keep(self, module: nn.Module, inputs: Any, value: torch.Tensor) -> None:
        with torch.enable_grad():
            vars(module)["kept"] = value.detach().clone().requires_grad_() * 1

    def forward(self, x: Any, box: Any = ()) -> Any:  # with None it would be no argument of an exact extractor
        self._box = {"k": x, "l": [x, x]} if isinstance(box, tuple) else box
        return self._run(x)


class BuiltCalling(BuiltMet):
    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return super().__call__(*arguments, **keywords) + 1


FORWARDS = {
    "x": BuiltPlain,
    "scale": BuiltScaled,
    "shift": BuiltShifted,
    "met": BuiltMet,
    "calling": BuiltCalling,
}


def build(plan: Net) -> Built:
    """The module of a plan; always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _build(plan, [])
    for path, module in model.named_modules():
        if isinstance(module, Built):
            module._path = path
    return model


def _build(plan: Net, built: List[nn.Module]) -> Built:
    base = FORWARDS[plan.arguments]
    module = type(base.__name__, (base,), {})(plan)  # a class of its own, so that it alone can become a leaf
    for name, member in plan.members:
        if member == "parameter":
            module.register_parameter(name, nn.Parameter(torch.rand(4)))
        elif member in TENSORS:
            module.register_buffer(name, torch.rand(4), persistent=member == "buffer")
        else:
            module.add_module(name, _build_module(member, built))
    built.append(module)
    return module


def _build_module(member: Any, built: List[nn.Module]) -> nn.Module:
    if isinstance(member, Net):
        return _build(member, built)
    if isinstance(member, int):
        return built[member % len(built)] if built else nn.Identity()
    leaves = [LEAVES[kind]() for kind in ([member] if isinstance(member, str) else member)]
    module = leaves[0] if isinstance(member, str) else nn.Sequential(*leaves)
    built.append(module)
    return module


# --------------------------------------------------------------------------------- eager execution


def example_input() -> torch.Tensor:
    return torch.tensor([[0.5, -1.0, 2.0, -0.05], [-1.5, 0.05, 0.25, 1.0]])


class Record(NamedTuple):
    """What eager execution did, in order, each value as it was when it was there; and what the model returned."""

    entries: List[Entry]
    output: Any


def record(model: Built, training: bool) -> Record:
    """Run a model in a mode."""
    log: List[Entry] = []
    paths = {module: path for path, module in model.named_modules()}
    x = example_input()
    defaults = {"x": {}, "scale": {"scale": 0.5}, "shift": {"shift": 1.5}}
    arguments = {"x": x, **defaults[model._plan.arguments]}
    for name, value in arguments.items():
        log.append(Entry("", name, snapshot(value)))

    def note(module: nn.Module, args: Any, value: Any) -> None:
        log.append(Entry(paths[module], None, snapshot(value), module))

    with contextlib.ExitStack() as stack, training_mode(model, training):
        for module in model.modules():
            if isinstance(module, Built):
                module._log = log
                stack.callback(setattr, module, "_log", None)
            if module is not model:
                stack.callback(module.register_forward_hook(note).remove)
        return Record(log, snapshot(model(x)))


@contextlib.contextmanager
def training_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Run in a mode; afterwards the buffers have the values that they had."""
    saved = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    model.train(training)
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)


# ------------------------------------------------------------------------------------- strategies

# Names that mean something to somebody: to Python, to torch.fx, to regular expressions, to JSON, or to featx.
HOSTILE = (
    *("1", "01", "fc_1", "fc_2", "fc", "fc_1_1", "_1", "_", "x", "x_1", "relu", "relu_1", "add", "add_"),
    *("output", "input"),
    *("a+b", "a(b", "a[0]", "a_b", ".*", "^x$", "a b", " ", "a|b", "\\d", "$", "a:b", "a=b", "class"),
    *("None", "lambda"),
    *("getattr", "print", "_tensor_constant0"),
    *('"', "'", '"""', "\n", "\\", "\\n", "#", "a\r", "\t", "\0", "{x}", "{", "%s", "é", "名", "ﬁ", "𝐱"),
    *("a\u2028b", "\u202e", "²", "a_٣"),
    *("breakpoint()", '"+breakpoint()+"', "'+breakpoint()+'", '")\nbreakpoint()#', "\nbreakpoint()\n"),
    *("{breakpoint()}", "x\\"),
)  # fmt: skip
PLAIN = ("a", "b", "fc_1", "fc_2", "fc", "relu", "add", "x", "a_b", "x_1", "1", "2")

TAKEN = {
    *dir(BuiltPlain(Net((), ()))),
    *dir(fx.symbolic_trace(nn.Identity())),
    "train_graph",
    "eval_graph",
    "self",
}


def is_possible(name: str) -> bool:
    """Whether a member can have a name in a model, and a tensor in an extractor, which is a GraphModule."""
    return bool(name) and "." not in name and name not in TAKEN


PLAIN_NAMES = st.sampled_from(PLAIN)
NAMES = st.one_of(PLAIN_NAMES, st.sampled_from(HOSTILE), st.text(max_size=4)).filter(is_possible)


OPERANDS = st.integers(0, 3)


def tuples_of(items: st.SearchStrategy[Any], least: int, most: int) -> st.SearchStrategy[Tuple[Any, ...]]:
    return st.lists(items, min_size=least, max_size=most).map(tuple)


def step(kind: str, *arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[Tuple[Any, ...]]:
    return st.tuples(st.just(kind), *arguments)


def apply(operations: Dict[str, Chain]) -> st.SearchStrategy[Tuple[Any, ...]]:
    return step("apply", st.sampled_from(sorted(operations)), OPERANDS, OPERANDS, st.booleans())


USE = step("use", OPERANDS, OPERANDS, st.booleans())


def steps(depth: int = 1, failing: bool = False) -> st.SearchStrategy[Tuple[Any, ...]]:
    kinds = [USE, apply(PURE), USE, apply(WRITES), apply(VIEWS)]
    kinds.append(step("split", OPERANDS))
    kinds.append(step("check", OPERANDS))
    kinds.append(step("update", OPERANDS, OPERANDS))
    if depth:
        branch = tuples_of(steps(0), 0, 3)
        kinds.append(step("mode", branch, branch))
    if failing:
        kinds.append(step("touch"))
        kinds.append(step("fail", st.sampled_from(["branch", "assign", "raise"])))
    return st.one_of(kinds)


def losing_steps(depth: int = 1) -> st.SearchStrategy[Tuple[Any, ...]]:
    """Nothing in place: what a leaf writes into its input is not known."""
    inner = tuples_of(losing_steps(depth - 1), 0, 3) if depth else st.just(())
    return st.one_of(
        USE,
        apply(PURE),
        apply(VIEWS),
        step("mode", inner, inner),
        step("compute", OPERANDS, OPERANDS),
        step("number", OPERANDS, OPERANDS),
        step("draw", OPERANDS),
        step("chance", inner),
        step("block", st.sampled_from(sorted(BLOCKS)), inner),
    )


def members(depth: int, leaves: Tuple[str, ...], named: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    in_sequence = [leaf for leaf in leaves if leaf not in ("pair", "silent")]
    kinds: List[st.SearchStrategy[Any]] = [
        st.sampled_from(leaves),
        st.sampled_from(TENSORS),
        st.integers(0, 5),
        tuples_of(st.sampled_from(in_sequence), 1, 3),
    ]
    if depth:
        kinds.insert(1, plans(depth - 1, leaves, named))
    return st.one_of(kinds)


def named_members(names: st.SearchStrategy[str], kinds: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    pairs = st.tuples(names, kinds)
    return st.lists(pairs, min_size=1, max_size=4, unique_by=operator.itemgetter(0)).map(tuple)


def plans(
    depth: int = 2,
    leaves: Tuple[str, ...] = tuple(sorted(LEAVES)),
    named: st.SearchStrategy[str] = NAMES,
    failing: bool = False,
) -> st.SearchStrategy[Net]:
    """Plans of up to depth + 1 nested modules; smaller and plainer ones come first."""
    return st.builds(
        Net,
        named_members(named, members(depth, leaves, named)),
        tuples_of(steps(failing=failing), 2, 8),
        st.tuples(st.sampled_from(["one", "tuple", "list", "dict", "named"]), OPERANDS),
        st.sampled_from(["x", "scale", "shift"]),
    )


def nets_of(inside: list[Any], every_step: st.SearchStrategy[Any], arguments: list[str]) -> st.SearchStrategy[Net]:
    return st.builds(
        Net,
        named_members(PLAIN_NAMES.filter(is_possible), st.one_of(inside)),
        tuples_of(every_step, 2, 6),
        step("one", OPERANDS),
        st.sampled_from(arguments),
    )


def losing_plans(depth: int = 2) -> st.SearchStrategy[Net]:
    """Plans of modules that do what tracing would leave out, or make a constant; each may become a leaf."""
    inside = [st.sampled_from(PURE_LEAVES), st.sampled_from(TENSORS), st.integers(0, 5)]
    if depth:
        inside.append(losing_plans(depth - 1))
    return nets_of(inside, losing_steps(), ["x"])


def met_steps(depth: int = 1) -> st.SearchStrategy[Tuple[Any, ...]]:
    inner = tuples_of(met_steps(depth - 1), 0, 3) if depth else st.just(())
    met = step("do", st.sampled_from(MET), OPERANDS, OPERANDS)
    return st.one_of(met, USE, apply(PURE), met, apply(VIEWS), apply(WRITES), met, step("mode", inner, inner))


def met_plans(depth: int = 2) -> st.SearchStrategy[Net]:
    """Plans of modules that keep something from call to call, or change what is not theirs."""
    inside = [st.sampled_from(PURE_LEAVES), st.sampled_from(["relu_", "dropout_", "doubling"]), st.integers(0, 5)]
    if depth:
        inside.append(met_plans(depth - 1))
    return nets_of(inside, met_steps(), ["met", "met", "met", "calling"])
