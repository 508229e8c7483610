"""The model against the authors' own numbers, a dense-mask decoder, and stock open_clip."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clips_core.config import ModelConfig, TransformerConfig
from clips_core.errors import InputError
from clips_core.formats import jax_config, load_jax
from clips_core.model import CLIPS, DecoderBlock, decayed_parameters, open_clip_config, sin_cos_positions
from scripts.verify_reference import verify

REFERENCE = Path(__file__).parent / "data" / "clips_reference.npz"
SCRIPT = Path(__file__).parent.parent / "scripts" / "verify_reference.py"


def tiny_config() -> ModelConfig:
    return ModelConfig(
        image_size=32,
        patch_size=8,
        vision=TransformerConfig(width=32, layers=3, heads=2),
        text=TransformerConfig(width=24, layers=2, heads=2),
        decoder=TransformerConfig(width=16, layers=3, heads=2),
        embed_dim=16,
        context_length=12,
        learnable_tokens=9,
        vocab_size=150,
    )


def test_parity_with_the_authors_model() -> None:
    differences = verify(REFERENCE)
    assert {"z_img", "z_txt", "logits", "temperature", "contrastive", "caption", "loss"} <= differences.keys()
    assert sum(name.startswith("grad/") for name in differences) == 10
    assert all(difference <= 1e-5 for difference in differences.values()), differences


def test_verify_command_notices_a_wrong_parameter(tmp_path: Path) -> None:
    with np.load(REFERENCE) as archive:
        arrays = {name: archive[name] for name in archive.files}
    arrays["param/img/encoder_norm/bias"] = arrays["param/img/encoder_norm/bias"] + 0.01
    np.savez(tmp_path / "off.npz", **arrays)
    wrong = subprocess.run([sys.executable, SCRIPT, tmp_path / "off.npz"], capture_output=True, text=True)
    assert wrong.returncode == 1 and "BAD  z_img" in wrong.stdout
    (tmp_path / "text.npz").write_text("no archive")
    unusable = subprocess.run([sys.executable, SCRIPT, tmp_path / "text.npz"], capture_output=True, text=True)
    assert unusable.returncode == 2 and "text.npz" in unusable.stderr and "Traceback" not in unusable.stderr


def test_import_takes_three_dimensional_attention_kernels() -> None:
    with np.load(REFERENCE) as archive:
        flat = {name.removeprefix("param/"): archive[name] for name in archive.files if name.startswith("param/")}
        heads = {key: int(archive[f"meta/heads_{key}"]) for key in ("img", "txt", "dec")}
    config = jax_config(flat, image_size=42, heads=heads)
    split = {}
    for name, value in flat.items():
        if "MultiHeadDotProductAttention_0/out/kernel" in name:
            value = value.reshape(2, -1, value.shape[1])  # [heads, head width, out]
        elif "MultiHeadDotProductAttention_0/out/" not in name and "MultiHeadDotProductAttention_0" in name:
            value = value.reshape(*value.shape[:-1], 2, -1)  # [in, heads, head width] and [heads, head width]
        split[name] = value
    assert jax_config(split, image_size=42) == config
    models = [CLIPS(config), CLIPS(config)]
    for model, parameters in zip(models, (flat, split), strict=True):
        load_jax(model, parameters)
    for (name, a), b in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_import_refuses_what_is_missing_or_left_over() -> None:
    with np.load(REFERENCE) as archive:
        flat = {name.removeprefix("param/"): archive[name] for name in archive.files if name.startswith("param/")}
    with pytest.raises(InputError, match="two-dimensional"):
        jax_config(flat, image_size=42)
    config = jax_config(flat, image_size=42, heads={"img": 2, "txt": 2, "dec": 2})
    with pytest.raises(InputError, match="img/cls"):
        load_jax(CLIPS(config), {name: value for name, value in flat.items() if name != "img/cls"})
    with pytest.raises(InputError, match="stranger"):
        load_jax(CLIPS(config), flat | {"stranger": flat["t"]})


def dense_decoder(model: CLIPS, image_tokens: Tensor, text_tokens: Tensor) -> Tensor:
    """The caption decoder as METHOD words it: one sequence, one dense combination mask, plain softmax attention."""
    decoder = model.decoder
    assert decoder is not None
    prefix = torch.cat([decoder.image_proj(image_tokens), decoder.text_proj(text_tokens)], dim=1)
    x = torch.cat([prefix, decoder.learnable_tokens.expand(len(prefix), -1, -1)], dim=1)
    length, total = prefix.shape[1], x.shape[1]
    seen = torch.zeros(total, total, dtype=torch.bool)
    for query in range(total):
        for key in range(total):
            seen[query, key] = key < length if query < length else key <= query
    for block in decoder.blocks:
        assert isinstance(block, DecoderBlock)
        q, k, v = (
            part.unflatten(-1, (block.heads, -1)).transpose(1, 2) for part in block.in_proj(block.ln_1(x)).chunk(3, -1)
        )
        scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
        attended = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
        x = x + block.out_proj(attended.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.ln_2(x))
    return decoder.ln_final(x[:, length:])


@pytest.mark.parametrize("target_length", [1, 6, 9])
def test_decoder_equals_the_dense_mask_forward_and_backward(target_length: int) -> None:
    torch.manual_seed(0)
    model = CLIPS(tiny_config()).double()
    for value in model.parameters():  # away from the initial zeros, so that every term counts
        value.data += 0.05 * torch.randn_like(value)
    assert model.decoder is not None
    inputs = [torch.randn(2, 16, 32).double(), torch.randn(2, 11, 24).double()]
    results = []
    for fast in (True, False):
        leaves = [value.clone().requires_grad_() for value in inputs]
        run = partial(model.decoder, target_length=target_length) if fast else partial(dense_decoder, model)
        hidden = run(*leaves)[:, :target_length]
        model.zero_grad()
        (hidden * torch.arange(hidden.numel()).view(hidden.shape).cos()).sum().backward()
        gradients = [v.grad for _, v in model.decoder.named_parameters() if v.grad is not None]
        results.append([hidden, *(leaf.grad for leaf in leaves), *gradients])
    for fast_value, plain_value in zip(*results, strict=True):
        torch.testing.assert_close(fast_value, plain_value, rtol=1e-10, atol=1e-10)


def test_towers_equal_stock_open_clip() -> None:
    torch.manual_seed(1)
    config = tiny_config()
    model = CLIPS(config)
    stock = open_clip.CustomTextCLIP(**open_clip_config(config))
    missing, unexpected = stock.load_state_dict(model.state_dict(), strict=False)
    assert not missing and all(name.startswith("decoder.") for name in unexpected)
    image, texts = torch.randn(3, 3, 32, 32), torch.randint(0, 150, (3, 2, 12))
    z_img, z_txt, hidden = model(image, texts)
    assert hidden is None
    torch.testing.assert_close(z_img, stock.encode_image(image, normalize=True))
    torch.testing.assert_close(z_txt[:, 1], stock.encode_text(texts[:, 1], normalize=True))
    intermediates = stock.visual.forward_intermediates(image, indices=1, output_fmt="NLC")["image_intermediates"][-1]
    torch.testing.assert_close(model.visual(image)[1], intermediates)


def test_positions_follow_their_formula() -> None:
    width, grid = 16, 3
    positions = sin_cos_positions(grid, width)
    assert torch.equal(positions[0], torch.zeros(width))
    for y in range(grid):
        for x in range(grid):
            omega = [10_000 ** (-k / (width / 4 - 1)) for k in range(width // 4)]
            expected = [f(p * w) for p, f in ((x, np.sin), (x, np.cos), (y, np.sin), (y, np.cos)) for w in omega]
            np.testing.assert_allclose(positions[1 + y * grid + x], expected, atol=1e-6)


def test_initialisation_has_the_stated_spread() -> None:
    torch.manual_seed(0)
    wide = TransformerConfig(width=256, layers=2, heads=4)
    model = CLIPS(ModelConfig(32, 8, wide, wide, 128, wide, 16, 64, 2000))
    state, d, n = model.state_dict(), 256, 2
    expected = {
        "visual.transformer.resblocks.0.attn.in_proj_weight": d**-0.5,
        "visual.transformer.resblocks.1.attn.out_proj.weight": d**-0.5 * (2 * n) ** -0.5,
        "text.transformer.resblocks.0.mlp.c_fc.weight": (2 * d) ** -0.5,
        "decoder.blocks.1.mlp.2.weight": d**-0.5 * (2 * n) ** -0.5,
        "text.token_embedding.weight": 0.02,
        "decoder.head.weight": d**-0.5,
        "visual.proj": d**-0.5,
        "decoder.learnable_tokens": 1.0,
        "visual.class_embedding": 1e-6,
    }
    for name, std in expected.items():
        assert state[name].std().item() == pytest.approx(std, rel=0.15), name
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    assert not model.visual.positional_embedding.requires_grad


def test_weight_decay_spares_all_but_matrices() -> None:
    model = CLIPS(tiny_config())
    decayed = decayed_parameters(model)
    assert {"visual.conv1.weight", "visual.proj", "text.text_projection", "decoder.head.weight"} <= decayed
    spared = set(dict(model.named_parameters())) - decayed
    assert {
        "logit_scale",
        "visual.class_embedding",
        "text.token_embedding.weight",
        "text.positional_embedding",
    } <= spared
    assert {"decoder.learnable_tokens", "visual.positional_embedding", "decoder.blocks.0.in_proj.bias"} <= spared
    assert not any("ln_" in name or name.endswith("bias") for name in decayed)


def test_features_are_normalised() -> None:
    model = CLIPS(tiny_config())
    z_img, z_txt, _ = model(torch.randn(2, 3, 32, 32), torch.randint(0, 150, (2, 2, 12)))
    torch.testing.assert_close(F.normalize(z_img, dim=-1), z_img)
    torch.testing.assert_close(F.normalize(z_txt, dim=-1), z_txt)
