"""Tests of the tests: featx is broken on purpose, one fault at a time, and a named test must notice each."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import pytest

from tests.versions import older

ROOT = Path(__file__).parent.parent

RESTORE_BETWEEN, RESTORE_AT_THE_END = "restore(keep=(torch.Tensor, nn.Module))", "undo.callback(restore)"

# What is broken -> the test that notices, and what is written in place of what. Each old text is in featx.py just once.
FAULTS: Dict[str, Tuple[str, Dict[str, str]]] = {
    "one more function": (
        "test_shape.py::test_no_limit_is_passed[functions and classes at the top]",
        {'__version__ = "0.1.0"\n': '__version__ = "0.1.0"\ndef _one_more() -> None: ...\n'},
    ),
    # names
    "naming off by one": (
        "test_names.py::test_rules",
        {"self._next[head] = self._given[name] = last + 1": "self._next[head] = self._given[name] = last + 2"},
    ),
    "suffix not stripped": (
        "test_names.py::test_rules",
        {"stem = place if own is None and self._exact else _split_number(place)[0]": "stem = place"},
    ),
    "names given twice": (
        "test_names.py::test_rules",
        {"while name in self._given:": "while False:"},
    ),
    "exact names do not reserve paths": (
        "test_exact.py::test_the_path_of_a_module_means_that_module",
        {"self._uncalled = set(paths)": "self._uncalled = set()"},
    ),
    "the scope not maintained": (
        "test_names.py::test_names_of_both_modes",
        {"self.current_module_qualname = outer": "pass"},
    ),
    # selection
    "a query is a regular expression": (
        "test_selection.py::test_a_query_matches_literally_up_to_a_dot",
        {
            "return {query: last[query] for query in queries if query in last}": (
                "import re; return {query: last[it] for query in queries for it in last if re.fullmatch(query, it)}"
            )
        },
    ),
    "the first match, not the last": (
        "test_selection.py::test_each_query_is_resolved_by_itself",
        {"in enumerate(names) for prefix in": "in [*enumerate(names)][::-1] for prefix in"},
    ),
    "two queries under one key": (
        "test_errors.py::test_two_queries_under_one_key",
        {"if owners.setdefault(key, query) != query:": "if False:"},
    ),
    "results in the order of the queries": (
        "test_selection.py::test_forms_of_return_nodes",
        {"return {query: found[query] for query in order}": "return found"},
    ),
    "suggestions lost": (
        "test_errors.py::test_a_typo",
        {"return difflib.get_close_matches(query, list(candidates), n=3)": "return []"},
    ),
    "the other mode not mentioned": (
        "test_errors.py::test_a_name_of_the_other_mode",
        {"if _select(_known(tracers[other]), [query]):": "if False:"},
    ),
    # pruning
    "no cut, everything runs": (
        "test_pruning.py::test_nothing_runs_after_the_last_requested_node",
        {"staying = set(_staying(operations, requested, reads))": "staying = set(range(len(nodes)))"},
    ),
    "asserts after the cut stay": (
        "test_pruning.py::test_asserts_before_the_cut_stay_and_those_after_it_go",
        {"cut = max(needed.union(read_after), default=-1)": "cut = len(operations)"},
    ),
    "asserts before the cut dropped": (
        "test_pruning.py::test_asserts_before_the_cut_stay_and_those_after_it_go",
        {'"assert" if node.target in _ASSERTS else ""': '""'},
    ),
    "writes in place dropped": (
        "test_pruning.py::test_a_write_is_kept_while_something_later_reads_the_memory",
        {"writes = not read.isdisjoint(memory[written] for written in operation.writes)": "writes = False"},
    ),
    "views not followed": (
        "test_pruning.py::test_a_write_is_kept_while_something_later_reads_the_memory",
        {"for viewed in operation.views:": "for viewed in ():"},
    ),
    "a function's name in place not believed": (
        "test_pruning.py::test_the_name_of_an_opaque_function_is_believed",
        {' or (name.endswith("_") and not name.endswith("__")):': ":"},
    ),
    "a leaf's part in place not believed": (
        "test_pruning.py::test_an_opaque_leaf_with_an_in_place_part_may_write_its_input",
        {'if any(getattr(part, "inplace", None) is True for part in module.modules())': "if False"},
    ),
    "a leaf whose value nobody takes dropped": (
        "test_pruning.py::test_an_opaque_call_whose_value_nobody_takes_is_there_for_its_effect",
        {"(tracer._exact or not node.users, True)": "(tracer._exact, True)"},
    ),
    "a function whose value nobody takes dropped": (
        "test_pruning.py::test_an_opaque_call_whose_value_nobody_takes_is_there_for_its_effect",
        {"inputs if tracer._exact or not node.users else []": "inputs if tracer._exact else []"},
    ),
    "what a list's method does, expected of a tensor's": (
        "test_pruning.py::test_what_sorts_a_list_only_reads_a_tensor",
        {' or str(argument.type) not in ("Tensor", "Optional[Tensor]")': ""},
    ),
    "operators of Python taken for writes and views": (
        "test_pruning.py::test_operators_of_python_neither_write_nor_give_views",
        {'if library == "_operator" and': "if False and"},
    ),
    # the two-mode module
    "graphs swapped": (
        "test_modes.py::test_train_and_eval",
        {"self.train_graph, self.eval_graph = train_graph,": "self.eval_graph, self.train_graph = train_graph,"},
    ),
    "the mode looked up once": (
        "test_modes.py::test_the_attribute_set_by_hand",
        {"_dispatcher(self.train_graph, train))": "train if self.training else evaluation)"},
    ),
    "always in train mode": (
        "test_modes.py::test_train_and_eval",
        {'f"    if self.training:\\n': 'f"    if True:\\n'},
    ),
    "always exported in train mode": (
        "test_modes.py::test_export_takes_the_mode_it_finds",
        {'f"    if self.training:\\n': 'f"    if True:\\n'},
    ),
    "modes whose nodes have the same names taken for one": (
        "test_modes.py::test_modes_that_differ_in_one_argument",
        {
            "if train == evaluation:\n            _define": (
                "if [*map(str, self.train_graph.nodes)] == [*map(str, self.eval_graph.nodes)]:\n            _define"
            )
        },
    ),
    "starts in train mode": (
        "test_modes.py::test_it_starts_in_the_models_mode",
        {"self.training = root.training": "self.training = True"},
    ),
    "frozen submodules thaw": (
        "test_modes.py::test_frozen_submodules_stay_frozen",
        {"parent._modules[part].training = root.training": "pass"},
    ),
    "copies are in train mode": (
        "test_modes.py::test_copies",
        {'**graphs, "_class_name"': '**graphs, "training": True, "_class_name"'},
    ),
    "copies lose hooks": (
        "test_modes.py::test_copies",
        {'**graphs, "_class_name"': '**graphs, "_forward_hooks": {}, "_class_name"'},
    ),
    "copies untie parameters": (
        "test_modes.py::test_copies",
        {
            "        self.recompile()\n\n    def __reduce__": (
                "        self._modules.update({name: copy.deepcopy(part) for name, part in self._modules.items()})\n"
                "        self.recompile()\n\n    def __reduce__"
            )
        },
    ),
    "a copy runs what was compiled of its original": (
        "test_modes.py::test_copies_of_what_was_compiled_run_themselves",
        {'("_featx_codes", "_compiled_call_impl")': '("_featx_codes",)'},
    ),
    "parameters copied": (
        "test_effects.py::test_weights_are_shared_with_the_model",
        {"new._modules[name] = value": "new._modules[name] = copy.deepcopy(value)"},
    ),
    "non-persistent buffers become persistent": (
        "test_effects.py::test_constants_and_buffers",
        {"{name} & root._non_persistent_buffers_set": "()"},
    ),
    "graphs do not know their module": (
        "test_modes.py::test_graphs_know_their_module",
        {"self.train_graph.owning_module = self.eval_graph.owning_module = self": "pass"},
    ),
    "children are looked up the slow way": (
        "test_modes.py::test_children_are_looked_up_the_fast_way",
        {"written(in_dicts=True)": "written(in_dicts=False)"},
    ),
    "a module that was replaced runs on": (
        "test_modes.py::test_changes_are_seen",
        {
            'f"{source}._modules[{name!r}]" if': (
                'f"vars(self).setdefault({node.target!r}, {source}._modules[{name!r}])" if'
            )
        },
    ),
    "names are code": (
        "test_modes.py::test_the_name_of_a_module_is_never_code",
        {'f"{source}._modules[{name!r}]" if': """f'{source}._modules["{name}"]' if"""},
    ),
    "source lines of the dead pile up": (
        "test_modes.py::test_source_lines_go_with_their_module",
        {"weakref.finalize(module, linecache.cache.pop, filename, None)": "pass"},
    ),
    "scripted in both modes or not at all": (
        "test_exact.py::test_features_whose_types_differ_by_mode_are_scripted_in_one_mode",
        {"def __prepare_scriptable__": "def _prepare_scriptable"},
    ),
    # the caller's things
    "modes not restored": (
        "test_effects.py::test_success[True-modes]",
        {RESTORE_BETWEEN: "pass", RESTORE_AT_THE_END: "pass"},
    ),
    "modes restored without train()": (
        "test_effects.py::test_a_train_method_that_changes_the_weights",
        {"if module.training != training:": "if False:"},
    ),
    "the trace before not forgotten": (
        "test_effects.py::test_a_trace_does_not_see_the_one_before",
        {RESTORE_BETWEEN: "pass"},
    ),
    "a constant left behind": (
        "test_effects.py::test_constants_and_buffers",
        {RESTORE_AT_THE_END: "pass"},
    ),
    "train mode after a failure": (
        "test_effects.py::test_failure_in_one_mode_only",
        {f"{RESTORE_AT_THE_END}\n        yield restore": f"yield restore\n        {RESTORE_AT_THE_END}"},
    ),
    "constants of the tries before": (
        "test_auto_leaf.py::test_it_equals_passing_the_classes",
        {"            restore()\n            leaves.append": "            leaves.append"},
    ),
    "values of buffers not restored": (
        "test_effects.py::test_success",
        {"undo.callback(buffer.data.copy_, buffer.detach().clone())": "pass"},
    ),
    "random numbers drawn": (
        "test_effects.py::test_success",
        {"torch.random.fork_rng(devices=[])": "contextlib.nullcontext()"},
    ),
    "gradients switched off": (
        "test_effects.py::test_success",
        {"with torch.enable_grad():": "with contextlib.nullcontext():"},
    ),
    "tracer_kwargs written to": (
        "test_effects.py::test_tracer_kwargs_and_return_nodes_are_not_written_to",
        {"arguments = {**(given or {})}": "arguments = {} if given is None else given"},
    ),
    "no lock": (
        "test_effects.py::test_a_trace_waits_for_that_of_another_thread",
        {"_tracing = threading.RLock()": "_tracing = contextlib.nullcontext()"},
    ),
    "calls of other threads recorded": (
        "test_tracing.py::test_what_other_threads_run_is_not_seen_and_not_disturbed",
        {"if self._watch.thread != threading.get_ident():  # torch.fx has": "if False:  #"},
    ),
    # exact
    "no clone": (
        "test_exact.py::test_each_way_of_writing_in_place",
        {"for read in changes} if tracer._exact else {}": "for read in ()}"},
    ),
    "opaque leaves that may write are cut": (
        "test_exact.py::test_what_an_opaque_leaf_may_write_is_kept_though_nothing_that_stays_takes_its_value",
        {"(tracer._exact or not node.users, True)": "(not node.users, True)"},
    ),
    "no clone before opaque functions": (
        "test_exact.py::test_opaque_calls_that_write_into_their_input",
        {"inputs if tracer._exact or not node.users else []": "inputs if not node.users else []"},
    ),
    "no clone for what train mode writes": (
        "test_exact.py::test_dropout_in_place_writes_in_train_mode_only",
        {"tracer._training or tracer._exact)": "tracer._training)"},
    ),
    "a module's last operation for what it returns": (
        "test_exact.py::test_a_module_called_again",
        {"if tracer._exact and query in tracer._returned:": "if False:"},
    ),
    # warnings
    "a warning twice": (
        "test_exact.py::test_the_texts",
        {"for query in {**train, **evaluation}:": "for query in [*train, *evaluation]:"},
    ),
    "a warning missing": (
        "test_exact.py::test_the_texts",
        {"        if writers:": "        if False:"},
    ),
    "an idle warning of what misleads": (
        "test_exact.py::test_a_write_inside_of_a_module_is_part_of_what_it_returns",
        {"return returned.value is not node and not same": "return returned.value is not node"},
    ),
    "an idle warning of what train mode writes": (
        "test_exact.py::test_dropout_in_place_writes_in_train_mode_only",
        {"tracer._training or tracer._exact)": "True)"},
    ),
    "an idle warning of modes that agree": (
        "test_errors.py::test_no_warning_where_the_modes_agree_or_it_is_suppressed",
        {"if train == evaluation:\n        return": "if False:\n        return"},
    ),
    # what tracing leaves out, or makes a constant
    "buffers not proxied": (
        "test_tracing.py::test_what_is_computed_from_buffers_is_said_and_exact_follows[computed]",
        {"= exact or self.proxy_buffer_attributes": "= self.proxy_buffer_attributes"},
    ),
    "a replaced forward not seen": (
        "test_tracing.py::test_a_replaced_forward_is_refused_said_or_in_a_sequential_right",
        {'if "forward" in vars(root):': "if False:"},
    ),
    "a replaced forward not refused": (
        "test_tracing.py::test_a_replaced_forward_is_refused_said_or_in_a_sequential_right",
        {'if "forward" in vars(root):': 'if "forward" in vars(root) and not self._exact:'},
    ),
    "enable_grad not seen": (
        "test_tracing.py::test_a_block_is_said_refused_or_right",
        {"for kind in (torch.enable_grad, torch.set_grad_enabled):": "for kind in ():"},
    ),
    "what is written through a view not seen": (
        "test_tracing.py::test_what_is_drawn_is_said_refused_or_right",
        {"made += [tensor._base for tensor in made if tensor._base is not None]": "pass"},
    ),
    "a number that was drawn not seen": (
        "test_tracing.py::test_what_is_drawn_is_said_refused_or_right",
        {"self.next.update({} if made else baked)": "pass"},
    ),
    "blocks of other threads seen": (
        "test_tracing.py::test_what_other_threads_run_is_not_seen_and_not_disturbed",
        {"by * (threading.get_ident() == self.thread)": "by"},
    ),
    "a warning of what does not stay": (
        "test_tracing.py::test_only_what_depends_on_it_is_concerned",
        {"lost in tracer._baked.items() if place[node] in kept}": "lost in tracer._baked.items()}"},
    ),
    "a warning of tables of integers": (
        "test_tracing.py::test_no_false_alarm",
        {"            if buffer.is_floating_point() or buffer.is_complex()\n": ""},
    ),
    # the command line
    "--check finds nothing wrong": (
        "test_cli.py::test_check_gives_its_exit_code",
        {"return bool(lines), ": "return False, "},
    ),
}
for kind, test in {
    "_AUTOCAST": "test_a_block_is_said_refused_or_right",
    "_GRAD_MODE": "test_a_block_is_said_refused_or_right",
    "_BUFFERS": "test_what_is_computed_from_buffers_is_said_and_exact_follows[computed]",
    "_RANDOM": "test_what_is_drawn_is_said_refused_or_right",
}.items():
    says, refuses = "return {what: f", "if self.tracer._exact:\n            raise"
    FAULTS[f"{kind} not said"] = f"test_tracing.py::{test}", {says: f"return {{}} if what is {kind} else {{what: f"}
    if kind != "_BUFFERS":  # if exact these are nodes, from which nothing is computed while tracing
        edit = {refuses: f"if self.tracer._exact and what is not {kind}:\n            raise"}
        FAULTS[f"{kind} not refused"] = f"test_tracing.py::{test}", edit

# A fault shows as an assertion, a missing error or warning, an idle one, or an error that featx documents. Any
# other error would be the mutation's own, such as a name that is not defined.
SIGNS = {"AssertionError", "Failed", "UserWarning", "FeatureWarning", "NodeNameError", "UntraceableError", "ValueError"}

# Importing torch takes longer than a test. So this imports it once, and each run is a fork of it.
RUNNER = """
import gc, json, os, signal, sys
import hypothesis, pytest, torch
try:
    import torchvision.models  # as when the whole suite runs
except ImportError:
    pass

class Failures:
    def __init__(self):
        self.seen = []

    def pytest_exception_interact(self, node, call, report):
        self.seen.append((node.nodeid, report.when, type(call.excinfo.value).__name__, str(call.excinfo.value)))

gc.freeze()  # pytest collects garbage, which takes longer than a test where torch is part of the search
for line in sys.stdin:
    folder, name, *tests = json.loads(line)
    child = os.fork()
    if not child:
        signal.alarm(120)
        os.environ["FEATX"], failures = name, Failures()
        sys.path.insert(0, folder)
        sys.stdout = sys.stderr = open(os.path.join(folder, "output.txt"), "w", buffering=1)
        options = ["-x", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:threadexception"]
        code = int(pytest.main([*options, *tests], plugins=[failures]))
        with open(os.path.join(folder, "result.json"), "w") as file:
            json.dump([code, failures.seen], file)
        os._exit(0)
    os.waitpid(child, 0)
    print(flush=True)
"""

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the runner forks")


@pytest.fixture(scope="module")
def runner() -> Iterator[subprocess.Popen[str]]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("COV")}  # faults cover nothing
    environment = {**own, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", RUNNER]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
        yield process


def run(runner: subprocess.Popen[str], folder: Path, name: str, source: str, tests: List[str]) -> Tuple[int, Any, str]:
    """The exit code of pytest with a source in place of featx, what failed, and the output."""
    (folder / f"{name}.py").write_text(source, encoding="utf-8")
    assert runner.stdin is not None
    assert runner.stdout is not None
    print(json.dumps([str(folder), name, *tests]), file=runner.stdin, flush=True)
    runner.stdout.readline()
    output = (folder / "output.txt").read_text()
    assert (folder / "result.json").exists(), f"killed after two minutes\n{output}"
    code, failures = json.loads((folder / "result.json").read_text())
    return code, failures, output


def lacks(test: str) -> str:
    """What a test needs that is not there."""
    if test.startswith("test_cli.py") and importlib.util.find_spec("torchvision") is None:
        return "torchvision"
    if test.endswith("compiled_run_themselves") and older(torch="2.2"):
        return "modules with compile()"
    if test.endswith("the_one_before") and older(torch="2.14"):
        return "proxies in place of buffers"
    return "a torch.export that runs forward" if "export" in test and older(torch="2.14") else ""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault: str, runner: subprocess.Popen[str], tmp_path: Path) -> None:
    test, edits = FAULTS[fault]
    if lacks(test):
        pytest.skip(f"{test} needs {lacks(test)}")
    source = (ROOT / "featx.py").read_text(encoding="utf-8")
    for old, new in edits.items():
        assert source.count(old) == 1, f"featx.py changed, and so must this table: {source.count(old)} times {old!r}"
        source = source.replace(old, new)
    compile(source, "featx.py", "exec")
    code, failures, output = run(runner, tmp_path, "broken_featx", source, [f"tests/{test}"])
    assert code == 1, output
    ((failed, when, kind, message),) = failures
    assert failed.startswith(f"tests/{test}")
    assert (when, kind in SIGNS) == ("call", True), f"{kind}: {message}\n{output}"


def test_nothing_is_noticed_where_nothing_is_broken(runner: subprocess.Popen[str], tmp_path: Path) -> None:
    tests = sorted({f"tests/{test}" for test, _ in FAULTS.values() if not lacks(test)})
    source = (ROOT / "featx.py").read_text(encoding="utf-8")
    code, failures, output = run(runner, tmp_path, "whole_featx", source, tests)
    assert (code, failures) == (0, []), output
