"""The hook that lets the original LLaVA, and LLaVA-NeXT, use any exported tower as their vision tower.

    pip install --no-deps clips-llava          # into the original's environment, where nothing else changes
    python -m llava_bridge.upstream train --vision_tower /path/to/tower …

A tower is a folder that `clips-llava tower SPEC --export DIR` wrote, or a pretraining run's `export/hf`. This module stands alone:
it imports nothing of this project, and needs no more than torch, Pillow and transformers ≥ 4.37 (with what these bring along).
"""

import functools
import importlib
import importlib.util
import json
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

CONFIG, PROCESSOR, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"
INSTALL = "pip install --no-deps llava-torch==1.2.2.post1"


@dataclass(frozen=True)
class Kind:
    """How an exported tower's model type is built and read."""

    model: str  # the class of transformers
    class_token: bool
    prefix: str = ""  # of its weights' names; transformers 5 reads them with and without it, and may write them without


KINDS = {
    "vit": Kind("ViTModel", class_token=True),
    "clip_vision_model": Kind("CLIPVisionModel", class_token=True, prefix="vision_model."),
    "siglip_vision_model": Kind("SiglipVisionModel", class_token=False, prefix="vision_model."),
    "dinov2": Kind("Dinov2Model", class_token=True),
}
FEATURES = ("patch", "cls_patch")
# Weights that no patch feature depends on; versions of transformers differ in whether they have them.
_NOT_READ = {"pooler", "head", "mask_token", "position_ids"}
# Whatever makes a model random in training: LLaVA's Trainer puts the tower into training mode with all the rest.
_RANDOM = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "drop_path_rate")


class ExportedTower(nn.Module):
    """An exported tower with all that LLaVA asks of one: pixels [B, 3, S, S] → patch features [B, N, D].

    Frozen, unless somebody unfreezes it. The weights stand under the attribute `vision_tower`: by that name LLaVA keeps LoRA out.

    Args:
        vision_tower: the tower's folder.
        args: LLaVA's model arguments or model config: `mm_vision_select_layer`, `mm_vision_select_feature`.
        delay_load: create no weight before `load_model` (a checkpoint that is just being loaded has none for a frozen tower).
            Of no effect if the checkpoint holds a tuned tower.

    Raises:
        ValueError: for a folder that is no exported tower, or arguments that it cannot serve.
    """

    def __init__(self, vision_tower: str, args: Any, delay_load: bool = False):
        super().__init__()
        self.is_loaded = False
        self.vision_tower_name = vision_tower
        self.folder = Path(vision_tower)
        self.kind, self.config = _read_config(self.folder)
        self.image_processor = ExactImageProcessor(self.folder)
        self.select_layer = args.mm_vision_select_layer
        self.select_feature = getattr(args, "mm_vision_select_feature", "patch")
        self._check(args)
        tuned = getattr(args, "unfreeze_mm_vision_tower", False) or "mm_vision_tower" in (
            getattr(args, "mm_tunable_parts", None) or ""
        )
        if tuned or not delay_load:
            self.load_model()

    def load_model(self, device_map: Any = None) -> None:
        """Read the weights; nothing, if they are there already.

        Args:
            device_map: a device, or accelerate's map for a model in parts: the tower goes as a whole to the first device of it.
        """
        if self.is_loaded:
            return
        name = self.kind.model
        options = {"add_pooling_layer": False} if name == "ViTModel" else {}
        weights = _read_weights(self.folder, self.kind.prefix)
        model, report = getattr(transformers, name).from_pretrained(
            None, config=self.config, state_dict=dict(weights), output_loading_info=True, **options
        )
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            keys = sorted(key for key in map(str, report[problem]) if not _NOT_READ & set(key.split(".")))
            if keys:
                raise ValueError(f"{self.folder / WEIGHTS}: {problem.replace('_', ' ')}: {', '.join(keys[:3])} …")
        _keep_weights(model, weights)
        self.vision_tower = model.requires_grad_(False)
        if device_map is not None:
            self.vision_tower.to(_one_device(device_map))
        self.is_loaded = True

    def forward(self, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Normalised pixels [B, 3, S, S] → features [B, N, D] in the pixels' dtype; a list of [3, S, S] → a list of [1, N, D]."""
        if isinstance(images, list):
            return [self(image.unsqueeze(0)) for image in images]
        pixels = images.to(device=self.device, dtype=self.dtype)
        features = self.vision_tower(pixels, output_hidden_states=True).hidden_states[self.select_layer]
        if self.kind.class_token and self.select_feature == "patch":
            features = features[:, 1:]
        return features.to(images.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_tower.dtype

    @property
    def device(self) -> torch.device:
        return self.vision_tower.device

    @property
    def dummy_feature(self) -> Tensor:
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def image_size(self) -> int:
        return int(self.config.image_size)

    @property
    def num_patches_per_side(self) -> int:
        return self.image_size // int(self.config.patch_size)

    @property
    def num_patches(self) -> int:
        """Features of one picture, the N of `forward`."""
        return self.num_patches_per_side**2 + (self.kind.class_token and self.select_feature == "cls_patch")

    def _check(self, args: Any) -> None:
        made = self.image_processor.side
        if made != self.image_size:
            raise ValueError(
                f"{self.folder}: its image processor makes pictures of {made} × {made} pixels, but its model takes "
                f"{self.image_size} × {self.image_size}; {_export_it(self.folder)}"
            )
        layers = self.config.num_hidden_layers
        if not -layers - 1 <= self.select_layer <= layers:
            raise ValueError(
                f"mm_vision_select_layer {self.select_layer}: {self.folder} has hidden states 0 … {layers}"
            )
        possible = FEATURES if self.kind.class_token else FEATURES[:1]
        if self.select_feature not in possible:
            raise ValueError(
                f"mm_vision_select_feature {self.select_feature!r}: {self.folder} gives {' or '.join(possible)}"
                + ("" if self.kind.class_token else ", having no class token")
            )
        if getattr(args, "s2", False):
            raise ValueError(f"s2 is LLaVA-NeXT's own CLIP tower at several sizes; {self.folder} has one")


class ExactImageProcessor:
    """A tower's preprocessing, from its preprocessor_config.json: the same pixels in every version of transformers.

    A picture is squashed to S × S, or resized by its shorter edge and cropped at the centre, whichever the tower was made with.

    Attributes:
        side: S, in pixels.
        size, crop_size: S once more, in the form in which LLaVA reads it for its tiles (`anyres`). A tile is S × S already, and a
            picture of that size is only normalised: cropping a tile would lose what lies between it and the next.
    """

    def __init__(self, folder: Path):
        settings = _read_json(folder / PROCESSOR, folder)
        missing = [key for key in ("image_mean", "image_std", "resample", "size") if settings.get(key) is None]
        if missing or not isinstance(settings["size"], dict):
            raise ValueError(f"{folder / PROCESSOR}: lacks {', '.join(missing) or 'a full size'}; {_export_it(folder)}")
        self.image_mean, self.image_std = settings["image_mean"], settings["image_std"]
        self.resample = Image.Resampling(settings["resample"])
        self.rescale_factor = settings.get("rescale_factor", 1 / 255)
        self._resize = {key: int(value) for key, value in settings["size"].items() if value is not None}
        crops = settings.get("do_center_crop", "shortest_edge" in self._resize)
        crop = (settings.get("crop_size") or {}) if crops else self._resize
        self.side = int(crop.get("height") or 0)
        on = all(settings.get(f"do_{step}", True) for step in ("resize", "rescale", "normalize"))
        square = crop.get("width") == self.side and 0 < self.side <= min(self._resize.values(), default=0)
        if not on or not square or settings.get("do_pad") or "longest_edge" in self._resize:
            raise ValueError(f"{folder / PROCESSOR}: does not resize to a square and normalise; {_export_it(folder)}")
        self.size = {"shortest_edge": self.side}
        self.crop_size = {"height": self.side, "width": self.side}

    def preprocess(self, images: Any, return_tensors: str | None = None) -> transformers.BatchFeature:
        """Pictures (PIL, or uint8 arrays [H, W, 3]; one or several) → `pixel_values`, fp32 [B, 3, S, S]."""
        several = isinstance(images, (list, tuple)) or (isinstance(images, np.ndarray) and images.ndim == 4)
        pixels = [self._pixels(image) for image in (images if several else [images])]
        return transformers.BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    __call__ = preprocess

    def _pixels(self, image: Image.Image | np.ndarray) -> np.ndarray:
        image = (image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))).convert("RGB")
        if image.size != (self.side, self.side):
            image = _cropped(image.resize(self._resized(*image.size), self.resample), self.side)
        # In fp64, then rounded, then normalised in fp32: to the last bit what transformers' own processors do.
        scaled = (np.asarray(image).astype(np.float64) * self.rescale_factor).astype(np.float32)
        mean, std = (np.array(values, dtype=np.float32) for values in (self.image_mean, self.image_std))
        return np.ascontiguousarray(((scaled - mean) / std).transpose(2, 0, 1))

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        if "shortest_edge" not in self._resize:
            return self._resize["width"], self._resize["height"]
        short = self._resize["shortest_edge"]
        long = int(short * max(width, height) / min(width, height))
        return (short, long) if width <= height else (long, short)


# ------------------------------------------------------------------------------------------------------- the hook


def install() -> None:
    """From now on LLaVA builds its vision tower from an exported tower's folder, where it is given one.

    What it is given else goes to its own function. Calling this twice is like calling it once.

    Raises:
        ImportError: if there is no `llava` here, with what to install.
    """
    try:
        builder: Any = importlib.import_module("llava.model.multimodal_encoder.builder")
        arch: Any = importlib.import_module("llava.model.llava_arch")  # has bound the function by name
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "llava":
            raise
        raise ImportError(f"the original LLaVA is not installed here ({error}): run  {INSTALL}") from None
    original = builder.build_vision_tower
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def build_vision_tower(vision_tower_cfg: Any, **options: Any) -> Any:
        name: Any = getattr(vision_tower_cfg, "mm_vision_tower", getattr(vision_tower_cfg, "vision_tower", None))
        if is_exported(name):
            return ExportedTower(name, vision_tower_cfg, **options)
        return original(vision_tower_cfg, **options)

    builder.build_vision_tower = arch.build_vision_tower = build_vision_tower


def is_exported(name: Any) -> bool:
    """Whether LLaVA's `vision_tower` names an exported tower's folder. False: it is LLaVA's own to build.

    Raises:
        ValueError: for the folder of another kind of model, which LLaVA would take for a CLIP and leave mostly random.
    """
    if not name or not (Path(name) / CONFIG).is_file():
        return False
    model_type = _read_json(Path(name) / CONFIG, Path(name)).get("model_type")
    if model_type not in (*KINDS, "clip"):
        raise ValueError(
            f"{name}: model type {model_type!r} is not one of {', '.join(KINDS)}; {_export_it(Path(name))}"
        )
    return model_type in KINDS


def train(**options: Any) -> None:
    """LLaVA's own training, its arguments read from the command line as always, with the hook in place.

    Args:
        options: of LLaVA's `train` function: attn_implementation="flash_attention_2".
    """
    install()
    do_without_deepspeed()
    importlib.import_module("llava.train.train").train(**options)


def do_without_deepspeed() -> None:
    """LLaVA's training imports DeepSpeed to save, whether it is used or not. Where it is not installed, no weight is sharded."""
    if importlib.util.find_spec("deepspeed") is None:
        for name in ("llava.train.train", "llava.train.llava_trainer"):
            importlib.import_module(name).maybe_zero_3 = _whole_parameter  # type: ignore[attr-defined]


def _whole_parameter(param: Tensor, ignore_status: bool = False, name: str | None = None) -> Tensor:
    return param.detach().cpu().clone()


def main(arguments: Sequence[str]) -> None:
    """`train …`: `train` with these arguments. `run MODULE …`: a module of LLaVA's as `python -m MODULE …`, with the hook."""
    if arguments[:1] == ["train"]:
        sys.argv = ["train", *arguments[1:]]
        train()
    elif arguments[:1] == ["run"] and len(arguments) > 1:
        install()
        if arguments[1].startswith("llava.train."):
            do_without_deepspeed()
        sys.argv = [*arguments[1:]]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.exit("usage: python -m llava_bridge.upstream train ARGUMENTS … | run MODULE ARGUMENTS …")


# -------------------------------------------------------------------------------------------------------- reading


def _read_config(folder: Path) -> tuple[Kind, Any]:
    settings = _read_json(folder / CONFIG, folder)
    if settings.get("model_type") not in KINDS:
        raise ValueError(f"{folder}: model type {settings.get('model_type')!r}; {_export_it(folder)}")
    kind = KINDS[settings["model_type"]]
    if not hasattr(transformers, kind.model):
        raise ValueError(f"{folder}: is a {kind.model}, which transformers {transformers.__version__} does not know")
    config = getattr(transformers, kind.model).config_class.from_pretrained(folder)
    for name in _RANDOM:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return kind, config


def _read_json(file: Path, folder: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); {_export_it(folder)}") from None
    return value


def _export_it(folder: Path) -> str:
    return f"a tower is a folder that `clips-llava tower KIND:{folder} --export DIR` writes"


def _read_weights(folder: Path, prefix: str) -> dict[str, Tensor]:
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS}: cannot be read ({error}); {_export_it(folder)}") from None
    return {prefix + name.removeprefix(prefix): value for name, value in weights.items()}


def _keep_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Guard the weights against the model around them, if that is being loaded while this tower is built (LLaVA-NeXT does so).

    transformers builds it without storage, and initialises at random whatever its own checkpoint lacks.
    """
    for prefix, module in model.named_modules():
        module._is_hf_initialized = True
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                value = weights.get(f"{prefix}.{name}".lstrip("."), torch.zeros(parameter.shape))
                # Not by setattr: that is what has been replaced meanwhile, to drop every weight's storage.
                module._parameters[name] = nn.Parameter(value.to(parameter.dtype), requires_grad=False)


def _one_device(device_map: Any) -> Any:
    if isinstance(device_map, dict):
        device_map = next(iter(device_map.values()))
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device_map


def _cropped(image: Image.Image, side: int) -> Image.Image:
    """The middle of a picture that is at least `side` pixels wide and high."""
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


if __name__ == "__main__":
    main(sys.argv[1:])
