"""The rules once more, by other algorithms than featx's: slow, obvious, and over plain data only."""

from __future__ import annotations

from typing import Any, Dict, FrozenSet, Iterable, List, NamedTuple, Optional, Sequence, Set, Tuple

Call = Tuple[str, Optional[str]]  # scope and torch.fx's name; a path and None for a call of a module

# --- names ---


def names(calls: Iterable[Call]) -> List[str]:
    """Rules 1 to 4: look back over all names for the most recent form."""
    given: List[str] = []
    for scope, own in calls:
        stem = scope if own is None else ".".join(part for part in (scope, own) if part)
        head, _, digits = stem.rpartition("_")
        if head and is_number(digits):
            stem = head
        name = stem
        for earlier in reversed(given):
            if is_form(earlier, stem):
                number = number_of(earlier, stem) + 1
                while f"{stem}_{number}" in given:
                    number += 1
                name = f"{stem}_{number}"
                break
        given.append(name)
    return given


def exact_names(paths: Iterable[str], calls: Iterable[Call]) -> List[str]:
    """Rule 5: a set of what is taken, searched upwards from the last number."""
    given: List[str] = []
    paths = list(paths)
    taken = set(paths)
    for scope, own in calls:
        place = scope if own is None else ".".join(part for part in (scope, own) if part)
        if own is None and place not in given:
            given.append(place)
            continue
        stem, _, digits = place.rpartition("_")
        if own is None or not (stem and is_number(digits)):
            stem = place
        forms = [name for name in given if name not in paths and is_form(name, stem)]
        number = number_of(forms[-1], stem) + 1 if forms else int(stem in taken)
        name = f"{stem}_{number}" if number else stem
        while name in taken:
            number += 1
            name = f"{stem}_{number}"
        given.append(name)
        taken.add(name)
    return given


def is_form(name: str, stem: str) -> bool:
    """Whether a name is the stem, or the stem with a number."""
    return name == stem or (name.startswith(f"{stem}_") and is_number(name[len(stem) + 1 :]))


def is_number(text: str) -> bool:
    return text != "" and all(character in "0123456789" for character in text)


def number_of(name: str, stem: str) -> int:
    return int(name[len(stem) + 1 :] or 0)


# --- selection ---


class NoMatch(Exception):
    """A query that matches no name."""

    def __init__(self, query: str, suggestions: List[str]) -> None:
        super().__init__(query)
        self.query = query
        self.suggestions = suggestions


class TwoQueriesOneKey(Exception):
    """Two queries whose values would stand under one key."""


def select(listed: Sequence[str], queries: Dict[str, str]) -> List[List[Any]]:
    """Pairs of key and position, in the order of results; the position of the model's own output is ``"output"``."""
    if len(set(queries.values())) < len(queries):
        raise TwoQueriesOneKey
    found: List[Tuple[int, str, Any]] = []
    for query, key in queries.items():
        matching = [
            place for place, name in enumerate(listed) if name == query or name[: len(query) + 1] == query + "."
        ]
        if matching:
            found.append((max(matching), key, max(matching)))
        elif query == "output":
            found.append((len(listed), key, "output"))
        else:
            raise NoMatch(query, suggestions(listed, query))
    return [[key, position] for _, key, position in sorted(found, key=lambda entry: entry[0])]


def suggestions(listed: Sequence[str], query: str) -> List[str]:
    """Up to three candidates of similarity 0.6 or more, the most similar first, then what sorts last."""
    candidates: Set[str] = set()
    for name in listed:
        parts = name.split(".")
        candidates.update(".".join(parts[: count + 1]) for count in range(len(parts)))
    scored = [(similarity(candidate, query), candidate) for candidate in candidates]
    return [candidate for score, candidate in sorted(scored, reverse=True)[:3] if score >= 0.6]


def similarity(a: str, b: str) -> float:
    """Ratcliff and Obershelp's measure: twice the matching characters over all characters."""
    return 2.0 * matching_characters(a, b) / (len(a) + len(b)) if a or b else 1.0


def matching_characters(a: str, b: str) -> int:
    """The longest common substring, and what matches to its left and to its right."""
    for length in range(min(len(a), len(b)), 0, -1):
        for start in range(len(a) - length + 1):
            there = b.find(a[start : start + length])
            if there >= 0:
                left = matching_characters(a[:start], b[:there])
                return left + length + matching_characters(a[start + length :], b[there + length :])
    return 0


# --- pruning ---


class Node(NamedTuple):
    """A node of a program; others are given by their positions."""

    kind: str  # "placeholder", "state", "assert" or "operation"
    inputs: Sequence[int]
    writes: Sequence[int]
    views: Sequence[int]


Read = Tuple[int, int]  # a position, and the position after which its value is taken


def memories(program: Sequence[Node], ran: Iterable[int]) -> List[FrozenSet[int]]:
    """For each node those that may share memory with it when these ran: spread what is shared until nothing is new."""
    sharing: List[Set[int]] = [{place} for place, _ in enumerate(program)]
    for place in ran:
        sharing[place].update(program[place].views)
    for _ in program:
        for place, group in enumerate(sharing):
            for other in list(group):
                sharing[other].add(place)
                group |= sharing[other]
    return [frozenset(group) for group in sharing]


def staying(program: Sequence[Node], reads: Sequence[Read]) -> List[int]:
    """The nodes that must run: begin with what is read, add what is missing until nothing is."""
    memory = memories(program, range(len(program)))
    cut = max((after for _, after in reads), default=-1)
    here = {place for place, node in enumerate(program) if node.kind == "placeholder"}
    here |= {place for place, node in enumerate(program) if node.kind == "assert" and place <= cut}
    here.update(place for place, _ in reads)

    def is_needed(place: int) -> bool:
        written = frozenset().union(*(memory[taken] for taken in program[place].writes))
        return (
            any(place in program[user].inputs for user in here)
            or any(program[taken].kind == "state" for taken in written)
            or any(taken in written for user in here if user > place for taken in program[user].inputs)
            or any(taken in written and after >= place for taken, after in reads)
        )

    before = -1
    while before != len(here):
        before = len(here)
        here.update(place for place in range(cut + 1) if place not in here and is_needed(place))
    return sorted(here)


def overwritten(program: Sequence[Node], stays: Sequence[int], reads: Sequence[Read]) -> Dict[Read, int]:
    """The reads whose memory is written later, and the first that does: let all run, one after the other."""
    found: Dict[Read, int] = {}
    for place in sorted(stays):
        memory = memories(program, [earlier for earlier in stays if earlier < place])
        for taken, after in reads:
            if place > after and any(written in memory[taken] for written in program[place].writes):
                found.setdefault((taken, after), place)
    return found
