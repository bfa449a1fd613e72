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

# What is broken -> the test that notices, and what is written in place of what. Each old text is in featx.py just once.
FAULTS: Dict[str, Tuple[str, Dict[str, str]]] = {
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
        {"return {query: found[query] for query in ordered}": "return found"},
    ),
    "suggestions lost": (
        "test_errors.py::test_a_typo",
        {"return difflib.get_close_matches(query, candidates, n=3)": "return []"},
    ),
    "the other mode not mentioned": (
        "test_errors.py::test_a_name_of_the_other_mode",
        {"if _select(tracers[other].names, [query]) or": "if"},
    ),
    # pruning
    "no cut, everything runs": (
        "test_pruning.py::test_nothing_runs_after_the_last_requested_node",
        {"if node in plan.leaving:": 'if node.op == "output":'},
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
        {'_writes_first_argument(node, getattr(node.target, "__name__", "")):': "False:"},
    ),
    "a function's source not read": (
        "test_pruning.py::test_what_the_source_of_an_opaque_function_plainly_writes",
        {"written.append(_base(part.func))": "pass"},
    ),
    "what a list's method does, expected of a tensor's": (
        "test_pruning.py::test_what_sorts_a_list_only_reads_a_tensor",
        {'is_tensor = str(argument.type) in ("Tensor", "Optional[Tensor]")': "is_tensor = True"},
    ),
    "leaves judged by their train mode": (
        "test_exact.py::test_leaves_that_write_in_one_mode_stay_for_what_is_read_later",
        {"_looked_into, look, (True, False), _believed": "_looked_into, look, (True,), _believed"},
    ),
    # the two-mode module
    "graphs swapped": (
        "test_modes.py::test_train_and_eval",
        {"self.train_graph, self.eval_graph = train_graph,": "self.eval_graph, self.train_graph = train_graph,"},
    ),
    "the mode looked up once": (
        "test_modes.py::test_the_attribute_set_by_hand",
        {
            '_define(self, "forward", _dispatcher(train.src), train.globals)': (
                "type(self).forward = type(self)._train_forward if self.training else type(self)._eval_forward"
            )
        },
    ),
    "always in train mode": (
        "test_modes.py::test_train_and_eval",
        {'f"{head}\\n    if self.training:\\n': 'f"{head}\\n    if True:\\n'},
    ),
    "always exported in train mode": (
        "test_modes.py::test_export_takes_the_mode_it_finds",
        {'f"{head}\\n    if self.training:\\n': 'f"{head}\\n    if True:\\n'},
    ),
    "starts in train mode": (
        "test_modes.py::test_it_starts_in_the_models_mode",
        {"self.training = root.training": "self.training = True"},
    ),
    "frozen submodules thaw": (
        "test_modes.py::test_frozen_submodules_stay_frozen",
        {"parent._modules[part].training = root.training": "pass"},
    ),
    "deepcopy is in train mode": (
        "test_modes.py::test_copies",
        {
            "new.__setstate__(copy.deepcopy(self.__getstate__(), memo))": (
                'new.__setstate__({**copy.deepcopy(self.__getstate__(), memo), "training": True})'
            )
        },
    ),
    "deepcopy loses hooks": (
        "test_modes.py::test_copies",
        {
            "new.__setstate__(copy.deepcopy(self.__getstate__(), memo))": (
                'new.__setstate__({**copy.deepcopy(self.__getstate__(), memo), "_forward_hooks": {}})'
            )
        },
    ),
    "deepcopy unties parameters": (
        "test_modes.py::test_copies",
        {
            "new.__setstate__(copy.deepcopy(self.__getstate__(), memo))": (
                "new.__setstate__(copy.deepcopy(self.__getstate__(), memo)); "
                "new._modules.update({name: copy.deepcopy(module) for name, module in self._modules.items()})"
            )
        },
    ),
    "parameters copied": (
        "test_effects.py::test_weights_are_shared_with_the_model",
        {"new._modules[name] = value": "new._modules[name] = copy.deepcopy(value)"},
    ),
    "non-persistent buffers become persistent": (
        "test_effects.py::test_constants_and_buffers",
        {"new._non_persistent_buffers_set.add(name)": "pass"},
    ),
    "graphs do not know their module": (
        "test_modes.py::test_graphs_know_their_module",
        {"train_graph.owning_module = eval_graph.owning_module = self": "pass"},
    ),
    "children are looked up the slow way": (
        "test_modes.py::test_children_are_looked_up_the_fast_way",
        {"vars(owner)[name] = child": "pass"},
    ),
    "a child that was replaced runs on": (
        "test_modes.py::test_changes_are_seen",
        {"super().__setitem__(name, child)\n        self.show(name, before)": "super().__setitem__(name, child)"},
    ),
    "a child that was deleted runs on": (
        "test_modes.py::test_what_is_deleted_does_not_run",
        {"super().__delitem__(name)\n        self.show(name, before)": "super().__delitem__(name)"},
    ),
    "children that were replaced at once run on": (
        "test_modes.py::test_changes_are_seen",
        {"            children.show(given, child)": "            pass"},
    ),
    "what a function adds to its input is not seen": (
        "test_pruning.py::test_what_adds_to_what_it_is_given",
        {'setattr(_ItemProxy, f"__i{_name}__", _recorded(f"{_name}_"))': "pass"},
    ),
    "the modules of an extractor inside a model are not restored": (
        "test_effects.py::test_the_modules_of_an_extractor_inside",
        {"collections.deque, _Children]": "collections.deque]"},
    ),
    "what a leaf keeps while it is looked into stays": (
        "test_effects.py::test_looking_into_a_leaf_leaves_nothing_behind",
        {
            "except Exception:  # its code may be anybody's\n        return None\n    finally:\n        restore()": (
                "except Exception:\n        return None\n    finally:\n        pass"
            )
        },
    ),
    "wrapped functions are run": (
        "test_effects.py::test_a_wrapped_function_is_never_run_with_proxies",
        {"else not _is_library(target):": "else False:"},
    ),
    "what another thread calls is recorded": (
        "test_effects.py::test_other_threads_run_their_models_while_one_traces",
        {"return threading.get_ident() == self._thread": "return True"},
    ),
    "hooks of leaves are overlooked": (
        "test_exact.py::test_hooks_of_leaves_that_write",
        {"if not (module._forward_pre_hooks or module._forward_hooks):": "if True:"},
    ),
    "only the way that a trace took is seen": (
        "test_exact.py::test_what_a_leaf_may_do_on_another_way",
        {"writes += _said_by_source(root, node)[0]": "pass"},
    ),
    "a copy runs what was compiled of its original": (
        "test_modes.py::test_copies_of_what_was_compiled_run_themselves",
        {'("_featx_codes", "_compiled_call_impl")': '("_featx_codes",)'},
    ),
    "what equals a number is taken for it": (
        "test_modes.py::test_modes_that_differ_in_one_argument",
        {"type(value) in _PLAIN_TYPES and repr(value) == repr(other)": "value == other"},
    ),
    "source lines of the dead pile up": (
        "test_modes.py::test_source_lines_go_with_their_module",
        {"weakref.finalize(module, linecache.cache.pop, filename, None)": "pass"},
    ),
    "names are code": (
        "test_modes.py::test_the_name_of_a_module_is_never_code",
        {"return name.isascii() and not keyword.iskeyword(name) and (name.isidentifier() or quotable)": "return True"},
    ),
    # the caller's things
    "modes not restored": (
        "test_effects.py::test_success[True-modes]",
        {
            "modes = {module: module.training for module in keeper.modules}": "modes = {}",
            "            restore()\n            keeper.restore_tensors()": "            keeper.restore_tensors()",
        },
    ),
    "train mode after a failure": (
        "test_effects.py::test_failure_in_one_mode_only",
        {
            "    finally:\n        # By the methods": "    except ZeroDivisionError:\n        # By the methods",
            "            yield keeper\n        finally:": "            yield keeper\n        except ZeroDivisionError:",
        },
    ),
    "a constant left behind": (
        "test_effects.py::test_constants_and_buffers",
        {"            restore()\n            keeper.restore_tensors()": "            keeper.restore_tensors()"},
    ),
    "values of buffers not restored": (
        "test_effects.py::test_success",
        {"buffer.copy_(content)": "pass"},
    ),
    "random numbers drawn": (
        "test_effects.py::test_success",
        {"random.setstate(python_random)": "pass"},
    ),
    "torch's random numbers drawn": (
        "test_effects.py::test_success",
        {"torch.random.fork_rng(devices=[])": "contextlib.nullcontext()"},
    ),
    "gradients switched off": (
        "test_effects.py::test_success",
        {"fork_rng(devices=[]), grad,": "fork_rng(devices=[]),"},
    ),
    "tracer_kwargs written to": (
        "test_effects.py::test_tracer_kwargs_and_return_nodes_are_not_written_to",
        {"arguments = dict(given or {})": "arguments = {} if given is None else given"},
    ),
    "no lock": (
        "test_effects.py::test_a_trace_waits_for_that_of_another_thread",
        {"_tracing = threading.RLock()": "_tracing = contextlib.nullcontext()"},
    ),
    "constants of the tries before": (
        "test_auto_leaf.py::test_it_equals_passing_the_classes",
        {"del vars(model)[constant]": "pass"},
    ),
    # exact
    "no clone": (
        "test_exact.py::test_each_way_of_writing_in_place",
        {"for read in plan.overwritten} if tracer._exact else {}": "for read in ()}"},
    ),
    "clones for what train mode writes": (
        "test_exact.py::test_leaves_that_write_in_one_mode",
        {"((True, False), _suspected) if tracer._exact": "((True,), _suspected) if tracer._exact"},
    ),
    "items that leaves assign not seen": (
        "test_exact.py::test_opaque_calls_that_write_into_their_input",
        {"if name in _IN_PLACE_OPERATORS and": "if name in () and"},
    ),
    "a module's last operation for what it returns": (
        "test_exact.py::test_a_module_called_again",
        {"if tracer._exact and query in tracer._returned:": "if False:"},
    ),
    # warnings
    "a warning twice": (
        "test_exact.py::test_the_texts",
        {"for query, said in found.items():": "for query, said in [*found.items()] * 2:"},
    ),
    "a warning missing": (
        "test_exact.py::test_the_texts",
        {"if query in overwritten[mode]:": "if False:"},
    ),
    "an idle warning of what misleads": (
        "test_exact.py::test_a_write_inside_of_a_module_is_part_of_what_it_returns",
        {"return not same or node.target in (operator.setitem, operator.delitem)": "return True"},
    ),
    "an idle warning of modes that agree": (
        "test_errors.py::test_no_warning_where_the_modes_agree_or_it_is_suppressed",
        {"if train == evaluation:": "if False:"},
    ),
    # the command line
    "--check finds nothing wrong": (
        "test_cli.py::test_check_gives_its_exit_code",
        {"return bool(lines), ": "return False, "},
    ),
}

# A fault shows as an assertion, a missing error or warning, an idle one, or an error that featx documents. Any
# other error would be the mutation's own, such as a name that is not defined.
SIGNS = {"AssertionError", "Failed", "UserWarning", "NodeNameError", "UntraceableError", "ValueError", "TraceError"}

# Importing torch takes longer than a test. So this imports it once, and each run is a fork of it.
RUNNER = """
import json, os, signal, sys
import pytest, torch
try:
    import torchvision.models  # as when the whole suite runs
except ImportError:
    pass

class Failures:
    def __init__(self):
        self.seen = []

    def pytest_exception_interact(self, node, call, report):
        self.seen.append((node.nodeid, report.when, type(call.excinfo.value).__name__, str(call.excinfo.value)))

for line in sys.stdin:
    folder, name, *tests = json.loads(line)
    child = os.fork()
    if not child:
        signal.alarm(120)
        os.environ["FEATX"], failures = name, Failures()
        sys.path.insert(0, folder)
        sys.stdout = sys.stderr = open(os.path.join(folder, "output.txt"), "w", buffering=1)
        options = ["-x", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
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
