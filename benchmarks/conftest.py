from __future__ import annotations

from typing import Any, Callable

import pytest

LINES = pytest.StashKey[list]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LINES] = []


@pytest.fixture
def record_ratio(request: pytest.FixtureRequest) -> Callable[..., None]:
    return lambda *columns: request.config.stash[LINES].append(columns)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    terminalreporter.section("medians of ratios (quartiles)")
    for name, *columns in config.stash[LINES]:
        terminalreporter.line(f"{name:24}" + "".join(f"{column:48}" for column in columns).rstrip())
