#!/usr/bin/env bash
# OpenVINO, openvino 2026.4.1 with torch 2.14.1: of two keys of a module's dict that hold one tensor, one is lost.
#
# Guess before it was run: `convert_model` of a module that returns {"a": y, "b": y} has two outputs, "a" and "b".
# Seen: it has two outputs, and both are called "b". Nothing is said, and to ask the compiled model's results for "a"
#   raises KeyError. With {"a": y, "b": y + 0} the outputs are "a" and "b".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.14.1 openvino==2026.4.1 numpy
cat >"$folder/run.py" <<'PYTHON'
import openvino
import torch
from torch import nn


class Twice(nn.Module):
    def forward(self, x):
        y = torch.relu(x)
        return {"a": y, "b": y}


class Apart(nn.Module):
    def forward(self, x):
        y = torch.relu(x)
        return {"a": y, "b": y + 0}


names = {}
for kind in (Twice, Apart):
    converted = openvino.convert_model(kind(), example_input=torch.ones(2))
    names[kind.__name__] = [output.get_names() for output in converted.outputs]
assert names == {"Twice": [{"b"}, {"b"}], "Apart": [{"a"}, {"b"}]}, f"changed: {names}"
print("as stated:", names)
PYTHON
"$folder/env/bin/python" "$folder/run.py"
