"""HF vision models that carry a tower: read from a folder in HF layout, resized, frozen.

A carrier is one of transformers' own classes, since a stock LLaVA builds its vision tower from the config alone. Which class
carries which model exactly, and what stands before its patch tokens, is the table `MODEL_TYPES`.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    CLIPVisionModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    PretrainedConfig,
    PreTrainedModel,
    SiglipVisionModel,
    ViTModel,
)

from clips_core.errors import InputError
from clips_core.folders import read_json, sha256_file

PROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True)
class ModelType:
    """How an HF vision model stands in a LLaVA."""

    model: type[PreTrainedModel]
    class_token: bool
    # Whether the library takes pictures of any size unasked (it interpolates while it runs, or computes rotary positions); such a
    # model's size is its image processor's, which need not be its config's.
    any_size: bool = False


MODEL_TYPES: dict[str, ModelType] = {
    "vit": ModelType(ViTModel, class_token=True),
    "clip_vision_model": ModelType(CLIPVisionModel, class_token=True),
    "siglip_vision_model": ModelType(SiglipVisionModel, class_token=False),
    "dinov2": ModelType(Dinov2Model, class_token=True, any_size=True),
    "dinov2_with_registers": ModelType(Dinov2WithRegistersModel, class_token=True, any_size=True),
    "dinov3_vit": ModelType(DINOv3ViTModel, class_token=True, any_size=True),
}
_NAFLEX = (
    "SigLIP 2 NaFlex reads pictures that were cut into patches beforehand, with a mask and a grid per picture, while a LLaVA gives "
    "its tower pixels [B, 3, H, W]; take a SigLIP 2 of fixed resolution, such as google/siglip2-so400m-patch14-384"
)
REFUSED = {
    "siglip2": _NAFLEX,
    "siglip2_vision_model": _NAFLEX,
    "dinov3_convnext": "a ConvNeXt has no patch tokens of one width through its stages; take a DINOv3 ViT",
}
_DUAL = ("clip", "siglip", "siglip2")  # image and text encoder in one
# Weights that no patch feature depends on: the text side of a dual encoder and heads after the last block are not even read.
_NOT_READ = (
    "text_model.",
    "text_projection.",
    "visual_projection.",
    "logit_scale",
    "logit_bias",
    "classifier.",
    "pooler.",
)
_NOT_READ_ENDS = (".position_ids", ".pooler.dense.weight", ".pooler.dense.bias")
# Whatever makes a model random in training, by name in the config: a tower gives the same features in training and after it.
_RANDOM = {
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attention_dropout": 0.0, "drop_path_rate": 0.0,
    "pos_embed_shift": None, "pos_embed_jitter": None, "pos_embed_rescale": None,
}  # fmt: skip


@dataclass(frozen=True)
class Carrier:
    """An HF vision model with its image processor, and where its weights are from."""

    folder: Path
    model: PreTrainedModel  # frozen, fp32, in evaluation mode, on the CPU
    image_processor: Any
    weight_hash: str  # SHA-256 of the file of weights; of the parts' hashes where there are several


def read_carrier(folder: Path, image_size: int | None = None) -> Carrier:
    """A folder in HF layout: config.json, weights, preprocessor_config.json. Of a dual encoder, the vision part.

    Args:
        image_size: pixels; another than the stored one interpolates learned position embeddings with the model's own function.

    Raises:
        InputError: for a missing file, a model without a carrier, weights that do not fit, or a processor that makes pictures
            of another size.
    """
    for file in ("config.json", PROCESSOR):
        if not (folder / file).is_file():
            raise InputError(f"{folder} has no {file}")
    config = _read_config(folder)
    stored = square(config.image_size, f"{folder / 'config.json'}: image_size")
    if image_size is None and not MODEL_TYPES[config.model_type].any_size:
        processor, wanted = load_processor(folder, stored, check=True), stored
    else:
        processor = load_processor(folder, image_size)
        wanted = processor.crop_size["height"]
    files = weight_files(folder)
    model = build_model(config, _read_weights(files), files[0])
    if wanted != stored:
        model = _resized(model, wanted)
    return Carrier(folder, model, processor, hash_of(files))


def build_model(config: PretrainedConfig, weights: dict[str, Tensor], source: Path) -> PreTrainedModel:
    """The carrier that `config` names, with exactly these weights, frozen, in fp32 and evaluation mode.

    Args:
        weights: under the names of the model's files or of its attributes.
        source: what an error calls them.

    Raises:
        InputError: if a weight is missing, left over or of another shape: nothing stays random.
    """
    for name, value in _RANDOM.items():
        if hasattr(config, name):
            setattr(config, name, value)
    carrier = MODEL_TYPES[config.model_type].model
    options = {"add_pooling_layer": False} if carrier is ViTModel else {}
    try:
        model, report = carrier.from_pretrained(
            None, config=config, state_dict=weights, dtype=torch.float32, output_loading_info=True, **options
        )
    except (RuntimeError, ValueError, TypeError) as error:
        raise InputError(f"{source} does not fit its config ({one_line(error)})") from None
    unknown = {
        key for key in report["unexpected_keys"] if not key.endswith("mask_token")
    }  # read for masked pictures only
    for problem, keys in (("lacks", report["missing_keys"]), ("has unknown", unknown)):
        if keys:
            raise InputError(f"{source} {problem} {', '.join(sorted(keys)[:3])} …")
    if report["mismatched_keys"]:
        raise InputError(f"{source} does not fit its config ({report['mismatched_keys']})")
    return model.requires_grad_(False).eval()


def load_processor(folder: Path, image_size: int | None, check: bool = False) -> Any:
    """A folder's image processor, for square pictures of `image_size` (None: whatever size it is for).

    Args:
        check: refuse a processor that is for another size, rather than change it in proportion.
    """
    own = _processor(folder)
    size = _try(own, folder)
    wanted = image_size or size
    if check and size != wanted:
        raise InputError(
            f"{folder}: its image processor makes pictures of ({size}, {size}) pixels, but its config says {wanted} × {wanted}"
        )
    scaled = {name: round(value * wanted / size) for name, value in dict(own.size).items() if value is not None}
    # A LLaVA counts its image tokens by crop_size, which many processors leave out.
    changed = _processor(folder, size=scaled, crop_size={"height": wanted, "width": wanted})
    if _try(changed, folder) != wanted:
        raise InputError(f"{folder / PROCESSOR}: cannot be changed to make pictures of {wanted} × {wanted} pixels")
    return changed


def weight_files(folder: Path) -> list[Path]:
    """A folder's weights, all parts: safetensors, else what torch can read as plain tensors."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = [folder / Path(part).name for part in sorted(set(read_json(index)["weight_map"].values()))]
            for file in files:
                if not file.is_file():
                    raise InputError(f"{folder} has no {file.name}, which {index.name} names")
            return files
    raise InputError(f"{folder} has no model.safetensors")


def hash_of(files: list[Path]) -> str:
    """SHA-256 of a file; of several, that of their hashes in order of name."""
    hashes = [sha256_file(file) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def square(value: Any, name: str) -> int:
    """The side of a square that a config gives as one number or two."""
    sides = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(sides) != 1:
        raise InputError(f"{name} {value} is not square, which LLaVA needs")
    return int(sides.pop())


def one_line(error: Exception) -> str:
    """An exception's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


# ---------------------------------------------------------------------------------------------------------- reading


def _read_config(folder: Path) -> PretrainedConfig:
    path = folder / "config.json"
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} cannot be used ({one_line(error)})") from None
    vision = config.vision_config if config.model_type in _DUAL else config
    if vision.model_type not in MODEL_TYPES:
        reason = REFUSED.get(vision.model_type, f"a LLaVA's tower is one of {', '.join(MODEL_TYPES)}")
        raise InputError(f"{path} is of model type {vision.model_type!r}: {reason}")
    return vision


def _read_weights(files: Iterable[Path]) -> dict[str, Tensor]:
    """Tensors by name, without those that no patch feature depends on."""
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as tensors:
                    weights |= {name: tensors.get_tensor(name) for name in filter(_is_read, tensors.keys())}
            else:
                state = torch.load(file, map_location="cpu", weights_only=True)
                weights |= {name: value for name, value in state.items() if _is_read(name)}
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} does not fit ({one_line(error)}); fetch it again") from None
        except Exception as error:  # torch raises nearly anything on what is not its own, or is more than tensors
            raise InputError(
                f"{file} cannot be read as plain tensors, and whatever else it holds is not run ({one_line(error)[:200]})"
            ) from None
    return weights


def _is_read(name: str) -> bool:
    return not name.startswith(_NOT_READ) and not name.endswith(_NOT_READ_ENDS)


def _processor(folder: Path, **changes: Any) -> Any:
    try:
        # The PIL backend resizes as the towers' own libraries do; torchvision's differs in the second decimal.
        return AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False, **changes)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / PROCESSOR} cannot be used ({one_line(error)})") from None


def _try(processor: Any, folder: Path) -> int:
    """The side of the pictures that a processor makes, from one that is not square."""
    try:
        pixels = processor(Image.new("RGB", (90, 70)), return_tensors="pt")["pixel_values"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / PROCESSOR} cannot be used ({one_line(error)})") from None
    if pixels.ndim != 4 or pixels.shape[2] != pixels.shape[3]:
        raise InputError(f"{folder / PROCESSOR}: makes pixels {tuple(pixels.shape)}, but LLaVA needs square pictures")
    return int(pixels.shape[2])


# --------------------------------------------------------------------------------------------------------- resizing


def _resized(model: PreTrainedModel, image_size: int) -> PreTrainedModel:
    """The model for pictures of another size: the position embeddings that its own library would interpolate for each picture
    become its weights."""
    config = type(model.config).from_dict(model.config.to_dict())
    patch = square(config.patch_size, "patch_size")
    if image_size % patch:
        raise InputError(f"image_size {image_size} is not a multiple of the patch size {patch}")
    config.image_size = image_size
    weights: Mapping[str, Tensor] = model.state_dict()
    embeddings: Any = next((m for m in model.modules() if hasattr(m, "interpolate_pos_encoding")), None)
    if embeddings is not None:  # without one, positions are rotary, computed from the grid
        grid, class_token = image_size // patch, MODEL_TYPES[config.model_type].class_token
        name = next(key for key in weights if ".position_embedding" in f".{key}")
        tokens = torch.empty(1, grid**2 + class_token, config.hidden_size)  # the function looks at its shape alone
        with torch.no_grad():
            positions = embeddings.interpolate_pos_encoding(tokens, image_size, image_size)
        weights = {**weights, name: positions.reshape(*weights[name].shape[:-2], -1, config.hidden_size)}
    return build_model(config, dict(weights), Path(f"{type(model).__name__} at {image_size} pixels"))
