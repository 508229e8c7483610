"""open_clip's image towers → HF carriers.

open_clip has many kinds of image towers. Those that are a plain ViT, its own or timm's, are brought into one form (`PlainViT`),
and that form decides the carrier: `CLIPVisionModel` where a LayerNorm stands before the blocks, `ViTModel` where none does, and
`SiglipVisionModel` where there is no class token either. The carrier's features are then compared with open_clip's own.
"""

import difflib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import open_clip
import torch
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    PretrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    ViTConfig,
)
from transformers.activations import ACT2FN

from clips_core.errors import InputError
from clips_core.folders import sha256_file
from llava_bridge.towers.carriers import MODEL_TYPES, Carrier, build_model, one_line, square

# The first of these that a folder has is what open_clip reads too.
WEIGHTS = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
)  # fmt: skip
CONFIG = "open_clip_config.json"
ACTIVATIONS = ("gelu", "quick_gelu", "gelu_pytorch_tanh")
RESAMPLE = {"bilinear": 2, "bicubic": 3}
TOLERANCE = 1e-4  # of the features' largest value, between open_clip's and the carrier's, both in fp32


@dataclass(frozen=True)
class PlainViT:
    """What a pre-norm ViT consists of. A layer is the pair of its weight and its bias."""

    image_size: int
    patch_size: int
    heads: int
    activation: str  # in transformers' names
    eps: float
    patches: tuple[Tensor, Tensor | None]  # [D, 3, P, P], [D]
    class_token: Tensor | None  # [D]
    positions: Tensor  # [T, D], class token's first
    before: nn.LayerNorm | None
    blocks: list[dict[str, tuple[Tensor, Tensor]]]  # ln_1, query, key, value, out, ln_2, fc_1, fc_2
    after: tuple[Tensor, Tensor]


def folder_carrier(folder: Path, image_size: int | None) -> Carrier:
    """A folder in open_clip's `local-dir:` layout as a carrier, at another resolution as open_clip itself resizes it."""
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} has no {CONFIG}")
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise InputError(f"{folder} has none of {', '.join(WEIGHTS)}")
    return _carrier(f"local-dir:{folder}", None, weights, image_size)


def pretrained_carrier(arch: str, tag: str, image_size: int | None) -> Carrier:
    """A model of open_clip's own list, by architecture and name of its pretrained weights, as a carrier."""
    if arch not in open_clip.list_models():
        nearest = difflib.get_close_matches(arch, open_clip.list_models(), n=3)
        raise InputError(
            f"open_clip {open_clip.__version__} has no architecture {arch!r} (nearest: {', '.join(nearest) or 'none'})"
        )
    known = open_clip.get_pretrained_cfg(arch, tag)
    if not known:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(arch)) or "none"
        raise InputError(f"open_clip {open_clip.__version__} has no weights {tag!r} for {arch} (it has: {tags})")
    check_quick_gelu(arch, tag)
    try:
        weights = Path(open_clip.download_pretrained(known))
    except Exception as error:  # whatever its ways of downloading raise
        raise InputError(f"the weights {tag!r} of {arch} cannot be fetched ({one_line(error)[:300]})") from None
    return _carrier(arch, tag, weights, image_size)


def check_quick_gelu(arch: str, tag: str) -> None:
    """Refuse weights that were trained with another activation than the architecture's, of which open_clip itself only warns."""
    config, known = open_clip.get_model_config(arch), open_clip.get_pretrained_cfg(arch, tag)
    if not config or not known:
        return  # no such model: opening it says so
    quick = bool(config.get("quick_gelu"))
    if quick != bool(known.get("quick_gelu")):
        other = arch.removesuffix("-quickgelu") if quick else f"{arch}-quickgelu"
        raise InputError(
            f"the weights {tag!r} were trained {'without' if quick else 'with'} QuickGELU, and {arch} computes "
            f"{'with' if quick else 'without'} it; write open_clip:{other}/{tag}"
        )


def _carrier(model: str, tag: str | None, weights: Path, image_size: int | None) -> Carrier:
    size = {} if image_size is None else {"force_image_size": image_size}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            visual = open_clip.create_model(
                model, tag, require_pretrained=True, weights_only=True, **size
            ).visual.eval()
    except Exception as error:  # open_clip, timm and torch raise nearly anything on configs and weights that do not fit
        raise InputError(f"{weights}: open_clip cannot load it ({one_line(error)[:300]})") from None
    vit = plain_vit(visual)
    if image_size is not None and image_size % vit.patch_size:
        raise InputError(f"image_size {image_size} is not a multiple of the patch size {vit.patch_size}")
    config, state = to_hf(vit)
    carrier = build_model(config, state, weights)
    _compare(visual, carrier, vit, weights)
    return Carrier(
        weights.parent, carrier, image_processor(visual.preprocess_cfg, vit.image_size), sha256_file(weights)
    )


# ----------------------------------------------------------------------------------------------------- open_clip, timm


def plain_vit(visual: nn.Module) -> PlainViT:
    """The parts of an open_clip image tower, its own ViT or timm's.

    Raises:
        InputError: naming what it has that no HF carrier has.
    """
    from timm.models.vision_transformer import VisionTransformer as TimmViT

    if isinstance(visual, open_clip.transformer.VisionTransformer):
        return _own_vit(visual)
    trunk = getattr(visual, "trunk", None)
    if type(trunk) is TimmViT:
        return _timm_vit(trunk)
    kind = type(visual if trunk is None else trunk)
    raise InputError(f"a {kind.__module__}.{kind.__name__} is no plain ViT, and no HF vision model computes the same")


def _own_vit(visual: Any) -> PlainViT:
    blocks = visual.transformer.resblocks
    for block in blocks:
        if type(block) is not open_clip.transformer.ResidualAttentionBlock:
            _refuse(f"blocks of kind {type(block).__name__}")
        if not isinstance(block.ls_1, nn.Identity):
            _refuse("LayerScale")
    norm = visual.ln_post
    width = visual.conv1.out_channels
    return PlainViT(
        image_size=square(visual.image_size, "image_size"),
        patch_size=square(visual.patch_size, "patch_size"),
        heads=blocks[0].attn.num_heads,
        activation=_activation(blocks[0].mlp.gelu),
        eps=norm.eps,
        patches=(visual.conv1.weight, visual.conv1.bias),
        class_token=visual.class_embedding,
        positions=visual.positional_embedding,
        before=None if isinstance(visual.ln_pre, nn.Identity) else visual.ln_pre,
        blocks=[
            {
                "ln_1": _pair(block.ln_1), "ln_2": _pair(block.ln_2), "out": _pair(block.attn.out_proj),
                "fc_1": _pair(block.mlp.c_fc), "fc_2": _pair(block.mlp.c_proj),
                **_split(block.attn.in_proj_weight, block.attn.in_proj_bias),
            }
            for block in blocks
        ],
        # CoCa's stands after attentional pooling, at another width. Patch features come before it: then it does nothing here.
        after=_pair(norm) if norm.weight.numel() == width else (torch.ones(width), torch.zeros(width)),
    )  # fmt: skip


def _timm_vit(trunk: Any) -> PlainViT:
    from timm.layers import PatchEmbed
    from timm.models.vision_transformer import Attention, Block, Mlp

    first = trunk.blocks[0]
    for name, found in {
        "a patch embedding that is no plain convolution": type(trunk.patch_embed) is not PatchEmbed
        or not isinstance(trunk.patch_embed.norm, nn.Identity),
        "register tokens": trunk.num_reg_tokens > 0,
        "no learned positions": trunk.pos_embed is None,
        "positions for patches only beside a class token": trunk.no_embed_class and trunk.has_class_token,
        "blocks of another kind": any(type(block) is not Block for block in trunk.blocks),
        "attention or MLP of another kind": type(first.attn) is not Attention or type(first.mlp) is not Mlp,
    }.items():
        if found:
            _refuse(name)
    for name, module in {
        "LayerScale": first.ls1,
        "a norm of queries and keys": first.attn.q_norm,
        "a norm in its attention": first.attn.norm,
        "a norm in its MLP": first.mlp.norm,
    }.items():
        if not isinstance(module, nn.Identity):
            _refuse(name)
    if first.attn.qkv.bias is None:
        _refuse("attention without bias")
    norm = trunk.norm if not isinstance(trunk.norm, nn.Identity) else trunk.fc_norm
    width = trunk.embed_dim
    return PlainViT(
        image_size=square(trunk.patch_embed.img_size, "image_size"),
        patch_size=square(trunk.patch_embed.patch_size, "patch_size"),
        heads=first.attn.num_heads,
        activation=_activation(first.mlp.act),
        eps=first.norm1.eps,
        patches=(trunk.patch_embed.proj.weight, trunk.patch_embed.proj.bias),
        class_token=trunk.cls_token.flatten() if trunk.has_class_token else None,
        positions=trunk.pos_embed[0],
        before=None if isinstance(trunk.norm_pre, nn.Identity) else trunk.norm_pre,
        blocks=[
            {
                "ln_1": _pair(block.norm1), "ln_2": _pair(block.norm2), "out": _pair(block.attn.proj),
                "fc_1": _pair(block.mlp.fc1), "fc_2": _pair(block.mlp.fc2),
                **_split(block.attn.qkv.weight, block.attn.qkv.bias),
            }
            for block in trunk.blocks
        ],
        after=(torch.ones(width), torch.zeros(width)) if isinstance(norm, nn.Identity) else _pair(norm),
    )  # fmt: skip


def _pair(layer: Any) -> tuple[Tensor, Tensor]:
    if layer.bias is None:
        _refuse(f"a {type(layer).__name__} without bias")
    return layer.weight, layer.bias


def _split(weight: Tensor, bias: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    parts = zip(("query", "key", "value"), weight.chunk(3), bias.chunk(3), strict=True)
    return {name: (w, b) for name, w, b in parts}


def _activation(module: nn.Module) -> str:
    """transformers' name for an activation, found by what it computes, whatever class it is of."""
    x = torch.linspace(-6, 6, 241)
    for name in ACTIVATIONS:
        if torch.allclose(module(x.clone()), ACT2FN[name](x), rtol=0, atol=1e-6):
            return name
    _refuse(f"the activation {type(module).__name__}")


def _refuse(what: str) -> NoReturn:
    raise InputError(f"it has {what}, and no HF vision model that takes its other parts has that")


# --------------------------------------------------------------------------------------------------------- carriers

_CLIP_NAMES = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "query": "self_attn.q_proj", "key": "self_attn.k_proj",
    "value": "self_attn.v_proj", "out": "self_attn.out_proj", "fc_1": "mlp.fc1", "fc_2": "mlp.fc2",
}  # fmt: skip
_VIT_NAMES = {
    "ln_1": "layernorm_before", "ln_2": "layernorm_after", "query": "attention.attention.query",
    "key": "attention.attention.key", "value": "attention.attention.value", "out": "attention.output.dense",
    "fc_1": "intermediate.dense", "fc_2": "output.dense",
}  # fmt: skip


def to_hf(vit: PlainViT) -> tuple[PretrainedConfig, dict[str, Tensor]]:
    """The carrier's config, and the weights under the names that they have on disk (stable from version to version)."""
    width = vit.positions.shape[1]
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": vit.heads,
        "intermediate_size": len(vit.blocks[0]["fc_1"][0]),
        "hidden_act": vit.activation,
        "layer_norm_eps": vit.eps,
        "image_size": vit.image_size,
        "patch_size": vit.patch_size,
    }
    kernel, bias = vit.patches
    state: dict[str, Tensor] = {}

    def add(name: str, pair: tuple[Tensor, Tensor]) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = pair

    def add_blocks(prefix: str, names: dict[str, str]) -> None:
        for layer, block in enumerate(vit.blocks):
            for part, name in names.items():
                add(f"{prefix}.{layer}.{name}", block[part])

    config: PretrainedConfig
    if vit.before is None and vit.class_token is not None:
        config = ViTConfig(**sizes, qkv_bias=True)
        state["embeddings.cls_token"] = vit.class_token.reshape(1, 1, width)
        state["embeddings.position_embeddings"] = vit.positions[None]
        add("embeddings.patch_embeddings.projection", (kernel, torch.zeros(width) if bias is None else bias))
        add_blocks("encoder.layer", _VIT_NAMES)
        add("layernorm", vit.after)
    elif vit.before is None:
        # The pooling head, which timm builds otherwise, comes after all patch features.
        config = SiglipVisionConfig(**sizes, vision_use_head=False)
        state["vision_model.embeddings.position_embedding.weight"] = vit.positions
        add("vision_model.embeddings.patch_embedding", (kernel, torch.zeros(width) if bias is None else bias))
        add_blocks("vision_model.encoder.layers", _CLIP_NAMES)
        add("vision_model.post_layernorm", vit.after)
    elif vit.class_token is not None and bias is None:
        config = CLIPVisionConfig(**sizes)
        state["vision_model.embeddings.class_embedding"] = vit.class_token
        state["vision_model.embeddings.position_embedding.weight"] = vit.positions
        state["vision_model.embeddings.patch_embedding.weight"] = kernel
        add("vision_model.pre_layrnorm", _pair(vit.before))
        add_blocks("vision_model.encoder.layers", _CLIP_NAMES)
        add("vision_model.post_layernorm", vit.after)
    else:
        raise InputError(
            "it has a LayerNorm before the blocks and "
            f"{'no class token' if vit.class_token is None else 'a bias of its patches'}; CLIPVisionModel, the only HF vision "
            "model with such a LayerNorm, has it the other way"
        )
    return config, {name: value.detach().clone() for name, value in state.items()}


def image_processor(preprocess: dict[str, Any], image_size: int) -> CLIPImageProcessorPil:
    """HF's image processor for open_clip's `preprocess_cfg`.

    Raises:
        InputError: for a way of resizing that no stock processor has.
    """
    mode, interpolation = preprocess["resize_mode"], preprocess["interpolation"]
    if interpolation not in RESAMPLE:
        raise InputError(f"its preprocess_cfg has interpolation {interpolation!r}; known are {', '.join(RESAMPLE)}")
    if mode not in ("squash", "shortest"):
        raise InputError(
            f"its preprocess_cfg has resize_mode {mode!r}, which pads, and no stock image processor of transformers pads like "
            "that; known are squash, shortest"
        )
    crop = {"height": image_size, "width": image_size}
    return CLIPImageProcessorPil(
        size=crop if mode == "squash" else {"shortest_edge": image_size},
        do_center_crop=mode == "shortest",
        crop_size=crop,
        resample=RESAMPLE[interpolation],
        image_mean=list(preprocess["mean"]),
        image_std=list(preprocess["std"]),
    )


@torch.no_grad()
def _compare(visual: Any, carrier: PreTrainedModel, vit: PlainViT, weights: Path) -> None:
    """The last guard: open_clip's last block and the carrier's, on one random picture."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, vit.image_size, vit.image_size, generator=generator)
    expected = visual.forward_intermediates(pixels, indices=1, intermediates_only=True, output_fmt="NLC")
    expected = expected["image_intermediates"][-1]
    found = carrier(pixels, output_hidden_states=True).hidden_states[-1][
        :, MODEL_TYPES[carrier.config.model_type].class_token :
    ]
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if not difference < TOLERANCE:
        raise InputError(
            f"{weights}: {type(carrier).__name__} gives features that differ from open_clip's by {difference:.1e}"
        )
