"""The vectors as real models, so that torch itself says what is right."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Mapping, Sequence, Tuple

import torch
from torch import nn

from tests.conformance.slow import is_number

# --- selection: a model whose nodes have given names, and whose value at each position is the position ---


class Leaf(nn.Module):
    """Adds 1: after it the value is the number of leaves that ran, which is its position."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


class Chain(nn.Module):
    """Leaves that run one after the other, other ones in each mode; the model's own output is a tuple.

    >>> chain = Chain({"train": ["x", "a.b", "a.c"], "eval": ["x", "a.c"]})
    >>> chain(torch.zeros(())), chain.eval()(torch.zeros(()))
    ((tensor(2.),), (tensor(1.),))
    """

    def __init__(self, names: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.paths = {mode: [path_for(name) for name in listed[1:]] for mode, listed in names.items()}
        leaves = {path for listed in self.paths.values() for path in listed}
        for path in sorted(leaves):  # which has "a" before "a.b"
            module: Any = self
            for depth, part in enumerate(path.split("."), 1):
                if part not in module._modules:
                    module.add_module(part, Leaf() if ".".join(path.split(".")[:depth]) in leaves else nn.Module())
                module = module._modules[part]

    def forward(self, x: Any) -> Any:
        for path in self.paths["train" if self.training else "eval"]:
            x = self.get_submodule(path)(x)
        return (x,)


def path_for(name: str) -> str:
    """The path of a leaf that is given this name: rule 2 removes one number from it."""
    head, _, digits = name.rpartition("_")
    return f"{name}_0" if head and is_number(digits) else name


# --- pruning: a program of plain data as a model, one operation of torch for each node ---

Values = List[Any]


def execute(program: Sequence[Mapping[str, Any]], arguments: Sequence[Any], fetch: Callable[[int], Any]) -> Values:
    """Run a program; all its values are positive, so that every assert holds."""
    values: Values = []
    arguments = list(arguments)
    for place, node in enumerate(program):
        taken = [values[at] for at in node["inputs"]]
        values.append(
            arguments.pop(0)
            if node["kind"] == "placeholder"
            else fetch(place)
            if node["kind"] == "state"
            else operation(place, node, taken)
        )
    return values


def operation(place: int, node: Mapping[str, Any], taken: Values) -> Any:
    """The value of a node, by one function or method of torch."""
    inputs = node["inputs"]
    writes = node["writes"]
    views = node["views"]
    number = float(place + 1)
    if not taken:
        raise NotImplementedError(f"no single operation of torch is like node {place}, which takes nothing")
    if node["kind"] == "assert":
        return torch._assert(taken[0], "all values are positive")
    first = taken[0]
    if writes and writes == views == inputs[:1]:
        return first.add_(taken[1] if len(taken) == 2 else number)
    if views == inputs and len(taken) == 2:
        return first.type_as(taken[1])
    if views == inputs[:1]:
        return first.view_as(taken[1]) if len(taken) == 2 else first.view(1)
    if writes == inputs and not views:
        return torch._foreach_add_(taken, number)  # of which nobody takes the value
    if writes or views or len(taken) > 2:
        raise NotImplementedError(f"no single operation of torch is like node {place}")
    return torch.add(first, taken[1], alpha=number) if len(taken) == 2 else torch.add(first, number)


def program_model(program: Sequence[Mapping[str, Any]]) -> Tuple[nn.Module, List[torch.Tensor]]:
    """A model whose graph is the program, with its arguments; each state is a parameter."""
    count = sum(node["kind"] == "placeholder" for node in program)
    names = "".join(f", x{at}" for at in range(count))

    def forward(model: Any, *arguments: Any) -> Any:
        return execute(program, arguments, lambda place: getattr(model, f"p{place}"))[-1]

    # fx reads the arguments off the code
    signature = eval(f"lambda self{names}: forward(self{names})", {"forward": forward})
    model: nn.Module = type("Program", (nn.Module,), {"forward": signature})()
    for place in fetched(program):
        model.register_parameter(f"p{place}", nn.Parameter(torch.tensor([0.5]), requires_grad=False))
    return model, [torch.tensor([float(at + 1)]) for at in range(count)]


def snapshots(program: Sequence[Mapping[str, Any]]) -> Dict[Tuple[int, int], torch.Tensor]:
    """(position, after) -> the value of a node as it was after another, in eager execution; of state also before it."""
    model, arguments = program_model(program)
    seen = {}
    for after in range(len(program)):
        fresh = {place: model.get_parameter(f"p{place}").clone() for place in fetched(program)}
        values = execute(program[: after + 1], [argument.clone() for argument in arguments], fresh.__getitem__)
        seen.update({(place, after): value for place, value in {**fresh, **dict(enumerate(values))}.items()})
    return seen


def fetched(program: Sequence[Mapping[str, Any]]) -> List[int]:
    """The nodes that fetch a parameter of their own."""
    found = []
    for place, node in enumerate(program):
        if node["kind"] == "state":
            if node["views"]:
                raise NotImplementedError(f"no single operation of torch fetches once more, as node {place} does")
            found.append(place)
    return found
