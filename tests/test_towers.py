"""Towers: features equal the library's own; bad specs and folders are refused with one clear error."""

import json
from pathlib import Path

import pytest
import torch
from llava_samples import make_vision_model, save_tower
from PIL import Image

from clips_core.errors import InputError
from clips_core.folders import sha256_file, write_manifest
from llava_bridge.towers import load_tower

PREFIX_TOKENS = {"vit": 1, "clip": 1, "siglip": 0, "dinov2": 1}


@pytest.mark.parametrize("kind", PREFIX_TOKENS)
def test_features_equal_the_librarys_hidden_states(tmp_path: Path, kind: str) -> None:
    tower = load_tower(f"hf:{save_tower(tmp_path, kind)}")
    reference = make_vision_model(kind)
    pixels = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        states = reference(pixels, output_hidden_states=True).hidden_states
    assert len(states) == 3
    for layer in (-3, -2, -1, 0, 1, 2):
        expected = states[layer][:, PREFIX_TOKENS[kind] :]
        assert expected.shape == (2, 36, 64)
        assert torch.equal(tower.features(pixels, layer), expected)


@pytest.mark.parametrize("kind", PREFIX_TOKENS)
def test_a_tower_declares_itself(tmp_path: Path, kind: str) -> None:
    tower = load_tower(f"hf:{save_tower(tmp_path, kind)}")
    assert (tower.image_size, tower.patch_size, tower.num_image_tokens) == (48, 8, 36)
    assert (tower.hidden_size, tower.num_layers, tower.num_prefix_tokens) == (64, 2, PREFIX_TOKENS[kind])
    assert tower.weight_hash == sha256_file(tmp_path / "model.safetensors")
    assert tower.weight_hash in tower.describe()
    assert not any(parameter.requires_grad for parameter in tower.vision_model.parameters())
    assert tower.image_processor(Image.new("RGB", (31, 77)), return_tensors="pt")["pixel_values"].shape == (
        1,
        3,
        48,
        48,
    )


def test_a_features_batch_equals_its_single_pictures(tmp_path: Path) -> None:
    tower = load_tower(f"hf:{save_tower(tmp_path)}")
    pixels = torch.randn(3, 3, 48, 48)
    singles = torch.cat([tower.features(pixels[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(tower.features(pixels), singles, rtol=1e-5, atol=1e-5)


def test_there_is_no_such_layer(tmp_path: Path) -> None:
    tower = load_tower(f"hf:{save_tower(tmp_path)}")
    with pytest.raises(InputError, match=r"select_layer 3: .*0 … 2, or -3 … -1"):
        tower.features(torch.zeros(1, 3, 48, 48), 3)


# ---------------------------------------------------------------------------------------------------- clips: run folders


def make_run(folder: Path) -> Path:
    save_tower(folder / "export" / "hf")
    write_manifest(folder, "pretrain", {}, {}, {})
    return folder


def test_a_run_folder_and_its_export_are_the_same_tower(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert load_tower(f"clips:{run}").weight_hash == load_tower(f"clips:{run}/export/hf").weight_hash


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


# -------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("clip:somewhere", r"one of clips, hf \(did you mean 'clips'\?\)"),
        ("runs/clips", "write KIND:FOLDER"),
        ("hf:", "names no folder"),
        ("hf:/nowhere/at/all", "/nowhere/at/all: no such folder"),
        ("clips:/nowhere/at/all", "/nowhere/at/all: no such folder"),
    ],
)
def test_bad_specs(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_tower(spec)


def change_config(folder: Path, file: str, **changes: object) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (save_tower(tmp_path) / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"has no preprocessor_config\.json"):
        load_tower(f"hf:{tmp_path}")


def test_another_model_type_is_refused(tmp_path: Path) -> None:
    change_config(save_tower(tmp_path), "config.json", model_type="bert")
    with pytest.raises(InputError, match=r"model type 'bert'.*vit, clip_vision_model, siglip_vision_model, dinov2"):
        load_tower(f"hf:{tmp_path}")


def test_a_processor_of_another_size_is_refused(tmp_path: Path) -> None:
    size = {"height": 56, "width": 56}
    change_config(save_tower(tmp_path), "preprocessor_config.json", size=size, crop_size=size)
    with pytest.raises(InputError, match=r"pictures of \(56, 56\) pixels, but its config says 48 × 48"):
        load_tower(f"hf:{tmp_path}")


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path: Path) -> None:
    change_config(save_tower(tmp_path), "config.json", hidden_size=32)
    with pytest.raises(InputError, match=r"model\.safetensors does not fit"):
        load_tower(f"hf:{tmp_path}")


def test_missing_weights_are_not_drawn_at_random(tmp_path: Path) -> None:
    change_config(save_tower(tmp_path), "config.json", num_hidden_layers=3)
    with pytest.raises(InputError, match=r"model\.safetensors lacks"):
        load_tower(f"hf:{tmp_path}")


def test_left_over_weights_are_refused(tmp_path: Path) -> None:
    change_config(save_tower(tmp_path), "config.json", num_hidden_layers=1)
    with pytest.raises(InputError, match=r"model\.safetensors has unknown"):
        load_tower(f"hf:{tmp_path}")


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    weights = save_tower(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"model\.safetensors does not fit"):
        load_tower(f"hf:{tmp_path}")
