"""What a test needs of Python, torch and torchvision. The reason why one does not run is itself checked.

Where it is not known which version brought something, the limit is the oldest of tox's environments that has it.
"""

from __future__ import annotations

import importlib
import platform
import re
from typing import Tuple, Type, Union

import pytest

Kinds = Union[Type[BaseException], Tuple[Type[BaseException], ...]]


def version(library: str) -> Tuple[int, ...] | None:
    """The first numbers of a library's version, or of Python's; None if it is absent.

    >>> (1, 13) <= version("torch")[:2]
    True
    """
    if library == "python":
        return numbers(platform.python_version())
    try:
        return numbers(importlib.import_module(library).__version__)
    except ImportError:
        return None


def numbers(text: str) -> Tuple[int, ...]:
    """As numbers, which can be compared.

    >>> numbers("2.14.1+cu130")
    (2, 14, 1)
    """
    return tuple(map(int, re.findall(r"\d+", text.split("+")[0])))


def older(**limits: str) -> bool:
    """Whether something that runs is older than its limit. What is absent is not old.

    >>> older(torch="1.0"), older(python="3.7", torch="99")
    (False, True)
    """
    found = {library: version(library) for library in limits}
    return any(found[library] is not None and found[library] < numbers(limit) for library, limit in limits.items())


def needs(path: str, **limit: str) -> pytest.MarkDecorator:
    """Skip where a library lacks something; that this is so before a version, and only there, is checked.

    >>> needs("torch.fx", torch="1.8").args
    (False,)
    >>> needs("torch.fx", torch="99")
    Traceback (most recent call last):
    AssertionError: torch.fx is there, which should come with torch 99
    """
    present = exists(path)
    text = " and ".join(" ".join(pair) for pair in limit.items())
    if present == older(**limit):
        raise AssertionError(f"{path} is {'there' if present else 'not there'}, which should come with {text}")
    return pytest.mark.skipif(not present, reason=f"{path} came with {text}")


def exists(path: str) -> bool:
    """Whether a dotted path leads to something.

    >>> exists("torch.nn.Linear"), exists("torch.nn.Nothing")
    (True, False)
    """
    module, _, name = path.rpartition(".")
    return hasattr(importlib.import_module(module), name)


def fails_before(raises: Kinds, why: str, **limit: str) -> pytest.MarkDecorator:
    """The test runs, and has to fail in this way where something is older than a limit."""
    text = " and ".join(" ".join(pair) for pair in limit.items())
    return pytest.mark.xfail(older(**limit), reason=f"before {text}: {why}", raises=raises, strict=True)
