"""Models of other libraries, cut with an example: output and features are those of eager execution, bit for bit.

Small, with weights from nowhere; `benchmarks/bench_reach.py` goes over many more.
"""

from __future__ import annotations

import copy
from typing import Any, Callable, Iterable, NamedTuple

import pytest
import torch
from torch import nn

from tests.helpers import exact, ignored_warnings, parametrize, recording, same, tensors
from tests.versions import needs

pytestmark = [
    # As in test_ecosystem.py: the libraries change with each release, and old ones are not looked at.
    needs("torch.distributed.fsdp.fully_shard", torch="2.6"),
    # Models that batch norm, or a want of targets, keeps from running in train mode.
    pytest.mark.filterwarnings("ignore:in train mode an extractor will raise an error:UserWarning"),
]


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    features: tuple[str, ...]
    inputs: Callable[[int], Any]  # the arguments of a call, positional or by name; made of a seed


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(size: int) -> Callable[[int], Any]:
    return lambda seed: (normal(seed, 1, 3, size, size),)


def ids(seed: int) -> dict[str, Any]:
    return {"input_ids": torch.randint(5, 90, (2, 8), generator=torch.Generator().manual_seed(seed))}


def library(name: str) -> Any:
    with ignored_warnings():
        return pytest.importorskip(name)


def timm(name: str, **options: Any) -> nn.Module:
    """A model of timm that computes attention in single steps."""
    model: nn.Module = library("timm").create_model(name, **options)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


def naflexvit() -> nn.Module:
    naflexvit = library("timm.models.naflexvit")
    return naflexvit.NaFlexVit(naflexvit.NaFlexVitCfg(embed_dim=64, depth=2, num_heads=4))


def segmentation(name: str) -> nn.Module:
    return library("segmentation_models_pytorch").create_model(name, "resnet18", encoder_weights=None)


def transformers(name: str, **options: Any) -> nn.Module:
    transformers = library("transformers")
    config = getattr(transformers, f"{name}Config")(hidden_size=64, num_hidden_layers=2, **options)
    return getattr(transformers, f"{name}Model")(config)


def language(name: str, **options: Any) -> nn.Module:
    sizes = {"num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 100}
    return transformers(name, **sizes, **options)


def torchaudio(name: str, *options: Any) -> nn.Module:
    return getattr(library("torchaudio.models"), name)(*options)


def torchvision(name: str, **options: Any) -> nn.Module:
    return library("torchvision.models").get_model(name, weights=None, **options)


def detector(name: str, **options: Any) -> nn.Module:
    return torchvision(name, weights_backbone=None, **options)


def yolo() -> nn.Module:
    return library("ultralytics.nn.tasks").DetectionModel("yolo11n.yaml", verbose=False)


# Without training all scores are low.
FEW_BOXES = {"min_size": 96, "max_size": 128, "box_score_thresh": 0.0, "rpn_post_nms_top_n_test": 20}
BLOCKS = ("layers.0", "layers.1.mlp", "norm")

CASES = {
    "naflexvit": Case(naflexvit, ("blocks.0.attn", "blocks.1", "norm"), images(64)),
    "eva02": Case(
        lambda: timm("eva02_tiny_patch14_224", depth=2, img_size=56),
        ("patch_embed", "blocks.0.attn", "blocks.1"),
        images(56),
    ),
    "vit_tiny": Case(
        lambda: timm("vit_tiny_patch16_224", depth=2, img_size=64),
        ("patch_embed", "blocks.0.attn", "blocks.1"),
        images(64),
    ),
    "mobilevit_s": Case(
        lambda: timm("mobilevit_s"),
        ("stages.1", "stages.2.1.transformer.0.attn", "stages.4.1"),
        images(64),
    ),
    "mvitv2_tiny": Case(
        lambda: timm("mvitv2_tiny", img_size=64),
        ("patch_embed", "stages.1.blocks.0", "norm"),
        images(64),
    ),
    "unetplusplus": Case(
        lambda: segmentation("unetplusplus"),
        ("encoder", "decoder.blocks.x_1_2", "segmentation_head"),
        images(64),
    ),
    "deeplabv3": Case(lambda: segmentation("deeplabv3"), ("encoder", "decoder", "segmentation_head"), images(64)),
    "ViTModel": Case(
        lambda: transformers("ViT", num_attention_heads=4, intermediate_size=64, image_size=64),
        ("embeddings", "layers.0", "layers.1.mlp"),
        images(64),
    ),
    "BertModel": Case(lambda: language("Bert"), ("embeddings", "encoder.layer.0", "pooler"), ids),
    "LlamaModel": Case(lambda: language("Llama", num_key_value_heads=2, use_cache=False), BLOCKS, ids),
    "Gemma2Model": Case(
        lambda: language("Gemma2", num_key_value_heads=2, head_dim=16, use_cache=False),
        BLOCKS,
        ids,
    ),
    "MambaModel": Case(
        lambda: transformers("Mamba", vocab_size=100, state_size=8, use_cache=False),
        ("layers.0.mixer", "layers.1", "norm_f"),
        ids,
    ),
    "ConvTasNet": Case(
        lambda: torchaudio("ConvTasNet", 2, 16, 32, 3, 16, 32, 2, 2),
        ("encoder", "mask_generator.conv_layers.1", "mask_generator"),
        lambda seed: (normal(seed, 2, 1, 800),),
    ),
    "Conformer": Case(
        lambda: torchaudio("Conformer", 80, 4, 64, 2, 7),
        ("conformer_layers.0.conv_module", "conformer_layers.0", "conformer_layers.1.ffn2"),
        lambda seed: (normal(seed, 2, 24, 80), torch.tensor([24, 20])),
    ),
    "yolo11n": Case(yolo, ("model.2", "model.10", "model.21"), images(64)),
    "raft_small": Case(
        lambda: torchvision("raft_small"),
        ("feature_encoder", "context_encoder.layer2", "update_block"),
        lambda seed: (normal(seed, 1, 3, 128, 128), normal(seed + 10, 1, 3, 128, 128), 2),
    ),
    "fasterrcnn": Case(
        lambda: detector("fasterrcnn_mobilenet_v3_large_320_fpn", **FEW_BOXES),
        ("backbone.body.5", "backbone.fpn", "roi_heads.box_roi_pool"),
        lambda seed: ([normal(seed, 3, 64, 64)],),
    ),
    "ssdlite320": Case(
        lambda: detector("ssdlite320_mobilenet_v3_large"),
        ("backbone.features.0.5", "backbone", "head"),
        lambda seed: ([normal(seed, 3, 64, 64)],),
    ),
}
# What a detector returns depends on how many boxes it finds.
DETECTORS = ["fasterrcnn", "ssdlite320"]
MASKED = ["BertModel", "LlamaModel", "Gemma2Model", "MambaModel"]


def call(module: nn.Module, arguments: Any) -> Any:
    arguments = copy.deepcopy(arguments)
    with torch.no_grad():
        return module(**arguments) if isinstance(arguments, dict) else module(*arguments)


def eager(model: nn.Module, features: Iterable[str], arguments: Any) -> dict[str, Any]:
    """What modules return at their first call, and of what the model returns the tensors."""
    with recording(model) as calls:
        call(model, arguments)
    seen = dict(reversed(calls))
    output = [*tensors(call(model, arguments))]
    assert output
    return {**{path: seen[path] for path in features}, "output": output}


def cut(model: nn.Module, features: Iterable[str], example: Any) -> nn.Module:
    """An extractor that gives on its own example what the model gives."""
    extractor: nn.Module = exact(model, [*features, "output"], example_inputs=example)
    assert same(values(extractor, example), eager(model, features, example))
    return extractor


def values(extractor: nn.Module, arguments: Any) -> dict[str, Any]:
    """The features, and of the output the tensors."""
    found = call(extractor, arguments)
    output = [*tensors(found.pop("output"))]
    return {**found, "output": output}


def is_right(extractor: nn.Module, model: nn.Module, features: Iterable[str], arguments: Any) -> bool:
    """Whether the values are eager's; else the extractor has to refuse the arguments."""
    expected = eager(model, features, arguments)
    try:
        actual = values(extractor, arguments)
    except AssertionError as error:
        assert "forward went one way" in str(error)  # noqa: PT017
        return False
    assert same(actual, expected)
    return True


@parametrize("name", CASES)
def test_on_the_example_and_on_other_values(name: str) -> None:
    build, features, inputs = CASES[name]
    model = build().eval()
    extractor = cut(model, features, inputs(0))
    assert not same(eager(model, features, inputs(0)), eager(model, features, inputs(1)))
    assert is_right(extractor, model, features, inputs(1)) or name in DETECTORS


@parametrize("example", ["ones", "padded"])
@parametrize("name", MASKED)
def test_with_a_mask_of_ones_and_with_padding(name: str, example: str) -> None:
    """Where all is attended to, some models leave the mask out: they may not do so when it is another one."""
    build, features, inputs = CASES[name]
    model = build().eval()
    masks = {"ones": torch.ones(2, 8, dtype=torch.long), "padded": torch.ones(2, 8, dtype=torch.long)}
    masks["padded"][1, :3] = 0
    extractor = cut(model, features, {**inputs(0), "attention_mask": masks[example]})
    assert is_right(extractor, model, features, {**inputs(1), "attention_mask": masks[example]})
    for mask in masks.values():
        is_right(extractor, model, features, {**inputs(0), "attention_mask": mask})
