"""Tests of the tests: featx is broken on purpose, one fault at a time, and a named test must notice each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tokenize
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import pytest

from tests.helpers import ROOT, parametrize
from tests.versions import older, version

RESTORE_BETWEEN = "restore(keep=(torch.Tensor, nn.Module))"
RESTORE_AT_THE_END = "        finally:\n            restore()"
IN_ORDER = "return dict(sorted(features, key=lambda item: item[1].after))"
VERSION = '__version__ = "1.0.0"\n'
PLANNED = "stays, missed = _staying(operations, reads)"
MEMORIES = "    memory = {node: _Memory(node) for node in operations}"
IN_TRAIN_MODE = "    if self.training:\n        return self._featx_train"
COPIED = "{**vars(self)}"
DEEP = "        copied.__dict__ = copy.deepcopy(vars(copied), memo)\n"
CHILD = 'f"{parent}._modules[{name!r}]"'

# What is broken -> the test that notices, and what is written in place of what. Each old text is in featx.py just once.
FAULTS: Dict[str, Tuple[str, Dict[str, str]]] = {
    "one more function, too long": (
        "test_shape.py::test_no_limit_is_passed[lines of the longest body]",
        {VERSION: f"{VERSION}def _one_more() -> None:\n" + "    print()\n" * 41},
    ),
    "lines that are too full": (
        "test_shape.py::test_no_limit_is_passed[tokens on a line]",
        {VERSION: VERSION + "_full = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]\n" * 200},
    ),
    "a file that grew": (
        "test_shape.py::test_no_limit_is_passed[tokens]",
        {VERSION: VERSION + "_more = 1\n" * 200},
    ),
    # names
    "naming off by one": (
        "test_names.py::test_rules",
        {"self._next_number[head] = last + 1": "self._next_number[head] = last + 2"},
    ),
    "suffix not stripped": (
        "test_names.py::test_rules",
        {"stem, _ = _split_number(place)": "stem = place"},
    ),
    "names given twice": (
        "test_names.py::test_rules",
        {"while name in self._retry:": "while False:"},
    ),
    "exact names do not reserve paths": (
        "test_exact.py::test_the_path_of_a_module_means_that_module",
        {"self._uncalled = set(paths)": "self._uncalled = set()"},
    ),
    "the scope not maintained": (
        "test_names.py::test_names_of_both_modes",
        {"self.current_module_qualname = outer": "pass"},
    ),
    "functions that are autowrapped by name alone": (
        "test_met.py::test_functions_that_are_autowrapped",
        {"patcher.patch(namespace, function.__name__, self.recorded(function))": "pass"},
    ),
    "scripted submodules are no leaves": (
        "test_met.py::test_scripted_and_traced_parts_are_leaves",
        {"(*self.leaf_modules, torch.jit.ScriptModule)": "self.leaf_modules"},
    ),
    # examples
    "no guards": (
        "test_example.py::test_a_question_is_answered_or_refused[truth-exact-True]",
        {"self.record(torch._assert, condition, said)": "pass"},
    ),
    "equal guards are many": (
        "test_example.py::test_equal_guards_are_one",
        {"or guard in self._guards": ""},
    ),
    "what is asked of parameters is guarded": (
        "test_example.py::test_equal_guards_are_one",
        {'not in _PARTS else ""': "not in () else node.name"},
    ),
    "what a mapping holds is not guarded": (
        "test_example.py::test_trees_are_stand_ins",
        {"return self.answer(obj, list)": "return list(obj._value)"},
    ),
    "the example not copied": (
        "test_example.py::test_what_is_none_missing_or_of_another_kind[a list that shrinks-default]",
        {"return tree_map(_copied, self.given[target])": "return self.given[target]"},
    ),
    "constants keep what the example wrote": (
        "test_example.py::test_a_question_is_answered_or_refused[a constant that is written-exact-True]",
        {"tensor.data.copy_(before)": "pass"},
    ),
    "an example is not checked": (
        "test_example.py::test_an_example_that_shows_a_difference",
        {"_check_example(model, mode, traced)": "pass"},
    ),
    "constants of the example not guarded": (
        "test_example.py::test_a_constant_of_the_example_is_guarded[mask]",
        {"self.record(torch._assert, stand_in == value, said)\n        return value": "return value"},
    ),
    "defaults are not taken": (
        "test_example.py::test_exact_takes_defaults[{}]",
        {"(self.example is None and not self.exact)": "self.example is None"},
    ),
    "arguments that nobody takes": (
        "test_example.py::test_an_argument_that_nobody_takes_is_said",
        {"self.lose(_UNASKED.format(node.target), 0)": "pass"},
    ),
    "the other mode has to be traced": (
        "test_example.py::test_the_other_mode_may_fail[train-eval]",
        {"elif mode == own:": "else:\n                raise\n            if False:"},
    ),
    "errors that the forward catches": (
        "test_example.py::test_an_error_that_other_inputs_may_not_raise",
        {"self.raised = error": "pass"},
    ),
    "None is not guarded": (
        "test_example.py::test_what_is_none_missing_or_of_another_kind[None in a tree-exact]",
        {"            self.guard_none(proxy)": "            pass"},
    ),
    "kinds are not guarded": (
        "test_example.py::test_what_is_none_missing_or_of_another_kind[a list or a tuple-exact]",
        {"                self.answer(item, _kind)": "                pass"},
    ),
    "what is missing is not guarded": (
        "test_example.py::test_what_is_none_missing_or_of_another_kind[attributes-exact]",
        {"bool(self.tracer.record(hasattr, self, name))": "pass"},
    ),
    "writes do not ask again": (
        "test_example.py::test_what_is_none_missing_or_of_another_kind[a list that shrinks-exact]",
        {"            self._writes += 1": "            pass"},
    ),
    "parameters keep what is written": (
        "test_example.py::test_parameters_are_as_they_were[self.scale.data.clamp_(0, 0.5); return h * self.scale]",
        {"self.keep(first)": "pass"},
    ),
    "gradients are not switched off": (
        "test_example.py::test_gradients_that_are_switched_off",
        {'node.meta["featx_block"] = block': "pass"},
    ),
    "what hooks keep of an example": (
        "test_example.py::test_what_a_hook_keeps_of_the_example",
        {" or self.watch.is_of_example(a):": ":"},
    ),
    "leaves are advised that are none": (
        "test_met.py::test_what_has_a_call_of_its_own_is_no_leaf",
        {"if self.path and self.module_type.__call__ is nn.Module.__call__:": "if self.path:"},
    ),
    "stand-ins stay in caches": (
        "test_example.py::test_functools_caches_are_cleared",
        {"                    cache.cache_clear()": "                    pass"},
    ),
    "caches of a model's own are not looked at": (
        "test_example.py::test_nothing_stays_in_a_cache[a number]",
        {"                if not caches:": "                if False:"},
    ),
    "a look-up is not guarded": (
        "test_example.py::test_a_look_up_is_guarded",
        {"return hash(self.tracer.answer(self))": "return hash(self._value)"},
    ),
    "what is written is not guarded": (
        "test_example.py::test_a_question_is_answered_or_refused[a text-default-True]",
        {"    stand_in.tracer.note_asked(stand_in)\n    return": "    return"},
    ),
    "other asserts make texts messages": (
        "test_example.py::test_a_question_is_answered_or_refused[a text before an assert-default-True]",
        {" if str(item[1]) not in message]": " if False]"},
    ),
    "attributes of objects are read late": (
        "test_example.py::test_attributes_are_read_where_the_forward_reads_them",
        {"if value is None or is_of_object or is_in_block:": "if value is None or is_in_block:"},
    ),
    "refusals that the forward catches": (
        "test_example.py::test_a_refusal_cannot_be_caught",
        {"            raise self.raised\n": "            self.raised = None\n            raise ValueError\n"},
    ),
    "parameters with other data stay": (
        "test_example.py::test_parameters_keep_their_data",
        {"                parameter.data = memory": "                pass"},
    ),
    "dicts of classes keep stand-ins": (
        "test_example.py::test_a_dict_of_the_class_is_as_it_was",
        {"        note([*vars(kind).values()])": "        pass"},
    ),
    "texts of asserts are questions": (
        "test_example.py::test_the_text_of_an_assert_is_no_question",
        {" if str(item[1]) not in message]": "]"},
    ),
    "a text that is returned is not guarded": (
        "test_example.py::test_a_question_is_answered_or_refused[a text that is returned-default-True]",
        {"            self.guard_pending()\n            return returned": "            return returned"},
    ),
    # one trace
    "modes that are asked for in ways of their own": (
        "test_one_trace.py::test_who_asks_is_traced_twice[Train-True]",
        {'for name in ("train", "eval", "__getattribute__"):': "for name in ():"},
    ),
    "reads of the mode not seen": (
        "test_one_trace.py::test_who_asks_is_traced_twice[a branch-True]",
        {"self.asked_mode |= not self._is_aside()": "pass"},
    ),
    "reads of other threads are seen": (
        "test_one_trace.py::test_other_threads_may_ask",
        {"self.asked_mode |= not self._is_aside()": "self.asked_mode = True"},
    ),
    "two modes with one graph": (
        "test_one_trace.py::test_the_graphs_are_edited_apart",
        {'elif graphs["_train_graph"] is graphs["_eval_graph"]:': "elif False:"},
    ),
    # selection
    "a query ends inside of a word": (
        "test_selection.py::test_a_query_matches_literally_up_to_a_dot",
        {'name.split("."), "{}.{}".format': 'name, "{}{}".format'},
    ),
    "a query is a regular expression": (
        "test_conformance.py::test_selection_on_a_model",
        {
            "    for query in queries:\n        if query not in known:": (
                "    for name in [*known]:\n"
                "        known.update((query, known[name]) for query in queries if re.match(query, name))\n"
                "    for query in queries:\n        if query not in known:"
            )
        },
    ),
    "the first match, not the last": (
        "test_selection.py::test_each_query_is_resolved_by_itself",
        {"answers[query] = feature": "answers.setdefault(query, feature)"},
    ),
    "two queries under one key": (
        "test_errors.py::test_two_queries_under_one_key",
        {"if owner != query:": "if False:"},
    ),
    "results in the order of the queries": (
        "test_selection.py::test_forms_of_return_nodes",
        {IN_ORDER: "return {query: known[query] for query in queries}"},
    ),
    "results in the order of the names": (
        "test_exact.py::test_a_module_called_again",
        {IN_ORDER: "return dict(features)"},
    ),
    "suggestions lost": (
        "test_errors.py::test_a_typo",
        {"return difflib.get_close_matches(query, answers)": "return []"},
    ),
    "the other mode not mentioned": (
        "test_errors.py::test_a_name_of_the_other_mode",
        {"if query in _answers(tracers[other]):": "if False:"},
    ),
    "the first of two places not mentioned": (
        "test_met.py::test_hints[shared]",
        {"if path != query:": "if False:"},
    ),
    "what auto_leaf did not mentioned": (
        "test_met.py::test_hints[auto_leaf]",
        {"if leaf in tracer.auto_leaves:": "if False:"},
    ),
    # pruning
    "no cut, everything runs": (
        "test_pruning.py::test_nothing_runs_after_the_last_requested_node",
        {f"{PLANNED}\n": f"{PLANNED}\n    stays = set(operations)\n"},
    ),
    "asserts after the cut stay": (
        "test_pruning.py::test_asserts_before_the_cut_stay_and_those_after_it_go",
        {
            'if position > end and kind != "placeholder":': (
                'if position > end and kind not in ("placeholder", "assert") and node not in stays:'
            )
        },
    ),
    "asserts before the cut dropped": (
        "test_pruning.py::test_asserts_before_the_cut_stay_and_those_after_it_go",
        {'is_kept = kind in ("placeholder", "assert")': 'is_kept = kind == "placeholder"'},
    ),
    "writes in place dropped": (
        "test_pruning.py::test_a_write_is_kept_while_something_later_reads_the_memory",
        {"is_live = any(memory[written] in live for written in writes)": "is_live = False"},
    ),
    "writes into state dropped": (
        "test_met.py::test_right[a mean that moves-extract-False]",
        {'for node in operations if operations[node].kind == "get_attr"': "for node in ()"},
    ),
    "state that is fetched twice taken for two": (
        "test_met.py::test_right[rows of a constant-extract-False]",
        {"views = [fetched.setdefault(node.target, node)]": "pass"},
    ),
    "views not followed": (
        "test_pruning.py::test_a_write_is_kept_while_something_later_reads_the_memory",
        {"for viewed in views:": "for viewed in ():"},
    ),
    "a function's name in place not believed": (
        "test_pruning.py::test_the_name_of_an_opaque_function_is_believed",
        {" or bool(ends_so)": ""},
    ),
    "a leaf's part in place not believed": (
        "test_pruning.py::test_an_opaque_leaf_with_an_in_place_part_may_write_its_input",
        {"return writes if in_place else None": "return None"},
    ),
    "a leaf whose value nobody takes dropped": (
        "test_pruning.py::test_an_opaque_call_whose_value_nobody_takes_is_there_for_its_effect",
        {"writes if in_place else None": "writes if in_place else hands_on"},
    ),
    "a function whose value nobody takes dropped": (
        "test_pruning.py::test_an_opaque_call_whose_value_nobody_takes_is_there_for_its_effect",
        {"        return None\n    if name in": "        return [], inputs\n    if name in"},
    ),
    "methods that no tensor has only read": (
        "test_met.py::test_methods_of_containers[insert-extract]",
        {"is_unknown = isinstance(target, str) and not is_of_tensor": "is_unknown = False"},
    ),
    "attributes that are set dropped": (
        "test_met.py::test_right[data-extract-False]",
        {"is_unknown or target is setattr": "is_unknown"},
    ),
    "what a list's method does, expected of a tensor's": (
        "test_pruning.py::test_what_sorts_a_list_only_reads_a_tensor",
        {"[( ]Tensor\\(": "\\("},
    ),
    "operators of Python taken for writes and views": (
        "test_pruning.py::test_operators_of_python_neither_write_nor_give_views",
        {" and not hasattr(operator, name)": "", 'if library == "_operator":': "if False:"},
    ),
    "constants keep what was written": (
        "test_met.py::test_right[a constant's method-extract-False]",
        {"original = current[node] = renewed[node.target]": "pass"},
    ),
    "constants not looked at": (
        "test_met.py::test_right[a constant's method-extract-False]",
        {'if operations[node].kind == "constant":': "if False:"},
    ),
    # the two-mode module
    "graphs swapped": (
        "test_modes.py::test_train_and_eval",
        {"_train_graph=train_graph, _eval_graph=eval_graph": "_train_graph=eval_graph, _eval_graph=train_graph"},
    ),
    "the mode looked up once": (
        "test_modes.py::test_the_attribute_set_by_hand",
        {"_dispatcher(self.train_graph, train)": "train if self.training else evaluation"},
    ),
    "always in train mode": (
        "test_modes.py::test_train_and_eval",
        {IN_TRAIN_MODE: IN_TRAIN_MODE.replace("self.training", "True")},
    ),
    "always exported in train mode": (
        "test_modes.py::test_export_takes_the_mode_it_finds",
        {IN_TRAIN_MODE: IN_TRAIN_MODE.replace("self.training", "True")},
    ),
    "modes whose nodes have the same names taken for one": (
        "test_modes.py::test_modes_that_differ_in_one_argument",
        {"if train != evaluation:": ("if [*map(str, self.train_graph.nodes)] != [*map(str, self.eval_graph.nodes)]:")},
    ),
    "starts in train mode": (
        "test_modes.py::test_it_starts_in_the_models_mode",
        {"module.training = source.training": "module.training = True"},
    ),
    "frozen submodules thaw": (
        "test_modes.py::test_frozen_submodules_stay_frozen",
        {"module.training = source.training": "module.training = root.training"},
    ),
    "copies are in train mode": (
        "test_modes.py::test_copies",
        {COPIED: '{**vars(self), "training": True}'},
    ),
    "copies lose hooks": (
        "test_modes.py::test_copies",
        {COPIED: '{**vars(self), "_forward_hooks": {}}'},
    ),
    "copies untie parameters": (
        "test_modes.py::test_copies",
        {
            DEEP: DEEP
            + "        copied._modules.update({name: copy.deepcopy(part) for name, part in copied._modules.items()})\n"
        },
    ),
    "graphs of a copy do not know it": (
        "test_modes.py::test_graphs_know_their_module",
        {"set_to(self, _unpack(graph))": "graphs[name] = _unpack(graph)"},
    ),
    "a copy runs what was compiled of its original": (
        "test_modes.py::test_copies_of_what_was_compiled_run_themselves",
        {'state.pop("_compiled_call_impl", None)': "pass"},
    ),
    "copies are made of one graph": (
        "test_modes.py::test_copies[False-copy]",
        {"def __copy__(self) -> DualGraphModule": "def _copy(self) -> DualGraphModule"},
    ),
    "parameters copied": (
        "test_effects.py::test_weights_are_shared_with_the_model",
        {"_copy_attr(root, self, ": "_copy_attr(copy.deepcopy(root), self, "},
    ),
    "non-persistent buffers become persistent": (
        "test_tracing.py::test_a_buffer_that_is_not_saved_is_a_node_too",
        {"|= made | source._non_persistent_buffers_set": "= made"},
    ),
    "constants become state": (
        "test_met.py::test_right[a constant's method-extract-False]",
        {"|= made | source._non_persistent_buffers_set": "|= source._non_persistent_buffers_set"},
    ),
    "graphs do not know their module": (
        "test_modes.py::test_graphs_know_their_module",
        {"graph.owning_module = self  # once": "pass  # once"},
    ),
    "children are looked up the slow way": (
        "test_modes.py::test_children_are_looked_up_the_fast_way",
        {"with_paths(_fast_source)": "with_paths(_shown_source)"},
    ),
    "a module that was replaced runs on": (
        "test_modes.py::test_changes_are_seen",
        {CHILD: 'f"vars(self).setdefault({node.target!r}, {parent}._modules[{name!r}])"'},
    ),
    "names are code": (
        "test_modes.py::test_the_name_of_a_module_is_never_code",
        {CHILD: """f'{parent}._modules["{name}"]'"""},
    ),
    "numbers are bound to what an operator made of them": (
        "test_met.py::test_numbers_may_be_said_idly",
        {"re.sub(pattern, replacement, code.src)": "code.src"},
    ),
    "source lines of the dead pile up": (
        "test_modes.py::test_source_lines_go_with_their_module",
        {"weakref.finalize(method, linecache.cache.pop, filename, None)": "pass"},
    ),
    "scripted in both modes or not at all": (
        "test_exact.py::test_features_whose_types_differ_by_mode_are_scripted_in_one_mode",
        {"def __prepare_scriptable__": "def _prepare_scriptable"},
    ),
    # the caller's things
    "modes not restored": (
        "test_effects.py::test_success[True-modes]",
        {RESTORE_BETWEEN: "pass", RESTORE_AT_THE_END: "        finally:\n            pass"},
    ),
    "modes restored without train()": (
        "test_effects.py::test_a_train_method_that_changes_the_weights",
        {"if module.training != training:": "if False:"},
    ),
    "the model's own mode set anew": (
        "test_met.py::test_a_part_in_the_other_mode",
        {'if model.training != (mode == "train"):': "if True:"},
    ),
    "the trace before not forgotten": (
        "test_effects.py::test_a_trace_does_not_see_the_one_before",
        {RESTORE_BETWEEN: "pass"},
    ),
    "a constant left behind": (
        "test_effects.py::test_constants_and_buffers",
        {RESTORE_AT_THE_END: "        finally:\n            pass"},
    ),
    "constants after a failure": (
        "test_effects.py::test_constants_after_a_failure",
        {RESTORE_AT_THE_END: "        except ZeroDivisionError:\n            pass\n        restore()"},
    ),
    "values of buffers not restored": (
        "test_effects.py::test_success",
        {"self.keep(first)": "pass"},
    ),
    "what train() froze stays frozen": (
        "test_effects.py::test_a_train_method_that_freezes",
        {"parameter.requires_grad = requires_grad": "pass"},
    ),
    "random numbers drawn": (
        "test_effects.py::test_success",
        {"return torch.random.fork_rng(": "return contextlib.nullcontext("},
    ),
    "gradients switched off": (
        "test_effects.py::test_success",
        {"grad = torch.enable_grad()": "grad = contextlib.nullcontext()"},
    ),
    "tracer_kwargs written to": (
        "test_effects.py::test_tracer_kwargs_and_return_nodes_are_not_written_to",
        {"arguments = {**own, **(given or {})}": "arguments = given or {}\n    arguments.update(own)"},
    ),
    "no lock": (
        "test_effects.py::test_a_trace_waits_for_that_of_another_thread",
        {"_tracing = threading.RLock()": "_tracing = contextlib.nullcontext()"},
    ),
    "calls of other threads recorded": (
        "test_tracing.py::test_what_other_threads_run_is_not_seen_and_not_disturbed",
        {"return self._thread != threading.get_ident()": "return False"},
    ),
    "lazy parameters touched": (
        "test_met.py::test_lazy_parts_stay_lazy",
        {"parameter.requires_grad = requires_grad": "parameter.requires_grad_(requires_grad)"},
    ),
    "compiled models taken": (
        "test_met.py::test_compiled_models_are_not_taken[compile]",
        {' or hasattr(model, "_orig_mod"):': ":"},
    ),
    "no way out of a scripted model": (
        "test_met.py::test_compiled_models_are_not_taken[jit.script]",
        {" hand in the module that it was made from (_orig_mod)": ""},
    ),
    # exact
    "no clone": (
        "test_exact.py::test_each_way_of_writing_in_place",
        {"if tracer.exact or _is_constant(node):": "if _is_constant(node):"},
    ),
    "opaque leaves that may write are cut": (
        "test_exact.py::test_what_an_opaque_leaf_may_write_is_kept_though_nothing_that_stays_takes_its_value",
        {"may_write = tracer.exact or not node.users": "may_write = not node.users"},
    ),
    "no clone before opaque functions": (
        "test_exact.py::test_opaque_calls_that_write_into_their_input",
        {"may_write = tracer.exact or not node.users": "may_write = not node.users"},
    ),
    "no clone for what train mode writes": (
        "test_exact.py::test_dropout_in_place_writes_in_train_mode_only",
        {"inputs, training or tracer.exact)": "inputs, training)"},
    ),
    "what is alone overwritten all the same": (
        "test_met.py::test_gradients_of_what_is_overwritten",
        {"                current[value] = clone\n": ""},
    ),
    "a clone takes the place of what shares memory": (
        "test_exact.py::test_the_input_and_tuples_are_cloned_too",
        {"if plan.alone[value]:": "if True:"},
    ),
    "memories joined from the start": (
        "test_met.py::test_what_meets_later_is_not_overwritten",
        {
            f"{MEMORIES}\n    changed": (
                f"{MEMORIES}\n"
                "    for node in operations:\n"
                "        _join(memory, node, operations[node].views)\n"
                "    changed"
            )
        },
    ),
    "operators in place make new values": (
        "test_met.py::test_said_by_default",
        {"if self.tracer.exact:\n        return self.tracer": "if False:\n        return self.tracer"},
    ),
    "a module's last operation for what it returns": (
        "test_exact.py::test_a_module_called_again",
        {"answers.update(tracer.returned)": "pass"},
    ),
    "the path of what is not called means what is in it": (
        "test_met.py::test_the_path_of_what_is_not_called",
        {"[name] if tracer.exact else _prefixes(name)": "_prefixes(name)"},
    ),
    # warnings
    "a warning twice": (
        "test_exact.py::test_each_way_of_writing_in_place",
        {"for flaw in flaws:": "for flaw in [*flaws, *flaws]:"},
    ),
    "a warning for each mode": (
        "test_tracing.py::test_what_both_modes_lose_is_said_once",
        {"losses.setdefault(kind, text)": "losses.setdefault(mode + kind, text)"},
    ),
    "a warning missing": (
        "test_exact.py::test_each_way_of_writing_in_place",
        {"if writer is not None:": "if False:"},
    ),
    "no warning of what is not called": (
        "test_met.py::test_the_path_of_what_is_not_called",
        {"return query in tracer.paths": "return False"},
    ),
    "no warning of operators in place": (
        "test_met.py::test_said_by_default",
        {"missed = node": "pass"},
    ),
    "writes after a replaced operator": (
        "test_met.py::test_said_by_default[another name, written later-True]",
        {"(shared in changing and node in stays)": "False"},
    ),
    "copies compile again": (
        "test_modes.py::test_copies_share_their_code",
        {"return copied\n\n    def __deepcopy__": "copied.recompile()\n        return copied\n\n    def __deepcopy__"},
    ),
    "a constant that is fetched twice is made anew twice": (
        "test_met.py::test_right[a constant written twice-extract-False]",
        {"if node.target not in renewed:": "if True:"},
    ),
    "what is written into attributes of attributes is lost": (
        "test_example.py::test_attributes_of_attributes_are_written_too",
        {'    _own = "root", "attr", "tracer", "_node", "_value"': "    __setattr__ = object.__setattr__"},
    ),
    "the example's output is compared when its memory is put back": (
        "test_example.py::test_what_the_model_returns_of_itself_is_compared_as_it_was",
        {"_clone_nested(returned)))": "returned))"},
    ),
    "an empty buffer that is assigned not seen": (
        "test_tracing.py::test_an_empty_buffer_that_is_assigned_is_said_or_refused",
        {'"_value", value) is buffer': '"_value", value) is buffer or buffer is None'},
    ),
    "an idle warning of items": (
        "test_met.py::test_right[items-extract-False]",
        {'self.tracer.replaced.discard(getattr(value, "node", None))': "pass"},
    ),
    "an idle warning of operators in place": (
        "test_met.py::test_right[a residual-extract-False]",
        {"if shared in live or": "if True or"},
    ),
    "an idle warning of what misleads": (
        "test_exact.py::test_a_write_inside_of_a_module_is_part_of_what_it_returns",
        {"return returned_after != after or returned not in written": "return True"},
    ),
    "an idle warning of what train mode writes": (
        "test_exact.py::test_dropout_in_place_writes_in_train_mode_only",
        {"inputs, training or tracer.exact)": "inputs, True)"},
    ),
    "an idle warning of modes that agree": (
        "test_errors.py::test_no_warning_where_the_modes_agree_or_it_is_suppressed",
        {"if train == evaluation or": "if"},
    ),
    "an idle warning of modes that differ where nobody looks": (
        "test_met.py::test_modes_that_differ_where_nobody_looks",
        {" and not (exact and _run_alike(tracers, plans)):": ":"},
    ),
    # what tracing leaves out, or makes a constant
    "buffers not proxied": (
        "test_tracing.py::test_what_is_computed_from_buffers_is_said_and_exact_follows[computed]",
        {"= self.exact or self.proxy_buffer_attributes": "= self.proxy_buffer_attributes"},
    ),
    "a replaced forward not seen": (
        "test_tracing.py::test_the_warnings_can_be_silenced",
        {'if is_hooked or "forward" in vars(self.root) or': "if is_hooked or"},
    ),
    "hooks of the model not seen": (
        "test_met.py::test_around_the_model[hook]",
        {"if is_hooked or": "if"},
    ),
    "hooks of the model that come before not seen": (
        "test_met.py::test_around_the_model[pre-hook]",
        {" or self.root._forward_pre_hooks": ""},
    ),
    "a call of the model's own not seen": (
        "test_met.py::test_around_the_model[call]",
        {" or not is_called_so:": ":"},
    ),
    "enable_grad not seen": (
        "test_tracing.py::test_a_block_is_said_refused_or_right",
        {'for name in ("__enter__", "__exit__"):': "for name in ():"},
    ),
    "tensors of earlier calls not seen": (
        "test_met.py::test_refused_if_exact[kept]",
        {"if a.grad_fn is not None or self.watch": "if self.watch"},
    ),
    "buffers that are assigned not seen": (
        "test_tracing.py::test_a_buffer_that_is_assigned_is_said_refused_or_right",
        {'if node is None or node.op != "get_attr":': "if False:"},
    ),
    "operators on buffers taken for assignments": (
        "test_met.py::test_said_by_default[an operator-False]",
        {"while node and node.args and _is_in_place(node):": "while False:"},
    ),
    "what is written into buffers without a node not seen": (
        "test_met.py::test_said_by_default",
        {"if target in self.watched or target in self.taken:": "if False:"},
    ),
    "blocks of other threads seen": (
        "test_tracing.py::test_what_other_threads_run_is_not_seen_and_not_disturbed",
        {"if not self._is_aside():\n                step": "if True:\n                step"},
    ),
    "a warning of what does not stay": (
        "test_tracing.py::test_what_comes_before_is_not_concerned_and_what_comes_later_is",
        {"if any(position <= feature.after for feature in asked.values()):": "if True:"},
    ),
    "a warning of tables of integers": (
        "test_tracing.py::test_no_false_alarm",
        {"any(item.is_floating_point() or item.is_complex() for item in found)": "bool(found)"},
    ),
    "a warning of views of buffers": (
        "test_tracing.py::test_no_false_alarm",
        {"self.watched[id(view)] = view\n            return\n": "self.watched[id(view)] = view\n"},
    ),
    "what the tries before left": (
        "test_auto_leaf.py::test_a_try_does_not_see_what_the_ones_before_left",
        {RESTORE_BETWEEN: "pass"},
    ),
    "views of constants not looked at": (
        "test_met.py::test_refused_if_exact[a view of a constant]",
        {"        if is_view and _is_constant(node.all_input_nodes[0]):": "        if False:"},
    ),
    "integers that are written into not looked at": (
        "test_met.py::test_refused_if_exact[integers]",
        {"self.written.add(id(tensor))": "pass"},
    ),
    "a forward taken for an own call": (
        "test_met.py::test_what_surrounds_a_forward_is_no_part_of_what_the_forward_returns",
        {"        if type(m).__call__ is nn.Module.__call__:": "        if True:"},
    ),
    "leaves with an own call": (
        "test_met.py::test_what_surrounds_a_forward_is_no_part_of_what_the_forward_returns",
        {"if has_own_call or isinstance": "if isinstance"},
    ),
    # the command line
    "--check finds nothing wrong": (
        "test_cli.py::test_check_gives_its_exit_code",
        {"return 1 if text and options.check else 0": "return 0"},
    ),
    "--check looks at no shapes": (
        "test_cli.py::test_check_compares_shapes",
        {'("train", "eval", *expected.keys() & {"shapes"})': '("train", "eval")'},
    ),
}
BLOCK = "test_tracing.py::test_a_block_is_said_refused_or_right"
for kind, test in {
    "_AUTOCAST": BLOCK,
    "_GRAD_MODE": BLOCK,
    "_BUFFERS": "test_met.py::test_refused_if_exact[out of the graph]",
    "_RANDOM": "test_tracing.py::test_what_is_drawn_is_said_refused_or_right",
    "_ASSIGNED": "test_tracing.py::test_a_buffer_that_is_assigned_is_said_refused_or_right",
    "_EARLIER": "test_met.py::test_refused_if_exact[kept]",
    "_AROUND": "test_met.py::test_around_the_model",
}.items():
    says, refuses = "if kind in self.losses:", "if self.exact:\n            self.raised"
    FAULTS[f"{kind} not said"] = test, {says: f"if kind in (*self.losses, {kind}):"}
    if kind != "_GRAD_MODE":  # which is recorded
        FAULTS[f"{kind} not refused"] = (
            test,
            {refuses: f"if self.exact and kind is not {kind}:\n            self.raised"},
        )

# The same for the port in conformance/port.py: what is broken -> the file whose vectors notice first, the old text and
# the new one.
PORT_FAULTS: Dict[str, Tuple[str, str, str]] = {
    "suffixes stay": ("naming", "split(place)[0]", "place"),
    "suffixes of paths are removed": ("naming", "place if path in paths else split(place)[0]", "split(place)[0]"),
    "suffixes of nothing": ("naming", "if head and is_number", "if is_number"),
    "digits of all scripts": ("naming", 'digits != "" and set(digits) <= set("0123456789")', "digits.isdecimal()"),
    "scopes that are empty keep their dot": ("naming", "filter(None, (", "map(str, ("),
    "the lowest number": ("naming", "latest.get(stem, -1) + 1", "int(stem in latest)"),
    "names given twice": ("naming", "while name in taken:", "while False:"),
    "numbers are no forms": ("naming", "latest[head] = own", "pass"),
    "first calls are forms": ("naming", "uncalled.remove(path)", "latest[path] = uncalled.remove(path) or 0"),
    "paths are free": ("naming", "taken = set(paths)", "taken = set()"),
    "a query matches what begins with it": ("selection", 'startswith(f"{query}.")', "startswith(query)"),
    "the first node of a query": ("selection", "matching[-1]", "matching[0]"),
    "the output in capitals": ("selection", '"output" if query ==', '"output" if query.lower() =='),
    "the order of queries": ("selection", "sorted(pairs, key=lambda pair:", "sorted(pairs, key=lambda pair: 0 and"),
    "two queries under one key": ("selection", "< len(keys)", "< 0"),
    "candidates are whole names": ("selection", "range(1, len(parts) + 1)", "(len(parts),)"),
    "a lower cutoff": ("selection", "cutoff=0.6", "cutoff=0.58"),
    "the first read is the cut": ("pruning", "cut = max(", "cut = min("),
    "asserts after the cut": (
        "pruning",
        'node["kind"] == "placeholder" or',
        'node["kind"] in ("placeholder", "assert") or',
    ),
    "state is not read": ("pruning", 'if node["kind"] == "state"}', "if not node}"),
    "one write of several": (
        "pruning",
        'in live for written in node["writes"])',
        'in live for written in node["writes"][:1])',
    ),
    "inputs are not read": ("pruning", 'read(node["inputs"])', 'needed.update(node["inputs"])'),
    "members stay behind": ("pruning", "self.of[member] = large", "self.of[position] = large"),
    "writes before the read": ("pruning", "read[1] < position", "read[1] <= position"),
    "the last that overwrites": ("pruning", "found.setdefault(read, position)", "found[read] = position"),
    "asserts of the zoo not known": ("zoo", '"torch._assert"', '"_assert"'),
    "one mode of the zoo": ("zoo", 'if document[mode] == "same as train"', "if mode"),
}

# A fault shows as an assertion, a missing error or warning, an idle one, or an error that featx documents. Any
# other error would be the mutation's own, such as a name that is not defined.
SIGNS = {"AssertionError", "Failed", "UserWarning", "FeatureWarning", "NodeNameError", "UntraceableError", "ValueError"}

# Importing torch takes longer than a test. So this imports it once, and each run is a fork of it.
RUNNER = """
import gc, json, os, signal, sys
import hypothesis, pytest, torch
import torchvision.models  # as when the whole suite runs

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

# A fault is one with all versions; the runner forks, and the count of tokens is that of Python before 3.12.
IS_ELSEWHERE = older(torch="2.14") or not (version("torchvision") and hasattr(os, "fork"))
pytestmark = pytest.mark.skipif(
    IS_ELSEWHERE or hasattr(tokenize, "FSTRING_START"),
    reason="faults are looked for once, with the versions of tox's newest",
)


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


@parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault: str, runner: subprocess.Popen[str], tmp_path: Path) -> None:
    test, edits = FAULTS[fault]
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
    tests = sorted({f"tests/{test}" for test, _ in FAULTS.values()})
    source = (ROOT / "featx.py").read_text(encoding="utf-8")
    code, failures, output = run(runner, tmp_path, "whole_featx", source, tests)
    assert (code, failures) == (0, []), output


@parametrize("fault", PORT_FAULTS)
def test_a_fault_of_a_port_is_noticed(fault: str) -> None:
    file, old, new = PORT_FAULTS[fault]
    path = ROOT / "tests" / "conformance" / "port.py"
    source = path.read_text(encoding="utf-8")
    assert source.count(old) == 1, f"port.py changed, and so must this table: {source.count(old)} times {old!r}"
    broken: Dict[str, Any] = {"__name__": "broken_port", "__file__": str(path)}
    exec(compile(source.replace(old, new), "port.py", "exec"), broken)
    failed = (where for where, _, holds in broken["checks"]() if not holds)
    assert next(failed, None) == file
