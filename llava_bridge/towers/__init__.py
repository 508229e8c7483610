"""Vision towers: one spec `KIND:NAME` names a tower of any kind, and all look alike from here on.

A kind is one small function in `KINDS` that turns NAME into a `Carrier`: an exact HF vision model with its image processor. A new
kind is one more function there.
"""

import difflib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from clips_core.errors import InputError
from clips_core.folders import read_json, read_manifest, sha256_file, write_manifest
from llava_bridge.hub import WEIGHTS, download, is_repository
from llava_bridge.towers.carriers import MODEL_TYPES, PROCESSOR, Carrier, read_carrier, square

RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # PIL's numbers


@dataclass(frozen=True)
class Tower:
    """A frozen vision tower and everything about it that the rest of a LLaVA depends on."""

    spec: str
    folder: Path  # where its weights are from
    vision_model: PreTrainedModel  # its carrier
    image_processor: Any
    image_size: int  # pixels, square
    patch_size: int  # pixels
    num_prefix_tokens: int  # before the patch tokens: the class token, then register tokens; SigLIP has none
    num_register_tokens: int
    hidden_size: int
    num_layers: int
    select_layer: int  # the hidden state that `features` gives unless told otherwise
    weight_hash: str  # SHA-256 of the file that the weights are from

    @property
    def num_image_tokens(self) -> int:
        """Tokens that a stock LLaVA reads of one picture, the N of `features`: patches, and register tokens before them."""
        return (self.image_size // self.patch_size) ** 2 + self.num_register_tokens

    def describe(self) -> str:
        """Size, resolution, tokens, preprocessing, feature layer and hash, a line each."""
        parameters = sum(value.numel() for value in self.vision_model.parameters())
        grid = self.image_size // self.patch_size
        registers = f" and {self.num_register_tokens} register tokens" if self.num_register_tokens else ""
        dropped = "class token dropped" if self.num_prefix_tokens else "no class token"
        lines = {
            "tower": self.spec,
            "carrier": f"{type(self.vision_model).__name__}, from {self.folder}",
            "size": f"{parameters / 1e6:.2f} M parameters, {self.num_layers} blocks of width {self.hidden_size}",
            "pictures": f"{self.image_size} × {self.image_size} pixels in patches of {self.patch_size}",
            "tokens": f"{self.num_image_tokens} image tokens: {grid} × {grid} patches{registers}, {dropped}",
            "processor": _describe_processor(self.image_processor),
            "layer": f"{self.select_layer} of hidden states 0 … {self.num_layers}",
            "hash": f"sha256 {self.weight_hash}",
        }
        return "\n".join(f"{name:<10}{value}" for name, value in lines.items())

    @torch.no_grad()
    def features(self, pixels: Tensor, select_layer: int | None = None, class_token: bool = False) -> Tensor:
        """What a stock LLaVA's projector reads: pixels [B, 3, H, W], normalised → [B, N, D].

        Patch tokens, the class token dropped. Register tokens, where the tower has them, stand before the patches: a stock LLaVA
        drops the first token and no other.

        Args:
            select_layer: index into the hidden states: 0 is the patch embedding, k the output of block k, -1 the last; None: the
                tower's own `select_layer`.
            class_token: keep it, [B, 1 + N, D] (LLaVA's `cls_patch`, transformers' `full`).
        """
        layer = self.select_layer if select_layer is None else select_layer
        self.check_layer(layer)
        states = self.vision_model(pixels, output_hidden_states=True).hidden_states
        first = self.num_prefix_tokens - self.num_register_tokens
        features: Tensor = states[layer][:, 0 if class_token else first :]
        expected = (len(pixels), self.num_image_tokens + (first if class_token else 0), self.hidden_size)
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


def load_tower(spec: str, image_size: int | None = None, select_layer: int = -2) -> Tower:
    """The tower that `KIND:NAME` names, frozen, in fp32 and evaluation mode, on the CPU.

    Args:
        image_size: pixels; another than the stored one gives the tower new position embeddings: sin-cos ones (`clips:`) anew,
            learned ones by the interpolation of the tower's own library.
        select_layer: index into the hidden states that `features` gives.

    Raises:
        InputError: for an unknown kind, a missing folder, a model without an exact HF carrier, weights that do not fit their
            config, or a processor that makes pictures of another size.
    """
    kind, separator, name = spec.partition(":")
    if not separator or kind not in KINDS:
        raise InputError(f"tower {spec!r}: write KIND:NAME, with KIND one of {', '.join(KINDS)}{_guess(spec)}")
    if not name:
        raise InputError(f"tower {spec!r}: names no folder after {kind}:")
    if image_size is not None and image_size < 1:
        raise InputError(f"tower {spec!r}: image_size must be at least 1, not {image_size}")
    try:
        carrier = KINDS[kind](name, image_size)
    except InputError as error:
        raise InputError(f"tower {spec!r}: {error}") from None
    config = carrier.model.config
    registers = getattr(config, "num_register_tokens", 0)
    tower = Tower(
        spec=spec,
        folder=carrier.folder,
        vision_model=carrier.model,
        image_processor=carrier.image_processor,
        image_size=square(config.image_size, "image_size"),
        patch_size=square(config.patch_size, "patch_size"),
        num_prefix_tokens=MODEL_TYPES[config.model_type].class_token + registers,
        num_register_tokens=registers,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        select_layer=select_layer,
        weight_hash=carrier.weight_hash,
    )
    tower.check_layer(select_layer)
    return tower


def export_tower(tower: Tower, folder: Path) -> None:
    """Write the carrier as a folder of its own, `hf:FOLDER` from then on: config.json, model.safetensors, processor, manifest."""
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: holds something already; name a new folder")
    tower.vision_model.save_pretrained(folder, max_shard_size="1TB")
    tower.image_processor.save_pretrained(folder)
    settings = {"spec": tower.spec, "image_size": tower.image_size}
    write_manifest(folder, "tower", settings, {"tower": tower.weight_hash}, {})


# ------------------------------------------------------------------------------------------------------------ kinds


def _clips(name: str, image_size: int | None) -> Carrier:
    """A pretraining run folder, an export of one, or a released CLIPS model: a folder in open_clip's layout or hf-hub:ORG/NAME."""
    folder = Path(name)
    if not folder.is_dir() or _open_clip_places(folder):
        return _convert_clips(name, image_size)
    is_run = not (folder / "config.json").is_file()
    hf = _export_of(folder) if is_run else folder
    if image_size in (None, read_json(hf / "config.json").get("image_size")):
        return read_carrier(hf)
    return _convert_clips(name if is_run else str(hf.parent), image_size)  # the export in open_clip's layout, beside it


def _open_clip(name: str, image_size: int | None) -> Carrier:
    """ARCH/PRETRAINED of open_clip's list, a folder in its `local-dir:` layout, or hf-hub:ORG/NAME."""
    from llava_bridge.towers import from_open_clip

    if name.startswith("hf-hub:"):
        folder = download(
            name.removeprefix("hf-hub:"), (from_open_clip.CONFIG,), [(w,) for w in from_open_clip.WEIGHTS]
        )
        return from_open_clip.folder_carrier(folder, image_size)
    folder = Path(name.removeprefix("local-dir:"))
    if folder.is_dir():
        return from_open_clip.folder_carrier(folder, image_size)
    arch, _, tag = name.partition("/")
    if not tag or name.startswith("local-dir:"):
        raise InputError(f"{folder}: no such folder (a model of open_clip's list is written ARCH/PRETRAINED)")
    return from_open_clip.pretrained_carrier(arch, tag, image_size)


def _hf(name: str, image_size: int | None) -> Carrier:
    """A folder that transformers' `save_pretrained` wrote, with its image processor, or ORG/NAME[@REVISION] on the hub."""
    folder = Path(name)
    if not folder.is_dir():
        if not is_repository(name):
            raise InputError(f"{folder}: no such folder")
        folder = download(name, ("config.json", PROCESSOR), WEIGHTS)
    return read_carrier(folder, image_size)


KINDS: dict[str, Callable[[str, int | None], Carrier]] = {"clips": _clips, "open_clip": _open_clip, "hf": _hf}


def _export_of(run: Path) -> Path:
    """A finished run's HF export, compared with the hashes that the run recorded."""
    hashes = read_manifest(run, "pretrain")["weights"]
    export = run / "export" / "hf"
    weights = export / "model.safetensors"
    if not weights.is_file():
        raise InputError(f"{run}: has no {weights.relative_to(run)}; export the tower again")
    found, recorded = sha256_file(weights), hashes.get(str(weights.relative_to(run)))
    if found != recorded:
        raise InputError(f"{weights}: its hash is {found}, but {run / 'manifest.json'} records {recorded}")
    return export


def _open_clip_places(folder: Path) -> bool:
    """Whether a folder is in open_clip's layout, or a run's export/ with such a folder in it."""
    return (folder / "open_clip_config.json").is_file() or (folder / "open_clip" / "open_clip_config.json").is_file()


def _convert_clips(spec: str, image_size: int | None) -> Carrier:
    """A CLIPS model in open_clip's layout, through the same export that ends a pretraining run: equal weights, equal hash."""
    from clips_core.formats import export_hf_tower, load_open_clip, locate

    files = locate(spec)
    model, _ = load_open_clip(spec, image_size)
    with tempfile.TemporaryDirectory(prefix="clips-llava-tower-") as temporary:
        export_hf_tower(model, Path(temporary))
        carrier = read_carrier(Path(temporary))
    return Carrier(files.config.parent, carrier.model, carrier.image_processor, carrier.weight_hash)


# ----------------------------------------------------------------------------------------------------------- texts


def _guess(spec: str) -> str:
    """What somebody who wrote a bare path, a hub name or a misspelt kind probably means."""
    kind, separator, name = spec.partition(":")
    folder = Path(spec.removeprefix("local-dir:"))
    if match := difflib.get_close_matches(kind, KINDS, n=1) if separator else []:
        guess = f"{match[0]}:{name}"
    elif spec.startswith("hf-hub:"):
        guess = f"{'clips' if 'clips' in spec.lower() else 'open_clip'}:{spec}"
    elif folder.is_dir():
        guess = f"{_kind_of(folder)}:{folder}" if _kind_of(folder) else ""
    elif is_repository(spec):
        import open_clip

        guess = f"{'open_clip' if spec.partition('/')[0] in open_clip.list_models() else 'hf'}:{spec}"
    else:
        guess = ""
    return f" (did you mean {guess!r}?)" if guess else ""


def _kind_of(folder: Path) -> str | None:
    """The kind of tower that lies in a folder, by its files."""
    if (folder / "open_clip_config.json").is_file():
        from clips_core.formats import read_open_clip_config

        try:
            read_open_clip_config(folder / "open_clip_config.json")
        except InputError:
            return "open_clip"
        return "clips"
    if (folder / "config.json").is_file():
        return "hf"
    return "clips" if (folder / "export").is_dir() or (folder / "open_clip").is_dir() else None


def _describe_processor(processor: Any) -> str:
    """Its class and what it does, in order: `ViTImageProcessorPil: resize to 224 × 224 (bilinear), mean …, std …`."""
    size = processor.size
    target = f"shortest edge {size.shortest_edge}" if size.shortest_edge else f"{size.height} × {size.width}"
    steps = [f"resize to {target} ({RESAMPLE[int(processor.resample)]})"]
    if getattr(processor, "do_center_crop", False):
        steps.append(f"crop {processor.crop_size['height']} × {processor.crop_size['width']}")
    for name, values in (("mean", processor.image_mean), ("std", processor.image_std)):
        steps.append(f"{name} {', '.join(f'{value:.4g}' for value in values)}")
    return f"{type(processor).__name__}: {'; '.join(steps)}"
