#!/usr/bin/env bash
# Ray Data, ray 2.60.0: actors that have all CPUs keep everything in memory until the last row is computed.
#
# Guess before it was run: write_parquet after map_batches writes the file of a block once the block is computed, however
#   many actors there are.
# Seen: it is so where a CPU is left. Two actors of one CPU each on two CPUs have none left for the tasks that write, so
#   that no file is there before the last block has been computed, and all results wait in the object store (a run that
#   is killed then has written nothing). Half a CPU for each actor is enough.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet "ray[data]==2.60.0" pyarrow==26.0.1
cat >"$folder/run.py" <<'PYTHON'
import sys
import time
from pathlib import Path

import ray


class Slow:
    """Notes when it has computed a block, and how many files are there by then."""

    def __init__(self, out):
        self.out = Path(out)

    def __call__(self, batch):
        time.sleep(1)
        return {**batch, "files": [len(list(self.out.glob("*.parquet")))] * len(batch["id"])}


def files_at_the_last_block(cpus):
    """How many of 12 files are there when the last block is computed."""
    out = Path(sys.argv[1]) / f"out-{cpus}"
    out.mkdir()
    rows = ray.data.range(12, override_num_blocks=12)
    actors = ray.data.ActorPoolStrategy(size=2)
    rows.map_batches(
        Slow, batch_size=None, compute=actors, num_cpus=cpus, fn_constructor_args=[str(out)]
    ).write_parquet(str(out))
    return max(row["files"] for row in ray.data.read_parquet(str(out)).take_all())


ray.init(num_cpus=2, log_to_driver=False)
found = {cpus: files_at_the_last_block(cpus) for cpus in (1, 0.5)}
assert found[1] == 0, f"changed: files are there before the last block: {found}"
assert found[0.5] > 0, f"changed: no files are there although a CPU is left: {found}"
print("as stated: files of 12 at the last block, by the CPUs of an actor:", found)
PYTHON
RAY_AUTH_MODE=disabled "$folder/env/bin/python" "$folder/run.py" "$folder" 2>"$folder/log" || { tail -5 "$folder/log"; exit 1; }
