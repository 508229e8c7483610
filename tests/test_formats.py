"""Exports against stock open_clip and stock transformers, in features and preprocessing."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, ViTModel

from clips_core.data import to_pixels
from clips_core.formats import export
from clips_core.model import CLIPS
from clips_core.tokenizer import ClipsTokenizer, train_vocab
from clips_core.zero_shot import normalise
from tests.test_model import tiny_config


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[CLIPS, ClipsTokenizer, Path]:
    folder = tmp_path_factory.mktemp("export")
    train_vocab(["a red heart above a blue star!"], folder / "small_vocab.txt")
    torch.manual_seed(0)
    model = CLIPS(tiny_config())
    for value in model.parameters():
        value.data += 0.05 * torch.randn_like(value)
    tokenizer = ClipsTokenizer(folder / "small_vocab.txt")
    export(model, tokenizer, folder)
    return model.eval(), tokenizer, folder


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (45, 70, 3), dtype=np.uint8))


@torch.no_grad()
def test_stock_open_clip_opens_the_folder(exported: tuple[CLIPS, ClipsTokenizer, Path]) -> None:
    model, tokenizer, folder = exported
    name = f"local-dir:{folder / 'open_clip'}"
    stock, _, preprocess = open_clip.create_model_and_transforms(name)
    stock.eval()
    texts = ["A red heart", "a blue star above", ""]
    ids = open_clip.get_tokenizer(name)(texts)
    assert ids.tolist() == tokenizer.encode(texts, 12).tolist()
    pixels = normalise(torch.from_numpy(to_pixels(picture(), 32)))
    torch.testing.assert_close(preprocess(picture()), pixels, atol=1e-6, rtol=0)
    torch.testing.assert_close(stock.encode_image(pixels[None]), model.visual(pixels[None])[0])
    torch.testing.assert_close(stock.encode_text(ids), model.text(ids)[0])
    torch.testing.assert_close(stock.logit_scale, model.logit_scale)


@torch.no_grad()
def test_vit_model_carries_the_tower_exactly(exported: tuple[CLIPS, ClipsTokenizer, Path]) -> None:
    model, _, folder = exported
    vit, info = ViTModel.from_pretrained(
        folder / "hf", add_pooling_layer=False, output_loading_info=True, dtype=torch.float64
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    visual = CLIPS(model.config).double()
    visual.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    states = vit.eval()(pixels, output_hidden_states=True).hidden_states
    feature, tokens = visual.visual(pixels)
    torch.testing.assert_close(states[-1][:, 1:], tokens, rtol=1e-10, atol=1e-10)
    between = visual.visual.forward_intermediates(pixels, indices=2, output_fmt="NLC")["image_intermediates"][0]
    torch.testing.assert_close(states[-2][:, 1:], between, rtol=1e-10, atol=1e-10)
    proj = load_file(folder / "hf" / "clips_sidecar.safetensors")["proj"].double()
    torch.testing.assert_close(vit.layernorm(states[-1][:, 1:].mean(1)) @ proj, feature, rtol=1e-10, atol=1e-10)


def test_hf_processor_equals_ours(exported: tuple[CLIPS, ClipsTokenizer, Path]) -> None:
    processor = AutoImageProcessor.from_pretrained(exported[2] / "hf", backend="pil")
    pixels = processor(picture(), return_tensors="pt").pixel_values[0]
    expected = normalise(torch.from_numpy(to_pixels(picture(), 32)))
    torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)
