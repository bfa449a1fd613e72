"""Every code block of the README runs, and prints what stands below it."""

from __future__ import annotations

import configparser
import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
import torch

from tests import featx

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PYTHON = [(text, BLOCKS[i + 1]) for i, (kind, text) in enumerate(BLOCKS) if kind == "python"]
COMMANDS = [line for kind, text in BLOCKS if kind == "console" for line in text.splitlines()]
TOX = [line for line in COMMANDS if "tox" in line]


def test_blocks_were_found() -> None:
    kinds = [kind for kind, _ in BLOCKS]
    assert {kind: kinds.count(kind) for kind in kinds} == {"python": 3, "": 4, "console": 3, "yaml": 1}
    assert len(COMMANDS) == 5


def run(pairs: List[Tuple[str, Tuple[str, str]]], namespace: Dict[str, Any]) -> None:
    """In one namespace for all: a reader runs them one after the other."""
    for text, (kind, expected) in pairs:
        assert kind == "", "an output follows each block of Python"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(text, "README.md", "exec"), namespace)
        assert printed.getvalue() == expected


def test_python_blocks_print_what_the_readme_says() -> None:
    pytest.importorskip("torchvision")
    run(PYTHON, {})


def test_python_blocks_without_torchvision() -> None:
    alone = [pair for pair in PYTHON if "torchvision" not in pair[0]]
    assert len(alone) >= 2
    run(alone, {"featx": featx, "torch": torch})


@pytest.mark.parametrize("command", [line for line in COMMANDS if line not in TOX and "mypackage" not in line])
def test_commands_of_featx(command: str) -> None:
    arguments = shlex.split(command)
    if "torchvision" in command:
        pytest.importorskip("torchvision")
    assert arguments[:3] == ["python", "-m", "featx"]
    done = subprocess.run([sys.executable, *arguments[1:]], cwd=ROOT, capture_output=True, text=True)
    said = "featx: note: the weights are random, unless the callable loads some\n"
    assert (done.returncode, done.stderr) == (0, said if "--image" in arguments else "")
    assert len(done.stdout.splitlines()) >= 3


def test_commands_of_tox_are_those_that_ci_and_tox_know() -> None:
    demo, tests = TOX
    assert tests in (ROOT / ".ci" / "run").read_text().splitlines()
    assert demo == f"{tests} -e demo"
    assert f"{tests} -e bench" in (ROOT / "benchmarks" / "README.md").read_text().splitlines()
    configuration = configparser.ConfigParser(interpolation=None)
    configuration.read(ROOT / "tox.ini")
    command = " ".join(configuration["testenv:demo"]["commands"].split())
    assert command.replace("{toxinidir}/", "") in COMMANDS  # which another test runs


def test_the_table_of_differences_is_tested_row_by_row() -> None:
    rows = re.findall(r"^\| (D\d\d) \|", README, re.MULTILINE)
    tests = (ROOT / "tests" / "test_differences.py").read_text()
    tested = {row.upper() for row in re.findall(r"^def test_(d\d\d)_", tests, re.MULTILINE)}
    assert rows == sorted(tested)


def test_the_version_has_one_source() -> None:
    assert "version = attr: featx.__version__" in (ROOT / "setup.cfg").read_text()
    assert re.fullmatch(r"\d+\.\d+\.\d+", featx.__version__)


def test_the_names_that_a_ci_pins(tmp_path: Path) -> None:
    """As the README says it, for a model whose ``head`` becomes ``classifier``."""
    (write,) = (line for line in COMMANDS if "--json" in line)
    (steps,) = (text for kind, text in BLOCKS if kind == "yaml")
    (compare,) = re.findall(r"- run: (.*--check.*)", steps)
    (failure,) = (text for kind, text in BLOCKS if kind == "" and text.startswith("---"))
    package = tmp_path / "mypackage"
    package.mkdir()

    def run_in_project(command: str) -> subprocess.CompletedProcess[str]:
        line = command.replace("python", shlex.quote(sys.executable), 1)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)

    model = """from collections import OrderedDict\nfrom torch import nn\n
def build():
    return nn.Sequential(OrderedDict(body=nn.Linear(4, 4), {}=nn.Linear(4, 2)))
"""
    (package / "models.py").write_text(model.format("head"))
    done = run_in_project(write)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = run_in_project(compare)
    assert (done.returncode, done.stderr) == (0, "")
    (package / "models.py").write_text(model.format("classifier"))
    done = run_in_project(compare)
    assert (done.returncode, done.stdout, done.stderr) == (1, failure, "")
