"""Features of the images in a folder, as Parquet, on Ray: ``python -m benchmarks.features_of_a_dataset OUT [FOLDER]``.

OUT, which is OUT.part until it is whole, has a row for each file: path, error, and for each key the values as a flat
list and their shape, in a column ``key.shape``, as pyarrow and DuckDB do not see the shapes that Ray notes elsewhere.
"""

import argparse
import shutil
import time
from pathlib import Path

import pyarrow.parquet
import ray
import torch
from PIL import Image
from torchvision import models, transforms, utils

from featx import create_feature_extractor

QUERIES = {"layer1": "low.map", "layer4": "deep"}
PHOTOGRAPH = Path(__file__).parent.parent / "tests" / "data" / "grace_hopper.jpg"


class Features:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.extractor = create_feature_extractor(models.resnet18().eval().requires_grad_(False), QUERIES, exact=True)

    def __call__(self, batch: dict[str, list]) -> pyarrow.Table:
        images, errors = zip(*map(read, batch["path"]))
        columns = {**batch, "error": errors}
        for key, values in self.extractor(torch.stack(images)).items():
            columns[key] = list(values.flatten(1).numpy())
            columns[f"{key}.shape"] = [values.shape[1:]] * len(errors)
        return pyarrow.table(columns)


def read(path: str) -> tuple[torch.Tensor, str]:
    try:
        return transforms.functional.to_tensor(Image.open(path).convert("RGB").resize((64, 64))), ""
    except Exception as error:
        return torch.full((3, 64, 64), torch.nan), repr(error)


def write(rows: list[dict[str, str]], out: Path, actors: int) -> float:
    start, part = time.perf_counter(), f"{out}.part"
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    if actors:
        dataset = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // 32))
        pool = ray.data.ActorPoolStrategy(size=actors)  # of half a CPU each: the other half writes
        dataset.map_batches(Features, batch_size=None, compute=pool, num_cpus=0.5).write_parquet(part)
    else:
        for table in map(Features(), torch.utils.data.DataLoader(rows, 32)):
            pyarrow.parquet.write_to_dataset(table, part)
    found = pyarrow.parquet.read_table(part, columns=["path", "error"]).sort_by("path").to_pylist()
    assert [row["path"] for row in found] == [row["path"] for row in rows], "a row is lost, or there twice"
    Path(part).rename(out)
    unread = [f"{row['path']}: {row['error']}" for row in found if row["error"]]
    print(f"{out}: {len(found)} rows, {len(unread)} of them could not be read", *unread, sep="\n")
    return len(rows) / (time.perf_counter() - start)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("folder", type=Path, nargs="?", help="if none, 256 tiles of a photograph, in OUT.tiles")
    parser.add_argument("--actors", type=int, nargs="+", default=[2], help="several: into OUT-N each; 0: a plain loop")
    options = parser.parse_args()
    folder = options.folder or Path(f"{options.out}.tiles")
    if not options.folder:
        folder.mkdir(parents=True, exist_ok=True)
        tiles = transforms.functional.to_tensor(Image.open(PHOTOGRAPH)).unfold(1, 37, 37).unfold(2, 32, 32)
        for number, tile in enumerate(tiles.flatten(1, 2).unbind(1)):
            utils.save_image(tile, folder / f"{number:03}.png")
    rows = [{"path": path} for path in sorted(str(path) for path in folder.rglob("*") if path.is_file())]
    outs = [options.out if len(options.actors) == 1 else Path(f"{options.out}-{each}") for each in options.actors]
    if not rows or any(out.exists() for out in outs):
        parser.error(f"no file in {folder}, or {options.out} is there already")
    rates = [write(rows, out, number) for out, number in zip(outs, options.actors)]
    print("rows a second:", *(f"{rate:.1f} ({rate / rates[0]:.2f})" for rate in rates))
