"""The pairs of versions: tox, the README and what is installed say the same."""

from __future__ import annotations

import configparser
import os
import re
from pathlib import Path

import pytest

from tests.versions import numbers, version

ROOT = Path(__file__).parent.parent
TOX = configparser.ConfigParser(interpolation=None)
TOX.read(ROOT / "tox.ini")
ENVIRONMENTS = ["oldest", "between1", "between2", "newest", "alone"]


def pinned(environment: str) -> dict[str, str]:
    """What tox installs: Python, torch and torchvision."""
    section = {**TOX["testenv"], **TOX[f"testenv:{environment}"]}
    pins = dict(line.split("==") for line in section["deps"].split() if "==" in line)
    return {"python": section["base_python"].replace("python", ""), "torchvision": "none", **pins}


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_the_readme_has_the_versions_of_tox(environment: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| `tox run -e {environment}` \| (\S+) \| (\S+) \| (\S+) \|", readme, re.MULTILINE)
    assert dict(zip(("python", "torch", "torchvision"), row)) == pinned(environment)


def test_the_default_run_has_the_ends_and_torch_alone() -> None:
    assert {"lint", "type", "oldest", "newest", "alone"} == set(TOX["tox"]["env_list"].split(", "))


@pytest.mark.skipif(os.environ.get("TOX_ENV_NAME") not in ENVIRONMENTS, reason="not in one of tox's environments")
def test_what_is_installed_is_what_tox_says() -> None:
    for library, pin in pinned(os.environ["TOX_ENV_NAME"]).items():
        found, wanted = version(library), None if pin == "none" else numbers(pin)
        assert (found and wanted and found[: len(wanted)]) == wanted, library
