"""Any tower as measurement sees it: pictures and, where it reads them, texts → vectors of one space.

This differs from `llava_bridge.towers`, which gives patch features for a LLaVA: here it is the pooled feature, projected into the
space that pictures and texts share, and the text encoder beside it. Each kind of tower is computed by its own library.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from torch import Tensor, nn

from clips_core import formats, zero_shot
from clips_core.config import to_dict
from clips_core.data import to_pixels
from clips_core.errors import InputError
from clips_core.folders import read_json
from llava_bridge.hub import WEIGHTS, download, is_repository
from llava_bridge.towers import load_tower
from llava_bridge.towers.carriers import MODEL_TYPES, PROCESSOR, load_processor, one_line, square
from llava_bridge.towers.from_open_clip import check_quick_gelu

SIDECAR = "clips_sidecar.safetensors"  # marks the image tower of a CLIPS model in HF layout
DUAL = {"clip": "CLIPModel", "siglip": "SiglipModel"}  # HF models of pictures and texts, by model type
# What an HF repository may have of a tokenizer.
TOKENIZER_FILES = (
    "tokenizer*.json", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model",
)  # fmt: skip


@dataclass(frozen=True)
class Embedder:
    """A tower that turns pictures, and perhaps texts, into vectors."""

    spec: str
    hash: str  # of the weights, and of the settings that say what is computed with them
    image_size: int  # pixels, square
    feature: str  # which one it is, in words
    module: nn.Module  # frozen, fp32, in evaluation mode, on its device
    to_pixels: Callable[[Image.Image], Tensor]  # RGB → [3, S, S]
    images: Callable[[Tensor], Tensor]  # a batch of these, [B, 3, S, S] → [B, E]
    tokens: Callable[[Sequence[str]], Tensor] | None  # texts → ids, int64 [B, T]; None: it reads no texts
    texts: Callable[[Tensor], Tensor] | None  # ids → [B, E]

    @property
    def name(self) -> str:
        """A folder's name: what it was called, and the start of its hash."""
        words = re.sub(r"[^\w.-]+", "-", self.spec).strip("-.")
        words = words if len(words) <= 40 else words[-40:].partition("-")[2] or words[-40:]
        return f"{words}-{self.hash[:8]}"

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device


def check_reads_texts(spec: str, wanted: Sequence[str]) -> None:
    """Before anything is loaded: raise an `InputError`, saying why, for a tower that reads no texts and tasks that need them.

    Args:
        wanted: these tasks, as an error shows them.
    """
    kind, _, name = spec.partition(":")
    if kind != "hf" or not wanted:
        return
    found = _model_type(_hf_folder(name))
    if found not in DUAL:
        raise InputError(
            f"tower {spec!r} has no text encoder (model type {found!r}): pictures cannot be told apart by words with it, as "
            f"{', '.join(wanted)} would; measure it by probe and knn (classes.NAME.tasks=[probe,knn], with classes.NAME.train)"
        )


def load_embedder(spec: str, image_size: int | None = None, device: str = "auto") -> Embedder:
    """The tower that `KIND:NAME` names, on its device.

    Args:
        image_size: pixels; another than the stored one gives new position embeddings, as in `llava_bridge.towers.load_tower`.
        device: auto, cpu, cuda, cuda:1 …

    Raises:
        InputError: for an unknown kind, what cannot be loaded or does not fit, and a device that is not there.
    """
    kind, _, name = spec.partition(":")
    if kind not in KINDS or not name:
        raise InputError(f"tower {spec!r}: write KIND:NAME, with KIND one of {', '.join(KINDS)}")
    try:
        embedder = KINDS[kind](spec, name, image_size)
    except InputError as error:
        text = str(error)
        raise InputError(text if text.startswith(f"tower {spec!r}") else f"tower {spec!r}: {text}") from None
    chosen = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        embedder.module.to(chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"device {device!r} cannot be used ({reason}); write auto, cpu or cuda") from None
    return embedder


# -------------------------------------------------------------------------------------------------------------- kinds


def _clips(spec: str, name: str, image_size: int | None) -> Embedder:
    """A CLIPS model, by `clips_core`."""
    # Of a run's export/hf, which is the image tower alone, the text encoder lies beside it.
    source = str(Path(name).parent) if (Path(name) / SIDECAR).is_file() else name
    model, tokenizer = formats.load_open_clip(source, image_size)
    model = model.requires_grad_(False).eval()
    size = model.config.image_size

    def tokens(texts: Sequence[str]) -> Tensor:
        return torch.from_numpy(tokenizer.encode(texts, model.config.context_length))

    return Embedder(
        spec=spec,
        hash=_hash(model, {"kind": "clips", "config": to_dict(model.config), "preprocess": formats.PREPROCESS}),
        image_size=size,
        feature="mean of the patches after the last LayerNorm, projected into the space of pictures and texts",
        module=model,
        to_pixels=lambda image: torch.from_numpy(to_pixels(image, size)),  # uint8: a quarter of the traffic
        images=lambda pixels: model.visual(zero_shot.normalise(pixels))[0],
        tokens=tokens,
        texts=lambda ids: model.text(ids)[0],
    )


def _open_clip(spec: str, name: str, image_size: int | None) -> Embedder:
    """Any model of open_clip, by open_clip: of its list, a folder in its layout, or on the hub."""
    folder = Path(name.removeprefix("local-dir:"))
    tag = None
    if name.startswith("hf-hub:"):
        model_name = name
    elif folder.is_dir():
        model_name = f"local-dir:{folder}"
    else:
        model_name, _, tag = name.partition("/")
        if not tag or name.startswith("local-dir:"):
            raise InputError(f"{folder}: no such folder (a model of open_clip's list is written ARCH/PRETRAINED)")
        check_quick_gelu(model_name, tag)
    size = {} if image_size is None else {"force_image_size": image_size}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, preprocess = open_clip.create_model_from_pretrained(model_name, tag, weights_only=True, **size)
            tokenizer = open_clip.get_tokenizer(model_name)
            config = open_clip.get_model_config(model_name)
    except (
        Exception
    ) as error:  # open_clip, timm, torch and the hub raise nearly anything on what is missing or does not fit
        raise InputError(f"open_clip cannot load it ({one_line(error)[:300]})") from None
    model = model.requires_grad_(False).eval()
    settings = model.visual.preprocess_cfg
    return Embedder(
        spec=spec,
        hash=_hash(model, {"kind": "open_clip", "config": config, "preprocess": settings}),
        image_size=square(settings["size"], "image_size"),
        feature="open_clip's image feature, in the space of pictures and texts",
        module=model,
        to_pixels=preprocess,
        images=model.encode_image,
        tokens=lambda texts: tokenizer(list(texts)),
        texts=model.encode_text,
    )


def _hf(spec: str, name: str, image_size: int | None) -> Embedder:
    """A model of transformers, by transformers: CLIP and SigLIP with their text encoders, others as image towers."""
    folder = _hf_folder(name)
    model_type = _model_type(folder)
    if model_type in DUAL:
        return _hf_dual(spec, folder, DUAL[model_type], image_size)
    tower = load_tower(f"hf:{folder}", image_size)
    model = tower.vision_model
    class_token = MODEL_TYPES[model.config.model_type].class_token

    def images(pixels: Tensor) -> Tensor:
        output = model(pixels)
        if output.get("pooler_output") is not None:  # DINO's class token, CLIP's, or what SigLIP's head attends to
            return output.pooler_output
        states = output.last_hidden_state
        return states[:, 0] if class_token else states[:, tower.num_prefix_tokens :].mean(dim=1)

    pooled = "class token" if class_token else "attention-pooled patches or, without that head, their mean"
    return Embedder(
        spec=spec,
        hash=_hash(model, {"kind": "hf", "config": _plain(model.config), "preprocess": _plain(tower.image_processor)}),
        image_size=tower.image_size,
        feature=f"{pooled}, after the last LayerNorm",
        module=model,
        to_pixels=_processed(tower.image_processor),
        images=images,
        tokens=None,
        texts=None,
    )


def _hf_dual(spec: str, folder: Path, class_name: str, image_size: int | None) -> Embedder:
    import transformers

    path = folder / "config.json"
    try:
        model, report = getattr(transformers, class_name).from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, weights_only=True, trust_remote_code=False
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (
        Exception
    ) as error:  # transformers, tokenizers and torch raise nearly anything on files that are missing or damaged
        raise InputError(f"{folder}: transformers cannot load it ({one_line(error)[:300]})") from None
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        # Older files hold the numbers 0, 1, 2 … as a tensor, which newer versions do not.
        found = sorted(key for key in map(str, report[problem]) if not key.endswith("position_ids"))
        if found:
            first = found[0]
            raise InputError(f"{folder}: its weights do not fit its config ({problem.replace('_', ' ')}: {first} …)")
    model = model.requires_grad_(False).eval()
    stored = square(model.config.vision_config.image_size, f"{path}: image_size")
    processor = load_processor(folder, image_size or stored, check=image_size is None)
    resized = image_size not in (None, stored)
    length = model.config.text_config.max_position_embeddings

    def tokens(texts: Sequence[str]) -> Tensor:
        # Full length, as SigLIP was trained; to CLIP, whose text encoder is causal, what follows the end means nothing.
        settings = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        # Every SigLIP was trained on lower-cased texts, but SigLIP 2's files name a tokenizer that keeps capitals.
        lower = model.config.model_type == "siglip"
        return tokenizer([text.lower() if lower else text for text in texts], **settings).input_ids

    def images(pixels: Tensor) -> Tensor:
        return model.get_image_features(pixel_values=pixels, interpolate_pos_encoding=resized).pooler_output

    def texts(ids: Tensor) -> Tensor:
        return model.get_text_features(input_ids=ids).pooler_output  # without a mask: SigLIP attends to pads

    return Embedder(
        spec=spec,
        hash=_hash(model, {"kind": "hf", "config": _plain(model.config), "preprocess": _plain(processor)}),
        image_size=image_size or stored,
        feature="transformers' image feature, in the space of pictures and texts",
        module=model,
        to_pixels=_processed(processor),
        images=images,
        tokens=tokens,
        texts=texts,
    )


KINDS: dict[str, Callable[[str, str, int | None], Embedder]] = {"clips": _clips, "open_clip": _open_clip, "hf": _hf}


# -------------------------------------------------------------------------------------------------------------- parts


def _hf_folder(name: str) -> Path:
    """A folder, or the local snapshot of ORG/NAME[@REVISION]."""
    folder = Path(name)
    if (folder / SIDECAR).is_file():
        raise InputError(f"{folder} is the image tower of a CLIPS model; write clips:{folder}")
    if folder.is_dir():
        return folder
    if not is_repository(name):
        raise InputError(f"{folder}: no such folder")
    return download(name, ("config.json", PROCESSOR, *TOKENIZER_FILES), WEIGHTS)


def _model_type(folder: Path) -> str:
    path = folder / "config.json"
    content = read_json(path)
    found = content.get("model_type") if isinstance(content, dict) else None
    if not isinstance(found, str):
        raise InputError(f"{path}: says no model_type; a folder in the layout of transformers is needed")
    return found


def _processed(processor: Any) -> Callable[[Image.Image], Tensor]:
    return lambda image: processor(image, return_tensors="pt")["pixel_values"][0]


def _plain(config: Any) -> dict[str, Any]:
    """A config or processor of transformers as JSON values, without what its version or folder puts in."""
    values = json.loads(json.dumps(config.to_dict(), default=str, sort_keys=True))
    for key in ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"):
        values.pop(key, None)
    return values


def _hash(module: nn.Module, settings: dict[str, Any]) -> str:
    """SHA-256 over every weight, by name, and the settings: two towers that are alike in these give the same vectors."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
