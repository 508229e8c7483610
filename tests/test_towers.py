"""Towers: each kind equals its own library, in pixels and features, and so does a stock LLaVA around its carrier; bad specs,
folders and models without a carrier are refused with one clear error."""

import copy
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
from llava_samples import SIZE, WIDTH, make_vision_model, save_tower
from PIL import Image
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer as TimmViT
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedModel

from clips_core.config import ModelConfig, TransformerConfig
from clips_core.data import to_pixels
from clips_core.errors import InputError
from clips_core.folders import sha256_file, write_manifest
from clips_core.formats import export, load_open_clip
from clips_core.model import CLIPS
from clips_core.tokenizer import ClipsTokenizer, train_vocab
from clips_core.zero_shot import normalise
from llava_bridge.towers import KINDS, Tower, export_tower, load_tower
from llava_bridge.towers.from_open_clip import plain_vit, to_hf

# Per kind of HF model: tokens before the patches, and how many of them are registers.
HF = {
    "vit": (1, 0), "clip": (1, 0), "siglip": (0, 0), "dinov2": (1, 0), "dinov2_registers": (4, 3), "dinov3": (3, 2),
}  # fmt: skip
LAYERS = (-3, -2, -1, 0, 1, 2)


def make_hf(kind: str, **changes: Any) -> PreTrainedModel:
    """`make_vision_model`, and the kinds with register tokens."""
    settings = {**SIZE, **WIDTH, **changes}
    torch.manual_seed(0)
    if kind == "dinov2_registers":
        del settings["intermediate_size"]
        config = transformers.Dinov2WithRegistersConfig(**settings, mlp_ratio=2, num_register_tokens=3)
        return randomise(transformers.Dinov2WithRegistersModel(config).eval())
    if kind == "dinov3":
        config = transformers.DINOv3ViTConfig(**settings, num_register_tokens=2, drop_path_rate=0.3)
        return randomise(transformers.DINOv3ViTModel(config).eval())
    return randomise(make_vision_model(kind, **changes))


def randomise(model: Any) -> Any:
    """Every weight off its start, where norms do nothing and biases are zero."""
    torch.manual_seed(3)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.05 * torch.randn_like(value))
    return model


PROCESSORS: dict[str, Callable[[int], Any]] = {
    "vit": lambda size: transformers.ViTImageProcessorPil(size={"height": size, "width": size}),
    "clip": lambda size: transformers.CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    ),
    "siglip": lambda size: transformers.SiglipImageProcessorPil(size={"height": size, "width": size}),
    "dinov2": lambda size: transformers.BitImageProcessorPil(
        size={"shortest_edge": round(size * 7 / 6)}, crop_size={"height": size, "width": size}
    ),
    "dinov3": lambda size: transformers.DINOv3ViTImageProcessor(size={"height": size, "width": size}),
}
PROCESSORS["dinov2_registers"] = PROCESSORS["dinov2"]
PROCESSOR_TEXT = {
    "vit": "ViTImageProcessorPil: resize to 48 × 48 (bilinear); mean 0.5, 0.5, 0.5; std 0.5, 0.5, 0.5",
    "clip": "CLIPImageProcessorPil: resize to shortest edge 48 (bicubic); crop 48 × 48; mean 0.4815",
    "siglip": "SiglipImageProcessorPil: resize to 48 × 48 (bicubic); mean 0.5",
    "dinov2": "BitImageProcessorPil: resize to shortest edge 56 (bicubic); crop 48 × 48; mean",
    "dinov2_registers": "BitImageProcessorPil: resize to shortest edge 56",
    "dinov3": "DINOv3ViTImageProcessor: resize to 48 × 48 (bilinear); mean 0.485, 0.456, 0.406",
}


def save_hf(folder: Path, kind: str, processor_size: int = 48, **changes: Any) -> PreTrainedModel:
    """A model's folder as its publishers have it, with their image processor."""
    model = make_hf(kind, **changes)
    model.save_pretrained(folder)
    PROCESSORS[kind](processor_size).save_pretrained(folder)
    return model


def picture(width: int = 70, height: int = 50) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def hidden_states(model: PreTrainedModel, pixels: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return model(pixels, output_hidden_states=True, **options).hidden_states


def stock_llava(tower: Tower) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """transformers' own LLaVA around a carrier, its projector taken out: image features come as they are."""
    strategy = "default" if tower.num_prefix_tokens else "full"
    text = LlamaConfig(**{**WIDTH, "hidden_size": tower.hidden_size}, vocab_size=8)
    config = LlavaConfig(
        vision_config=tower.vision_model.config.to_dict(), text_config=text, image_token_index=0,
        vision_feature_select_strategy=strategy, vision_feature_layer=tower.select_layer,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    left = model.model.vision_tower.load_state_dict(tower.vision_model.state_dict(), strict=False)
    assert not left.unexpected_keys and all(key.startswith("pooler.") for key in left.missing_keys)
    model.model.multi_modal_projector = torch.nn.Identity()
    words = Tokenizer(models.WordLevel({"<image>": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", pad_token="?")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    processor = LlavaProcessor(
        image_processor=tower.image_processor, tokenizer=tokenizer, patch_size=tower.patch_size,
        vision_feature_select_strategy=strategy, num_additional_image_tokens=tower.num_prefix_tokens,
    )  # fmt: skip
    return model, processor


def check_stock_llava(tower: Tower) -> None:
    """A stock LLaVA in training mode reads the tower's own features of a picture, and reserves as many tokens for it."""
    model, processor = stock_llava(tower)
    model.train()
    batch = processor(images=picture(), text="<image> ?", return_tensors="pt")
    assert int((batch["input_ids"] == 0).sum()) == tower.num_image_tokens
    for layer in (-2, -1, 1):
        with torch.no_grad():
            found = model.model.get_image_features(batch["pixel_values"], vision_feature_layer=layer).pooler_output
        torch.testing.assert_close(found[0], tower.features(batch["pixel_values"], layer)[0], rtol=1e-5, atol=1e-5)
    assert model(**batch).logits.shape[1] == tower.num_image_tokens + 1
    # Servers count an image's tokens from its size and the processor alone.
    counted = processor._get_num_multimodal_tokens(image_sizes=[(50, 70)])
    assert counted.num_image_tokens == [tower.num_image_tokens]


# ----------------------------------------------------------------------------------------------------------- hf: models


@pytest.mark.parametrize("kind", HF)
def test_features_equal_the_librarys_hidden_states(tmp_path: Path, kind: str) -> None:
    reference, (prefix, registers) = save_hf(tmp_path, kind), HF[kind]
    tower = load_tower(f"hf:{tmp_path}")
    pixels = torch.randn(2, 3, 48, 48)
    states = hidden_states(reference, pixels)
    assert len(states) == 3
    for layer in LAYERS:
        assert torch.equal(tower.features(pixels, layer), states[layer][:, prefix - registers :])
        assert torch.equal(tower.features(pixels, layer, class_token=True), states[layer])
    assert torch.equal(tower.features(pixels), tower.features(pixels, -2))
    assert tower.features(pixels).shape == (2, 36 + registers, 64)


@pytest.mark.parametrize("kind", HF)
def test_a_stock_llava_around_the_carrier_reads_the_same(tmp_path: Path, kind: str) -> None:
    save_hf(tmp_path, kind)
    check_stock_llava(load_tower(f"hf:{tmp_path}"))


@pytest.mark.parametrize("kind", HF)
def test_pixels_equal_the_librarys(tmp_path: Path, kind: str) -> None:
    save_hf(tmp_path, kind)
    tower = load_tower(f"hf:{tmp_path}")
    for width, height in ((70, 50), (31, 77), (48, 48)):
        expected = PROCESSORS[kind](48)(picture(width, height), return_tensors="pt")["pixel_values"]
        found = tower.image_processor(picture(width, height), return_tensors="pt")["pixel_values"]
        assert found.shape == (1, 3, 48, 48)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", HF)
def test_a_tower_declares_itself(tmp_path: Path, kind: str) -> None:
    save_hf(tmp_path, kind)
    tower = load_tower(f"hf:{tmp_path}", select_layer=-1)
    prefix, registers = HF[kind]
    assert (tower.image_size, tower.patch_size, tower.num_image_tokens) == (48, 8, 36 + registers)
    assert (tower.num_prefix_tokens, tower.num_register_tokens) == (prefix, registers)
    assert (tower.hidden_size, tower.num_layers, tower.select_layer) == (64, 2, -1)
    assert tower.weight_hash == sha256_file(tmp_path / "model.safetensors")
    text = tower.describe()
    for part in (f"hf:{tmp_path}", "48 × 48 pixels in patches of 8", "2 blocks of width 64", tower.weight_hash,
                 f"{36 + registers} image tokens", "-1 of hidden states 0 … 2", PROCESSOR_TEXT[kind]):  # fmt: skip
        assert part in text, part
    assert ("register" in text) == (registers > 0)
    assert not any(parameter.requires_grad for parameter in tower.vision_model.parameters())


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("form", ["safetensors", "bin", "parts"])
def test_of_a_dual_encoder_the_vision_part_is_read(tmp_path: Path, kind: str, form: str) -> None:
    small = {**WIDTH, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    Config, Model = (
        (transformers.CLIPConfig, transformers.CLIPModel)
        if kind == "clip"
        else (transformers.SiglipConfig, transformers.SiglipModel)
    )
    torch.manual_seed(0)
    model = randomise(Model(Config(text_config=small, vision_config={**SIZE, **WIDTH})).eval())
    model.save_pretrained(tmp_path, max_shard_size="100KB" if form == "parts" else "1GB")
    PROCESSORS[kind](48).save_pretrained(tmp_path)
    if form == "parts":
        assert not (tmp_path / "model.safetensors").exists()
    if form == "bin":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    tower = load_tower(f"hf:{tmp_path}")
    pixels = torch.randn(1, 3, 48, 48)
    expected = hidden_states(model.vision_model, pixels)[-2][:, HF[kind][0] :]
    assert torch.equal(tower.features(pixels), expected)


def test_a_classifier_of_pictures_is_a_tower_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**SIZE, **WIDTH)).eval()
    model.save_pretrained(tmp_path)
    PROCESSORS["vit"](48).save_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 48, 48)
    expected = hidden_states(model, pixels)[-2][:, 1:]
    assert torch.equal(load_tower(f"hf:{tmp_path}").features(pixels), expected)


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("ran",)


def test_weights_that_hold_more_than_tensors_are_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tower(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"layernorm.weight": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin cannot be read as plain tensors"):
        load_tower(f"hf:{tmp_path}")
    assert "ran" not in capsys.readouterr().out


def test_a_features_batch_equals_its_single_pictures(tmp_path: Path) -> None:
    tower = load_tower(f"hf:{save_tower(tmp_path)}")
    pixels = torch.randn(3, 3, 48, 48)
    singles = torch.cat([tower.features(pixels[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(tower.features(pixels), singles, rtol=1e-5, atol=1e-5)


def test_there_is_no_such_layer(tmp_path: Path) -> None:
    tower = load_tower(f"hf:{save_tower(tmp_path)}")
    with pytest.raises(InputError, match=r"select_layer 3: .*0 … 2, or -3 … -1"):
        tower.features(torch.zeros(1, 3, 48, 48), 3)
    with pytest.raises(InputError, match=r"select_layer -4: .*0 … 2"):
        load_tower(f"hf:{tmp_path}", select_layer=-4)


def hub(cache: Path, name: str) -> Path:
    """The folder in a hub cache that a repository's one commit lies in."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c" * 40)
    return repository / "snapshots" / ("c" * 40)


def test_a_name_on_the_hub_comes_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    folder = hub(tmp_path, "LAB/tower")
    save_tower(folder)
    for spec in ("hf:LAB/tower", f"hf:LAB/tower@{'c' * 40}"):
        assert load_tower(spec).weight_hash == sha256_file(folder / "model.safetensors")
    with pytest.raises(InputError, match=r"LAB/other: neither a folder here nor .*hf download LAB/other"):
        load_tower("hf:LAB/other")


# ------------------------------------------------------------------------------------------------- another resolution


@pytest.mark.parametrize("kind", HF)
def test_another_resolution_is_the_librarys_own_interpolation(tmp_path: Path, kind: str) -> None:
    reference = save_hf(tmp_path, kind)
    tower, registers = load_tower(f"hf:{tmp_path}", image_size=80), HF[kind][1]
    options = {"interpolate_pos_encoding": True} if kind in ("vit", "clip", "siglip") else {}
    pixels = torch.randn(2, 3, 80, 80)
    states = hidden_states(reference, pixels, **options)
    for layer in LAYERS:
        expected = states[layer][:, HF[kind][0] - registers :]
        torch.testing.assert_close(tower.features(pixels, layer), expected, rtol=1e-5, atol=1e-5)
    assert (tower.image_size, tower.num_image_tokens) == (80, 100 + registers)
    expected = PROCESSORS[kind](80)(picture(), return_tensors="pt")["pixel_values"]
    assert torch.equal(tower.image_processor(picture(), return_tensors="pt")["pixel_values"], expected)
    check_stock_llava(tower)


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_registers"])
def test_dinov2_is_as_large_as_its_processors_pictures(tmp_path: Path, kind: str) -> None:
    """Published at 518 px with an image processor for 224: the model interpolates while it runs, and in a LLaVA too."""
    reference = save_hf(tmp_path, kind, processor_size=48, image_size=112)
    tower = load_tower(f"hf:{tmp_path}")
    assert (tower.image_size, tower.vision_model.config.image_size) == (48, 48)
    pixels = torch.randn(1, 3, 48, 48)
    torch.testing.assert_close(tower.features(pixels), hidden_states(reference, pixels)[-2][:, 1:])
    check_stock_llava(tower)


def test_an_exported_tower_is_the_tower(tmp_path: Path) -> None:
    save_hf(tmp_path / "own", "clip")
    tower = load_tower(f"hf:{tmp_path / 'own'}", image_size=80)
    export_tower(tower, tmp_path / "new")
    again = load_tower(f"hf:{tmp_path / 'new'}")
    pixels = torch.randn(1, 3, 80, 80)
    assert torch.equal(again.features(pixels), tower.features(pixels))
    assert json.loads((tmp_path / "new" / "manifest.json").read_text())["inputs"] == {"tower": tower.weight_hash}
    assert torch.equal(
        again.image_processor(picture(), return_tensors="pt")["pixel_values"],
        tower.image_processor(picture(), return_tensors="pt")["pixel_values"],
    )
    with pytest.raises(InputError, match="holds something already"):
        export_tower(tower, tmp_path / "new")


@pytest.mark.parametrize(("size", "message"), [(50, "not a multiple of the patch size 8"), (0, "at least 1")])
def test_impossible_resolutions(tmp_path: Path, size: int, message: str) -> None:
    save_hf(tmp_path, "vit")
    with pytest.raises(InputError, match=message):
        load_tower(f"hf:{tmp_path}", image_size=size)


# ---------------------------------------------------------------------------------------------------- clips: run folders


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished pretraining run with its exports, at 48 px."""
    folder = tmp_path_factory.mktemp("run")
    train_vocab(["a red heart above a blue star!"], folder / "vocab.txt")
    small = TransformerConfig(width=64, layers=2, heads=4)
    config = ModelConfig(48, 8, small, small, embed_dim=32, context_length=20, vocab_size=300)
    torch.manual_seed(0)
    model = CLIPS(config)
    for name, value in model.named_parameters():
        if name != "visual.positional_embedding":
            value.data += 0.05 * torch.randn_like(value)
    export(model, ClipsTokenizer(folder / "vocab.txt"), folder / "export")
    write_manifest(folder, "pretrain", {}, {}, {})
    return folder


def check_clips(tower: Tower, run: Path, size: int) -> None:
    model, _ = load_open_clip(run, None if size == 48 else size)
    pixels = tower.image_processor(picture(), return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, normalise(torch.from_numpy(to_pixels(picture(), size)))[None])
    with torch.no_grad():
        blocks = model.visual.forward_intermediates(pixels, output_fmt="NLC", intermediates_only=True)
    for layer, expected in enumerate(blocks["image_intermediates"], start=1):
        torch.testing.assert_close(tower.features(pixels, layer), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", ["", "export", "export/hf", "export/open_clip"])
@pytest.mark.parametrize("size", [None, 64])
def test_a_run_and_its_exports_are_the_same_tower(run: Path, place: str, size: int | None) -> None:
    tower = load_tower(f"clips:{run / place}", size)
    check_clips(tower, run, size or 48)
    assert type(tower.vision_model).__name__ == "ViTModel"
    if size is None:
        assert tower.weight_hash == sha256_file(run / "export" / "hf" / "model.safetensors")


def test_clips_on_the_hub(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    folder = hub(tmp_path, "LAB/CLIPS")
    folder.mkdir(parents=True)
    for file in (run / "export" / "open_clip").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tower = load_tower("clips:hf-hub:LAB/CLIPS")
    assert tower.weight_hash == load_tower(f"clips:{run}").weight_hash
    check_stock_llava(tower)


def test_clips_as_open_clip_sees_it(run: Path) -> None:
    """open_clip knows the layout too; at the stored resolution the two kinds agree."""
    pixels = torch.randn(1, 3, 48, 48)
    found = load_tower(f"open_clip:{run}/export/open_clip").features(pixels)
    torch.testing.assert_close(found, load_tower(f"clips:{run}").features(pixels), rtol=1e-5, atol=1e-5)


def make_run(folder: Path) -> Path:
    save_tower(folder / "export" / "hf")
    write_manifest(folder, "pretrain", {}, {}, {})
    return folder


def test_an_export_that_is_not_the_runs_own_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    old = sha256_file(run / "export/hf/model.safetensors")
    make_vision_model("vit", hidden_size=32).save_pretrained(run / "export/hf")
    with pytest.raises(
        InputError, match=rf"its hash is {sha256_file(run / 'export/hf/model.safetensors')}, but .* {old}"
    ):
        load_tower(f"clips:{run}")


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    save_tower(tmp_path / "export" / "hf")
    with pytest.raises(InputError, match=r"no manifest\.json"):
        load_tower(f"clips:{tmp_path}")


# ------------------------------------------------------------------------------------------------------------ open_clip:


@timm.models.register_model
def vit_tiny_siglip(pretrained: bool = False, **options: Any) -> TimmViT:
    return tiny_timm(class_token=False, **options)


@timm.models.register_model
def vit_tiny_siglip_tanh(pretrained: bool = False, **options: Any) -> TimmViT:
    return tiny_timm(class_token=False, act_layer="gelu_tanh", **options)


@timm.models.register_model
def vit_tiny_clip(pretrained: bool = False, **options: Any) -> TimmViT:
    return tiny_timm(pre_norm=True, norm_layer=timm.layers.LayerNorm, act_layer="quick_gelu", **options)


@timm.models.register_model
def vit_tiny_plain(pretrained: bool = False, **options: Any) -> TimmViT:
    return tiny_timm(**options)


@timm.models.register_model
def vit_tiny_registers(pretrained: bool = False, **options: Any) -> TimmViT:
    return tiny_timm(reg_tokens=2, **options)


@timm.models.register_model
def vit_tiny_qk_norm(pretrained: bool = False, **options: Any) -> TimmViT:
    return tiny_timm(qk_norm=True, **options)


@timm.models.register_model
def vit_tiny_norm_without_class(pretrained: bool = False, **options: Any) -> TimmViT:
    return tiny_timm(class_token=False, pre_norm=True, **options)


def tiny_timm(**options: Any) -> TimmViT:
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        options.pop(name, None)
    if options.get("global_pool") is None:
        options["global_pool"] = "avg"
    model = TimmViT(**{"img_size": 48, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, **options})
    model.default_cfg = model.pretrained_cfg = {"input_size": (3, 48, 48)}
    return model


OWN = {**SIZE, "width": 64, "layers": 2, "head_width": 16}
TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}


def timm_tower(name: str, **options: Any) -> dict[str, Any]:
    return {"vision_cfg": {"timm_model_name": name, "image_size": 48, "timm_pool": "", **options}}


SIGLIP = {"timm_pool": "map", "timm_proj": "none"}
# Kinds of open_clip models: what its config has besides sizes, its preprocessing, and the carrier that takes it.
OPEN_CLIP: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "openai": ({"quick_gelu": True, "vision_cfg": OWN}, {}, "CLIPVisionModel"),
    "laion": ({"vision_cfg": {**OWN, "mlp_ratio": 4.5}}, {"mean": [0.5] * 3, "std": [0.5] * 3}, "CLIPVisionModel"),
    "clipa": (
        {"vision_cfg": {**OWN, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}},
        {"interpolation": "bilinear", "resize_mode": "squash"},
        "ViTModel",
    ),
    "eps_tanh": (
        {"vision_cfg": {**OWN, "norm_kwargs": {"eps": 1e-3}, "act_kwargs": {"approximate": "tanh"}}}, {}, "CLIPVisionModel",
    ),
    "coca": ({"vision_cfg": {**OWN, "attentional_pool": True, "attn_pooler_heads": 4}}, {}, "CLIPVisionModel"),
    "siglip": (timm_tower("vit_tiny_siglip", **SIGLIP), {"resize_mode": "squash"}, "SiglipVisionModel"),
    "siglip_tanh": (timm_tower("vit_tiny_siglip_tanh", **SIGLIP), {"resize_mode": "squash"}, "SiglipVisionModel"),
    "timm_clip": (timm_tower("vit_tiny_clip"), {}, "CLIPVisionModel"),
    "timm_plain": (timm_tower("vit_tiny_plain"), {}, "ViTModel"),
}  # fmt: skip


def save_open_clip(folder: Path, model: dict[str, Any], preprocess: dict[str, Any]) -> torch.nn.Module:
    """A model with random weights in open_clip's local-dir layout, as open_clip loads it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": {"embed_dim": 32, "text_cfg": TEXT, **copy.deepcopy(model)}, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    stock = randomise(open_clip.create_model(f"local-dir:{folder}"))
    torch.save(stock.state_dict(), folder / "open_clip_pytorch_model.bin")
    loaded = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).eval()
    torch.testing.assert_close(loaded.state_dict(), stock.state_dict())
    return loaded


def check_open_clip(tower: Tower, stock: Any, size: int) -> None:
    """Pixels and every block's patch tokens, with and without the class token, beside open_clip's own."""
    transform = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**stock.visual.preprocess_cfg), is_train=False
    )
    for width, height in ((64, 48), (48, 90), (30, 40), (size, size), (size + 1, size)):
        expected = transform(picture(width, height))[None]
        pixels = tower.image_processor(picture(width, height), return_tensors="pt")["pixel_values"]
        assert torch.equal(pixels, expected), (width, height)
    with torch.no_grad():
        output = stock.visual.forward_intermediates(
            pixels, output_fmt="NLC", intermediates_only=True, output_extra_tokens=True
        )
    for layer, expected in enumerate(output["image_intermediates"], start=1):
        torch.testing.assert_close(tower.features(pixels, layer), expected, rtol=1e-5, atol=1e-5)
        if tower.num_prefix_tokens:
            class_token = output["image_intermediates_prefix"][layer - 1]
            found = tower.features(pixels, layer, class_token=True)[:, :1]
            torch.testing.assert_close(found, class_token, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", OPEN_CLIP)
def test_open_clip_models_equal_open_clip(tmp_path: Path, kind: str) -> None:
    model, preprocess, carrier = OPEN_CLIP[kind]
    stock = save_open_clip(tmp_path, model, preprocess)
    tower = load_tower(f"open_clip:{tmp_path}")
    assert type(tower.vision_model).__name__ == carrier
    assert tower.weight_hash == sha256_file(tmp_path / "open_clip_pytorch_model.bin")
    check_open_clip(tower, stock, 48)
    check_stock_llava(tower)


@pytest.mark.parametrize("kind", ["openai", "clipa", "siglip", "timm_clip"])
def test_open_clip_at_another_resolution(tmp_path: Path, kind: str) -> None:
    model, preprocess, _ = OPEN_CLIP[kind]
    save_open_clip(tmp_path, model, preprocess)
    stock = open_clip.create_model(f"local-dir:{tmp_path}", force_image_size=64).eval()
    tower = load_tower(f"open_clip:{tmp_path}", image_size=64)
    assert (tower.image_size, tower.num_image_tokens) == (64, 64)
    check_open_clip(tower, stock, 64)
    with pytest.raises(InputError, match="image_size 50 is not a multiple of the patch size 8"):
        load_tower(f"open_clip:{tmp_path}", image_size=50)


def test_quick_gelu_matters(tmp_path: Path) -> None:
    """The commonest silent error: the same weights with the other activation give other features."""
    for name, quick in (("a", True), ("b", False)):
        save_open_clip(tmp_path / name, {"quick_gelu": quick, "vision_cfg": OWN}, {})
    towers = [load_tower(f"open_clip:{tmp_path / name}") for name in "ab"]
    assert [tower.vision_model.config.hidden_act for tower in towers] == ["quick_gelu", "gelu"]
    pixels = torch.randn(1, 3, 48, 48)
    assert (towers[0].features(pixels) - towers[1].features(pixels)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("arch", "carrier", "activation", "eps"),
    [
        ("ViT-L-14-336", "clip_vision_model", "gelu", 1e-5),
        ("ViT-L-14-336-quickgelu", "clip_vision_model", "quick_gelu", 1e-5),
        ("coca_ViT-L-14", "clip_vision_model", "gelu", 1e-5),
        ("MobileCLIP2-L-14", "clip_vision_model", "gelu", 1e-5),
        ("ViT-L-14-CLIPA", "vit", "gelu", 1e-5),
        ("ViT-SO400M-14-SigLIP-384", "siglip_vision_model", "gelu", 1e-6),
        ("ViT-gopt-16-SigLIP2-384", "siglip_vision_model", "gelu_pytorch_tanh", 1e-6),
        ("EVA02-L-14", None, "Eva is no plain ViT", 0),
        ("PE-Core-L-14-336", None, "Eva is no plain ViT", 0),
        ("ViTamin-L", None, "no plain convolution", 0),
        ("vit_medium_patch16_gap_256", None, "LayerScale", 0),
    ],
)
def test_open_clips_own_architectures(arch: str, carrier: str | None, activation: str, eps: float) -> None:
    """At their real sizes, without weights: which carrier is chosen, and with which settings."""
    config = open_clip.get_model_config(arch)
    with torch.device("meta"):
        visual = open_clip.model._build_vision_tower(
            config["embed_dim"], config["vision_cfg"], config.get("quick_gelu", False)
        )
    if carrier is None:
        with pytest.raises(InputError, match=activation):
            plain_vit(visual)
        return
    found, _ = to_hf(plain_vit(visual))
    assert (found.model_type, found.hidden_act, found.layer_norm_eps) == (carrier, activation, eps)
    assert found.image_size == config["vision_cfg"]["image_size"]


def test_a_centre_crop_may_lie_one_pixel_beside_torchvisions(tmp_path: Path) -> None:
    """The one difference from open_clip: torchvision rounds half a pixel to even, transformers down; at an excess of 3, 7, …"""
    stock = save_open_clip(tmp_path, *OPEN_CLIP["laion"][:2])
    transform = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**stock.visual.preprocess_cfg), is_train=False
    )
    processor = load_tower(f"open_clip:{tmp_path}").image_processor
    for excess in range(9):
        expected = transform(picture(48 + excess, 48))
        found = processor(picture(48 + excess, 48), return_tensors="pt")["pixel_values"][0]
        if excess % 4 == 3:
            assert torch.equal(found[..., 1:], expected[..., :-1])
        else:
            assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("model", "preprocess", "message"),
    [
        ({"vision_cfg": {**OWN, "ls_init_value": 1e-4}}, {}, "LayerScale"),
        ({"vision_cfg": {**OWN, "block_type": "custom", "qk_norm": True}}, {}, "CustomResidualAttentionBlock"),
        ({"vision_cfg": {**OWN, "layers": [1, 1, 1, 1], "width": 16}}, {}, r"ModifiedResNet is no plain ViT"),
        (timm_tower("test_convnext", image_size=160), {}, r"ConvNeXt is no plain ViT"),
        (timm_tower("vit_tiny_registers"), {}, "register tokens"),
        (timm_tower("vit_tiny_qk_norm"), {}, "norm of queries and keys"),
        (timm_tower("vit_tiny_norm_without_class"), {}, "LayerNorm before the blocks and no class token"),
        ({"vision_cfg": OWN}, {"resize_mode": "longest"}, "resize_mode 'longest', which pads"),
        ({"vision_cfg": OWN}, {"interpolation": "random"}, "interpolation 'random'"),
    ],
)
def test_open_clip_models_without_a_carrier(
    tmp_path: Path, model: dict[str, Any], preprocess: dict[str, Any], message: str
) -> None:
    save_open_clip(tmp_path, model, preprocess)
    with pytest.raises(InputError, match=f"{re.escape(str(tmp_path))}.*{message}"):
        load_tower(f"open_clip:{tmp_path}")


def test_open_clips_list_of_pretrained_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for quick, name in ((False, "ViT-Ti-8"), (True, "ViT-Ti-8-quickgelu")):
        config = {"embed_dim": 32, "vision_cfg": OWN, "text_cfg": TEXT, "quick_gelu": quick}
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)
    stock = save_open_clip(tmp_path, {"vision_cfg": OWN, "quick_gelu": True}, {})
    weights = str(tmp_path / "open_clip_pytorch_model.bin")
    tags = {"lab": {"file": weights, "quick_gelu": True, "mean": (0.4, 0.5, 0.6), "interpolation": "bilinear"}}
    for name in ("ViT-Ti-8", "ViT-Ti-8-quickgelu"):
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, tags)
    tower = load_tower("open_clip:ViT-Ti-8-quickgelu/lab")
    assert list(tower.image_processor.image_mean) == [0.4, 0.5, 0.6]
    pixels = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        expected = stock.visual.forward_intermediates(pixels, intermediates_only=True, output_fmt="NLC")
    torch.testing.assert_close(tower.features(pixels), expected["image_intermediates"][0], rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match=r"trained with QuickGELU.*write open_clip:ViT-Ti-8-quickgelu/lab"):
        load_tower("open_clip:ViT-Ti-8/lab")
    with pytest.raises(InputError, match=r"no weights 'other' for ViT-Ti-8 \(it has: lab\)"):
        load_tower("open_clip:ViT-Ti-8/other")
    with pytest.raises(InputError, match=r"no architecture 'ViT-Ti-9' \(nearest: .*ViT-Ti-8"):
        load_tower("open_clip:ViT-Ti-9/lab")


def test_open_clip_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    folder = hub(tmp_path, "LAB/ViT")
    stock = save_open_clip(folder, *OPEN_CLIP["laion"][:2])
    check_open_clip(load_tower("open_clip:hf-hub:LAB/ViT"), stock, 48)


def test_open_clip_never_starts_at_random(tmp_path: Path) -> None:
    save_open_clip(tmp_path, {"vision_cfg": OWN}, {})
    weights = tmp_path / "open_clip_pytorch_model.bin"
    state = torch.load(weights, weights_only=True)
    del state["visual.ln_pre.weight"]
    torch.save(state, weights)
    with pytest.raises(InputError, match=r"open_clip cannot load it .*visual\.ln_pre\.weight"):
        load_tower(f"open_clip:{tmp_path}")
    torch.save({"x": Payload()}, weights)
    with pytest.raises(InputError, match=r"open_clip cannot load it .*[Ww]eights.only"):
        load_tower(f"open_clip:{tmp_path}")
    weights.unlink()
    with pytest.raises(InputError, match=r"has none of open_clip_model\.safetensors"):
        load_tower(f"open_clip:{tmp_path}")


# -------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("clip:somewhere", r"one of clips, open_clip, hf \(did you mean 'clips:somewhere'\?\)"),
        ("openclip:ViT-B-32/openai", r"did you mean 'open_clip:ViT-B-32/openai'\?"),
        ("ViT-B-32/openai", r"write KIND:NAME.*did you mean 'open_clip:ViT-B-32/openai'\?"),
        ("openai/clip-vit-large-patch14-336", r"did you mean 'hf:openai/clip-vit-large-patch14-336'\?"),
        ("hf-hub:UCSC-VLAA/ViT-L-14-CLIPS-224", r"did you mean 'clips:hf-hub:UCSC-VLAA/ViT-L-14-CLIPS-224'\?"),
        ("hf-hub:laion/CLIP-ViT-L-14", r"did you mean 'open_clip:hf-hub:laion/CLIP-ViT-L-14'\?"),
        ("/nowhere/at/all", r"one of clips, open_clip, hf$"),
        ("", r"one of clips, open_clip, hf$"),
        ("hf:", "names no folder"),
        ("hf:/nowhere/at/all", "/nowhere/at/all: no such folder"),
        ("clips:/nowhere/at/all", "/nowhere/at/all: no such folder"),
        ("open_clip:nowhere", r"nowhere: no such folder .*ARCH/PRETRAINED"),
    ],
)
def test_bad_specs(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_tower(spec)


def test_a_bare_folders_kind_is_guessed(run: Path, tmp_path: Path) -> None:
    save_tower(tmp_path / "hf")
    save_open_clip(tmp_path / "laion", *OPEN_CLIP["laion"][:2])
    for folder, kind in (
        (run, "clips"), (run / "export", "clips"), (run / "export/open_clip", "clips"),
        (tmp_path / "laion", "open_clip"), (tmp_path / "hf", "hf"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"did you mean '{kind}:{re.escape(str(folder))}'"):
            load_tower(str(folder))
        load_tower(f"{kind}:{folder}")


def test_a_new_kind_is_one_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tower(tmp_path / "siglip", "siglip")
    monkeypatch.setitem(KINDS, "mine", lambda name, image_size: KINDS["hf"](str(tmp_path / name), image_size))
    tower = load_tower("mine:siglip")
    assert tower == dataclasses.replace(tower, spec="mine:siglip") and tower.num_prefix_tokens == 0


def change_config(folder: Path, file: str, **changes: object) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, file: str) -> None:
    (save_tower(tmp_path) / file).unlink()
    with pytest.raises(InputError, match=f"has no {file}"):
        load_tower(f"hf:{tmp_path}")


def test_another_model_type_is_refused(tmp_path: Path) -> None:
    change_config(save_tower(tmp_path), "config.json", model_type="bert")
    with pytest.raises(InputError, match=r"model type 'bert'.*vit, clip_vision_model, siglip_vision_model, dinov2"):
        load_tower(f"hf:{tmp_path}")


def test_naflex_is_refused_with_the_reason(tmp_path: Path) -> None:
    save_tower(tmp_path)
    for config in (transformers.Siglip2VisionConfig(), transformers.Siglip2Config()):
        config.save_pretrained(tmp_path)
        with pytest.raises(InputError, match=r"NaFlex reads pictures that were cut .* take a SigLIP 2 of fixed"):
            load_tower(f"hf:{tmp_path}")


def test_a_processor_of_another_size_is_refused(tmp_path: Path) -> None:
    size = {"height": 56, "width": 56}
    change_config(save_tower(tmp_path), "preprocessor_config.json", size=size, crop_size=size)
    with pytest.raises(InputError, match=r"pictures of \(56, 56\) pixels, but its config says 48 × 48"):
        load_tower(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"hidden_size": 32}, "does not fit"),
        ({"num_hidden_layers": 3}, "lacks"),  # nothing is drawn at random
        ({"num_hidden_layers": 1}, "has unknown"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(tmp_path: Path, changes: dict[str, int], what: str) -> None:
    change_config(save_tower(tmp_path), "config.json", **changes)
    with pytest.raises(InputError, match=rf"model\.safetensors {what}"):
        load_tower(f"hf:{tmp_path}")


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    weights = save_tower(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"model\.safetensors does not fit"):
        load_tower(f"hf:{tmp_path}")
