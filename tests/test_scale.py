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

from tests.helpers import ROOT, python, recording, same

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
    return parquet.read_table(out).sort_by("path").to_pandas().to_dict("records")  # type: ignore[no-any-return]


def features_of(row: dict[str, Any]) -> dict[str, torch.Tensor]:
    """As anybody reads them who knows nothing of Ray."""
    return {key: torch.tensor(row[key]).reshape(tuple(row[f"{key}.shape"])) for key in KEYS.values()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What two actors make of the tiles of the photograph, three of which are no pictures, and what they say."""
    folder = tmp_path_factory.mktemp("features")
    done = run(folder / "tiles", "--actors", "0")  # cuts them
    assert done.returncode == 0, done.stderr
    images = folder / "tiles.tiles"
    (images / "031.png").write_text("no picture")
    (images / "032.png").write_bytes((images / "033.png").read_bytes()[:60])
    (images / "255.png").write_bytes(b"")
    done = run(folder / "out", images)
    assert done.returncode == 0, done.stderr
    shutil.copytree(images, folder / "images")
    return folder, done.stdout


BROKEN = ["031.png", "032.png", "255.png"]


def test_it_is_short() -> None:
    script = ROOT / "benchmarks" / "features_of_a_dataset.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 80


def test_features_are_those_of_eager_execution(made: tuple[Path, str]) -> None:
    rows = [row for row in rows_of(made[0] / "out") if not row["error"]]
    assert len(rows) == 256 - len(BROKEN)
    expected = eager(row["path"] for row in rows)
    for row in rows:
        for key, value in features_of(row).items():
            assert torch.equal(value, expected[row["path"]][key]), row["path"]
    shapes = {tuple(features_of(rows[0])[key].shape) for key in KEYS.values()}
    assert shapes == {(64, 16, 16), (512, 2, 2)}
    assert len({tuple(row["deep"]) for row in rows}) == len(rows), "tiles that are alike would show nothing"


def test_what_cannot_be_read_is_named_and_not_lost(made: tuple[Path, str]) -> None:
    folder, said = made
    rows = rows_of(folder / "out")
    assert [Path(row["path"]).name for row in rows] == [f"{number:03}.png" for number in range(256)]
    unread = [row for row in rows if row["error"]]
    assert [Path(row["path"]).name for row in unread] == BROKEN
    assert "256 rows, 3 of them could not be read" in said
    for row in unread:
        assert f"{row['path']}: {row['error']}\n" in said
        assert all(value.isnan().all() for value in features_of(row).values())


def test_readers_without_ray(made: tuple[Path, str]) -> None:
    """pyarrow and DuckDB see names with dots, flat lists, and the shapes."""
    out = made[0] / "out"
    listed = ["path", "error", *(f"{key}{end}" for key in KEYS.values() for end in ("", ".shape"))]
    assert parquet.read_table(out).column_names == listed
    duckdb = pytest.importorskip("duckdb")
    question = f"""select path, deep, "deep.shape" from '{out}/*.parquet' where error = '' order by path"""
    found = duckdb.sql(question).fetchall()
    assert len(found) == 256 - len(BROKEN)
    first = rows_of(out)[0]
    assert found[0] == (first["path"], list(first["deep"]), [512, 2, 2])


def test_a_killed_run_leaves_no_half_file(made: tuple[Path, str]) -> None:
    folder, _ = made
    out = folder / "again"
    command = [sys.executable, "-m", SCRIPT, str(out), str(folder / "images")]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part = folder / "again.part"
    deadline = time.monotonic() + 120
    while not list(part.glob("*.parquet")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert part.exists()
    assert not out.exists()
    done = run(out, folder / "images")
    assert done.returncode == 0, done.stderr
    assert not part.exists()
    assert len(rows_of(out)) == 256


def test_one_two_and_no_actors_are_compared(made: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for image in sorted((made[0] / "images").iterdir())[:40]:
        shutil.copy(image, tmp_path / "images")
    done = run(tmp_path / "out", tmp_path / "images", "--actors", 0, 1, 2)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^rows a second: \d+\.\d \(1\.00\) \d+\.\d \(\d\.\d\d\) \d+\.\d \(\d\.\d\d\)$", done.stdout, re.M)
    alone, *others = (rows_of(tmp_path / f"out-{actors}") for actors in (0, 1, 2))
    for rows in others:
        assert [row["path"] for row in rows] == [row["path"] for row in alone]
        for a, b in zip(rows, alone):
            assert a["error"] == b["error"]
            assert same(features_of(a), features_of(b))


def test_the_readmes_share_of_each_process_of_torchrun(made: tuple[Path, str], tmp_path: Path) -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S) if "WORLD_SIZE" in block)
    (tmp_path / "share.py").write_text(code)
    (tmp_path / "photos").mkdir()
    for number in range(5):
        shutil.copy(made[0] / "images" / f"{number:03}.png", tmp_path / "photos")
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "share.py"]
    done = python(*command, cwd=tmp_path, env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    shares = [[row["path"] for row in rows_of(tmp_path / f"features-{rank}-of-2")] for rank in (0, 1)]
    assert shares == [[f"photos/{number:03}.png" for number in range(rank, 5, 2)] for rank in (0, 1)]


@pytest.mark.parametrize("wrong", ["no folder", "nothing in it", "there already"])
def test_wrong_input_is_one_line(wrong: str, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    if wrong != "no folder":
        folder.mkdir()
    if wrong == "there already":
        (folder / "image.png").touch()
        (tmp_path / "out").mkdir()
    done = run(tmp_path / "out", folder)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].endswith(f"no file in {folder}, or {tmp_path / 'out'} is there already")
    assert (tmp_path / "out").exists() == (wrong == "there already")
    assert not (tmp_path / "out.part").exists()
