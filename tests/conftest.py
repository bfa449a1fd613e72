from __future__ import annotations

import gc
import os
import random
import sys
from typing import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
torch.jit.set_fusion_strategy([("STATIC", 0), ("DYNAMIC", 0)])  # what torch 1.13 fuses is rounded otherwise
pytest.register_assert_rewrite("tests.helpers")  # so that its failures show values

# `--hypothesis-profile=ci` and so on. What CI draws (few, ci) is the same each time, so that it fails for what was
# changed; dev and nightly draw anew. No deadlines: how long torch takes says nothing about featx.
_common = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("dev", _common, max_examples=10)
settings.register_profile("few", _common, max_examples=10, derandomize=True, database=None)
settings.register_profile("ci", _common, max_examples=100, derandomize=True, database=None)
settings.register_profile("nightly", _common, max_examples=6000)
settings.load_profile("dev")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("FEATX_DEVICE") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("FEATX_DEVICE=cuda: torch finds no GPU, so that nothing was run")


def pytest_report_header(config: pytest.Config) -> str:
    try:
        import torchvision

        vision = torchvision.__version__
    except ImportError:
        vision = "absent"
    return f"python {sys.version.split()[0]}, torch {torch.__version__}, torchvision {vision}, FEATX_SEED={_seed()}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """All lines of featx run without the zoo, other tools and what is drawn, in which to note them takes minutes."""
    for item in items if config.pluginmanager.hasplugin("pytest_cov") else ():
        if item.get_closest_marker("zoo") or item.path.stem in ("test_ecosystem", "test_properties"):
            item.add_marker("no_cover")


def _seed() -> int:
    """Drawn afresh for each run; the same in all workers of a run."""
    return int(os.environ.setdefault("FEATX_SEED", str(random.SystemRandom().randrange(2**32))))


@pytest.fixture
def rng() -> random.Random:
    """Random choices that a failure names: FEATX_SEED=<seed> repeats them."""
    print(f"FEATX_SEED={_seed()}")
    return random.Random(_seed())


# Files that trace many large models. Others ask the garbage collector who holds what, as hypothesis does.
MANY_MODELS = ("test_exact", "test_parity", "test_pruning", "test_tracing", "test_zoo")


@pytest.fixture(autouse=True, scope="module")
def _no_garbage_among_what_is_imported(request: pytest.FixtureRequest) -> Iterator[None]:
    """Else up to a fifth of the time of these files goes into looking for it, again and again."""
    if request.path.stem not in MANY_MODELS:
        yield
        return
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    torch.manual_seed(0)
