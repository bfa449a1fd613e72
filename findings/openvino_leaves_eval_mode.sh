#!/usr/bin/env bash
# OpenVINO, openvino 2026.4.1 with torch 2.14.1: `convert_model` leaves the module that it is given in eval mode.
#
# Guess before it was run: to convert a module does not change its mode, and one in train mode is converted as such.
# Seen: the module and all of its submodules are in eval mode after the call, and the dropout is gone from what was
#   converted. Nothing is said. A training that goes on after such a conversion goes on without dropout.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.14.1 openvino==2026.4.1 numpy
cat >"$folder/run.py" <<'PYTHON'
import openvino
import torch
from torch import nn

model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5)).train()
x = torch.ones(8, 4)
converted = openvino.convert_model(model, example_input=x)
modes = [module.training for module in model.modules()]
kinds = sorted(operation.get_type_name() for operation in converted.get_ops())
(values,) = openvino.compile_model(converted, "CPU")(x.numpy()).values()
assert modes == [False, False, False], f"changed: {modes}"
assert not (values == 0).any(), "changed: what was converted drops values"
print("as stated: training is", modes, "after the call; operations:", kinds)
PYTHON
"$folder/env/bin/python" "$folder/run.py"
