"""The file copied alone into another package under another name, with torchvision blocked from import."""

from __future__ import annotations

import ast
import collections
import os
import shutil
import sys
import zipfile
from pathlib import Path

from tests.helpers import ROOT, python
from tests.versions import needs

SCRIPT = """
import copy, pickle, sys
sys.modules["torchvision"] = None  # importing it is an ImportError from here on
import torch
from torch import nn
from somebody.internal import _extract

model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Sequential(nn.ReLU(), nn.Linear(8, 2)))
assert _extract.get_graph_node_names(model).eval == ["input", "0", "1", "2.0", "2.1"]
extractor = _extract.create_feature_extractor(model, {"1": "norm", "2": "last"})
x = torch.rand(3, 4)
assert list(extractor(x)) == ["norm", "last"]
assert torch.equal(extractor.eval()(x)["last"], model.eval()(x))
for twin in (pickle.loads(pickle.dumps(extractor)), copy.deepcopy(extractor), torch.jit.script(extractor)):
    assert torch.equal(twin(x)["last"], model(x))
try:
    _extract.create_feature_extractor(model, ["3"])
except _extract.NodeNameError as error:
    assert type(error).__module__ == "somebody.internal._extract"
else:
    raise AssertionError("no error")
assert "featx" not in sys.modules
print("works")
"""


def test_the_file_works_alone(tmp_path: Path) -> None:
    package = tmp_path / "somebody" / "internal"
    package.mkdir(parents=True)
    (tmp_path / "somebody" / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "_extract.py").write_bytes((ROOT / "featx.py").read_bytes())
    done = python("-W", "ignore", "-c", SCRIPT, cwd=tmp_path)
    assert (done.stderr, done.stdout) == ("", "works\n")


@needs("sys.stdlib_module_names", python="3.10")
def test_the_file_imports_the_standard_library_and_torch() -> None:
    source = (ROOT / "featx.py").read_text(encoding="utf-8")
    command_line = source.splitlines().index("# ---- command line")
    found = collections.defaultdict(set)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            inside = "the command line" if node.lineno > command_line else "another function"
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found[inside if node.col_offset else "the top"] |= {name.split(".")[0] for name in names}
    for libraries in found.values():
        libraries -= set(sys.stdlib_module_names)
    assert found == {"the top": {"torch"}, "the command line": {"PIL", "matplotlib"}}


def test_featx_does_not_import_torchvision() -> None:
    code = "import featx, sys; print([m for m in ('torchvision', 'PIL', 'matplotlib') if m in sys.modules])"
    assert python("-c", code).stdout == "[]\n"


def test_the_wheel_holds_the_file_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("featx.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in ("tests", "benchmarks"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PIP_NO_INPUT": "1"}
    options = ["--no-deps", "--quiet", "--wheel-dir", str(tmp_path)]
    python("-m", "pip", "wheel", str(source), *options, env=environment, check=True)
    (path,) = tmp_path.glob("featx-*.whl")
    wheel = zipfile.ZipFile(path)
    assert [name for name in wheel.namelist() if ".dist-info/" not in name] == ["featx.py"]
    assert wheel.read("featx.py") == (ROOT / "featx.py").read_bytes()
