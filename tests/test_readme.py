"""Every code block of the README runs, and prints what stands below it."""

from __future__ import annotations

import configparser
import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
import torch

from tests import featx
from tests.helpers import ROOT, parametrize

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PYTHON = [(text, BLOCKS[i + 1]) for i, (kind, text) in enumerate(BLOCKS) if kind == "python"]
COMMANDS = [line for kind, text in BLOCKS if kind == "console" for line in text.splitlines()]
TOX = [line for line in COMMANDS if "tox" in line]


def test_blocks_were_found() -> None:
    kinds = [kind for kind, _ in BLOCKS]
    assert {kind: kinds.count(kind) for kind in kinds} == {"python": 4, "": 4, "console": 2}
    assert len(COMMANDS) == 6


def run(pairs: List[Tuple[str, Tuple[str, str]]], namespace: Dict[str, Any]) -> None:
    """In one namespace for all: a reader runs them one after the other."""
    said: List[str] = []
    for text, (kind, expected) in pairs:
        assert kind == "", "an output follows each block of Python"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", featx.FeatureWarning)  # all others are errors
            exec(compile(text, "README.md", "exec"), namespace)
        assert printed.getvalue() == expected
        said += [str(warning.message) for warning in caught]
    (warning,) = said  # of the exact features, once by default
    assert "'0' is overwritten in place" in warning


def test_python_blocks_print_what_the_readme_says() -> None:
    pytest.importorskip("torchvision")
    run(PYTHON, {})


def test_python_blocks_without_torchvision() -> None:
    alone = [pair for pair in PYTHON if "torchvision" not in pair[0]]
    assert len(alone) >= 2
    run(alone, {"featx": featx, "torch": torch})


@parametrize("command", [line for line in COMMANDS if line not in TOX and "mypackage" not in line])
def test_commands_of_featx(command: str, tmp_path: Path) -> None:
    arguments = shlex.split(command)
    if "torchvision" in command:
        pytest.importorskip("torchvision")
    assert arguments[:3] == ["python", "-m", "featx"]
    picture = tmp_path / "features.png"
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
        assert arguments[arguments.index("--plot") + 1] == picture.name
    shutil.copytree(ROOT / "tests" / "data", tmp_path / "tests" / "data")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command_line = [sys.executable, *arguments[1:]]
    done = subprocess.run(command_line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("featx: note: ") for line in done.stderr.splitlines())
    assert len(done.stdout.splitlines()) >= 3
    assert picture.exists() == (picture.name in done.stdout + done.stderr) == ("--plot" in arguments)


def test_the_picture_is_one_of_the_first_command() -> None:
    (path,) = re.findall(r"!\[[^]]+\]\((\S+\.png)\)", README)
    picture = (ROOT / path).read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 150_000


def test_commands_of_tox_are_those_that_ci_and_tox_know() -> None:
    demo, tests = TOX
    assert tests in (ROOT / ".ci" / "run").read_text().splitlines()
    assert demo == f"{tests} -e demo"
    assert f"{tests} -e bench" in (ROOT / "benchmarks" / "README.md").read_text().splitlines()
    configuration = configparser.ConfigParser(interpolation=None)
    configuration.read(ROOT / "tox.ini")
    command = " ".join(configuration["testenv:demo"]["commands"].split())
    assert command.replace("{toxinidir}/", "") in COMMANDS  # which another test runs


def test_the_tables_of_differences_are_tested_row_by_row() -> None:
    """The README has the rows that somebody may notice, that of the tests all others."""
    texts = [README, (ROOT / "tests" / "README.md").read_text(encoding="utf-8")]
    noticed, others = (re.findall(r"^\| (D\d\d) \|", text, re.MULTILINE) for text in texts)
    assert noticed == sorted(noticed)
    assert others == sorted(others)
    tests = (ROOT / "tests" / "test_differences.py").read_text(encoding="utf-8")
    tested = {row.upper() for row in re.findall(r"^def test_(d\d\d)_", tests, re.MULTILINE)}
    assert sorted(noticed + others) == sorted(tested)


def test_the_readme_can_be_read_in_a_few_minutes() -> None:
    assert len(README.splitlines()) <= 200


@parametrize("folder", ["", "tests", "tests/conformance", "benchmarks"])
def test_links_lead_somewhere(folder: str) -> None:
    text = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)):
        target, _, section = link.partition("#")
        there = ROOT / folder / (target or "README.md")
        assert there.exists(), link
        titles = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.MULTILINE) if section else []
        assert section in ["", *(re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles)], link


def test_the_version_has_one_source() -> None:
    assert "version = attr: featx.__version__" in (ROOT / "setup.cfg").read_text()
    assert re.fullmatch(r"\d+\.\d+\.\d+", featx.__version__)


def test_the_names_that_a_ci_pins(tmp_path: Path) -> None:
    """The README's two commands, for a model whose ``head`` becomes ``classifier``."""
    (write,) = (line for line in COMMANDS if "--json" in line)
    (compare,) = (line for line in COMMANDS if "--check" in line)
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
    assert (done.returncode, done.stderr) == (1, "")
    for mode in ("train", "eval"):
        head = f"--- names.json\n+++ {mode}\n"
        assert f"{head}@@ -1,3 +1,3 @@\n input\n body\n-head\n+classifier\n" in done.stdout
