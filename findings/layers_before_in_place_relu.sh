#!/usr/bin/env bash
# torchextractor 0.3.0, surgeon-pytorch 0.0.4, torchcam 0.5.0, grad-cam 1.5.7 and captum 0.9.0, with torch 2.14.1: the
#   output of a batch norm that an in-place ReLU follows, as in each ResNet of torchvision.
#
# Guess before it was run: all five give what the batch norm returned, negative numbers and all.
# Seen: captum gives that. torchextractor, surgeon-pytorch's Inspect, torchcam and, on the CPU, grad-cam keep the tensor
#   without a copy and give the ReLU's output, without a word; with `inplace=False` they give the batch norm's. grad-cam
#   keeps `.cpu()` of it, which is a copy on a GPU only. So the heat map of one model and one image is another one when
#   the ReLU works in place, though the model computes the same.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.14.1 torchvision==0.29.1 numpy captum==0.9.0 grad-cam==1.5.7 \
    surgeon-pytorch==0.0.4 torchcam==0.5.0 torchextractor==0.3.0
cat >"$folder/run.py" <<'PYTHON'
import warnings

import torch
import torchextractor
from captum.attr import LayerActivation
from pytorch_grad_cam import GradCAM
from surgeon_pytorch import Inspect
from torch import nn
from torchcam.methods import LayerCAM

warnings.simplefilter("ignore")
image = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def classifier(inplace):
    torch.manual_seed(0)
    features = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace)
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).eval()


def by_torchextractor(model):
    return torchextractor.Extractor(model, ["1"])(image)[1]["1"]


def by_surgeon(model):
    return Inspect(model, layer="1")(image)[1]


def by_torchcam(model):
    with LayerCAM(model, "1") as extractor:
        model(image)
        return extractor.hook_a[0]


def by_grad_cam(model):
    with GradCAM(model=model, target_layers=[model[1]]) as extractor:
        heat_maps.append(torch.tensor(extractor(image, targets=None)))
        return extractor.activations_and_grads.activations[0]


def by_captum(model):
    return LayerActivation(model, model[1]).attribute(image)


heat_maps = []
normed = classifier(True)[:2](image)
values = {"the batch norm's": normed, "the ReLU's": normed.relu()}
given = {}
for inplace in (True, False):
    for extract in (by_torchextractor, by_surgeon, by_torchcam, by_grad_cam, by_captum):
        found = extract(classifier(inplace))
        (whose,) = [name for name, value in values.items() if torch.equal(found, value)]
        given[extract.__name__, inplace] = whose
assert torch.equal(classifier(True)(image), classifier(False)(image))
expected = {key: "the batch norm's" for key in given}
for name in ("by_torchextractor", "by_surgeon", "by_torchcam", "by_grad_cam"):
    expected[name, True] = "the ReLU's"
assert given == expected, f"changed: {given}"
apart = (heat_maps[0] - heat_maps[1]).abs().max().item()
assert apart > 0.1, f"changed: the heat maps are {apart} apart"
for (name, inplace), whose in given.items():
    print(f"as stated: {name}, inplace={inplace}: {whose}")
print(f"as stated: two heat maps of equal models, from 0 to 1, are {apart:.2f} apart")
PYTHON
"$folder/env/bin/python" "$folder/run.py"
