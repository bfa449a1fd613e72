"""Features of a data set: benchmarks/features_of_a_dataset.py gives what eager execution gives, and loses no row."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Iterable

import pytest
import torch

from tests.helpers import ROOT, python, recording

pytest.importorskip("ray")
models = pytest.importorskip("torchvision.models")
functional = pytest.importorskip("torchvision.transforms.functional")
parquet = pytest.importorskip("pyarrow.parquet")
Image = pytest.importorskip("PIL.Image")

SCRIPT = "benchmarks.features_of_a_dataset"
KEYS = {"layer1": "low.map", "layer4": "deep"}
ALONE = {name: value for name, value in os.environ.items() if "XDIST" not in name}
ENVIRONMENT = {**ALONE, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
BATCH = 32


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return python("-m", SCRIPT, *map(str, arguments), env=ENVIRONMENT)


def eager(paths: Iterable[str]) -> dict[str, dict[str, torch.Tensor]]:
    """What the modules return while the whole model runs, for each path."""
    torch.manual_seed(0)
    model = models.resnet18().eval()
    paths = list(paths)
    found: dict[str, dict[str, torch.Tensor]] = {path: {} for path in paths}
    for start in range(0, len(paths), BATCH):
        some = paths[start : start + BATCH]
        images = [Image.open(path).convert("RGB").resize((64, 64)) for path in some]
        with torch.no_grad(), recording(model) as calls:
            model(torch.stack([functional.to_tensor(image) for image in images]))
        for name, value in calls:
            if name in KEYS:
                for path, row in zip(some, value):
                    found[path][KEYS[name]] = row
    return found


def rows_of(out: Path) -> list[dict[str, Any]]:
    return parquet.read_table(out).sort_by("path").to_pylist()  # type: ignore[no-any-return]


def features_of(row: dict[str, Any]) -> dict[str, torch.Tensor]:
    """As anybody reads them who knows nothing of Ray."""
    return {key: torch.tensor(row[key]).reshape(row[f"{key}.shape"]) for key in KEYS.values()}
