"""How large language models and towers are, from their configs alone: what a plan counts with. Imports no torch.

A name stands for a published config; a folder's `config.json` for any other. tests/test_plan_llava.py holds the parameter counts
against transformers' own classes.
"""

import difflib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from clips_core.errors import InputError
from clips_core.folders import read_json
from clips_core.sizes import SIZES

T = TypeVar("T")


@dataclass(frozen=True)
class Llm:
    """A decoder of the Llama family: RMSNorm, rotary positions, grouped-query attention, gated MLP, no bias unless said."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp: int  # width of the gated MLP's middle
    vocab: int
    tied: bool  # the head is the embedding
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3

    @property
    def queries(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_width

    @property
    def keys(self) -> int:
        """Width of all key heads, and of all value heads."""
        return self.kv_heads * self.head_width

    @property
    def linear(self) -> int:
        """Parameters of a block's matrices: q, k, v, o, gate, up, down."""
        return self.width * (2 * self.queries + 2 * self.keys + 3 * self.mlp)

    @property
    def inputs(self) -> int:
        """Widths of what enters a block's seven matrices, added up."""
        return 5 * self.width + self.queries + self.mlp

    @property
    def outputs(self) -> int:
        """Widths of what leaves them, added up."""
        return 2 * self.width + self.queries + 2 * self.keys + 2 * self.mlp

    @property
    def vectors(self) -> int:
        """Parameters of a block beside its matrices."""
        bias = self.queries + 2 * self.keys if self.qkv_bias else 0
        return 2 * self.width + bias + (2 * self.head_width if self.qk_norm else 0)

    @property
    def embedding(self) -> int:
        return self.vocab * self.width

    @property
    def parameters(self) -> int:
        embeddings = self.embedding * (1 if self.tied else 2)
        return embeddings + self.layers * (self.linear + self.vectors) + self.width


@dataclass(frozen=True)
class VisionTower:
    """A ViT as a stock LLaVA holds it."""

    kind: str  # transformers' model type
    width: int
    layers: int
    heads: int
    mlp: int
    patch_size: int  # pixels
    image_size: int  # pixels
    prefix: int  # tokens before the patches
    registers: int = 0  # of those, the ones that a LLaVA reads

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """That go through the blocks."""
        return self.patches + self.prefix

    @property
    def image_tokens(self) -> int:
        """That the language model reads of one picture."""
        return self.patches + self.registers

    @property
    def linear(self) -> int:
        """Parameters of a block's matrices."""
        return 4 * self.width**2 + 2 * self.width * self.mlp

    @property
    def block(self) -> int:
        """Parameters of a block: matrices, biases, two norms; DINO scales what each half of a block adds."""
        return self.linear + 9 * self.width + self.mlp + (2 * self.width if "dino" in self.kind else 0)

    @property
    def above(self) -> int:
        """Parameters that no patch feature depends on: the last norm, DINO's mask token, the pooler of a ViT or SigLIP."""
        norm = 2 * self.width
        if self.kind == "vit":
            return norm + self.width**2 + self.width
        if self.kind == "siglip_vision_model":  # attention pooling: probe, attention, norm, MLP
            return norm + self.linear + 8 * self.width + self.mlp
        return norm + (self.width if "dino" in self.kind else 0)

    @property
    def parameters(self) -> int:
        """Of all of it."""
        below = (3 * self.patch_size**2 + self.prefix) * self.width  # patches; tokens before them
        below += (2 if self.kind == "clip_vision_model" else 1) * self.width  # a norm, or the patches' bias
        if self.kind != "dinov3_vit":  # which has rotary positions
            below += (self.tokens - self.registers) * self.width
        return self.layers * self.block + below + self.above


def _llm(width: int, layers: int, heads: int, kv_heads: int, mlp: int, vocab: int, tied: bool, **more: Any) -> Llm:
    return Llm(width, layers, heads, kv_heads, more.pop("head_width", width // heads), mlp, vocab, tied, **more)


# By name, with its place on the hub: the numbers of the config.json there.
LLMS: dict[str, tuple[str, Llm]] = {
    "vicuna-7b": ("lmsys/vicuna-7b-v1.5", _llm(4096, 32, 32, 32, 11008, 32000, False)),
    "vicuna-13b": ("lmsys/vicuna-13b-v1.5", _llm(5120, 40, 40, 40, 13824, 32000, False)),
    "llama-3-8b": ("meta-llama/Meta-Llama-3-8B-Instruct", _llm(4096, 32, 32, 8, 14336, 128256, False)),
    "llama-3.2-1b": ("meta-llama/Llama-3.2-1B-Instruct", _llm(2048, 16, 32, 8, 8192, 128256, True)),
    "llama-3.2-3b": ("meta-llama/Llama-3.2-3B-Instruct", _llm(3072, 28, 24, 8, 8192, 128256, True)),
    "mistral-7b": ("mistralai/Mistral-7B-Instruct-v0.2", _llm(4096, 32, 32, 8, 14336, 32000, False)),
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", _llm(576, 30, 9, 3, 1536, 49152, True)),
    "smollm2-360m": ("HuggingFaceTB/SmolLM2-360M-Instruct", _llm(960, 32, 15, 5, 2560, 49152, True)),
    "smollm2-1.7b": ("HuggingFaceTB/SmolLM2-1.7B-Instruct", _llm(2048, 24, 32, 32, 8192, 49152, True)),
    "qwen2.5-0.5b": ("Qwen/Qwen2.5-0.5B-Instruct", _llm(896, 24, 14, 2, 4864, 151936, True, qkv_bias=True)),
    "qwen2.5-1.5b": ("Qwen/Qwen2.5-1.5B-Instruct", _llm(1536, 28, 12, 2, 8960, 151936, True, qkv_bias=True)),
    "qwen2.5-3b": ("Qwen/Qwen2.5-3B-Instruct", _llm(2048, 36, 16, 2, 11008, 151936, True, qkv_bias=True)),
    "qwen2.5-7b": ("Qwen/Qwen2.5-7B-Instruct", _llm(3584, 28, 28, 4, 18944, 152064, False, qkv_bias=True)),
    "qwen3-0.6b": ("Qwen/Qwen3-0.6B", _llm(1024, 28, 16, 8, 3072, 151936, True, head_width=128, qk_norm=True)),
    "qwen3-8b": ("Qwen/Qwen3-8B", _llm(4096, 36, 32, 8, 12288, 151936, False, qk_norm=True)),
}


def _clips(size: str, image_size: int) -> VisionTower:
    vision = SIZES[size]["vision"]
    patch = SIZES[size]["patch_size"]
    return VisionTower(
        "vit", vision["width"], vision["layers"], vision["heads"], 4 * vision["width"], patch, image_size, 1
    )


TOWERS: dict[str, tuple[str, VisionTower]] = {
    "clip-l14-224": (
        "openai/clip-vit-large-patch14",
        VisionTower("clip_vision_model", 1024, 24, 16, 4096, 14, 224, 1),
    ),
    "clip-l14-336": (
        "openai/clip-vit-large-patch14-336",
        VisionTower("clip_vision_model", 1024, 24, 16, 4096, 14, 336, 1),
    ),
    "siglip-so400m-384": (
        "google/siglip-so400m-patch14-384",
        VisionTower("siglip_vision_model", 1152, 27, 16, 4304, 14, 384, 0),
    ),
    "clips-s16-224": ("", _clips("S/16", 224)),
    "clips-b16-224": ("", _clips("B/16", 224)),
    "clips-l14-224": ("UCSC-VLAA/ViT-L-14-CLIPS-224-Recap-DataComp-1B", _clips("L/14", 224)),
    "clips-l14-336": ("", _clips("L/14", 336)),
    "clips-h14-224": ("", _clips("H/14", 224)),
}

LLM_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3")
TOWER_TYPES = {  # tokens before the patches, registers left out
    "vit": 1, "clip_vision_model": 1, "siglip_vision_model": 0, "dinov2": 1, "dinov2_with_registers": 1, "dinov3_vit": 1,
}  # fmt: skip


def read_llm(spec: str) -> Llm:
    """The language model of a name in `LLMS`, of its place on the hub, or of a folder with a config.json (a LLaVA's too).

    Raises:
        InputError: if it is none of them, or of a family that is counted otherwise.
    """
    if (known := _known(spec, LLMS | {"smollm2": LLMS["smollm2-135m"]})) is not None:
        return known
    config, where = _config_of("llm", spec, LLMS, ("config.json", "model/config.json"))
    config = config.get("text_config", config)
    kind = config.get("model_type")
    if kind not in LLM_TYPES:
        raise InputError(f"{where}: model type {kind!r} cannot be counted; those that can are {', '.join(LLM_TYPES)}")
    try:
        width, heads = config["hidden_size"], config["num_attention_heads"]
        return Llm(
            width=width,
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_width=config.get("head_dim") or width // heads,
            mlp=config["intermediate_size"],
            vocab=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", kind == "gemma")),
            qkv_bias=kind == "qwen2",
            qk_norm=kind == "qwen3",
        )
    except KeyError as missing:
        raise InputError(f"{where}: has no {missing}") from None


def read_tower(spec: str, image_size: int | None = None) -> VisionTower:
    """The tower of a name in `TOWERS`, of its place on the hub (with or without a KIND: before it), or of a folder: in HF layout, a
    pretraining run's, open_clip's, or a LLaVA's.

    Raises:
        InputError: if it is none of them, or of a kind that is counted otherwise.
    """
    kind, separator, rest = spec.partition(":")
    name = rest if separator and kind in ("clips", "open_clip", "hf") else spec
    name = name.removeprefix("hf-hub:").removeprefix("local-dir:")
    tower = _known(name, TOWERS)
    if tower is None:
        places = (
            "config.json",
            "model/config.json",
            "export/hf/config.json",
            "hf/config.json",
            "open_clip_config.json",
        )
        config, where = _config_of("tower", name, TOWERS, places)
        try:
            tower = _open_clip_tower(config) if "model_cfg" in config else _hf_tower(config, where)
        except KeyError as missing:
            raise InputError(f"{where}: has no {missing}") from None
    return tower if image_size is None else replace(tower, image_size=image_size)


def _hf_tower(config: dict[str, Any], where: Path) -> VisionTower:
    config = config.get("vision_config", config)
    kind = config.get("model_type", "")
    kind = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}.get(kind, kind)
    if kind not in TOWER_TYPES:
        raise InputError(f"{where}: model type {kind!r} cannot be counted; those that can are {', '.join(TOWER_TYPES)}")
    width, registers = config["hidden_size"], config.get("num_register_tokens", 0)
    mlp = config.get("intermediate_size") or width * config["mlp_ratio"]
    size, patch = (v[0] if isinstance(v, list) else v for v in (config["image_size"], config["patch_size"]))
    return VisionTower(
        kind, width, config["num_hidden_layers"], config["num_attention_heads"], int(mlp), patch, size,
        TOWER_TYPES[kind] + registers, registers,
    )  # fmt: skip


def _open_clip_tower(config: dict[str, Any]) -> VisionTower:
    vision = config["model_cfg"]["vision_cfg"]
    width = vision["width"]
    mlp, heads = int(vision.get("mlp_ratio", 4) * width), width // vision.get("head_width", 64)
    kind = "vit" if vision.get("no_ln_pre") else "clip_vision_model"
    return VisionTower(kind, width, vision["layers"], heads, mlp, vision["patch_size"], vision["image_size"], 1)


def _known(spec: str, table: dict[str, tuple[str, T]]) -> T | None:
    """What a table has under a name or a place on the hub, a revision left out."""
    wanted = spec.partition("@")[0].lower()
    return next((value for name, (hub, value) in table.items() if wanted in (name, hub.lower()) and wanted), None)


def _config_of(what: str, spec: str, table: dict[str, Any], places: tuple[str, ...]) -> tuple[dict[str, Any], Path]:
    """The first of a folder's configs, and where it lies."""
    files = [Path(spec)] if Path(spec).suffix == ".json" else [Path(spec) / place for place in places]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        near = difflib.get_close_matches(spec.lower(), table, n=1)
        raise InputError(
            f"{what} {spec!r}: neither a folder with a config.json nor one of {', '.join(table)}"
            + (f" (did you mean {near[0]!r}?)" if near else "")
        )
    config = read_json(file)
    if not isinstance(config, dict):
        raise InputError(f"{file}: is no config")
    return config, file
