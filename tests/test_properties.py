"""Properties of featx over models that hypothesis draws; what eager execution does is the truth."""

from __future__ import annotations

import contextlib
import copy
import itertools
import random
import re
import sys
from typing import Any, Callable, Iterable, Sequence

import pytest
import torch
from hypothesis import Phase, assume, event, example, find, given, settings
from hypothesis import strategies as st
from torch import equal, nn
from torch.nn import Sequential

from tests import featx
from tests.conformance import slow
from tests.helpers import (
    COPIES,
    MODES,
    agree,
    as_it_is,
    both_traced,
    extract,
    extract_quietly,
    feature_extraction,
    heard,
    ignored_warnings,
    in_its_mode,
    node_names,
    outcome,
    parametrize,
    recording,
    same,
    snapshot,
    tensors,
    texts,
    traced_already,
    untouched,
)
from tests.nets import stated
from tests.strategies import (
    CUTTING,
    LEAF_CLASSES,
    LEAVES,
    LOST,
    MET,
    OPERATIONS,
    PLAIN_NAMES,
    SCRIPTABLE,
    TENSORS,
    Built,
    Dice,
    Entry,
    Net,
    Record,
    build,
    example_input,
    losing_plans,
    met_plans,
    plans,
    record,
    training_mode,
)
from tests.versions import older

KWARGS = {"leaf_modules": LEAF_CLASSES}


def names_of(model: nn.Module, exact: bool) -> tuple[list[str], list[str]]:
    return node_names(model, KWARGS, exact=exact)


def extract_in(model: Built, queries: Any, training: bool, **options: Any) -> nn.Module:
    """An extractor for one mode, in that mode; what it warns of is another test's."""
    asked = in_its_mode(model.train(training), queries)
    return extract_quietly(model, *asked, tracer_kwargs=KWARGS, **options)


def values_of(extractor: nn.Module, training: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    with training_mode(extractor, training), torch.no_grad():
        try:
            return snapshot(extractor(example_input()))  # before the buffers are put back, which features may be
        except Exception as error:  # else hypothesis takes each generated file for another place
            raise AssertionError(f"the extractor fails: {error!r}") from None


def eager(plan: Net, training: bool) -> Record:
    with torch.no_grad():
        return record(build(plan), training)


def slow_names_of(plan: Net, log: Sequence[Entry], exact: bool) -> list[str]:
    """The names of all entries, by the slow implementations."""
    calls = [(entry.scope, entry.own) for entry in log]
    if not exact:
        return slow.names([call for call, entry in zip(calls, log) if entry.is_node])
    return slow.exact_names([path for path, _ in build(plan).named_modules(remove_duplicate=False) if path], calls)


# What hypothesis found.
A_BUFFER_LIKE_AN_ARGUMENT = Net((("x", "buffer"),), (("use", 0, 0, False), ("apply", "add_", 1, 0, False)))
A_BUFFER_AS_A_FEATURE = Net((("a", "buffer"),), (("use", 0, 0, False), ("update", 0, 0)))
A_NAME_WITH_A_NEWLINE = Net((("\n", Net((), (("split", 0),))),), (("split", 0), ("use", 0, 0, False)))
A_NUMBER_BEFORE_OTHER_BRANCHES = Net(
    (("a", "linear"),), (("use", 0, 0, False), ("chance", (("compute", 0, 0),))), ("one", 1), "x"
)


# ------------------------------------------------------------------------------------------ names


@given(plans(), st.booleans())
def test_names_are_distinct_and_those_of_the_slow_implementation(plan: Net, exact: bool) -> None:
    assume("_tensor_constant0" not in repr(plan))  # torch.fx asks for it, and so makes a node of the parameter
    model = build(plan)
    for training, names in zip(MODES, names_of(model, exact)):
        assert len(set(names)) == len(names)
        log = eager(plan, training).entries
        expected = slow_names_of(plan, log, exact)
        assert names == ([name for name, entry in zip(expected, log) if entry.is_node] if exact else expected)
    assert names_of(copy.deepcopy(model), exact) == names_of(model, exact)


@given(plans())
@example(A_NAME_WITH_A_NEWLINE)
def test_names_are_torchvisions_wherever_these_are_distinct(plan: Net) -> None:
    theirs = feature_extraction()
    try:
        with ignored_warnings():
            named = theirs.get_graph_node_names(build(plan), {"leaf_modules": list(LEAF_CLASSES)})
    except (IndexError, ValueError, RuntimeError, re.error) as error:  # where its own naming fails
        event(f"torchvision: {type(error).__name__}")
        return
    for their_names, our_names in zip(named, names_of(build(plan), exact=False)):
        if len(set(their_names)) == len(their_names) and not is_misread(their_names):
            assert our_names == their_names


def is_misread(names: list[str]) -> bool:
    """Whether names mean something else as the regular expressions that torchvision makes of them (D12)."""
    stems = {re.sub(r"_[0-9]+$", "", name, flags=re.ASCII) for name in names}
    if any("\n" in name for name in names):  # of which it removes no number, since its dot matches no newline
        return True
    for stem, name in itertools.product(stems, names):
        if bool(re.match(rf"{stem}(_[0-9]+)?$", name)) != slow.is_form(name, stem):
            return True
    return False


# ------------------------------------------------------------------------------------------ values


def expected_exact(plan: Net, training: bool) -> dict[str, Any]:
    """All features and what they should be, in execution order."""
    entries, output = eager(plan, training)
    found = dict(zip(slow_names_of(plan, entries, exact=True), (entry.value for entry in entries)))
    return {**found, "output": found.get("output", output)}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for key in expected:
        assert same(found[key], expected[key]), f"{key!r}: {found[key]} is not {expected[key]}"


def each_alone(model: Built, queries: Iterable[str], training: bool, exact: bool) -> dict[str, Any]:
    """What an extractor of one query gives, for each; all are cut from one trace."""
    model.train(training)
    with both_traced(model, None, exact, KWARGS) as tracers, traced_already(tracers):
        extractors = {query: extract_in(model, query, training, exact=exact) for query in queries}
        return {query: values_of(extractor, training) for query, extractor in extractors.items()}


@given(plans(), st.booleans(), st.integers(0, 9))
@example(A_BUFFER_AS_A_FEATURE, True, 0)
def test_exact_features_are_those_of_eager_execution(plan: Net, training: bool, seed: int) -> None:
    expected = expected_exact(plan, training)
    queries = random.Random(seed).sample(list(expected), len(expected))
    model = build(plan)
    assert_same(values_of(extract_in(model, queries, training, exact=True), training), expected)
    for query, value in each_alone(model, expected, training, exact=True).items():
        assert_same(value, {query: expected[query]})


@given(plans(), st.booleans())
@example(A_BUFFER_AS_A_FEATURE, False)
def test_a_feature_alone_is_what_its_node_gave(plan: Net, training: bool) -> None:
    model, (entries, output) = build(plan), eager(plan, training)
    entries = [entry for entry in entries if entry.is_node]
    names = slow_names_of(plan, entries, exact=False)
    expected = {name: output if name == "output" else None for name in [*names, "output"]}
    for query in expected:
        for name, entry in zip(names, entries):
            if name == query or name.startswith(query + "."):
                expected[query] = entry.value
    for query, value in each_alone(model, expected, training, exact=False).items():
        assert_same(value, {query: expected[query]})
    with heard() as caught:
        extractor = extract(model, *in_its_mode(model, list(expected)), tracer_kwargs=KWARGS)
    together = values_of(extractor, training)
    said = [text for text in texts(caught) if text.startswith("the feature ")]
    overwritten = [text for text in said if "overwritten" in text]
    for query, value in expected.items():
        warned = any(text.startswith(f"the feature {query!r} ") for text in overwritten)
        assert warned or same(together[query], value), query
    assert len(said) == len(set(said))


# --------------------------------------------------------------------------------------- what runs


def chosen(plan: Net, training: bool, picks: Sequence[int]) -> tuple[dict[str, Any], int]:
    """Some of the exact features, and the position in eager execution of the last of them."""
    everything = list(expected_exact(plan, training).items())[:-1] or [("x", None)]
    places = sorted({pick % len(everything) for pick in picks})
    return dict(everything[place] for place in places), places[-1]


PICKS = st.lists(st.integers(0, 30), min_size=1, max_size=3).map(tuple)


@given(plans(), st.booleans(), PICKS)
def test_no_module_runs_after_the_last_one_needed(plan: Net, training: bool, picks: tuple[int, ...]) -> None:
    queries, last = chosen(plan, training, picks)
    model = build(plan)
    entries = eager(plan, training).entries
    before = [entry.scope for entry in entries[: last + 1] if entry.module is not None and entry.is_node]
    extractor = extract_in(model, list(queries), training, exact=True)
    with recording(model) as calls:
        values_of(extractor, training)
    called = [path for path, _ in calls if not isinstance(model.get_submodule(path), (Built, Sequential))]
    remaining = iter(before)
    assert all(path in remaining for path in called), f"{called} is not a part of {before}"


def words_of(plan: Any) -> list[str]:
    """All strings in a plan."""
    if isinstance(plan, tuple):
        return [word for part in plan for word in words_of(part)]
    return [plan] if isinstance(plan, str) else []


@given(plans(), st.booleans(), PICKS)
def test_parameters_are_those_that_get_a_gradient(plan: Net, training: bool, picks: tuple[int, ...]) -> None:
    queries, _ = chosen(plan, training, picks)
    model = build(plan)
    names = {parameter: name for name, parameter in model.named_parameters()}
    try:
        entries = record(model, training).entries
        values = dict(zip(slow_names_of(plan, entries, exact=True), (entry.value for entry in entries)))
        expected = gradients([values[query] for query in queries], list(names))
    except RuntimeError:  # eager execution itself writes over what a gradient needs
        event("no gradients")
        assume(False)
    extractor = extract_in(model, list(queries), training, exact=True)
    held = set(extractor.parameters())
    with training_mode(extractor, training):
        found = gradients(list(extractor(example_input()).values()), list(names))
    for (parameter, name), of_eager, of_featx in zip(names.items(), expected, found):
        assert of_eager is None or parameter in held, f"{name} is missing"
        assert (of_eager is None) == (of_featx is None), f"the gradient of {name}"
        if "data" not in words_of(plan):  # by which a later write, which is cut away, changes what backward has saved
            assert of_eager is None or equal(of_eager, of_featx), f"the gradient of {name}"
        if CUTTING.isdisjoint(words_of(plan)):
            assert of_eager is not None or parameter not in held, f"{name} is held and gets no gradient"


def gradients(values: list[Any], parameters: list[nn.Parameter]) -> list[Any]:
    sums = [tensor.sum() for tensor in tensors(values) if tensor.requires_grad]
    if not (sums and parameters):
        return [None] * len(parameters)
    return list(torch.autograd.grad(sum(sums), parameters, allow_unused=True))


# ------------------------------------------------------------------------------ what tracing loses


def seen(model: nn.Module, value_of: Callable[[], Any]) -> list[Any]:
    """A value and the gradients, with and without the grad mode, as what is drawn and the model's buffers change."""
    found = []
    for number in range(4):
        Dice.seed = number
        with training_mode(model, model.training), torch.set_grad_enabled(number != 1):
            with torch.no_grad():
                for buffer in model.buffers():
                    buffer += number
            value = value_of()
            found.append((snapshot(value), value.requires_grad, gradients([value], list(model.parameters()))))
    return found


def returned(model: nn.Module, path: str) -> torch.Tensor:
    """What the first call of a module returned; of none, what the model does."""
    with recording(model, as_it_is) as calls:
        model(example_input())
    return next((value for called, value in calls if called == path), torch.empty(0))


@given(losing_plans(), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 9))
@example(A_NUMBER_BEFORE_OTHER_BRANCHES, False, False, False, 0)
def test_what_tracing_loses_is_right_refused_or_said(
    plan: Net, training: bool, exact: bool, auto_leaf: bool, pick: int
) -> None:
    model = Sequential(build(plan)).train(training)
    Dice.seed = 0
    paths = ["", *(path for path, module in model.named_modules() if not any(module.children()))]
    path = paths[pick % len(paths)]
    refused = False
    losing = not LOST.isdisjoint(words_of(plan))
    with heard() as caught:
        try:
            extractor = extract(model, {path or "output": "value"}, exact=exact, auto_leaf=auto_leaf)
        except featx.NodeNameError:  # it is called in one mode only, or in none, or lies in a leaf
            event("no node")
            return
        except featx.UntraceableError:
            refused = True
    said = texts(warning for warning in caught if warning.category is featx.FeatureWarning)
    event("refused" if refused else "said" if said else "right")
    assert not refused or (losing and exact and not auto_leaf)
    assert losing or not any("tracing" in message for message in said)
    assert not (said and exact)
    if not refused and not said:
        expected = seen(model, lambda: returned(model, path))
        assert same(seen(model, lambda: extractor(example_input())["value"]), expected)


def met(plan: Net, training: bool, others: Sequence[int], hooked: bool) -> Any:
    """A model of which some parts are in the other mode."""
    model = build(plan).train(training)
    modules = [*model.modules()]
    for number in others:
        modules[number % len(modules)].training = not training
    if hooked:
        model.register_forward_hook(lambda module, inputs, value: value * 2)
    return model


def three_calls(model: nn.Module, call: Callable[..., dict[str, Any]]) -> tuple[list[Any], Any]:
    """What each gives, and the buffers after them; without batch norm's, of which no signature speaks."""
    values = []
    for factor in (1, -1, 2):
        x = example_input() * factor
        values.append(snapshot(call(x, {"k": -x, "l": [x + 1, x + 2]})))
    own = {path: value for path, value in model.named_buffers() if path.rpartition(".")[2] in ("mean", "steps")}
    return values, snapshot(own)


@given(met_plans(), st.booleans(), st.lists(st.integers(0, 5), max_size=2), st.booleans(), st.booleans())
@torch.no_grad()
def test_what_people_met_is_right_refused_or_said(
    plan: Net, training: bool, others: list[int], hooked: bool, exact: bool
) -> None:
    eager = met(plan, training, others, hooked)

    def first_calls(*arguments: Any) -> dict[str, Any]:
        with recording(eager) as calls:
            output = eager(*arguments)
        return {**dict(reversed(calls)), "output": output}

    expected, state = three_calls(eager, first_calls)
    asked: list[str] = []
    for query in [*expected[0], ""]:
        queries = [query] if query else asked  # at last all at once
        model = met(plan, training, others, hooked)
        with heard() as caught:
            try:
                extractor = extract(model, *in_its_mode(model, queries), tracer_kwargs=KWARGS, exact=exact)
            except featx.NodeNameError:
                assert query not in ("", "output")
                continue
            except featx.UntraceableError:
                assert exact or older(torch="2.14")  # before, no proxy stands in for a buffer
                event("refused")
                return
        if query:
            asked.append(query)
        event(f"said, {exact}" if caught else f"right, {exact}")
        if caught:
            assert not exact
            continue
        values, moved = three_calls(model, extractor)
        for found, wanted in zip(values, expected):
            assert found.keys() == set(queries)
            assert all(same(value, wanted[key]) for key, value in found.items())
        if "output" in queries:
            assert same(moved, state)


# --------------------------------------------------------------------------------- what is asked

# What a forward asks, and does; n is drawn.
QUESTIONS = [
    "h = h + 1 if x.shape[0] > {n} else h - 1",
    "h = h * 2 if (x > {n}).any() else h",
    "h = h * 3 if h.mean().item() > {n} - 2 else -h",
    "for i in range(x.shape[0] % ({n} + 1)): h = h + i",
    "h = torch.stack([row * k for k, row in enumerate(h, {n})])",
    "h = h + sum(len(part) for part in h.split({n} + 1))",
    "h = h + torch.arange(len(h))[:, None] * {n}",
    "h = h[:, : int(x.sum()) % 3 + 1].sum(1, keepdim=True) + h",
    "h = h + {{1: 2, 2: 5}}.get(len(x), {n})",
    "first, *rest = h; h = h + (rest[0] if rest else first)",
    "h = h - x if {n} in x.shape else h * x",
    "h = h.reshape(*h.shape[:1], 2, -1).flatten(1) + x.ndim",
    "h[: len(h) // 2] += {n}",
    "k = 0\nwhile h.abs().sum() > 8 and k < {n} + 3: h = h * 0.5; k = k + 1",
    "try: h = h[{n}] + h\nexcept IndexError: h = h * 7",
]


@given(
    st.lists(st.tuples(st.sampled_from(QUESTIONS), st.integers(0, 3)), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(1, 5), st.sampled_from([1, -1, 0.1, 4])), min_size=2, max_size=5),
    st.booleans(),
)
@torch.no_grad()
def test_an_example_answers_and_other_inputs_are_equal_or_refused(
    asked: list[tuple[str, int]], inputs: list[tuple[int, float]], training: bool
) -> None:
    body = "\n".join(question.format(n=n) for question, n in asked)
    model = stated(f"{body}\nreturn h").train(training)
    example, *others = (torch.linspace(0, factor, rows * 4).reshape(rows, 4) for rows, factor in inputs)
    extractor = outcome(lambda: extract(model, ["fc", "output"], exact=True, example_inputs=(example,)))
    if isinstance(extractor, Exception):
        assert "goes on after an error" in str(extractor) or isinstance(outcome(model, example), Exception)
        return
    assert same(extractor(example)["output"], model(example))
    event("traced")
    for other in others:
        assert agree(extractor, model, other) in (True, False)


# ------------------------------------------------------------------------------- the caller's things


@pytest.fixture(autouse=True, scope="module")
def _names_are_no_code() -> Any:
    """Names that are drawn call breakpoint() if anybody takes them for code."""

    def execute(*args: Any, **kwargs: Any) -> None:
        raise Executed

    hook = sys.breakpointhook
    sys.breakpointhook = execute
    yield
    sys.breakpointhook = hook


class Executed(BaseException):
    """Not to be caught by anybody."""


DOCUMENTED = (featx.NodeNameError, featx.UntraceableError, ValueError, TypeError)
QUERIES = st.one_of(
    st.sampled_from(
        ["output", "x", "", "lay.*", "(", "a.b", "x.", ".", 7, None, ("x", "x"), {"x": "k", "output": "k"}]
    ),
    st.text(max_size=6),
)
ARGUMENTS = st.sampled_from([None, {"x": None}, {"y": 1}, {"scale": 2.0}, [1], {"x": 2.0}])


@given(plans(failing=True), st.booleans(), st.one_of(PICKS, QUERIES), ARGUMENTS, st.booleans(), st.booleans())
def test_nothing_is_changed_and_all_errors_are_documented(
    plan: Net, training: bool, asked: Any, concrete_args: Any, exact: bool, auto_leaf: bool
) -> None:
    model = build(plan).train(training)
    kwargs = {"leaf_modules": [*LEAF_CLASSES]}
    options = {"exact": exact, "auto_leaf": auto_leaf, "concrete_args": concrete_args}
    with ignored_warnings(), untouched(model):
        with contextlib.suppress(DOCUMENTED):
            node_names(model, kwargs, **options)
        with contextlib.suppress(DOCUMENTED):
            extract(model, asked, tracer_kwargs=kwargs, **options)


# ------------------------------------------------------------------------------------------ copies


def in_both_modes(plan: Net, exact: bool, only_tensors: bool = False) -> tuple[nn.Module, dict[bool, dict[str, Any]]]:
    """An extractor of everything, and what it gives in each mode."""
    model = build(plan)
    queries = {mode: list(expected_exact(plan, mode)) for mode in MODES} if exact else {}
    if not exact:
        queries = {mode: [*names, "output"] for mode, names in zip(MODES, names_of(model, False))}
    if only_tensors:
        for mode in MODES:
            value = values_of(extract_in(model, queries[mode], mode, exact=exact), mode)
            queries[mode] = [query for query in queries[mode] if isinstance(value[query], torch.Tensor)]
    with ignored_warnings():
        extractor = extract(model, None, queries[True], queries[False], KWARGS, exact=exact)
    return extractor, {mode: values_of(extractor, mode) for mode in MODES}


@given(plans(), st.booleans())
def test_copies_give_the_same_in_both_modes(plan: Net, exact: bool) -> None:
    extractor, expected = in_both_modes(plan, exact)
    for copied in COPIES.values():
        check_both_modes(copied(extractor), expected)


def check_both_modes(extractor: nn.Module, expected: dict[bool, dict[str, Any]]) -> None:
    for mode in (False, True, False):
        assert_same(values_of(extractor, mode), expected[mode])


SCRIPTABLE_PLANS = plans(leaves=SCRIPTABLE, named=PLAIN_NAMES)


@settings(max_examples=max(5, settings().max_examples // 5))
@given(SCRIPTABLE_PLANS, st.booleans())
def test_a_scripted_extractor_gives_the_same_in_both_modes(plan: Net, exact: bool) -> None:
    extractor, expected = in_both_modes(plan, exact, only_tensors=True)
    check_both_modes(torch.jit.script(extractor), expected)


# That of 2.2 loses what is returned twice, that of 2.5 takes a buffer and an argument of one name for each other.
@pytest.mark.skipif(older(torch="2.14"), reason="torch.export before 2.14 mixes values up by itself")
@settings(max_examples=max(5, settings().max_examples // 10))
@given(SCRIPTABLE_PLANS, st.booleans(), st.booleans())
@example(A_BUFFER_LIKE_AN_ARGUMENT, False, False)
def test_an_exported_extractor_gives_the_same(plan: Net, training: bool, exact: bool) -> None:
    assume("data" not in words_of(plan))  # of which torch.export makes a constant without a value
    extractor, expected = in_both_modes(plan, exact, only_tensors=True)
    assume(expected[training])
    with training_mode(extractor, training), torch.no_grad():
        program = torch.export.export(extractor, (example_input(),)).module()
        assert_same(dict(snapshot(program(example_input()))), expected[training])


# ---------------------------------------------------------------------------------- the strategies


@parametrize(
    "word",
    [
        *(*LEAVES, *TENSORS, *OPERATIONS, *sorted(LOST), *MET),
        *("use", "update", "split", "check", "mode", "touch", "branch", "assign", "raise"),
    ],
)
def test_all_that_a_plan_can_have_is_drawn(word: str) -> None:
    quick = settings(max_examples=2000, derandomize=True, database=None, phases=[Phase.generate])
    drawn = losing_plans() if word in LOST else met_plans() if word in MET else plans(failing=True)
    find(drawn, lambda plan: word in words_of(plan), settings=quick)


@given(plans(), st.booleans())
def test_the_record_is_that_of_an_undisturbed_run(plan: Net, training: bool) -> None:
    model = build(plan)
    with torch.no_grad(), training_mode(model, training):
        output = snapshot(model(example_input()))
    assert same(eager(plan, training).output, output)


def test_a_failure_prints_a_plan_that_can_be_pasted(capsys: Any) -> None:
    @settings(derandomize=True, database=None, max_examples=500)
    @given(plans())
    def fails(plan: Net) -> None:
        assert "split" not in words_of(plan)

    with pytest.raises(AssertionError) as caught:
        fails()
    printed = "\n".join([capsys.readouterr().out, *getattr(caught.value, "__notes__", [])])
    pasted = printed[printed.index("plan=") + len("plan=") :].partition("\n)")[0].rstrip(",)")
    assert "split" in words_of(eval(pasted + ")")), printed
