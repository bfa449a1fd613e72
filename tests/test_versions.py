"""The pairs of versions: tox, the README and what is installed say the same."""

from __future__ import annotations

import configparser
import os
import re
from importlib import metadata

import pytest

from tests.helpers import ROOT, parametrize
from tests.versions import numbers, version

TOX = configparser.ConfigParser(interpolation=None)
TOX.read(ROOT / "tox.ini")
ENVIRONMENTS = ["oldest", "between1", "between2", "newest", "latest", "python313", "alone", "exporters"]
IN_TOX = pytest.mark.skipif(os.environ.get("TOX_ENV_NAME") not in ENVIRONMENTS, reason="not in tox's environments")


def section(environment: str) -> dict[str, str]:
    return {**TOX["testenv"], **TOX[f"testenv:{environment}"]}


def pinned(environment: str) -> dict[str, str]:
    """What tox installs: Python, torch and torchvision."""
    options = section(environment)
    pins = dict(line.split("==") for line in options["deps"].split() if "==" in line)
    return {"python": options["base_python"].replace("python", ""), "torchvision": "none", **pins}


@parametrize("environment", ENVIRONMENTS)
def test_the_readme_has_the_versions_of_tox(environment: str) -> None:
    readme = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| `tox run -e {environment}` \| (\S+) \| (\S+) \| (\S+) \|", readme, re.MULTILINE)
    assert dict(zip(("python", "torch", "torchvision"), row)) == pinned(environment)


def test_the_default_run_has_the_ends_and_torch_alone() -> None:
    assert {"lint", "oldest", "newest", "alone"} == set(TOX["tox"]["env_list"].split(", "))


@IN_TOX
def test_what_is_installed_is_what_tox_says() -> None:
    for library, pin in pinned(os.environ["TOX_ENV_NAME"]).items():
        found = version(library)
        wanted = None if pin == "none" else numbers(pin)
        assert (found and wanted and found[: len(wanted)]) == wanted, library


@IN_TOX
def test_no_test_is_skipped_for_want_of_an_extra() -> None:
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    for extra in section(os.environ["TOX_ENV_NAME"])["extras"].split(", "):
        for requirement in setup["options.extras_require"][extra].split():
            assert metadata.version(re.split("[<>=]", requirement)[0])
