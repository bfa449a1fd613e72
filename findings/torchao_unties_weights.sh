#!/usr/bin/env bash
# torchao 0.18.0 with torch 2.14.1: `quantize_` gives layers that share a weight a quantized weight each.
#
# Guess before it was run: two layers that hold one weight hold one quantized weight after `quantize_`.
# Seen: each holds one of its own, without a word, so that the int8 model needs twice the memory for them, and what
#   is written into the one does not reach the other. One layer that is used at two places stays one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.14.1 torchao==0.18.0 numpy
cat >"$folder/run.py" <<'PYTHON'
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

tied = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
tied[1].weight = tied[0].weight
layer = nn.Linear(64, 64)
reused = nn.Sequential(layer, layer)
shared = {}
for name, model in (("tied", tied), ("reused", reused)):
    assert model[0].weight is model[1].weight
    quantize_(model, Int8WeightOnlyConfig())
    first, second = model[0].weight, model[1].weight
    assert type(first) is type(second) is not nn.Parameter, f"changed: {type(first)}"
    shared[name] = first is second, first.qdata.data_ptr() == second.qdata.data_ptr()
assert shared == {"tied": (False, False), "reused": (True, True)}, f"changed: {shared}"
print("as stated: one weight, one memory:", shared)
PYTHON
"$folder/env/bin/python" "$folder/run.py"
