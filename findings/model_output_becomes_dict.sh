#!/usr/bin/env bash
# torch.fx with transformers, torch 2.14.1 and transformers 5.24.0: a traced model gives a dict for a ModelOutput.
#
# Guess before it was run: torch.fx keeps dataclasses, and ModelOutput is one, so that a traced module returns it.
# Seen: a dataclass of one's own stays what it is. A BaseModelOutput, which is a dataclass and an OrderedDict, becomes a
#   plain dict without a word: `.last_hidden_state` of what the traced module returns raises AttributeError.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.14.1 transformers==5.24.0
cat >"$folder/run.py" <<'PYTHON'
import dataclasses

import torch
from torch import fx, nn
from transformers.modeling_outputs import BaseModelOutput


@dataclasses.dataclass
class Own:
    last_hidden_state: torch.Tensor


class Encoder(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        return self.kind(last_hidden_state=x + 1)


given = {}
for kind in (Own, BaseModelOutput):
    found = fx.symbolic_trace(Encoder(kind))(torch.ones(2))
    given[kind.__name__] = type(found).__name__, hasattr(found, "last_hidden_state")
assert given == {"Own": ("Own", True), "BaseModelOutput": ("dict", False)}, f"changed: {given}"
print("as stated:", given)
PYTHON
"$folder/env/bin/python" "$folder/run.py"
