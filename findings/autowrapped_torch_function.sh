#!/usr/bin/env bash
# torch.fx, torch 2.14.1: a function of torch among a tracer's autowrap_functions breaks all later traces of the process.
#
# Guess before it was run: autowrap_functions concerns the tracer that gets it, and no other.
# Seen: the trace works, and so do others after it. Once a GraphModule is made of the graph and runs well, any
#   torch.fx.symbolic_trace of any other module raises KeyError: 'torch.zeros', until the process ends. The generated
#   code registers the function by its qualified name for the whole process, where torch.fx looks for a plain name.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.14.1 numpy
cat >"$folder/run.py" <<'PYTHON'
import torch
from torch import fx, nn, zeros


class Padded(nn.Module):
    def forward(self, x):
        return x + zeros(x.shape[0])


graph = fx.Tracer(autowrap_functions=(torch.zeros,)).trace(Padded())
fx.symbolic_trace(nn.Linear(2, 2))
module = fx.GraphModule(Padded(), graph)
assert torch.equal(module(torch.ones(3)), torch.ones(3))
try:
    fx.symbolic_trace(nn.Linear(2, 2))
except KeyError as error:
    assert error.args == ("torch.zeros",), error
    print("as stated: a later trace of another module raises KeyError", error)
else:
    raise SystemExit("changed: the later trace works")
PYTHON
"$folder/env/bin/python" "$folder/run.py"
