"""Models of five libraries, built without weights and as small as they go, and inputs that they take.

``candidates(library, name)`` gives pairs of a model and a function that makes its arguments, the best first; the caller
takes the first that runs. The libraries are imported where they are needed, so that one that is absent is left out.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from typing import Any, Callable, Dict, Iterator, List, Tuple

import torch
from torch import nn

# Of a seed, a batch, and a step by which they are larger or longer, the arguments of a call: positional or by name.
Inputs = Callable[[int, int, int], Any]
Candidates = Iterator[Tuple[nn.Module, Inputs]]


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(size: int, *frames: int) -> Inputs:
    def make(seed: int, batch: int, more: int) -> Any:
        side = size + 32 * more
        return (normal(seed, batch, 3, *frames, side, side),)

    return make


# ------------------------------------------------------------------------------------- torchvision


def torchvision_names() -> List[str]:
    from torchvision.models import list_models

    return list_models()


def torchvision_candidates(name: str) -> Candidates:
    from torchvision import models

    options: Dict[str, Any] = {"weights": None}
    group = models.get_model_builder(name).__module__.split(".")[2]
    if group in ("segmentation", "detection"):
        options["weights_backbone"] = None
    if group == "detection" and not name.startswith("ssd"):  # the others scale images up to 800 pixels
        options.update(min_size=128, max_size=192)
    if "rcnn" in name:  # without training all scores are low
        options.update(box_score_thresh=0.0, rpn_post_nms_top_n_test=40, box_detections_per_img=10)
    elif group == "detection":
        options.update(score_thresh=0.0, topk_candidates=40)
    if name.endswith(("googlenet", "inception_v3")):
        options["init_weights"] = False
    model = models.get_model(name, **options)
    if group == "detection":
        yield model, lambda seed, batch, more: ([normal(seed + i, 3, 96 + 32 * more, 128) for i in range(batch)],)
    elif group == "optical_flow":
        yield model, lambda seed, batch, more: tuple(images(128)(seed + i, batch, more)[0] for i in range(2))
    elif group == "video":
        yield model, images(64, 8)
        yield model, images(224, 16)
    else:
        for size in (64, 128, 224):
            yield model, images(size)


# -------------------------------------------------------------------------------------------- timm

# A small model of each module of timm.models.
TIMM = """
    beit_base_patch16_224 eca_botnext26ts_256 test_byobnet cait_xxs24_224 coat_lite_tiny convit_tiny
    convmixer_1024_20_ks9_p14 test_convnext3 cpubone_nano crossvit_9_240 csatv2 cs3darknet_focus_s cspnext_tiny
    davit_tiny deepseek_vit_412m deit_tiny_patch16_224 densenet121 dla46_c dpn48b edgenext_xx_small
    efficientformer_l1 efficientformerv2_s0 test_efficientnet_evos efficientvim_m1 efficientvit_b0 efficientvit_m1
    vit_tiny_patch16_dinov3_qkvb fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m_enc
    ghostnet_050 hardcorenas_a hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small iformer_t
    inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s lowformer_e1
    test_mambaout test_coatnet poolformer_s12 resmlp_12_224 mobilenetv3_small_050 mobilenetv5_base mobilevitv2_050
    mvitv2_tiny naflexvit_base_patch16_siglip nasnetalarge nest_tiny nextvit_small test_nfnet pit_ti_224
    pnasnet5large pvt_v2_b0 qwen3_vit_416m rdnet_tiny regnety_008_tv repghostnet_050 repvit_m0_9 res2net50_26w_4s
    resnest26d test_resnet resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18
    starnet_s2 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window16_256 swinv2_cr_tiny_224
    tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_pcpvt_small vgg11 visformer_tiny test_vit
    vit_tiny_r_s16_p8_224 test_vit_relpos samvit_base_patch16_224 vitamin_small_224 volo_d1_224 ese_vovnet19b_slim
    legacy_xception xception41p xcit_nano_12_p8_224
""".split()


def timm_names() -> List[str]:
    import timm

    assert len(TIMM) == len(timm.list_modules()), "timm has other modules than it had"
    return TIMM


def timm_candidates(name: str) -> Candidates:
    import timm

    is_large = re.search(r"_vit_\d+m$", name)
    model = timm.create_model(name, **({"depth": 2} if is_large else {}))
    for size in (64, 96, 128, 224, model.default_cfg["input_size"][-1]):
        yield model, images(size)


# --------------------------------------------------------------------- segmentation_models_pytorch


def segmentation_names() -> List[str]:
    from segmentation_models_pytorch import MODEL_ARCHITECTURES_MAPPING

    return list(MODEL_ARCHITECTURES_MAPPING)


def segmentation_candidates(name: str) -> Candidates:
    from segmentation_models_pytorch import create_model

    encoder = "tu-vit_tiny_patch16_224" if name == "dpt" else "resnet18"
    model = create_model(name, encoder, encoder_weights=None)
    yield model, images(64)
    yield model, images(224)


# -------------------------------------------------------------------------------------- torchaudio


def torchaudio_names() -> List[str]:
    from torchaudio import models

    found = {name: getattr(models, name) for name in models.__all__}
    return [name for name, item in found.items() if inspect.isclass(item) and issubclass(item, nn.Module)]


def torchaudio_candidates(name: str) -> Candidates:
    from torchaudio import models

    def lengths(batch: int, longest: int) -> torch.Tensor:
        return torch.arange(longest, longest - batch, -1)

    def waves(seed: int, batch: int, more: int, *channels: int) -> Any:
        return (normal(seed, batch, *channels, 4000 + 640 * more),)

    def frames(seed: int, batch: int, more: int, ahead: int = 0) -> Any:
        longest = 24 + 4 * more
        return normal(seed, batch, longest + ahead, 80), lengths(batch, longest)

    def symbols(seed: int, batch: int, count: int) -> Any:
        return normal(seed, batch, count).mul(9).long().abs()

    def speech(seed: int, batch: int, more: int) -> Any:
        spoken = normal(seed, batch, 80, 12)
        return symbols(seed, batch, 6 + more), lengths(batch, 6 + more), spoken, lengths(batch, 12)

    def transcribed(seed: int, batch: int, more: int) -> Any:
        spoken, duration = frames(seed, batch, more, 4)
        return spoken, duration.int(), symbols(seed, batch, 6).int(), lengths(batch, 6).int()

    recipes: Dict[str, Callable[[], Tuple[nn.Module, Inputs]]] = {
        "Conformer": lambda: (models.Conformer(80, 4, 64, 2, 7), frames),
        "ConvTasNet": lambda: (models.ConvTasNet(2, 16, 32, 3, 16, 32, 2, 2), lambda *how: waves(*how, 1)),
        "DeepSpeech": lambda: (models.DeepSpeech(80, 32), lambda *how: (frames(*how)[0][:, None],)),
        "Emformer": lambda: (models.Emformer(80, 4, 64, 2, 4, right_context_length=4), lambda *how: frames(*how, 4)),
        "HDemucs": lambda: (models.hdemucs_low(["drums", "voice"]), lambda *how: (waves(*how, 2)[0].repeat(1, 1, 5),)),
        "HuBERTPretrainModel": lambda: (
            models.hubert_pretrain_base(),
            lambda seed, batch, more: (*waves(seed, batch, more), symbols(seed, batch, 12 + 2 * more)),
        ),
        "RNNT": lambda: (models.emformer_rnnt_base(32), transcribed),
        "RNNTBeamSearch": lambda: (
            models.RNNTBeamSearch(models.emformer_rnnt_base(32), 31),
            lambda seed, batch, more: (*transcribed(seed, 1, more)[:2], 3),
        ),
        "SquimObjective": lambda: (models.squim_objective_base(), waves),
        "SquimSubjective": lambda: (
            models.squim_subjective_base(),
            lambda seed, *how: waves(seed, *how) + waves(9, *how),
        ),
        "Tacotron2": lambda: (models.Tacotron2(n_mels=80), speech),
        "Wav2Letter": lambda: (models.Wav2Letter(), lambda *how: waves(*how, 1)),
        "Wav2Vec2Model": lambda: (models.wav2vec2_base(), waves),
        "WaveRNN": lambda: (
            models.WaveRNN([2, 2, 2], 16, 8, n_rnn=32, n_fc=32, n_freq=80),
            lambda seed, batch, more: (
                normal(seed, batch, 1, 8 * (8 + more)),
                normal(seed, batch, 1, 80, 12 + more),
            ),
        ),
    }
    yield recipes[name]()


# ------------------------------------------------------------------------------------ transformers


def transformers_names() -> List[str]:
    """The classes of MODEL_MAPPING, each with the configuration after which it is called, or the first that it has."""
    from transformers import modeling_utils  # noqa: F401  # once, and not in each process
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    kinds: Dict[str, str] = {}
    for kind, names in MODEL_MAPPING_NAMES.items():
        name = names if isinstance(names, str) else names[0]
        if name not in kinds or name.lower() == re.sub("[-_]", "", kind) + "model":
            kinds[name] = kind
    return [f"{name} {kind}" for name, kind in kinds.items()]


def transformers_candidates(name: str) -> Candidates:
    import transformers

    class_name, kind = name.split()
    model_class = getattr(transformers, class_name)
    for sizes, at_once in ((SIZES, True), (SIZES, False), (DEPTHS, True)):
        with contextlib.suppress(Exception):  # the next way may do
            config = small_config(kind, sizes, at_once)
            with torch.device("meta"):
                parameters = sum(item.numel() for item in model_class(config).parameters())
            if parameters < 150_000_000:
                model = model_class(small_config(kind, sizes, at_once))
                for inputs in transformers_inputs(model):
                    yield model, inputs


def at_most(limit: int) -> Callable[[int], int]:
    return functools.partial(min, limit)


def to(size: int) -> Callable[[int], int]:
    return lambda old: size


def token(new: int) -> Callable[[int], int]:
    return lambda old: old if old < 97 else new


# What the name of a number in a configuration ends with -> what it becomes. The first that matches counts.
Sizes = Dict[str, Callable[[int], int]]
DEPTHS: Sizes = {
    "vocab_size": lambda old: 100 if old > 100 else old,
    "image_token_(id|index)": token(97),
    "video_token_(id|index)": token(96),
    "audio_token_(id|index)": token(95),
    "id|index": token(94),
    "(hidden|encoder|decoder|block|vision|num|n|t2u|transformer|text)_(layers?|blocks)|layers|depth": at_most(2),
}
SIZES: Sizes = {
    **DEPTHS,
    "(key_value|kv|num_key)_heads": to(2),
    "heads?": to(4),
    "qk_head_dim": to(32),
    "head_dim|d_kv|kv_channels|lora_rank|rotary_dim": to(16),
    "experts_per_tok|moe_topk|moe_k|top_k_experts": at_most(2),
    "experts": at_most(4),
    "n_group|topk_group|num_expert_group": to(1),
    "(intermediate|ffn?|mlp|forward|feedforward)_(size|dim)|d_ff|dim_ff|dim_feedforward": to(64),
    "(hidden|model|project(ion|or)|embed(ding)?|emb)_(size|dim)|d_model|n_embe?d|width|(?<!_)dim": to(64),
    "(vision|text|audio|output|decoder)_dim|hidden_channels": to(64),
    "position_embeddings|n_positions|n_ctx|source_positions|target_positions|max_seq_len|image_size|input_size": to(64),
    "patch_size": lambda old: old if old <= 16 and 64 % old == 0 else 16,
    "num_queries": at_most(10),
    "codebook_size": at_most(64),
    "window_size": at_most(4),
}
# The same for lists of numbers: what each of them becomes, by its place.
LISTS: Sizes = {
    "depths|num_block|layers|depth|blocks_per_stage": to(1),
    "heads": to(2),
    "hidden_sizes|embed_dims?": lambda place: 32 * 2 ** min(place, 2),
    "conv_dim": to(32),
    "image_size": to(64),
}


def small_config(kind: str, sizes: Sizes, at_once: bool) -> Any:
    """A configuration with small numbers, made of them at once, or the default one with other numbers."""
    import transformers

    config = transformers.CONFIG_MAPPING[kind]()
    changes = shrunk(config, sizes)
    if at_once:
        return type(config)(**changes)
    assign(config, changes)
    return config


def shrunk(config: Any, sizes: Sizes) -> Dict[str, Any]:
    """Only what changes; parts of a configuration as dicts."""
    changes: Dict[str, Any] = {}
    for name, old in vars(config).items():
        new = old
        if hasattr(old, "model_type"):
            new = {**shrunk(old, sizes), "model_type": old.model_type}
        elif type(old) is int:
            new = resized(name, old, sizes)
        elif isinstance(old, (list, tuple)) and {*map(type, old)} == {int} and sizes is SIZES:
            places = range(len(old))
            resizes = [resized(name, place, LISTS) for place in places]
            new = old if resizes == [*places] else type(old)(resizes)
        elif isinstance(old, dict) and "mrope_section" in old:
            new = {**old, "mrope_section": [2, 3, 3], "partial_rotary_factor": 1.0}
        elif name == "use_cache":
            new = False
        elif name == "head_dim" and old is None and sizes is SIZES:
            new = 16
        elif name in ("width_coefficient", "depth_coefficient"):
            new = 1.0
        if new is not old:
            changes[name] = new
    if getattr(config, "num_key_value_heads", None) == getattr(config, "num_attention_heads", 0):
        changes.pop("num_key_value_heads", None)  # by itself it is the number of heads
    return changes


def resized(name: str, old: int, sizes: Sizes) -> int:
    for pattern, size in sizes.items():
        if re.search(f"(^|_)({pattern})$", name):
            return size(old)
    return old


def assign(config: Any, changes: Dict[str, Any]) -> None:
    for name, new in changes.items():
        old = getattr(config, name, None)
        if hasattr(old, "model_type"):
            assign(old, new)
        elif name != "model_type" and new != old:
            with contextlib.suppress(AttributeError):  # some are computed
                setattr(config, name, new)
    for name in ("layer_types", "mlp_layer_types"):  # by default there is one for each layer
        if isinstance(getattr(config, name, None), list):
            setattr(config, name, getattr(config, name)[: getattr(config, "num_hidden_layers", None)])


def transformers_inputs(model: nn.Module) -> Iterator[Inputs]:
    """All arguments that one of these makes and the forward takes; the fullest first."""
    takes = inspect.signature(type(model).forward).parameters
    config = model.config

    def number(names: str, default: int) -> int:
        for holder in (config, *filter(lambda item: hasattr(item, "model_type"), vars(config).values())):
            for name in names.split():
                found = getattr(holder, name, None)
                found = found[0] if isinstance(found, (list, tuple)) and found else found
                if type(found) is int:
                    return found
        return default

    channels = number("num_channels in_channels in_chans", 3)
    side = number("image_size input_size", 64)
    mels = number("num_mel_bins input_feat_per_channel feature_size mel_bins num_mels n_mels input_dim", 80)
    sources = number("max_source_positions", 32)
    width = number("hidden_size d_model", 64)

    def ids(seed: int, batch: int, more: int) -> torch.Tensor:
        return torch.randint(5, 90, (batch, 8 + 3 * more), generator=torch.Generator().manual_seed(seed))

    def boxes(seed: int, batch: int, more: int) -> torch.Tensor:
        corners = torch.randint(0, 40, (batch, 8 + 3 * more, 4), generator=torch.Generator().manual_seed(seed))
        return corners.sort(-1)[0]

    def picture(size: int, *frames: int) -> Inputs:
        return lambda seed, batch, more: normal(seed, batch, *frames, channels, size + 32 * more, size + 32 * more)

    def sound(*before: int, step: int = 0, after: Tuple[int, ...] = ()) -> Inputs:
        return lambda seed, batch, more: normal(seed, batch, *before[:-1], before[-1] + step * more, *after)

    def patches(seed: int, batch: int, more: int) -> torch.Tensor:
        size = channels * number("patch_size", 16) ** 2 * number("temporal_patch_size", 1)
        return normal(seed, 16 * batch, size)

    def mask(seed: int, batch: int, more: int) -> torch.Tensor:
        return torch.ones(batch, 2 * sources, dtype=torch.long)

    texts: Dict[str, Inputs] = {"input_ids": ids, "bbox": boxes}
    if getattr(config, "is_encoder_decoder", False):
        texts["decoder_input_ids"] = ids
    if "use_cache" in takes:
        texts["use_cache"] = lambda seed, batch, more: False
    clips = number("num_frames frames_per_clip", 8)
    others: Dict[str, List[Inputs]] = {
        "pixel_values": [*map(picture, (side, 64, 224)), picture(side, clips), picture(side, 2)],
        "pixel_values_videos": [picture(side, clips)],
        "input_values": [
            sound(4000, step=640),
            sound(1, 4000, step=640),
            sound(number("max_length", 64), after=(mels,)),
            sound(32, step=8, after=(mels,)),
        ],
        "input_features": [
            sound(mels, 2 * sources),
            sound(2 * sources, step=8, after=(mels,)),
            sound(1, 2 * sources, after=(mels,)),
            sound(1, 4000, step=640),
            sound(2 * sources, step=8, after=(width,)),
        ],
        "past_values": [sound(number("context_length", 32), after=(number("num_input_channels", 1),))],
        "hidden_states": [patches],
        "inputs": [sound(8, step=3, after=(number("d_model", 64),))],
    }
    others["audio_values"] = others["input_features"]
    grid: Dict[str, Inputs] = {"grid_thw": lambda seed, batch, more: torch.tensor([[1, 4, 4]] * batch)}

    masks: Dict[str, Inputs] = {"input_features_mask": mask, "padding_mask": mask}

    for name in (*(name for name in others if name in takes), ""):
        for other in others.get(name, [ids]):
            for rest in ({**texts, **grid}, masks, {}):
                parts = {key: part for key, part in {name: other, **rest}.items() if key in takes}
                if parts:
                    yield functools.partial(together, parts)


def together(parts: Dict[str, Inputs], seed: int, batch: int, more: int) -> Dict[str, Any]:
    return {name: part(seed + place, batch, more) for place, (name, part) in enumerate(parts.items())}
