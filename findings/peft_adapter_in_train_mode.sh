#!/usr/bin/env bash
# peft 0.21.2 with torch 2.14.1: an adapter that is added to a model in eval mode drops values at random.
#
# Guess before it was run: the layers that `get_peft_model` adds are in the mode of the model that it is given.
# Seen: they are in train mode, and so is the wrapper, while the model's own modules stay in eval mode. With
#   lora_dropout above 0 two calls on one input differ, until `eval()` is called again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.14.1 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 numpy
cat >"$folder/run.py" <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2)).eval()
x = torch.rand(8, 64)
assert torch.equal(model(x), model(x))
adapted = get_peft_model(model, LoraConfig(target_modules=["0"], lora_dropout=0.5, init_lora_weights=False))
layer = model[0]
modes = {"model": model.training, "old layer": layer.base_layer.training, "dropout": layer.lora_dropout.training}
assert modes == {"model": False, "old layer": False, "dropout": True}, f"changed: {modes}"
assert not torch.equal(adapted(x), adapted(x)), "changed: two calls agree"
adapted.eval()
assert torch.equal(adapted(x), adapted(x))
print("as stated: training is", modes)
PYTHON
"$folder/env/bin/python" "$folder/run.py"
