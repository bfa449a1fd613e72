"""The vectors for ports: well formed, and right by featx, by a slow way, by real execution and by torchvision."""

from __future__ import annotations

import copy
import json
import operator
import random
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, NamedTuple

import jsonschema
import pytest
import torch
from torch import equal, fx, nn

from tests import featx, nets
from tests.conformance import generate, port, real, slow
from tests.helpers import (
    ROOT,
    Snapshots,
    both_traced,
    extract_quietly,
    feature_extraction,
    given_names,
    ignored_warnings,
    node_names,
    operations,
    overwritten,
    parametrize,
    prune,
    python,
    queries_by_mode,
    recording,
    run,
    same,
    select,
    staying,
    suggestions,
    traced,
    zoo,
)
from tests.nets import build

FOLDER = ROOT / "tests" / "conformance"
ZOO = sorted(path.stem for path in (FOLDER / "zoo").glob("*.json"))
EXAMPLES = sorted(generate.EXAMPLES)
# Of torchvision's models some that differ: other modes, constants, video, functions that are recorded whole, asserts.
VARIED = ["googlenet", "mobilenet_v3_small", "r3d_18", "resnet18", "swin_t", "vit_b_32"]
MODES = ("train", "eval")
ERRORS = {"AttributeError": AttributeError, "ValueError": ValueError, "re.error": re.error}


def load(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return document


def each(name: str, *, where: Any = lambda vector: True) -> Any:
    """A test for each vector of a file."""
    vectors = [vector for vector in load(name)["vectors"] if where(vector)]
    assert len(vectors) > 10
    return parametrize("vector", vectors, ids=[vector["id"] for vector in vectors])


def error_name(error: Exception) -> str:
    return next(name for name, kind in ERRORS.items() if type(error) is kind)


def same_pairs(answer: Any, expected: Any) -> bool:
    """Equal results; the order of queries that mean one node is not laid down."""
    for mode in MODES:
        pairs = answer[mode]
        wanted = expected[mode]
        if [position for _, position in pairs] != [position for _, position in wanted]:
            return False
        if sorted(map(str, pairs)) != sorted(map(str, wanted)):
            return False
    return True


def flagged(vector: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
    """torchvision's answer is the vector's, or else it is flagged, with the answer that it is."""
    own = {key: vector[key] for key in answer if key in vector}
    if "torchvision" not in vector:
        assert answer == own
    else:
        assert answer != own, "torchvision agrees here, so there is nothing to flag"
        assert answer == {key: value for key, value in vector["torchvision"].items() if key != "difference"}


# --- form ---


def validator_of(name: str) -> Any:
    path = (FOLDER / name).parent / load(name)["$schema"]
    return jsonschema.Draft202012Validator(json.loads(path.read_text(encoding="utf-8")))


@parametrize("name", ["naming", "selection", "pruning", *(f"zoo/{model}" for model in ZOO)])
def test_a_file_follows_its_schema(name: str) -> None:
    document = load(name)
    validator = validator_of(name)
    validator.check_schema(validator.schema)
    validator.validate(document)


def objects(value: Any) -> Iterator[dict[str, Any]]:
    """The objects in a document; those of a caller's queries may have any keys."""
    if isinstance(value, list):
        for item in value:
            yield from objects(item)
    elif isinstance(value, dict):
        yield value
        for key, item in value.items():
            if not key.endswith("return_nodes"):
                yield from objects(item)


@parametrize("name", ["naming", "selection", "pruning", "zoo/alexnet", "zoo/torchaudio_conformer"])
def test_a_schema_admits_nothing_else(name: str) -> None:
    document = load(name)
    validator = validator_of(name)
    del document.get("vectors", [])[8:]
    for part in objects(document):
        part["more"] = 1
        assert not validator.is_valid(document), part
        del part["more"]
        for key in set(part) - {"torchvision"}:  # which is optional
            value = part.pop(key)
            assert not validator.is_valid(document), key
            part[key] = {"of": "another kind"}
            assert not validator.is_valid(document) or key.endswith("return_nodes"), key
            part[key] = value
    validator.validate(document)


@parametrize("kind", ["placeholder", "state", "assert"])
def test_only_operations_write_and_what_has_no_inputs_has_none(kind: str) -> None:
    document = load("pruning")
    node = document["vectors"][0]["nodes"][1]
    admitted = set()
    for key in ("inputs", "writes", "views"):
        node.update({"kind": kind, "inputs": [], "writes": [], "views": [], key: [0]})
        if validator_of("pruning").is_valid(document):
            admitted.add(key)
    assert admitted == {"placeholder": set(), "state": {"views"}, "assert": {"inputs"}}[kind]


@parametrize("name", ["naming", "selection", "pruning"])
def test_vectors_are_counted_and_have_ids_of_their_own(name: str) -> None:
    document = load(name)
    ids = [vector["id"] for vector in document["vectors"]]
    assert len(set(ids)) == len(ids) == document["count"]
    for vector in document["vectors"]:
        for part in ("comment", "reason"):
            assert re.fullmatch(r"\S.*\S\.", vector[part]), "a sentence"


@parametrize("name", ZOO)
def test_nodes_of_the_zoo_are_counted(name: str) -> None:
    document = load(f"zoo/{name}")
    assert document["model"] == name
    for mode in MODES:
        names = [row[0] for row in generate.rows_of(document, mode)]
        assert len(set(names)) == len(names) == document["count"][mode]
    assert document["eval"] != document["train"]


@parametrize("name", ZOO)
def test_the_zoo_holds_programs(name: str) -> None:
    """As the schema of pruning asks, and more: what a node takes comes before it; what it writes and views it takes."""
    document = load(f"zoo/{name}")
    kinds = set()
    for mode in MODES:
        listed = port.program(document, mode)
        for place, node in enumerate(listed):
            assert {*node["inputs"], *node["views"]} <= set(range(place))
            assert set(node["writes"]) <= set(node["inputs"])
            assert set(node["views"]) <= set(node["inputs"]) or node["kind"] == "state"
            assert node["kind"] == "operation" or not node["writes"]
            assert node["kind"] in ("operation", "assert") or not node["inputs"]
            assert node["kind"] in ("operation", "state") or not node["views"]
            kinds.add(node["kind"])
        for cut in cuts_in(document, mode):
            assert cut["query"] in generate.queries([node["name"] for node in listed])
            assert cut["stays"] == sorted(set(cut["stays"]))
        assert len(cuts_in(document, mode)) == (3 if listed else 0)
    assert {"placeholder", "operation"} <= kinds
    assert "assert" in kinds or name not in EXAMPLES


def cuts_in(document: Mapping[str, Any], mode: str) -> list[dict[str, Any]]:
    """The extractors of a model in a mode."""
    listed_in = "train" if document[mode] == generate.SAME else mode
    return [cut for cut in document["extractors"] if cut["mode"] == listed_in]


def test_the_zoo_is_small() -> None:
    """And it has what the vectors are about: states, asserts, writes, views, and cuts that leave nodes out."""
    assert sum(path.stat().st_size for path in (FOLDER / "zoo").glob("*.json")) < 6_000_000
    seen: Counter[str] = Counter()
    for name in ZOO:
        document = load(f"zoo/{name}")
        for node in port.program(document, "eval"):
            seen.update([node["kind"], *(key for key in ("writes", "views") if node[key])])
        seen["less"] += sum(len(cut["stays"]) <= cut["position"] for cut in document["extractors"])
    assert all(seen[key] > 50 for key in ("state", "assert", "writes", "views", "less")), seen


def readme(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def test_differences_are_rows_of_both_readmes() -> None:
    folders = ROOT, ROOT / "tests", FOLDER
    rows, more, explained = (re.findall(r"^\| (D\d\d) \|", readme(folder), re.MULTILINE) for folder in folders)
    used = set()
    for name in ("naming", "selection", "pruning"):
        used |= {vector.get("torchvision", {}).get("difference") for vector in load(name)["vectors"]}
    assert explained == sorted(used - {None})
    assert set(explained) <= {*rows, *more}


def test_the_readme_counts_right() -> None:
    vectors = sum(load(name)["count"] for name in ("naming", "selection", "pruning"))
    assert f"{vectors} vectors, and {len(ZOO)} models" in readme(ROOT)
    assert f"`zoo/` has {len(ZOO)} models" in readme(FOLDER)


def test_the_three_rules_of_the_port_are_100_lines() -> None:
    source = (FOLDER / "port.py").read_text(encoding="utf-8")
    rules = source[source.index("# --- names") : source.index("# --- the files")]
    code = [line for line in rules.splitlines() if line and not re.match(r'\s*(""".*"""$|#)', line)]
    assert 95 <= len(code) <= 105


# --- naming ---


def calls_of(vector: Mapping[str, Any]) -> list[slow.Call]:
    calls = []
    for call in vector["calls"]:
        calls.append((call["module"], None) if "module" in call else (call["scope"], call["fx_name"]))
    return calls


@each("naming")
def test_naming(vector: dict[str, Any]) -> None:
    paths = vector.get("paths", [])
    calls = calls_of(vector)
    assert given_names(calls, paths) == vector["names"]
    assert (slow.exact_names(paths, calls) if paths else slow.names(calls)) == vector["names"]
    assert len(set(vector["names"])) == len(calls)


class StandIn:
    """What torchvision's namer looks at of a node."""

    def __init__(self, call: slow.Call) -> None:
        self.op = "call_module" if call[1] is None else "call_function"
        self.name = call[1]

    def __str__(self) -> str:
        return str(self.name)


@each("naming", where=lambda vector: vector["rules"] == "default")
def test_naming_by_torchvision(vector: dict[str, Any]) -> None:
    theirs = feature_extraction()
    tracer = theirs.NodePathTracer()
    try:
        for call in calls_of(vector):
            node = StandIn(call)
            tracer.node_to_qualname[node] = tracer._get_node_qualname(call[0], node)
    except Exception as error:
        flagged(vector, {"error": error_name(error)})
    else:
        flagged(vector, {"names": list(tracer.node_to_qualname.values())})


# --- selection ---

ARGUMENTS = ("return_nodes", "train_return_nodes", "eval_return_nodes")


def by_mode(value: Any) -> dict[str, Any]:
    """What is given once holds for both modes."""
    return value if isinstance(value, dict) else dict.fromkeys(MODES, value)


def own_answer(vector: Mapping[str, Any]) -> dict[str, Any]:
    """What a vector says, with both modes written out."""
    return {"error": vector["error"]} if "error" in vector else {"result": by_mode(vector["result"])}


def by_functions(vector: Mapping[str, Any]) -> dict[str, Any]:
    """featx's answer by its functions over strings."""
    found = {}
    try:
        asked = queries_by_mode(*map(vector.get, ARGUMENTS))
    except ValueError:
        return {"error": {"kind": "two-queries-one-key"}}
    for mode, names in by_mode(vector["names"]).items():
        positions = {"output": len(names), **select(names)}
        pairs = []
        for query, key in asked[mode].items():
            if query not in positions:
                return {"error": no_match(query, mode, suggestions(names, query))}
            pairs.append([key, positions[query]])
        pairs.sort(key=operator.itemgetter(1))
        found[mode] = [[key, "output" if position == len(names) else position] for key, position in pairs]
    return {"result": found}


def no_match(query: str, mode: str, suggestions: list[str]) -> dict[str, Any]:
    return {"kind": "no-match", "mode": mode, "query": query, "suggestions": suggestions}


def asked_by_mode(vector: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    found = {}
    for mode in MODES:
        asked = vector["return_nodes"] if "return_nodes" in vector else vector[f"{mode}_return_nodes"]
        if isinstance(asked, str):
            asked = [asked]
        found[mode] = asked if isinstance(asked, dict) else {query: query for query in asked}
    return found


def by_the_slow_way(vector: Mapping[str, Any]) -> dict[str, Any]:
    asked = asked_by_mode(vector)
    if any(len(set(queries.values())) < len(queries) for queries in asked.values()):
        return {"error": {"kind": "two-queries-one-key"}}
    found = {}
    for mode, names in by_mode(vector["names"]).items():
        try:
            found[mode] = slow.select(names, asked[mode])
        except slow.NoMatch as error:
            return {"error": no_match(error.query, mode, error.suggestions)}
    return {"result": found}


@each("selection")
def test_selection(vector: dict[str, Any]) -> None:
    assert by_functions(vector) == own_answer(vector)
    assert by_the_slow_way(vector) == own_answer(vector)


def test_suggestions_for_drawn_names(rng: random.Random) -> None:
    def draw() -> str:
        return "".join(rng.choice("ab.1_") for _ in range(rng.randrange(8)))

    found = 0
    for _ in range(500):
        names = [draw() for _ in range(6)]
        query = draw()
        found += len(slow.suggestions(names, query))
        assert suggestions(names, query) == slow.suggestions(names, query), (names, query)
    assert found > 100


def answer_of(library: Any, vector: Mapping[str, Any]) -> dict[str, Any]:
    """A library's answer by its public function, on a real model that has the names."""
    names = by_mode(vector["names"])
    model = real.Chain(names)
    kwargs = {"leaf_modules": [real.Leaf]}
    with ignored_warnings():  # of misleading names and of modes that differ
        listed = library.get_graph_node_names(model, dict(kwargs))
        assert dict(zip(MODES, map(list, listed))) == names, "the model is not what it should be"
        arguments = [copy.deepcopy(vector.get(argument)) for argument in ARGUMENTS]
        extractor = library.create_feature_extractor(model, *arguments, tracer_kwargs=dict(kwargs))
    found = {}
    for mode in MODES:
        values = extractor.train(mode == "train")(torch.zeros(()))
        found[mode] = []
        for key, value in values.items():
            found[mode].append([key, "output" if isinstance(value, tuple) else int(value)])
    return {"result": found}


def has_model(vector: Mapping[str, Any]) -> bool:
    return bool(by_mode(vector["names"])["train"][:1] == ["x"])


def test_all_vectors_but_nine_have_a_model() -> None:
    without = [vector["id"] for vector in load("selection")["vectors"] if not has_model(vector)]
    assert without == [
        "no-names",
        "empty-query-before-a-dot",
        "train-error-before-eval-error-of-an-earlier-query",
        "output-without-names",
        "almost-equally-similar",
        "cutoff-is-just-not-reached",
        "ties-of-different-length",
        "ties-of-different-case",
        "both-sides-count",
    ]


@each("selection", where=has_model)
def test_selection_on_a_model(vector: dict[str, Any]) -> None:
    expected = own_answer(vector)
    if "result" in expected:
        assert same_pairs(answer_of(featx, vector)["result"], expected["result"])
    elif expected["error"]["kind"] == "two-queries-one-key":
        with pytest.raises(ValueError, match="under the key"):
            answer_of(featx, vector)
    else:
        with pytest.raises(featx.NodeNameError, match="no node of the") as raised:
            answer_of(featx, vector)
        error = raised.value
        assert no_match(error.query, error.mode, error.suggestions) == expected["error"]


@each("selection", where=has_model)
def test_selection_by_torchvision(vector: dict[str, Any]) -> None:
    theirs = feature_extraction()
    marked = vector.get("torchvision", {})
    if "result" in marked:
        vector = {**vector, "torchvision": {**marked, "result": by_mode(marked["result"])}}
    try:
        answer = answer_of(theirs, vector)
    except Exception as error:
        is_no_match = type(error) is ValueError and "is not present in model" in str(error)
        if is_no_match and vector.get("error", {}).get("kind") == "no-match":
            assert not marked, "torchvision agrees here, so there is nothing to flag"
        else:
            flagged({**vector, **own_answer(vector)}, {"error": error_name(error)})
    else:
        flagged({**vector, **own_answer(vector)}, answer)


# --- pruning ---


def reads_of(vector: Mapping[str, Any]) -> list[tuple[int, int]]:
    """What is asked for, with the position after which it is taken."""
    if "requested" in vector:
        return [(at, at) for at in vector["requested"]]
    return [tuple(read) for read in vector["reads"]]


@each("pruning")
def test_pruning(vector: dict[str, Any]) -> None:
    reads = reads_of(vector)
    nodes = operations(vector["nodes"])
    program = program_of(vector)
    expected = {(entry["position"], entry["after"]): entry["by"] for entry in vector["overwritten"]}
    assert staying(nodes, reads) == vector["stays"]
    assert overwritten(nodes, vector["stays"], reads) == expected
    assert slow.staying(program, reads) == vector["stays"]
    assert slow.overwritten(program, vector["stays"], reads) == expected


def program_of(vector: Mapping[str, Any]) -> list[slow.Node]:
    return [slow.Node(**node) for node in vector["nodes"]]


PLAIN_ONLY = [
    "write-that-returns-something-fresh",
    "value-beside-a-write",
    "write-into-two-values",
    "write-into-what-has-no-inputs",
    "state-that-is-fetched-twice",
]


def has_program(vector: Mapping[str, Any]) -> bool:
    return vector["id"] not in PLAIN_ONLY


@parametrize("name", PLAIN_ONLY)
def test_what_has_no_operation_of_torch(name: str) -> None:
    (vector,) = (vector for vector in load("pruning")["vectors"] if vector["id"] == name)
    with pytest.raises(NotImplementedError, match="no single operation"):
        real.snapshots(vector["nodes"])


def places(graph: fx.Graph, traced: list[str]) -> list[int]:
    """The positions in the traced graph of the nodes that are left; clones were not there."""
    names = [node.name for node in graph.nodes if node.op != "output"]
    return [traced.index(name) for name in names if name in traced]


def cut(vector: Mapping[str, Any]) -> tuple[nn.Module, fx.GraphModule, list[int], list[torch.Tensor]]:
    """A program's model, the features of its reads under their numbers, the nodes that stay, and arguments."""
    model, arguments = real.program_model(vector["nodes"])
    tracer = featx.NodePathTracer(exact="reads" in vector)
    traced = [node.name for node in tracer.trace(model).nodes if node.op != "output"]
    assert len(traced) == len(vector["nodes"]) == len(tracer.names)
    reads = reads_of(vector)
    if all(at == after for at, after in reads):
        queries = {tracer.names[at]: str(number) for number, (at, _) in enumerate(reads)}
        extractor = extract_quietly(model.eval(), queries, exact="reads" in vector)
        return model, extractor, places(extractor.eval_graph, traced), arguments
    graph = prune(tracer, reads)
    return model, fx.GraphModule(model, graph), places(graph, traced), arguments


@each("pruning", where=has_program)
def test_pruning_by_execution(vector: dict[str, Any]) -> None:
    """Values and state against clones of eager execution; a value is another one exactly if it is overwritten."""
    model, extractor, stays, arguments = cut(vector)
    assert stays == vector["stays"]
    values = extractor(*arguments)
    seen = real.snapshots(vector["nodes"])
    changed = [(entry["position"], entry["after"]) for entry in vector["overwritten"]]
    surely = all(len(node["views"]) < 2 for node in vector["nodes"])
    assert len(values) == len(reads_of(vector))
    for number, read in enumerate(reads_of(vector)):
        is_same = equal(values[str(number)], seen[read])
        if "reads" in vector or read not in changed:
            assert is_same, read
        elif surely:
            assert not is_same, read
    end = max((after for _, after in reads_of(vector)), default=None)
    if end is not None:
        for place in real.fetched(vector["nodes"]):
            assert equal(model.get_parameter(f"p{place}"), seen[place, end]), "the state after the call"


@each("pruning", where=lambda vector: has_program(vector) and "requested" in vector)
def test_pruning_by_torchvision(vector: dict[str, Any]) -> None:
    theirs = feature_extraction()
    model, _ = real.program_model(vector["nodes"])
    tracer = featx.NodePathTracer()
    traced = [node.name for node in tracer.trace(model).nodes]
    extractor = theirs.create_feature_extractor(model, [tracer.names[at] for at in vector["requested"]])
    flagged(vector, {"stays": places(extractor.eval_graph, traced)})


def test_pruning_of_drawn_programs(rng: random.Random) -> None:
    for _ in range(300):
        vector = drawn_program(rng)
        nodes = operations(vector["nodes"])
        program = program_of(vector)
        size = len(program)
        requested = rng.sample(range(size), rng.randrange(min(size, 3) + 1))
        starts = [rng.randrange(size) for _ in range(rng.randrange(3))]
        later = [(start, rng.randrange(start, size)) for start in starts]
        own = list(zip(requested, requested))
        for reads in (own, later, own + later):
            print(vector, reads)
            stays = slow.staying(program, reads)
            assert staying(nodes, reads) == stays == port.staying(vector["nodes"], reads)
            assert port.overwritten(vector["nodes"], stays, reads) == slow.overwritten(program, stays, reads)
            assert overwritten(nodes, stays, reads) == slow.overwritten(program, stays, reads)


def drawn_program(rng: random.Random) -> dict[str, Any]:
    nodes: list[dict[str, Any]] = []
    for place in range(rng.randrange(1, 12)):
        kind = "placeholder" if place == 0 else rng.choice(["operation"] * 5 + ["assert", "state"])
        inputs = rng.sample(range(place), 0 if kind == "state" else min(place, rng.randrange(4)))
        writable = inputs if kind == "operation" else []
        viewable = [at for at, node in enumerate(nodes) if node["kind"] == "state"] if kind == "state" else writable
        writes = [at for at in writable if rng.random() < 0.3]
        views = [at for at in viewable if rng.random() < 0.3]
        nodes.append({"kind": kind, "inputs": inputs, "writes": writes, "views": views})
    return {"nodes": nodes}


# --- a port ---


def test_a_port_from_the_words_gives_all_of_it() -> None:
    """In a process that finds the standard library alone."""
    done = python("-I", "-S", str(FOLDER / "port.py"))
    counts = {name: load(name)["count"] for name in ("naming", "selection", "pruning")}
    counts["zoo"] = sum(len(load(f"zoo/{name}")["extractors"]) for name in ZOO)
    said = [f"{name}: {count} looked at" for name, count in counts.items()]
    assert (done.returncode, done.stdout.splitlines()) == (0, [*said, "0 fail"]), done.stderr
    assert counts["zoo"] > 350


def test_the_port_names_drawn_calls(rng: random.Random) -> None:
    """The vectors are not all that it was written for."""
    pieces = ["a", "a_1", "a_2", "a_1_1", "b", "b_", "_1", "a_0"]
    for _ in range(300):
        paths = rng.sample(pieces, 4)
        drawn = [rng.choice([{"module": path}, {"scope": "", "fx_name": path}]) for path in rng.choices(pieces, k=8)]
        known = [call for call in drawn if call.get("module", paths[0]) in paths]
        assert port.named(drawn) == slow.names(calls_of({"calls": drawn}))
        assert port.named(known, paths) == slow.exact_names(paths, calls_of({"calls": known}))


def test_a_port_says_what_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    changed = {
        "naming": ("layer1.0.add", "add"),
        "selection": ('"fc"', '"f"'),
        "pruning": ('"stays": [0', '"stays": [1'),
    }
    for name, (old, new) in {**changed, "zoo/resnet18": ('"stays": [0, 1, 2', '"stays": [0, 2')}.items():
        text = (FOLDER / f"{name}.json").read_text(encoding="utf-8")
        copied = tmp_path / f"{name}.json"
        copied.parent.mkdir(exist_ok=True)
        copied.write_text(text.replace(old, new), encoding="utf-8")
    monkeypatch.setattr(port, "FOLDER", tmp_path)
    assert port.main() == 1
    *printed, last = capsys.readouterr().out.splitlines()
    failures = [line for line in printed if line.endswith(" fails")]
    assert last == f"{len(failures)} fail"
    assert "naming: operation-by-scope fails" in failures
    assert "zoo: resnet18 train layer1 fails" in failures
    assert {line.partition(":")[0] for line in failures} == {"naming", "selection", "pruning", "zoo"}


# --- zoo ---


def skip_elsewhere(name: str = "resnet18") -> None:
    """The files are those of certain versions."""
    pytest.importorskip("torchvision")
    library = generate.library_of(name)
    with ignored_warnings():
        pytest.importorskip(library)
    here = generate.versions(library)
    there = load(f"zoo/{name}")["made_by"]
    for part in ("torch", library):
        if here[part] != there[part]:
            pytest.skip(f"the file was made by torch {there['torch']} and {library} {there[library]}")


@zoo
@parametrize("name", ZOO)
def test_the_zoo_is_as_stored(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    skip_elsewhere(name)
    assert generate.main(["--check", name]) == 0, capsys.readouterr().out
    assert capsys.readouterr().out == f"{name}: as stored\n"


def test_every_model_that_can_be_traced_has_a_file() -> None:
    assert set(EXAMPLES) < set(ZOO)
    assert len(ZOO) == 107 + 10
    assert Counter(generate.library_of(name) for name in EXAMPLES).most_common() == [
        (library, 2) for library in dict.fromkeys(map(generate.library_of, EXAMPLES))
    ]
    skip_elsewhere()
    assert set(ZOO) - set(EXAMPLES) == set(nets.zoo_names()) - set(nets.UNTRACEABLE)


def test_all_files_are_of_one_origin_which_the_readme_says() -> None:
    origin: dict[str, str] = {}
    for name in ZOO:
        made_by = load(f"zoo/{name}")["made_by"]
        assert list(made_by) == ["featx", "torch", generate.library_of(name)]
        assert {**made_by, **origin} == {**origin, **made_by}
        origin.update(made_by)
    *most, last = (f"{library} {version}" for library, version in origin.items())
    assert f"the files are of {', '.join(most)} and {last}" in " ".join(readme(FOLDER).split())


@zoo
@parametrize("name", [*VARIED, *EXAMPLES])
def test_cuts_are_those_of_featx_and_give_what_the_model_gives(name: str) -> None:
    """By the public function, with weights; a stage is what its module returned, by a hook."""
    skip_elsewhere(name)
    model, example = generate.build(name) if name in EXAMPLES else (build(name).eval(), None)
    document = load(f"zoo/{name}")
    if example is None:
        example = (torch.rand(document["input"]["shape"]),)
    else:
        with ignored_warnings(), pytest.raises(featx.UntraceableError):
            node_names(model)
    with recording(model) as calls:
        called(model, example)
    returned = dict(calls)
    with ignored_warnings(), both_traced(model, example if name in EXAMPLES else None) as tracers:
        tracer = tracers["eval"]
        truth = Snapshots(fx.GraphModule(model, tracer.graph))
        called(truth.run, example)
        nodes = [node.name for node in tracer.node_to_qualname]
    stages = 0
    for cut in cuts_in(document, "eval"):
        query = cut["query"]
        given = {"example_inputs": example} if name in EXAMPLES else {}
        extractor = extract_quietly(model, None, [], [query], **given)
        kept = {node.name for node in extractor.eval_graph.nodes}
        assert [place for place, node in enumerate(nodes) if node in kept] == cut["stays"]
        assert sum(parameter.numel() for parameter in extractor.parameters()) == cut["parameters"]
        value = called(extractor, example)[query]
        assert same(value, truth.seen[nodes[cut["position"]]])
        if isinstance(returned.get(query), torch.Tensor):
            assert same(value, returned[query])
            stages += 1
    assert stages or name == "ssdlite320_mobilenet_v3_large", "whose first stage returns no tensor"


def called(module: Callable[..., Any], arguments: Any) -> Any:
    """What a call with an example gives, without gradients."""
    arguments = copy.deepcopy(arguments)
    with torch.no_grad():
        if isinstance(arguments, dict):
            return module(**arguments) if isinstance(module, nn.Module) else module(*arguments.values())
        return module(*arguments)


@zoo
@parametrize("name", VARIED)
def test_shapes_are_those_of_eager_execution(name: str) -> None:
    """On a CPU, by hooks; nothing of fx is in it."""
    skip_elsewhere()
    model = build(name)
    document = load(f"zoo/{name}")
    x = torch.rand(document["input"]["shape"], generator=torch.Generator().manual_seed(0))
    for mode in MODES:
        with recording(model.train(mode == "train"), generate.shape) as calls:
            run(model, x)
        first_calls = dict(reversed(calls))
        called = {row[2]: row[3] for row in reversed(generate.rows_of(document, mode)) if row[1] == "call_module"}
        assert len(called) > 20
        assert {path: first_calls[path] for path in called} == called


# --- the generator ---


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of one model's file, alone."""
    skip_elsewhere()
    shutil.copy(FOLDER / "zoo" / "alexnet.json", tmp_path)
    monkeypatch.setattr(generate, "ZOO", tmp_path)
    return tmp_path / "alexnet.json"


@parametrize(
    ("old", "new", "line"),
    [
        (
            "[2, 64, 23, 23], [0]",
            "[2, 64, 23, 24], [0]",
            "changed features.0: shape [2, 64, 23, 24] -> [2, 64, 23, 23]",
        ),
        (
            '["features.1", "call_module"',
            '["features.1", "call_method"',
            "changed features.1: operation call_method -> ",
        ),
        ('["avgpool",', '["pool",', "removed pool (call_module avgpool, shape [2, 256, 6, 6])"),
        ('["avgpool",', '["pool",', "added avgpool (call_module avgpool, shape [2, 256, 6, 6])"),
        (
            '"features.1", [2, 64, 23, 23], [1], [1], [1]]',
            '"features.1", [2, 64, 23, 23], [1], [], [0]]',
            "changed features.1: writes [] -> ['features.0'], views ['x'] -> ['features.0']",
        ),
        (
            ',\n["classifier.6", "call_module", "classifier.6", [2, 1000], [21], [], []]',
            "",
            "added classifier.6 (call_module",
        ),
        ("[0, 1, 2, 3, 4, 5]", "[0, 1, 2, 4, 5]", "extractor of features.4 in train mode: keeps features.2"),
        (
            "[0, 1, 2, 3, 4, 5]",
            "[0, 1, 2, 3, 4, 5, 6]",
            "extractor of features.4 in train mode: keeps no longer features.5",
        ),
        (
            '"query": "features.4"',
            '"query": "features.5"',
            "added the extractor of features.4 in train mode",
        ),
        ('"parameters": 330688', '"parameters": 330689', "in train mode: parameters 330689 -> 330688"),
        ('"float32"', '"float64"', "input: {'shape': [2, 3, 96, 96], 'dtype': 'float64'} -> "),
        ('"train": 23', '"train": 24', "the nodes are the same, but the generator writes them otherwise"),
        ("],\n", "], \n", "the nodes are the same, but the generator writes them otherwise"),
    ],
)
def test_a_check_says_what_changed(
    stored: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, line: str
) -> None:
    text = stored.read_text(encoding="utf-8")
    assert old in text
    tampered = text.replace(old, new, 1)
    stored.write_text(tampered, encoding="utf-8")
    assert generate.main(["alexnet", "--check"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "alexnet: differs"
    assert [found for found in printed if line in found], printed
    assert len(printed) <= 5
    assert stored.read_text(encoding="utf-8") == tampered
    assert generate.main(["alexnet"]) == 0
    assert stored.read_text(encoding="utf-8") == text


def test_a_check_says_where_the_order_changed_and_which_mode(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = generate.load("alexnet")
    rows = document["train"]
    document["eval"] = [rows[0], [*rows[2][:4], [2], [2], [2]], rows[1], [*rows[3][:4], [1], [], []], *rows[4:]]
    stored.write_text(generate.text(document), encoding="utf-8")
    assert generate.main(["--check", "alexnet"]) == 1
    assert capsys.readouterr().out == "alexnet: differs\n  eval: features.0 now comes before features.1\n"


def test_a_check_is_short(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored.write_text(stored.read_text(encoding="utf-8").replace("[2, ", "[4, "), encoding="utf-8")
    assert generate.main(["--check", "alexnet"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + 1 + generate.MOST + 1
    assert re.fullmatch(r"  train and eval: … and \d+ more", printed[-1])


def test_models_that_are_gone_and_models_that_are_new(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = stored.rename(stored.with_name("gonenet.json"))
    assert generate.main(["--check", "gonenet", "alexnet"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "gonenet: differs",
        "  there is a file, but torchvision has no such model that torch.fx can trace",
        "alexnet: differs",
        "  there is no file, but torchvision has this model",
    ]
    assert generate.main(["gonenet", "alexnet"]) == 0
    assert not gone.exists()
    assert stored.read_bytes() == (FOLDER / "zoo" / "alexnet.json").read_bytes()


def test_without_torchvision_no_file_is_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(FOLDER / "zoo" / "alexnet.json", tmp_path)
    monkeypatch.setattr(generate, "ZOO", tmp_path)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    for arguments in ([], ["alexnet"], ["--check"]):
        assert generate.main(arguments) == 2
        out, err = capsys.readouterr()
        assert (out, len(err.splitlines())) == ("", 1)
    assert (tmp_path / "alexnet.json").read_bytes() == (FOLDER / "zoo" / "alexnet.json").read_bytes()


class Pair(NamedTuple):
    a: Any
    b: Any


@parametrize(
    "forward",
    [
        lambda model, x: torch.zeros(4).add_(x),
        lambda model, x: torch.zeros(4).expand_as(x).add_(x),
        lambda model, x: model.leaf(Pair(x, x)),
    ],
)
def test_what_would_be_lost_is_refused(forward: Any) -> None:
    """A write into a constant, and a value that is taken through what has no name."""
    model = type("Model", (nn.Module,), {"forward": forward})()
    model.leaf = nn.Identity()
    tracer, _ = traced(model)
    with pytest.raises(ValueError, match="takes what is not listed, or writes into it"):
        generate.rows(tracer, "eval", [None] * 9)


@parametrize("text", ["", "[]", "{", '{"train": 3}', '{"train": [[]], "eval": "same as train"}'])
def test_a_file_that_is_none(stored: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    stored.write_text(text, encoding="utf-8")
    assert generate.main(["--check", "alexnet"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "alexnet: differs"
    assert printed[1].startswith("  the file is none that the generator writes: ")
    assert len(printed) == 2


def test_a_model_that_cannot_be_traced_any_more(
    stored: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.models import AlexNet

    monkeypatch.setattr(AlexNet, "forward", lambda self, x: x if x.sum() > 0 else -x)
    assert generate.main(["--check", "alexnet"]) == 1
    assert "  here it cannot be traced and run: UntraceableError: " in capsys.readouterr().out
    before = stored.read_bytes()
    assert generate.main(["alexnet"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert stored.read_bytes() == before


@parametrize("name", ["no_such_model", "raft_large", "../naming"])
def test_what_is_no_model_is_said_in_one_line(stored: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert generate.main([name]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert name in err
