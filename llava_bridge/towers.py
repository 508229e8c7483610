"""Vision towers: one spec string `KIND:NAME` names a tower of any kind, and all look alike from here on.

A kind is one small function in `KINDS` that turns NAME into a folder in the HF layout (config.json, model.safetensors,
preprocessor_config.json). A new kind is one more function there.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    CLIPVisionModel,
    Dinov2Model,
    PretrainedConfig,
    PreTrainedModel,
    SiglipVisionModel,
    ViTModel,
)

from clips_core.errors import InputError
from clips_core.folders import read_manifest, sha256_file

# Per HF model type: the class that carries such a tower, and how many tokens stand before its patch tokens.
CARRIERS: dict[str, tuple[type[PreTrainedModel], int]] = {
    "vit": (ViTModel, 1),
    "clip_vision_model": (CLIPVisionModel, 1),
    "siglip_vision_model": (SiglipVisionModel, 0),
    "dinov2": (Dinov2Model, 1),
}
# Weights of a folder that no patch feature depends on, so they may stay unread.
UNUSED = ("pooler.", "classifier.")


@dataclass(frozen=True)
class Tower:
    """A frozen vision tower and everything about it that the rest of a LLaVA depends on."""

    spec: str
    folder: Path  # in HF layout
    vision_model: PreTrainedModel
    image_processor: Any
    image_size: int  # pixels, square
    patch_size: int  # pixels
    num_prefix_tokens: int  # class token: 1; none: 0
    hidden_size: int
    num_layers: int
    weight_hash: str  # SHA-256 of model.safetensors

    @property
    def num_image_tokens(self) -> int:
        """Patch tokens of one picture, the N of `features`."""
        return (self.image_size // self.patch_size) ** 2

    def describe(self) -> str:
        """Size, resolution, tokens, preprocessing and hash, a line each."""
        processor = self.image_processor
        parameters = sum(value.numel() for value in self.vision_model.parameters())
        lines = {
            "tower": self.spec,
            "carrier": f"{type(self.vision_model).__name__}, {self.folder}",
            "size": f"{parameters / 1e6:.2f} M parameters, {self.num_layers} blocks of width {self.hidden_size}",
            "pictures": f"{self.image_size} × {self.image_size} pixels in patches of {self.patch_size}",
            "tokens": f"{self.num_image_tokens} image tokens, {self.num_prefix_tokens} before them",
            "processor": f"{type(processor).__name__}, mean {processor.image_mean}, std {processor.image_std}",
            "hash": f"sha256 {self.weight_hash}",
        }
        return "\n".join(f"{name:<10}{value}" for name, value in lines.items())

    @torch.no_grad()
    def features(self, pixels: Tensor, select_layer: int = -2) -> Tensor:
        """Patch features: pixels [B, 3, H, W], normalised → [B, N, D], prefix tokens dropped.

        Args:
            select_layer: index into the hidden states: 0 is the patch embedding, k the output of block k, -1 the last.
        """
        self.check_layer(select_layer)
        states = self.vision_model(pixels, output_hidden_states=True).hidden_states
        features: Tensor = states[select_layer][:, self.num_prefix_tokens :]
        expected = (len(pixels), self.num_image_tokens, self.hidden_size)
        if features.shape != expected:
            raise InputError(
                f"tower {self.spec!r} gave features {tuple(features.shape)} where its config promises {expected}"
            )
        return features

    def check_layer(self, select_layer: int) -> None:
        """Raises an `InputError` if there is no such hidden state."""
        if not -self.num_layers - 1 <= select_layer <= self.num_layers:
            raise InputError(
                f"select_layer {select_layer}: tower {self.spec!r} has hidden states "
                f"0 … {self.num_layers}, or -{self.num_layers + 1} … -1"
            )


def load_tower(spec: str) -> Tower:
    """The tower that `KIND:NAME` names, frozen, in fp32 and evaluation mode, on the CPU.

    Raises:
        InputError: for an unknown kind, a missing folder, an unsupported model type, weights that do not fit their config,
            or a processor that makes pictures of another size.
    """
    folder = resolve(spec)
    config = _read_config(folder, spec)
    image_size, patch_size = (_square(config, name, spec) for name in ("image_size", "patch_size"))
    carrier, num_prefix_tokens = CARRIERS[config.model_type]
    return Tower(
        spec=spec,
        folder=folder,
        image_processor=_load_processor(folder, image_size, spec),
        vision_model=_load_weights(carrier, folder, config, spec),
        image_size=image_size,
        patch_size=patch_size,
        num_prefix_tokens=num_prefix_tokens,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        weight_hash=sha256_file(folder / "model.safetensors"),
    )


def resolve(spec: str) -> Path:
    """The folder in HF layout that a tower spec stands for."""
    kind, separator, name = spec.partition(":")
    if kind not in KINDS or not separator:
        match = difflib.get_close_matches(kind, KINDS, n=1)
        nearest = f" (did you mean {match[0]!r}?)" if match else ""
        raise InputError(f"tower {spec!r}: write KIND:FOLDER, with KIND one of {', '.join(KINDS)}{nearest}")
    if not name:
        raise InputError(f"tower {spec!r}: names no folder after {kind}:")
    folder = KINDS[kind](Path(name))
    for file in ("config.json", "model.safetensors", "preprocessor_config.json"):
        if not (folder / file).is_file():
            raise InputError(f"tower {spec!r}: {folder} has no {file}")
    return folder


# ------------------------------------------------------------------------------------------------------------ kinds


def _clips(run: Path) -> Path:
    """A pretraining run folder, or an export of one."""
    if (run / "config.json").is_file():
        return run
    hashes = read_manifest(run, "pretrain")["weights"]
    export = run / "export" / "hf"
    weights = export / "model.safetensors"
    if not weights.is_file():
        raise InputError(f"{run}: has no {weights.relative_to(run)}; export the tower again")
    found, recorded = sha256_file(weights), hashes.get(str(weights.relative_to(run)))
    if found != recorded:
        raise InputError(f"{weights}: its hash is {found}, but {run / 'manifest.json'} records {recorded}")
    return export


def _hf(folder: Path) -> Path:
    """A local folder that transformers' `save_pretrained` wrote, with its image processor."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    return folder


KINDS: dict[str, Callable[[Path], Path]] = {"clips": _clips, "hf": _hf}


# ---------------------------------------------------------------------------------------------------------- loading


def _read_config(folder: Path, spec: str) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"tower {spec!r}: {folder / 'config.json'} cannot be used ({_line(error)})") from None
    if config.model_type not in CARRIERS:
        raise InputError(
            f"tower {spec!r}: {folder / 'config.json'} is of model type {config.model_type!r}; "
            f"a LLaVA's tower is one of {', '.join(CARRIERS)}"
        )
    return config


def _square(config: PretrainedConfig, name: str, spec: str) -> int:
    value = getattr(config, name)
    sides = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(sides) != 1:
        raise InputError(f"tower {spec!r}: its config's {name} {value} is not square, which LLaVA needs")
    return int(sides.pop())


def _load_processor(folder: Path, image_size: int, spec: str) -> Any:
    """The tower's image processor, tried on a picture that is not square."""
    try:
        # The PIL backend resizes as the towers' own libraries do; torchvision's differs in the second decimal.
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        pixels = processor(Image.new("RGB", (2 * image_size, image_size + 1)), return_tensors="pt")["pixel_values"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"tower {spec!r}: {folder / 'preprocessor_config.json'} cannot be used ({_line(error)})"
        ) from None
    if pixels.shape != (1, 3, image_size, image_size):
        raise InputError(
            f"tower {spec!r}: its processor makes pictures of {tuple(pixels.shape[2:])} pixels, "
            f"but its config says {image_size} × {image_size}"
        )
    return processor


def _load_weights(carrier: type[PreTrainedModel], folder: Path, config: PretrainedConfig, spec: str) -> PreTrainedModel:
    options = {"add_pooling_layer": False} if carrier is ViTModel else {}
    try:
        model, report = carrier.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            use_safetensors=True,
            **options,
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise InputError(f"tower {spec!r}: {folder / 'model.safetensors'} does not fit ({_line(error)})") from None
    unexpected = {key for key in report["unexpected_keys"] if not key.startswith(UNUSED)}
    for problem, keys in (("lacks", report["missing_keys"]), ("has unknown", unexpected)):
        if keys:
            raise InputError(
                f"tower {spec!r}: {folder / 'model.safetensors'} {problem} {', '.join(sorted(keys)[:3])} …"
            )
    return model.requires_grad_(False).eval()


def _line(error: Exception) -> str:
    """An exception's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__
