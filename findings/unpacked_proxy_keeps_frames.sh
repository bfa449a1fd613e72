#!/usr/bin/env bash
# torch.fx, torch 2.14.1: `a, b = x` in a traced forward keeps all local variables of that forward alive.
#
# Guess before it was run: what a traced forward holds is let go when the forward returns, with or without unpacking.
# Seen: with `a, b = x` everything that the forward's frame holds (here an object of its own, in a model its tensors)
#   stays until Python collects garbage; with `a, b = x[0], x[1]` it is gone at once. Proxy.__iter__ stores its own
#   frame in a local variable, which is a cycle, and its caller's frame beside it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.14.1 numpy
cat >"$folder/run.py" <<'PYTHON'
import gc
import weakref

from torch import fx, nn


class Large:
    """Stands for what a forward holds."""


class Unpacked(nn.Module):
    def forward(self, x):
        large = Large()
        seen.append(weakref.ref(large))
        a, b = x
        return a + b


class Indexed(nn.Module):
    def forward(self, x):
        large = Large()
        seen.append(weakref.ref(large))
        a, b = x[0], x[1]
        return a + b


gc.disable()
alive = {}
for kind in (Unpacked, Indexed):
    seen = []
    fx.symbolic_trace(kind())
    alive[kind.__name__] = seen[0]() is not None
assert alive == {"Unpacked": True, "Indexed": False}, f"changed: {alive}"
print("as stated: still alive after the trace:", alive)
PYTHON
"$folder/env/bin/python" "$folder/run.py"
