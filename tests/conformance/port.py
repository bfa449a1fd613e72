"""The three rules in plain Python, from the words of README.md: what a porter reads first.

It knows nothing of featx or torch. ``python -m tests.conformance.port``, or the file alone, runs all vectors and all
cuts of the zoo, prints how many there are and which the rules answer otherwise, and exits 1 if there is one.
"""

from __future__ import annotations

import difflib
import json
import math
import sys
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Sequence, Set, Tuple

FOLDER = Path(__file__).parent
MODES = ("train", "eval")
Read = Tuple[int, int]  # the position of a value, and that of the node after which it is taken


# --- names


def split(name: str) -> Tuple[str, int]:
    """What stands before a number at the end, and the number: ``x_3`` is x and 3, ``x`` is x and 0."""
    head, _, digits = name.rpartition("_")
    is_number = digits != "" and set(digits) <= set("0123456789")
    return (head, int(digits)) if head and is_number else (name, 0)


def named(calls: Iterable[Dict[str, str]], paths: Sequence[str] = ()) -> List[str]:
    """The names of calls; with the paths of all modules, the exact ones."""
    taken = set(paths)
    uncalled = set(paths)
    latest: Dict[str, int] = {}  # stem -> the number of its form that was given out most recently
    names = []
    for call in calls:
        path = call.get("module")
        if path in uncalled:
            uncalled.remove(path)
            names.append(path)
            continue
        place = ".".join(filter(None, (call["scope"], call["fx_name"]))) if path is None else path
        stem = place if path in paths else split(place)[0]
        number = latest.get(stem, -1) + 1
        name = f"{stem}_{number}" if number else stem
        while name in taken:
            number += 1
            name = f"{stem}_{number}"
        taken.add(name)
        names.append(name)
        latest[name] = 0
        head, own = split(name)
        latest[head] = own
    return names


# --- selection


def position_of(names: Sequence[str], query: str) -> Any:
    """The position that a query means, ``"output"`` for the model's own, or None."""
    matching = [place for place, name in enumerate(names) if name == query or name.startswith(f"{query}.")]
    if matching:
        return matching[-1]
    return "output" if query == "output" else None


def closest(names: Sequence[str], query: str) -> List[str]:
    """The names, and what they begin with before a dot, that are most similar to a query."""
    candidates = set()
    for name in names:
        parts = name.split(".")
        candidates.update(".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return difflib.get_close_matches(query, candidates, n=3, cutoff=0.6)


def keys_of(queries: Any) -> Dict[str, str]:
    """Query -> key, of a mapping, a list of queries or a single one."""
    if isinstance(queries, dict):
        return queries
    return {query: query for query in ([queries] if isinstance(queries, str) else queries)}


def resolved(vector: Dict[str, Any]) -> Dict[str, Any]:
    """The pairs of each mode, or what a vector calls its ``error``."""
    asked = {mode: keys_of(vector.get("return_nodes", vector.get(f"{mode}_return_nodes"))) for mode in MODES}
    if any(len(set(keys.values())) < len(keys) for keys in asked.values()):
        return {"kind": "two-queries-one-key"}
    found = {}
    for mode in MODES:
        names = by_mode(vector["names"])[mode]
        positions = {query: position_of(names, query) for query in asked[mode]}
        for query, position in positions.items():
            if position is None:
                return {"kind": "no-match", "mode": mode, "query": query, "suggestions": closest(names, query)}
        pairs = [[key, positions[query]] for query, key in asked[mode].items()]
        found[mode] = sorted(pairs, key=lambda pair: math.inf if pair[1] == "output" else pair[1])
    return found


def by_mode(value: Any) -> Dict[str, Any]:
    """What is given once holds for both modes."""
    return value if isinstance(value, dict) else dict.fromkeys(MODES, value)


# --- pruning


class Memories:
    """The positions of the values that share memory with each value, in sets that they have in common."""

    def __init__(self, count: int) -> None:
        self.of = [{position} for position in range(count)]

    def join(self, position: int, views: Iterable[int]) -> None:
        """A value shares memory with those that it views, and with all that these share it with."""
        for viewed in views:
            small, large = sorted((self.of[position], self.of[viewed]), key=len)
            if small is not large:
                large |= small
                for member in small:
                    self.of[member] = large


def staying(nodes: Sequence[Dict[str, Any]], reads: Sequence[Read]) -> List[int]:
    """The nodes that must run, by one pass from the cut backwards."""
    memories = Memories(len(nodes))
    for position, node in enumerate(nodes):
        memories.join(position, node["views"])
    cut = max((after for _, after in reads), default=-1)
    needed: Set[int] = set()
    live = {id(memories.of[position]) for position, node in enumerate(nodes) if node["kind"] == "state"}

    def read(positions: Iterable[int]) -> None:
        needed.update(positions)
        live.update(id(memories.of[position]) for position in positions)

    stays = []
    for position in reversed(range(len(nodes))):
        node = nodes[position]
        read([value for value, after in reads if after == position])
        is_live = any(id(memories.of[written]) in live for written in node["writes"])
        is_wanted = node["kind"] == "assert" or position in needed or is_live
        if node["kind"] == "placeholder" or (is_wanted and position <= cut):
            stays.append(position)
            read(node["inputs"])
    return stays[::-1]


def overwritten(nodes: Sequence[Dict[str, Any]], stays: Iterable[int], reads: Iterable[Read]) -> Dict[Read, int]:
    """The reads whose values change later, and the first node that does it, by one pass forwards."""
    memories = Memories(len(nodes))
    found: Dict[Read, int] = {}
    for position in stays:
        for read in reads:
            written = [place for place in nodes[position]["writes"] if place in memories.of[read[0]]]
            if written and read[1] < position:
                found.setdefault(read, position)
        memories.join(position, nodes[position]["views"])
    return found


# --- the files


def load(path: str) -> Any:
    return json.loads((FOLDER / path).read_text(encoding="utf-8"))


def program(document: Dict[str, Any], mode: str) -> List[Dict[str, Any]]:
    """The nodes of a model of the zoo, as pruning takes them."""
    rows = document["train"] if document[mode] == "same as train" else document[mode]
    nodes = [dict(zip(document["columns"], row)) for row in rows]
    kinds = {"placeholder": "placeholder", "get_attr": "state"}
    for node in nodes:
        kind = kinds.get(node["operation"], "operation")
        node["kind"] = "assert" if node["target"] == "torch._assert" else kind
    return nodes


def checks() -> Iterator[Tuple[str, str, bool]]:
    """Each vector, and each cut of the zoo: the file, which one it is, and whether the rules give it."""
    for vector in load("naming.json")["vectors"]:
        yield "naming", vector["id"], named(vector["calls"], vector.get("paths", ())) == vector["names"]
    for vector in load("selection.json")["vectors"]:
        expected = vector["error"] if "error" in vector else by_mode(vector["result"])
        yield "selection", vector["id"], resolved(vector) == expected
    for vector in load("pruning.json")["vectors"]:
        nodes = vector["nodes"]
        reads = [(place, place) for place in vector["requested"]] if "requested" in vector else vector["reads"]
        reads = [tuple(read) for read in reads]
        changed = {(entry["position"], entry["after"]): entry["by"] for entry in vector["overwritten"]}
        answers = staying(nodes, reads), overwritten(nodes, vector["stays"], reads)
        yield "pruning", vector["id"], answers == (vector["stays"], changed)
    for path in sorted((FOLDER / "zoo").glob("*.json")):
        document = load(f"zoo/{path.name}")
        for cut in document["extractors"]:
            nodes = program(document, cut["mode"])
            position = position_of([node["name"] for node in nodes], cut["query"])
            answers = position, staying(nodes, [(position, position)])
            yield "zoo", f"{path.stem} {cut['mode']} {cut['query']}", answers == (cut["position"], cut["stays"])


def main() -> int:
    counts: Dict[str, int] = {}
    failures = []
    for file, name, holds in checks():
        counts[file] = counts.get(file, 0) + 1
        if not holds:
            failures.append(f"{file}: {name} fails")
    said = [f"{file}: {count} looked at" for file, count in counts.items()]
    print(*failures, *said, f"{len(failures)} fail", sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
