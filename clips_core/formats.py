"""CLIPS in other people's layouts: the authors' JAX parameters, an open_clip folder or hub name, an HF vision tower folder."""

import dataclasses
import json
import math
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from clips_core.config import ModelConfig, TransformerConfig, load_config, to_dict
from clips_core.errors import InputError
from clips_core.folders import MANIFEST, read_json, read_manifest, sha256_file, write_json
from clips_core.model import CLIPS, NORM_EPS, open_clip_config, sin_cos_positions
from clips_core.tokenizer import BERT_VOCAB, RESERVED, ClipsTokenizer

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREPROCESS = {"mean": list(IMAGE_MEAN), "std": list(IMAGE_STD), "interpolation": "bilinear", "resize_mode": "squash"}

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

    def norm(jax: str, name: str) -> list[JaxRule]:
        return [JaxRule(f"{jax}/scale", f"{name}.weight", vector), JaxRule(f"{jax}/bias", f"{name}.bias", vector)]

    rules = [
        JaxRule("img/embedding/kernel", "visual.conv1.weight", (3, 2, 0, 1)),  # HWIO → OIHW
        JaxRule("img/cls", "visual.class_embedding", vector),
        *norm("img/encoder_norm", "visual.ln_post"),
        JaxRule("img/head/kernel", "visual.proj", same),
        JaxRule("txt/Embed_0/embedding", "text.token_embedding.weight", same),
        JaxRule("txt/pos_embedding", "text.positional_embedding", same),
        *norm("txt/encoder_norm", "text.ln_final"),
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
            *norm("txt_decoder/decoder_norm", "decoder.ln_final"),
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
            rules += norm(f"{jax}/LayerNorm_0", f"{name}.ln_1") + norm(f"{jax}/LayerNorm_1", f"{name}.ln_2")
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


OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # the first that is there is read
VOCABULARIES = ("vocab.txt", "tokenizer.json")  # likewise
# Settings of open_clip that change nothing in a CLIPS model: they act in training only, or belong to kinds of towers, pooling
# and tokenizers that are refused or looked at for themselves. The position embeddings are the ones among the weights.
_IDLE = {
    "vision_cfg": {"pos_embed_type", "patch_dropout", "output_tokens", "attn_pooler_queries", "attn_pooler_heads",
                   "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path"},
    "text_cfg": {"hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "output_tokens", "pad_id", "eos_id",
                 "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"},
}  # fmt: skip


@dataclass(frozen=True)
class ModelFiles:
    """Where the parts of a model lie."""

    config: Path  # open_clip_config.json
    towers: Path  # their weights
    vocabulary: Path  # vocab.txt or tokenizer.json
    own: Path | None  # a run's export/clips: config.json, and decoder.safetensors where there is a decoder

    @property
    def decoder(self) -> Path | None:
        """The caption decoder's weights."""
        path = self.own / "decoder.safetensors" if self.own is not None else None
        return path if path is not None and path.is_file() else None

    @property
    def method(self) -> str | None:
        """What the model was trained by, where the run's folder is still around its export."""
        manifest = self.own.parent.parent / MANIFEST if self.own is not None else None
        return read_json(manifest)["config"].get("method") if manifest is not None and manifest.is_file() else None

    def hashes(self) -> dict[str, str]:
        """SHA-256 of everything that decides what the model computes, by file name."""
        parts = [path for path in (self.towers, self.decoder, self.vocabulary) if path is not None]
        return {path.name: sha256_file(path) for path in parts}


def load_model(spec: str | Path | ModelFiles, image_size: int | None = None) -> tuple[CLIPS, ClipsTokenizer]:
    """A model with everything that there is of it: a run's caption decoder too. Arguments and errors as `load_open_clip`."""
    files = spec if isinstance(spec, ModelFiles) else locate(spec)
    return _load(files, _config(files), image_size)


def load_run(folder: str | Path, image_size: int | None = None) -> tuple[CLIPS, ClipsTokenizer]:
    """The model of a finished pretraining run, or of its export folder, with its caption decoder. See `load_open_clip`."""
    files = locate(folder)
    if files.own is None:
        raise InputError(f"{folder}: has no export/clips beside its towers, so its caption decoder was not kept")
    return load_model(files, image_size)


def load_open_clip(spec: str | Path, image_size: int | None = None) -> tuple[CLIPS, ClipsTokenizer]:
    """The towers, without a caption decoder, in fp32 on the CPU, and their tokenizer.

    Args:
        spec: a folder in open_clip's layout (`local-dir:` may precede it), `hf-hub:ORG/NAME[@REVISION]`, or a pretraining run
            folder or its export. A name on the hub goes through huggingface_hub and its cache; HF_HUB_OFFLINE holds.
        image_size: pixels; another than the stored one computes sin-cos position embeddings anew on the new grid, and
            interpolates learned ones as open_clip does.

    Raises:
        InputError: if a file is missing, the config has a setting that a CLIPS model cannot represent, or a weight is missing,
            left over or of another shape: nothing stays random.
    """
    files = locate(spec)
    return _load(files, dataclasses.replace(_config(files), decoder=None), image_size)


def locate(spec: str | Path) -> ModelFiles:
    """The files that `spec` stands for (see `load_open_clip`); a run's are checked against the hashes that it recorded."""
    name = str(spec)
    if name.startswith("hf-hub:"):
        folder = _download(name.removeprefix("hf-hub:"))
        return ModelFiles(folder / OPEN_CLIP_CONFIG, _one_of(folder, OPEN_CLIP_WEIGHTS), _vocabulary(folder), None)
    root = Path(name.removeprefix("local-dir:"))
    if not root.is_dir():
        raise InputError(f"{name}: no such folder (a model on the hub is written hf-hub:ORG/NAME)")
    places = (root, root / "open_clip", root / "export" / "open_clip")
    folder = next((place for place in places if (place / OPEN_CLIP_CONFIG).is_file()), root)
    if not (folder / OPEN_CLIP_CONFIG).is_file():
        what = "a folder in open_clip's layout, a finished pretraining run, or hf-hub:ORG/NAME"
        raise InputError(f"{name}: holds no {OPEN_CLIP_CONFIG}; give {what}")
    own = folder.parent / "clips" if (folder.parent / "clips" / "config.json").is_file() else None
    files = ModelFiles(folder / OPEN_CLIP_CONFIG, _one_of(folder, OPEN_CLIP_WEIGHTS), _vocabulary(folder), own)
    if folder == places[2]:
        recorded = read_manifest(root, "pretrain")["weights"]
        for path in (files.towers, *([files.decoder] if files.decoder is not None else [])):
            found, expected = sha256_file(path), recorded.get(str(path.relative_to(root)))
            if found != expected:
                raise InputError(f"{path}: its hash is {found}, but {root / 'manifest.json'} records {expected}")
    return files


def read_open_clip_config(path: Path) -> ModelConfig:
    """The sizes of the towers that an `open_clip_config.json` describes (`model_cfg` may be the whole file).

    Raises:
        InputError: naming the key, if a setting is none of open_clip's or one that a CLIPS model cannot represent.
    """
    content = _mapping(read_json(path), path, "its content")
    model = _mapping(content.get("model_cfg", content), path, "model_cfg")
    for key in ("embed_dim", "vision_cfg", "text_cfg"):
        if key not in model:
            raise InputError(f"{path}: key {key!r} is required")
    # quick_gelu and the like are False or null where they are harmless; the temperature's start is not used after training.
    idle = {"embed_dim", "vision_cfg", "text_cfg", "custom_text", "init_logit_scale", "output_dict", "cast_dtype"}
    for key, value in model.items():
        if key not in idle and value:
            raise _not_clips(path, key, value, None)
    given = _mapping(model["text_cfg"], path, "text_cfg")
    padding = given.get("text_padding", "attended")  # ours, where it is masked: stock open_clip refuses such a folder
    model = model | {"text_cfg": {key: value for key, value in given.items() if key != "text_padding"}}
    vision = _settings(open_clip.CLIPVisionCfg, model, "vision_cfg", path)
    text = _settings(open_clip.CLIPTextCfg, model, "text_cfg", path)
    try:
        config = ModelConfig(
            image_size=_side(vision["image_size"]),
            patch_size=_side(vision["patch_size"]),
            vision=TransformerConfig(vision["width"], vision["layers"], vision["width"] // vision["head_width"]),
            text=TransformerConfig(text["width"], text["layers"], text["heads"]),
            embed_dim=model["embed_dim"],
            context_length=text["context_length"],
            vocab_size=text["vocab_size"],
            text_padding=padding,
        )
    except (ValidationError, TypeError, ZeroDivisionError) as error:
        raise InputError(f"{path}: a size cannot be used ({' '.join(str(error).split())})") from None
    ours = open_clip_config(config)
    expected = {
        "vision_cfg": dataclasses.asdict(open_clip.CLIPVisionCfg(**ours["vision_cfg"])),
        "text_cfg": dataclasses.asdict(open_clip.CLIPTextCfg(**ours["text_cfg"])),
    }
    for part, settings in (("vision_cfg", vision), ("text_cfg", text)):
        for key, value in settings.items():
            wanted = expected[part][key]
            if key not in _IDLE[part] and (_side(value) or None) != (wanted or None):
                raise _not_clips(path, f"{part}.{key}", value, wanted)
    _check_tokenization(path, text)
    for key, value in _mapping(content.get("preprocess_cfg", {}), path, "preprocess_cfg").items():
        if key in PREPROCESS and value != PREPROCESS[key]:
            raise _not_clips(path, f"preprocess_cfg.{key}", value, PREPROCESS[key])
    return config


def export_open_clip(model: CLIPS, tokenizer: ClipsTokenizer, folder: Path) -> None:
    """Write the towers as a folder that stock open_clip opens as `local-dir:FOLDER`, tokenizer included."""
    from transformers import BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    config = open_clip_config(model.config) | {"custom_text": True}
    # open_clip asks for a tokenizer name even where the folder itself holds the tokenizer.
    config["text_cfg"] |= {"hf_tokenizer_name": "bert-base-uncased", "tokenizer_mode": "clips"}
    if (
        model.config.text_padding == "masked"
    ):  # unknown to open_clip, so that it opens no text tower that attends to pads
        config["text_cfg"]["text_padding"] = "masked"
    write_json(folder / OPEN_CLIP_CONFIG, {"model_cfg": config, "preprocess_cfg": PREPROCESS})
    towers = {name: value for name, value in model.state_dict().items() if not name.startswith("decoder.")}
    _save(towers, folder / OPEN_CLIP_WEIGHTS[0])
    vocab = {token: i for i, token in enumerate(tokenizer.tokens)}
    bos, eos = RESERVED[1:3]
    BertTokenizer(vocab=vocab, do_lower_case=True, bos_token=bos, eos_token=eos).save_pretrained(folder)
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokenizer.tokens), encoding="utf-8")


def export_own(model: CLIPS, folder: Path) -> None:
    """Write what open_clip's layout has no place for: the whole `ModelConfig` and the caption decoder's weights."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", to_dict(model.config))
    decoder = {name: value for name, value in model.state_dict().items() if name.startswith("decoder.")}
    if decoder:
        _save(decoder, folder / "decoder.safetensors")


def _config(files: ModelFiles) -> ModelConfig:
    if files.own is not None:
        return load_config(ModelConfig, files.own / "config.json")
    return read_open_clip_config(files.config)


def _load(files: ModelFiles, config: ModelConfig, image_size: int | None) -> tuple[CLIPS, ClipsTokenizer]:
    state = _read_towers(files.towers)
    if config.decoder is not None:
        if files.decoder is None:
            raise InputError(f"{files.own}: has no decoder.safetensors, but its config.json has a caption decoder")
        state |= _read_safetensors(files.decoder)
    if image_size is not None and image_size != config.image_size:
        try:
            config = dataclasses.replace(config, image_size=image_size)
        except ValidationError as error:
            raise InputError(f"image_size {image_size}: {error.errors()[0]['msg']}") from None
        positions = state.get("visual.positional_embedding")
        if positions is not None:
            state["visual.positional_embedding"] = resize_positions(positions, image_size // config.patch_size)
    with torch.device("meta"):  # no memory and no random numbers for weights that are about to be replaced
        model = CLIPS(config)
    expected = model.state_dict()
    where = f"{files.towers} against {(files.own / 'config.json') if files.own else files.config}"
    for problem, names in (
        ("lacks", expected.keys() - state.keys()),
        ("has an unknown", state.keys() - expected.keys()),
    ):
        if names:
            raise InputError(f"{where}: {problem} weight {min(names)!r} ({len(names)} in all)")
    for key, value in expected.items():
        if state[key].shape != value.shape:
            raise InputError(
                f"{where}: weight {key!r} has shape {tuple(state[key].shape)}, but the config makes it {tuple(value.shape)}"
            )
    model.load_state_dict(state, assign=True)
    tokenizer = ClipsTokenizer(files.vocabulary, config.text_padding == "attended")
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"vocabulary {files.vocabulary} has {len(tokenizer)} entries, but the model's vocab_size is {config.vocab_size}"
        )
    return model, tokenizer


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """Position embeddings [1 + old², D] for another grid, [1 + grid², D]: sin-cos ones anew, others interpolated."""
    old, width = math.isqrt(len(positions) - 1), positions.shape[-1]
    if positions.shape != (1 + old**2, width):
        return positions  # of no square grid: the shapes will be found not to fit
    if width % 4 == 0 and width >= 8:
        fixed = sin_cos_positions(old, width)
        if torch.allclose(positions, fixed, rtol=0, atol=2e-3):  # half precision stores 1 ± 5e-4
            return sin_cos_positions(grid, width)
    state = {"visual.positional_embedding": positions}
    open_clip.model.resize_pos_embed(state, SimpleNamespace(visual=SimpleNamespace(grid_size=(grid, grid))))
    return state["visual.positional_embedding"]


def _read_towers(path: Path) -> dict[str, Tensor]:
    """The towers' weights in fp32 under our names; a text tower at the top level (open_clip's `CLIP`) goes below `text.`."""
    if path.suffix == ".safetensors":
        state = _read_safetensors(path)
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as error:  # torch raises nearly anything on what is not its own, or is more than tensors
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{path}: cannot be read as plain tensors, and whatever else it holds is not run ({reason}); fetch it again"
            ) from None
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise InputError(f"{path}: holds something other than one table of tensors")
    state = {key: value.float() for key, value in state.items()}
    if "logit_scale" in state:
        state["logit_scale"] = state["logit_scale"].reshape(())  # some releases have it as [1]
    converted: dict[str, Tensor] = open_clip.model.convert_to_custom_text_state_dict(state)
    return converted


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a safetensors file, or damaged ({error}); fetch or export it again") from None
    return tensors


def _download(name: str) -> Path:
    """The local snapshot of `ORG/NAME[@REVISION]`, with the files that are needed and none twice."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    repository, _, revision = name.partition("@")

    def fetch(file: str, revision: str | None) -> Path | None:
        try:
            return Path(hf_hub_download(repository, file, revision=revision, cache_dir=constants.HF_HUB_CACHE))
        except EntryNotFoundError:  # not in the repository, or offline and not in the cache
            return None
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise InputError(f"hf-hub:{name}: cannot be fetched ({' '.join(str(error).split())[:300]})") from None

    config = fetch(OPEN_CLIP_CONFIG, revision or None)
    if config is None:
        raise InputError(
            f"hf-hub:{name}: no {OPEN_CLIP_CONFIG} could be had from the hub or from the cache {constants.HF_HUB_CACHE}; "
            f"without a network, run `hf download {repository}` elsewhere and give the folder"
        )
    commit = config.parent.name  # all files of one commit, whatever is pushed meanwhile
    next((path for file in OPEN_CLIP_WEIGHTS if (path := fetch(file, commit)) is not None), None)
    if fetch("vocab.txt", commit) is None:
        fetch("tokenizer.json", commit)
    fetch("tokenizer_config.json", commit)
    return config.parent


def _one_of(folder: Path, names: tuple[str, ...]) -> Path:
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise InputError(f"{folder}: has neither {' nor '.join(names)}")
    return found


def _vocabulary(folder: Path) -> Path:
    """The folder's vocabulary; ours, which is BERT's, where its config names BERT's tokenizer and no file is there."""
    if (folder / "tokenizer_config.json").is_file():
        _check_tokenizer_config(folder / "tokenizer_config.json")
    if not any((folder / name).is_file() for name in VOCABULARIES):
        content = _mapping(read_json(folder / OPEN_CLIP_CONFIG), folder / OPEN_CLIP_CONFIG, "its content")
        model = _mapping(content.get("model_cfg", content), folder / OPEN_CLIP_CONFIG, "model_cfg")
        text = _mapping(model.get("text_cfg", {}), folder / OPEN_CLIP_CONFIG, "text_cfg")
        if str(text.get("hf_tokenizer_name")).removeprefix("google-bert/") == "bert-base-uncased":
            return BERT_VOCAB
    return _one_of(folder, VOCABULARIES)


def _check_tokenizer_config(path: Path) -> None:
    config = _mapping(read_json(path), path, "its content")
    for key in ("do_lower_case", "strip_accents", "tokenize_chinese_chars"):
        if config.get(key) is False:
            raise InputError(
                f"{path}: {key} is false, but a CLIPS model reads lower-cased WordPiece as BERT's; it needs true"
            )
    for key, wanted in (("bos_token", RESERVED[1]), ("eos_token", RESERVED[2])):
        token = config.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and token != wanted:
            raise InputError(f"{path}: {key} is {token!r}, but a CLIPS model has {wanted!r}")


def _check_tokenization(path: Path, text: Mapping[str, Any]) -> None:
    """Whether the texts were tokenized as CLIPS has it; the authors' files leave the mode out, since their code always does."""
    if text["tokenizer_mode"] not in (None, "", "clips"):
        raise _not_clips(path, "text_cfg.tokenizer_mode", text["tokenizer_mode"], "clips")
    harmless = {"strip_sep_token": (True, False), "clean": ("whitespace",)}  # [SEP] does not occur
    for key, value in (text["tokenizer_kwargs"] or {}).items():
        if value not in harmless.get(key, ()):
            raise _not_clips(path, f"text_cfg.tokenizer_kwargs.{key}", value, None)


def _settings(cls: type, model: Mapping[str, Any], part: str, path: Path) -> dict[str, Any]:
    """A part of open_clip's config with open_clip's own defaults filled in."""
    given = _mapping(model[part], path, part)
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(given.keys() - known)
    if unknown:
        raise InputError(f"{path}: {part}.{unknown[0]} is no setting of open_clip {open_clip.__version__}")
    return dataclasses.asdict(cls(**given))


def _not_clips(path: Path, key: str, value: Any, wanted: Any) -> InputError:
    return InputError(
        f"{path}: {key} is {json.dumps(value)}, but a CLIPS model has {json.dumps(wanted)}; "
        "as a vision tower of a LLaVA, such a model is named open_clip:NAME"
    )


def _mapping(value: Any, path: Path, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{path}: {name} must be a JSON object")
    return value


def _side(size: Any) -> Any:
    """The side of a square that is given as one number or two."""
    return size[0] if isinstance(size, (list, tuple)) and len(set(size)) == 1 else size


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
    write_json(
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
    """`FOLDER/open_clip` (the towers), `FOLDER/hf` (the image tower) and `FOLDER/clips` (config and caption decoder)."""
    export_open_clip(model, tokenizer, folder / "open_clip")
    export_hf_tower(model, folder / "hf")
    export_own(model, folder / "clips")


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path, metadata={"format": "pt"}
    )
    umask = os.umask(0)  # can be read by setting it only
    os.umask(umask)
    path.chmod(0o666 & ~umask)  # safetensors leaves its files to their owner alone, but a lab shares its towers
