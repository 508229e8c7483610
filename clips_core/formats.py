"""CLIPS in other people's layouts: the authors' JAX parameters, an open_clip folder, an HF vision tower folder."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from clips_core.config import ModelConfig, TransformerConfig
from clips_core.errors import InputError
from clips_core.model import CLIPS, NORM_EPS, open_clip_config
from clips_core.tokenizer import ClipsTokenizer

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# ---------------------------------------------------------------------------------------------------------------------
# The authors' JAX parameters
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JaxRule:
    """Where one JAX parameter lives in ours: `ours[name][rows] = jax.reshape(canonical).permute(order)`."""

    jax: str
    name: str
    order: tuple[int, ...]  # of the canonical JAX axes
    part: tuple[int, int] = (0, 1)  # (i, n): the i-th of n equal parts along our first axis


def jax_rules(config: ModelConfig) -> list[JaxRule]:
    """The correspondence of every parameter, in the names of the authors' big_vision-style trees."""
    kernel, vector, same = (1, 0), (0,), (0, 1)
    rules = [
        JaxRule("img/embedding/kernel", "visual.conv1.weight", (3, 2, 0, 1)),  # HWIO → OIHW
        JaxRule("img/cls", "visual.class_embedding", vector),
        JaxRule("img/encoder_norm/scale", "visual.ln_post.weight", vector),
        JaxRule("img/encoder_norm/bias", "visual.ln_post.bias", vector),
        JaxRule("img/head/kernel", "visual.proj", same),
        JaxRule("txt/Embed_0/embedding", "text.token_embedding.weight", same),
        JaxRule("txt/pos_embedding", "text.positional_embedding", same),
        JaxRule("txt/encoder_norm/scale", "text.ln_final.weight", vector),
        JaxRule("txt/encoder_norm/bias", "text.ln_final.bias", vector),
        JaxRule("txt/head/kernel", "text.text_projection", same),
        JaxRule("t", "logit_scale", ()),
    ]
    towers = [
        ("img", "visual.transformer.resblocks", config.vision),
        ("txt", "text.transformer.resblocks", config.text),
    ]
    if config.decoder is not None:
        towers.append(("txt_decoder", "decoder.blocks", config.decoder))
        rules += [
            JaxRule("txt_decoder/learnable_tokens", "decoder.learnable_tokens", same),
            JaxRule("txt_decoder/image_projection_layer/kernel", "decoder.image_proj.weight", kernel),
            JaxRule("txt_decoder/text_projection_layer/kernel", "decoder.text_proj.weight", kernel),
            JaxRule("txt_decoder/decoder_norm/scale", "decoder.ln_final.weight", vector),
            JaxRule("txt_decoder/decoder_norm/bias", "decoder.ln_final.bias", vector),
            JaxRule("txt_decoder/head/kernel", "decoder.head.weight", kernel),
        ]
    for jax_tower, blocks, transformer in towers:
        if jax_tower == "txt_decoder":
            in_weight, in_bias, out, first, second = "in_proj.weight", "in_proj.bias", "out_proj", "mlp.0", "mlp.2"
        else:
            in_weight, in_bias, out = "attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj"
            first, second = "mlp.c_fc", "mlp.c_proj"
        for layer in range(transformer.layers):
            jax, name = f"{jax_tower}/Transformer/encoderblock_{layer}", f"{blocks}.{layer}"
            attention = f"{jax}/MultiHeadDotProductAttention_0"
            for i, projection in enumerate(("query", "key", "value")):
                rules.append(JaxRule(f"{attention}/{projection}/kernel", f"{name}.{in_weight}", kernel, (i, 3)))
                rules.append(JaxRule(f"{attention}/{projection}/bias", f"{name}.{in_bias}", vector, (i, 3)))
            for jax_linear, linear in (
                (f"{attention}/out", out), (f"{jax}/MlpBlock_0/Dense_0", first), (f"{jax}/MlpBlock_0/Dense_1", second)
            ):  # fmt: skip
                rules.append(JaxRule(f"{jax_linear}/kernel", f"{name}.{linear}.weight", kernel))
                rules.append(JaxRule(f"{jax_linear}/bias", f"{name}.{linear}.bias", vector))
            for jax_norm, norm in (("LayerNorm_0", "ln_1"), ("LayerNorm_1", "ln_2")):
                rules.append(JaxRule(f"{jax}/{jax_norm}/scale", f"{name}.{norm}.weight", vector))
                rules.append(JaxRule(f"{jax}/{jax_norm}/bias", f"{name}.{norm}.bias", vector))
    return rules


def jax_config(
    parameters: Mapping[str, np.ndarray], image_size: int, heads: Mapping[str, int] | None = None
) -> ModelConfig:
    """The sizes of a model from the shapes of its JAX parameters.

    Args:
        parameters: arrays by JAX name (`img/…`, `txt/…`, `txt_decoder/…`, `t`).
        image_size: pixels; the fixed position embeddings leave no trace of it.
        heads: attention heads of `img`, `txt`, `dec`; needed where the attention kernels are two-dimensional, since only
            three-dimensional ones ([in, heads, head width]) show them.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in parameters:
            raise InputError(f"JAX parameters: {name!r} is missing")
        return tuple(parameters[name].shape)

    def transformer(tower: str, short: str) -> TransformerConfig:
        query = shape(f"{tower}/Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel")
        layers = {name.split("/")[2] for name in parameters if name.startswith(f"{tower}/Transformer/encoderblock_")}
        if len(query) == 3:
            count = query[1]
        elif heads is not None and short in heads:
            count = heads[short]
        else:
            raise InputError(
                f"JAX parameters: {tower}'s attention kernels are two-dimensional: give its number of heads"
            )
        return TransformerConfig(width=query[0], layers=len(layers), heads=count)

    has_decoder = any(name.startswith("txt_decoder/") for name in parameters)
    return ModelConfig(
        image_size=image_size,
        patch_size=shape("img/embedding/kernel")[0],
        vision=transformer("img", "img"),
        text=transformer("txt", "txt"),
        decoder=transformer("txt_decoder", "dec") if has_decoder else None,
        embed_dim=shape("img/head/kernel")[1],
        context_length=shape("txt/pos_embedding")[-2],
        learnable_tokens=shape("txt_decoder/learnable_tokens")[-2] if has_decoder else 128,
        vocab_size=shape("txt/Embed_0/embedding")[0],
    )


def load_jax(model: CLIPS, parameters: Mapping[str, np.ndarray]) -> None:
    """Copy JAX parameters into `model`. Attention kernels may have two or three dimensions.

    Raises:
        InputError: if a parameter is missing, left over, or of another size: nothing stays random unnoticed.
    """
    rules = jax_rules(model.config)
    names = {rule.jax for rule in rules}
    missing, unknown = sorted(names - parameters.keys()), sorted(parameters.keys() - names)
    if missing or unknown:
        raise InputError(f"JAX parameters: missing {missing[:3] or 'none'}, unknown {unknown[:3] or 'none'}")
    state = model.state_dict()
    with torch.no_grad():
        for rule in rules:
            target = _part(state[rule.name], rule)
            source = torch.from_numpy(np.asarray(parameters[rule.jax], dtype=np.float32))
            if source.numel() != target.numel():
                raise InputError(
                    f"JAX parameter {rule.jax!r} has shape {tuple(source.shape)}, which does not fit {rule.name} "
                    f"{tuple(target.shape)}"
                )
            canonical = [target.shape[rule.order.index(axis)] for axis in range(len(rule.order))]
            target.copy_(source.reshape(canonical).permute(rule.order))


def to_jax(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Parameters or gradients under our names → the same under JAX names, attention kernels two-dimensional."""
    result = {}
    for rule in jax_rules(config):
        if rule.name in tensors:
            part = _part(tensors[rule.name], rule)
            result[rule.jax] = part.permute([rule.order.index(axis) for axis in range(len(rule.order))])
    return result


def _part(tensor: Tensor, rule: JaxRule) -> Tensor:
    index, count = rule.part
    return tensor if count == 1 else tensor.chunk(count)[index]


# ---------------------------------------------------------------------------------------------------------------------
# open_clip folder
# ---------------------------------------------------------------------------------------------------------------------


def export_open_clip(model: CLIPS, tokenizer: ClipsTokenizer, folder: Path) -> None:
    """Write the towers as a folder that stock open_clip opens as `local-dir:FOLDER`, tokenizer included."""
    from transformers import BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    config = open_clip_config(model.config) | {"custom_text": True}
    # open_clip asks for a tokenizer name even where the folder itself holds the tokenizer.
    config["text_cfg"] |= {"hf_tokenizer_name": "bert-base-uncased", "tokenizer_mode": "clips"}
    preprocess = {"mean": IMAGE_MEAN, "std": IMAGE_STD, "interpolation": "bilinear", "resize_mode": "squash"}
    _write_json(folder / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": preprocess})
    towers = {name: value for name, value in model.state_dict().items() if not name.startswith("decoder.")}
    _save(towers, folder / "open_clip_model.safetensors")
    vocab = {token: i for i, token in enumerate(tokenizer.tokens)}
    BertTokenizer(vocab=vocab, do_lower_case=True, bos_token="[unused0]", eos_token="[unused1]").save_pretrained(folder)
    shutil.copyfile(tokenizer.vocab_path, folder / "vocab.txt")


# ---------------------------------------------------------------------------------------------------------------------
# HF vision tower folder
# ---------------------------------------------------------------------------------------------------------------------


def export_hf_tower(model: CLIPS, folder: Path) -> None:
    """Write the image tower as a stock `ViTModel` folder with its image processor: the exact carrier for LLaVA.

    `ViTModel` cannot hold the projection into the shared space; it lies beside it in `clips_sidecar.safetensors` (`proj`,
    [D, E]). The image feature is `layernorm(hidden_states[-1][:, 1:].mean(1)) @ proj`.
    """
    from transformers import ViTConfig

    config = model.config
    folder.mkdir(parents=True, exist_ok=True)
    vit = ViTConfig(
        architectures=["ViTModel"],
        hidden_size=config.vision.width,
        num_hidden_layers=config.vision.layers,
        num_attention_heads=config.vision.heads,
        intermediate_size=4 * config.vision.width,
        hidden_act="gelu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=NORM_EPS,
        image_size=config.image_size,
        patch_size=config.patch_size,
    )
    vit.save_pretrained(folder)
    visual = model.visual.state_dict()
    _save(_vit_state(visual), folder / "model.safetensors")
    _save({"proj": visual["proj"]}, folder / "clips_sidecar.safetensors")
    size = {"height": config.image_size, "width": config.image_size}
    _write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": size,
            "resample": 2,  # bilinear
            "do_center_crop": False,
            "crop_size": size,  # LLaVA's processor counts image tokens by it
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "do_convert_rgb": True,
            "image_mean": IMAGE_MEAN,
            "image_std": IMAGE_STD,
        },
    )


def _vit_state(visual: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's ViT state under the names that `ViTModel` has on disk (they are older than its attributes, and stable)."""
    width = visual["class_embedding"].numel()
    state = {
        "embeddings.cls_token": visual["class_embedding"].reshape(1, 1, width),
        "embeddings.position_embeddings": visual["positional_embedding"].unsqueeze(0),
        "embeddings.patch_embeddings.projection.weight": visual["conv1.weight"],
        "embeddings.patch_embeddings.projection.bias": torch.zeros(width),
        "layernorm.weight": visual["ln_post.weight"],
        "layernorm.bias": visual["ln_post.bias"],
    }
    renamed = {
        "attn.out_proj": "attention.output.dense",
        "mlp.c_fc": "intermediate.dense",
        "mlp.c_proj": "output.dense",
        "ln_1": "layernorm_before",
        "ln_2": "layernorm_after",
    }
    layers = sum(name.endswith("attn.in_proj_weight") for name in visual)
    for layer in range(layers):
        old, new = f"transformer.resblocks.{layer}", f"encoder.layer.{layer}"
        for kind in ("weight", "bias"):
            parts = visual[f"{old}.attn.in_proj_{kind}"].chunk(3)
            for projection, part in zip(("query", "key", "value"), parts, strict=True):
                state[f"{new}.attention.attention.{projection}.{kind}"] = part
            for theirs, hf in renamed.items():
                state[f"{new}.{hf}.{kind}"] = visual[f"{old}.{theirs}.{kind}"]
    return state


def export(model: CLIPS, tokenizer: ClipsTokenizer, folder: Path) -> None:
    """Both folders, `FOLDER/open_clip` and `FOLDER/hf`."""
    export_open_clip(model, tokenizer, folder / "open_clip")
    export_hf_tower(model, folder / "hf")


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path, metadata={"format": "pt"}
    )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
