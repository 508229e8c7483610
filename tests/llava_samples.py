"""Tiny towers, language models and conversations for the tests of llava_bridge: real classes, random weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from llava_bridge.llm import smollm2
from llava_bridge.mllm import build_mllm, save_mllm
from llava_bridge.towers import load_tower

SIZE = {"image_size": 48, "patch_size": 8}
WIDTH = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


def make_vision_model(kind: str, **changes: Any) -> PreTrainedModel:
    """A random tower of a kind (vit, clip, siglip, dinov2): 48 px, patch 8, width 64, 2 layers."""
    torch.manual_seed(0)
    settings = {**SIZE, **WIDTH, **changes}
    if kind == "vit":
        return ViTModel(ViTConfig(**settings), add_pooling_layer=False).eval()
    if kind == "clip":
        return CLIPVisionModel(CLIPVisionConfig(**settings)).eval()
    if kind == "siglip":
        return SiglipVisionModel(SiglipVisionConfig(**settings)).eval()
    settings["mlp_ratio"] = settings.pop("intermediate_size") // settings["hidden_size"]
    return Dinov2Model(Dinov2Config(**settings)).eval()


def save_tower(folder: Path, kind: str = "vit", **changes: Any) -> Path:
    """A tower's folder in HF layout, with its image processor."""
    model = make_vision_model(kind, **changes)
    model.save_pretrained(folder)
    size = {"height": model.config.image_size, "width": model.config.image_size}
    CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False, resample=2).save_pretrained(folder)
    return folder


def save_llm(folder: Path, **changes: Any) -> Path:
    """A random two-layer Llama with SmolLM2's tokenizer and chat template."""
    source = smollm2()
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, folder / name)
    torch.manual_seed(1)
    settings = {
        **WIDTH, "num_key_value_heads": 2, "vocab_size": 49152, "tie_word_embeddings": True,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "initializer_range": 0.2,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).save_pretrained(folder)
    return folder


def save_two_llavas(folder: Path) -> tuple[Path, Path]:
    """Two models that differ in their projectors."""
    tower = load_tower(f"hf:{save_tower(folder / 'tower')}")
    llm = save_llm(folder / "llm")
    for seed, name in enumerate(("left", "right")):
        save_mllm(*build_mllm(tower, llm, seed=seed), folder / name)
    return folder / "left", folder / "right"


def save_conversations(folder: Path, count: int = 12) -> Path:
    """images/, align.json and tune.json: conversations of uneven length about random pictures."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    words = ["red", "blue", "bird", "house", "left", "of", "two", "stars", "small", "near"]
    align, tune = [], []
    for number in range(count):
        name = f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(folder / "images" / name)

        def text(shortest: int, longest: int) -> str:
            return " ".join(rng.choice(words, rng.integers(shortest, longest)))

        caption = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": text(3, 20)}]
        align.append({"id": f"a{number}", "image": name, "conversations": caption})
        turns = []
        for turn in range(rng.integers(1, 4)):
            mark = "<image>\n" if turn == 0 else ""
            turns.append({"from": "human", "value": f"{mark}Is there a {text(1, 4)}?"})
            turns.append({"from": "gpt", "value": text(1, 5)})
        tune.append({"id": f"t{number}", "image": name, "conversations": turns})
    (folder / "align.json").write_text(json.dumps(align))
    (folder / "tune.json").write_text(json.dumps(tune))
    return folder
