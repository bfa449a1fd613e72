"""Options, fixtures, and the results: printed, and saved with ``--save`` if all benchmarks of the device ran.

``--save-to`` saves a part as well, in a folder of its own.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
import time
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence

import cpuinfo
import pytest
import torch
import torchvision

import featx
from benchmarks.turns import Turns

RESULTS = Path(__file__).parent / "results"
collect_ignore = ["features_of_a_dataset.py"]  # it wants Ray, and holds no tests
START = time.monotonic()
FOUND = pytest.StashKey[List[Dict[str, Any]]]()
NOT_RUN = pytest.StashKey[Dict[str, str]]()
IS_PARTIAL = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="where the models compute")
    parser.addoption("--save", action="store_true", help="write benchmarks/results/<machine>.json")
    parser.addoption("--against", type=Path, metavar="FILE", help="another featx.py whose creation is timed, too")
    parser.addoption("--save-to", metavar="FOLDER", help="write FOLDER/<machine>.json, also of a part")
    parser.addoption("--until", metavar="SECONDS", type=float, help="leave out what would begin later than that")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FOUND], config.stash[NOT_RUN], config.stash[IS_PARTIAL] = [], {}, False
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no GPU, so that nothing was run")


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    for item in items[:1]:
        item.config.stash[IS_PARTIAL] = True


def pytest_collection_modifyitems(config: pytest.Config, items: List[pytest.Item]) -> None:
    """On a GPU runs what computes there; tracing and the like do not."""
    if config.getoption("--device") == "cuda":
        items[:] = [item for item in items if "device" in getattr(item, "fixturenames", ())]
        config.stash[NOT_RUN]["names, creation, flips, copies, import"] = "they do not compute; --device cpu runs them"
    else:
        config.stash[NOT_RUN]["CUDA"] = "--device cuda runs it on a machine with a GPU"


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Any:
    """Where the models compute."""
    return request.config.getoption("--device")


@pytest.fixture
def against(request: pytest.FixtureRequest) -> Any:
    """The module of ``--against``, such as that of an older commit."""
    path = request.config.getoption("--against")
    if path is None:
        return None
    spec = importlib.util.spec_from_file_location("the other featx", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def turns(request: pytest.FixtureRequest, benchmark: Any, not_run: Callable[[str], Any]) -> Iterator[Turns]:
    until = request.config.getoption("--until")
    if until is not None and time.monotonic() - START > until:
        not_run(f"--until {until:g}: no time was left")
    yield Turns(benchmark, request.config.getoption("--device"))
    if benchmark.extra_info:
        request.config.stash[FOUND].append({"benchmark": request.node.name, **benchmark.extra_info})


@pytest.fixture
def not_run(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    """Leave a benchmark out; the report and the results say so and why."""

    def leave_out(reason: str) -> None:
        request.config.stash[NOT_RUN][request.node.name] = reason
        pytest.skip(reason)

    return leave_out


@pytest.fixture(autouse=True)
def _alike() -> Iterator[None]:
    """One thread, unless a benchmark says otherwise, and the same random numbers each time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


def machine(device: str) -> Dict[str, Any]:
    """What timings depend on, and nothing that tells which machine it was."""
    cpu = cpuinfo.get_cpu_info()
    return {
        "processor": torch.cuda.get_device_name() if device == "cuda" else cpu.get("brand_raw", platform.machine()),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "featx": featx.__version__,
    }


def blob(path: Path) -> str:
    """What git calls a file by: a machine without the history tells what it ran by this."""
    text = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    found, is_whole = config.stash[FOUND], not config.stash[IS_PARTIAL]
    folder = config.getoption("--save-to") or (config.getoption("--save") and is_whole and RESULTS)
    if not (found and folder and exitstatus == pytest.ExitCode.OK):
        return
    if not is_whole:
        config.stash[NOT_RUN]["all other benchmarks"] = f"-k {config.option.keyword!r} leaves them out"
    device = config.getoption("--device")
    commit = config.hook.pytest_benchmark_generate_commit_info(config=config)
    results = {
        "device": device,
        "machine": machine(device),
        "commit": {"id": commit["id"], "changed_since": commit["dirty"], "featx.py": blob(Path(featx.__file__))},
        "not_run": config.stash[NOT_RUN],
        "benchmarks": found,
    }
    cores = "" if device == "cuda" else f" {results['machine']['cores']} cores"
    name = re.sub(r"\W+", "-", re.sub(r"\(\w+\)", "", results["machine"]["processor"] + cores).lower()).strip("-")
    path = Path(folder) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    terminalreporter.section("medians of ratios (quartiles)")
    for row in config.stash[FOUND]:
        terminalreporter.line(f"{row['benchmark']}, compared with {row['to']}, {row['rounds']} rounds")
        for name, (low, middle, high) in row["ratios"].items():
            facts = "".join(f", {row[fact][name]:.1f} {fact}" for fact in FACTS if name in row.get(fact, {}))
            milliseconds = f"{1e3 * row['seconds'][name]:.2f} ms"
            terminalreporter.line(f"    {name:20} {middle:6.3f} ({low:.3f} to {high:.3f})  {milliseconds}{facts}")
    for name, reason in config.stash[NOT_RUN].items():
        terminalreporter.line(f"not run: {name}: {reason}")


FACTS = ("million parameters", "MiB at most", "MiB left")
