"""Nets with one hazard each, and torchvision's zoo."""

from __future__ import annotations

import functools
import inspect
import textwrap
from typing import Any, Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn import Sequential
from torch.overrides import TorchFunctionMode


def net(forward: Callable[..., Any], **members: Any) -> nn.Module:
    """A module of the given forward, with modules, parameters, buffers and other members.

    >>> net(lambda self, x: self.widen(x), widen=nn.Linear(2, 4))(torch.rand(1, 2)).shape
    torch.Size([1, 4])
    """
    module = type("Net", (nn.Module,), {"forward": forward})()
    for name, member in members.items():
        if isinstance(member, torch.Tensor) and not isinstance(member, nn.Parameter):
            module.register_buffer(name, member)
        else:
            setattr(module, name, member)
    return module


def linear() -> nn.Module:
    return nn.Linear(4, 4)


def stated(body: str, **members: Any) -> Any:
    """A net whose forward is a text, since a lambda holds no statements; ``h`` is what its ``fc`` returned."""
    namespace: dict[str, Any] = {"torch": torch, "F": F}
    exec("def forward(self, x):\n h = self.fc(x)\n" + textwrap.indent(body, " "), namespace)
    own = {"fc": linear(), "scale": nn.Parameter(torch.ones(4)), "mean": torch.ones(4), "bank": torch.ones(4, 4)}
    return net(namespace["forward"], **{**own, "steps": torch.tensor(1), **members})


class Block(nn.Module):
    """Two layers, functions that repeat, and a sum; nothing in place."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.sigmoid(self.first(x))
        return torch.sigmoid(self.second(hidden)) + x


def blocks() -> nn.Module:
    return Sequential(Block(), Block())


class Modes(nn.Module):
    """Train mode has an auxiliary head, batch norm, dropout and a value that eval mode lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Sequential(Block(), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.aux = nn.Linear(4, 3)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.body(x)
        if self.training:
            return self.head(features) + self.aux(features).mean()
        return self.head(features) * 2


def misleading() -> nn.Module:
    """The names of ln_1 and of pair are those of other values, and relu writes into what ln_2 returned."""

    def forward(self: Any, x: Any) -> Any:
        return self.pair(self.relu(self.ln_2(self.ln_1(x))))[0]

    return net(
        forward,
        ln_1=nn.LayerNorm(4),
        ln_2=linear(),
        relu=nn.ReLU(inplace=True),
        pair=net(lambda self, x: (x * 2, x + 1)),
    )


class Rectifying(nn.Module):
    """A part of it works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(x) + 1


# What a forward does to its value y before it returns y * 1; each is dropped by a plain dead-code pass.
IN_PLACE = {
    "module": "self.relu(y)",
    "function_keyword": "F.relu(y, inplace=True)",
    "function_position": "F.hardtanh(y, -0.1, 0.1, True)",
    "function_underscore": "torch.relu_(y)",
    "method": "y.add_(1)",
    "slice": "y[:, 0].fill_(7)",
    "view": "y.view(-1).mul_(2)",
    "view_of_view": "y.view(-1)[1:].unsqueeze(0).clamp_(min=0)",
    "transposed_attribute": "y.T.mul_(3)",
    "data": "y.data.zero_()",
    "flatten_module": "self.flatten(y).neg_()",
    "dropout_in_eval": "F.dropout(y, 0.5, False).add_(1)",
    "dropout_module_in_eval": "self.dropout(y).add_(1)",
    "identity": "self.identity(y).add_(1)",
    "detached": "y.detach().mul_(2)",
    "out": "torch.neg(y.detach(), out=y.detach())",
    "copy": "y.copy_(torch.ones_like(y))",
    "stack_of_writes": "(y.add_(1), y.mul_(2), y.sub_(3))",
    "same_dtype": "y.to(torch.float32).add_(1)",
    "same_type": "y.type_as(y).add_(1)",
    "reshape": "y.reshape(2, -1).add_(1)",
    "expand": "y[None].squeeze(0).add_(1)",
}


def writes_in_place(kind: str) -> nn.Module:
    """``y = fc(x)``, then an unassigned in-place write of a kind into y, then ``y * 1``."""
    return stated(
        f"y = h; {IN_PLACE[kind]}; return y * 1",
        relu=nn.ReLU(inplace=True),
        flatten=nn.Flatten(0),
        dropout=nn.Dropout(0.5),
        identity=nn.Identity(),
    )


# Names of modules that would do harm if they were pasted into source.
LIKE_CODE = ['a", print("executed") or "b', 'a"b', "a'b", "a\nb", "a\\b", "class", "ﬁ"]


def with_member(name: str) -> nn.Module:
    """It calls a module of this name, and adds 1."""
    model = net(lambda self, x: self._modules[name](x) + 1)
    model.add_module(name, linear())
    return model


# --- torchvision's zoo ---

# The 14 models that torchvision cannot trace: the exception and a part of its message.
UNTRACEABLE = {
    **dict.fromkeys(
        [
            "fasterrcnn_mobilenet_v3_large_320_fpn",
            "fasterrcnn_mobilenet_v3_large_fpn",
            "fasterrcnn_resnet50_fpn",
            "fasterrcnn_resnet50_fpn_v2",
            "fcos_resnet50_fpn",
            "keypointrcnn_resnet50_fpn",
            "maskrcnn_resnet50_fpn",
            "maskrcnn_resnet50_fpn_v2",
            "retinanet_resnet50_fpn",
            "retinanet_resnet50_fpn_v2",
            "ssd300_vgg16",
            "ssdlite320_mobilenet_v3_large",
        ],
        (fx.proxy.TraceError, "Proxy object cannot be iterated"),
    ),
    **dict.fromkeys(
        ["raft_large", "raft_small"],
        (fx.proxy.TraceError, "symbolically traced variables cannot be used as inputs to control flow"),
    ),
}


def zoo_names() -> list[str]:
    """All models of torchvision."""
    from torchvision.models import list_models

    return sorted(list_models())


def traceable() -> list[str]:
    """Those that torch.fx can trace."""
    return [name for name in zoo_names() if name not in UNTRACEABLE]


def in_zoo(names: Iterable[str]) -> list[str]:
    """Those that the torchvision that runs has; `test_the_zoo_is_whole` says which may be missing."""
    return sorted(set(names) & set(zoo_names()))


def collected(listing: Callable[..., list[str]], *arguments: Any) -> list[str]:
    """What a listing gives, for a test; where torchvision is absent one stand-in, which `build` skips."""
    try:
        return listing(*arguments)
    except ImportError:
        return ["torchvision is absent"]


def build(name: str) -> nn.Module:
    """A model of torchvision's zoo with random weights."""
    pytest.importorskip("torchvision")
    from torchvision.models import get_model, get_model_builder

    parameters = inspect.signature(get_model_builder(name)).parameters
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in parameters:
        options["weights_backbone"] = None
    if name.endswith(("googlenet", "inception_v3")):
        options["init_weights"] = False
    with pytest.MonkeyPatch.context() as patch:
        for method in ("normal_", "uniform_", "erfinv_"):
            patch.setattr(torch.Tensor, method, repeating(getattr(torch.Tensor, method)))
        return get_model(name, **options)


def repeating(fill: Callable[..., torch.Tensor], size: int = 65_521) -> Callable[..., torch.Tensor]:
    """What draws a few numbers and repeats them: to draw all of a large model takes longer than to run it."""

    def filled(tensor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if tensor.numel() > size and tensor.is_contiguous():
            flat = tensor.view(-1)
            few = fill(flat[:size], *arguments, **options)
            for part in flat[size:].split(size):
                part.copy_(few[: len(part)])
            return tensor
        return fill(tensor, *arguments, **options)

    return filled


def build_with_input(name: str) -> tuple[nn.Module, torch.Tensor]:
    """The same, and an input for it; of MViT those for 64 x 64, ten times as quick as 224 x 224."""
    x = zoo_input(name)
    if not name.startswith("mvit"):
        return build(name), x
    mvit = pytest.importorskip("torchvision.models.video.mvit")
    made = mvit.MViT
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mvit, "MViT", lambda **options: made(**{**options, "spatial_size": (64, 64)}))
        return build(name), x[..., :64, :64]


def build_on_meta(name: str) -> nn.Module:
    """A model whose weights have no values, which is fast."""
    with WeightsOnMeta():
        return build(name)


class WeightsOnMeta(TorchFunctionMode):
    """The meta device for what modules make their weights of; the RegNets read the values of other tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func in (torch.empty, torch.ones, torch.zeros)
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if made else {})})


# One model of each family of torchvision.models, the smallest.
FAMILIES = [
    "alexnet",
    "convnext_tiny",
    "deeplabv3_mobilenet_v3_large",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "fcn_resnet50",
    "googlenet",
    "inception_v3",
    "lraspp_mobilenet_v3_large",
    "maxvit_t",
    "mc3_18",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mvit_v2_s",
    "quantized_mobilenet_v2",
    "quantized_resnet18",
    "quantized_shufflenet_v2_x0_5",
    "r3d_18",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "resnet18",
    "resnext50_32x4d",
    "s3d",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin3d_t",
    "swin_t",
    "swin_v2_t",
    "vgg11_bn",
    "vit_b_32",
    "wide_resnet50_2",
]


def zoo_input(name: str) -> torch.Tensor:
    """A small input that a model of the zoo accepts, two of a batch where batch norm needs them."""
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.rand, generator=generator)
    if name.startswith("mvit"):
        return draw(1, 3, 16, 224, 224)
    if name == "s3d":
        return draw(1, 3, 16, 224, 224)
    if name.startswith(("r3d", "mc3", "r2plus1d", "swin3d")):
        return draw(2, 3, 4, 64, 64)
    sizes = {"vit": 224, "maxvit": 224, "inception": 299, "quantized_inception": 299, "alexnet": 96}
    size = next((size for start, size in sizes.items() if name.startswith(start)), 64)
    return draw(2, 3, size, size)
