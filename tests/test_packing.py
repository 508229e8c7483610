"""`text_padding: masked`: packed rows against open_clip's own masked encoder, and what is not computed."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from clips_core import formats
from clips_core.config import ModelConfig, TransformerConfig
from clips_core.model import CLIPS
from clips_core.packing import Packing, pack
from clips_core.tokenizer import EOS, PAD, ClipsTokenizer, train_vocab

SIZES = TransformerConfig(width=32, layers=2, heads=4)
CONFIG = ModelConfig(
    image_size=16, patch_size=8, vision=SIZES, text=SIZES, decoder=SIZES, embed_dim=16, context_length=24,
    vocab_size=400, text_padding="masked",
)  # fmt: skip
TEXTS = ["", "one", "two words", "a text of " + "very " * 40 + "many words", "some more words of a text", "one two"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ClipsTokenizer:
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    train_vocab(TEXTS, path)
    return ClipsTokenizer(path, ends_in_cls=False)


@pytest.fixture
def model() -> CLIPS:
    torch.manual_seed(0)
    model = CLIPS(CONFIG)
    with torch.no_grad():  # norms and biases away from one and zero
        for value in model.parameters():
            value += 0.05 * torch.randn_like(value)
    return model


def ids(tokenizer: ClipsTokenizer) -> Tensor:
    return torch.from_numpy(tokenizer.encode(TEXTS, CONFIG.context_length))


@pytest.mark.parametrize("seed", range(20))
def test_packed_texts_share_rows_and_no_places(seed: int) -> None:
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(4, 40))
    lengths = rng.integers(1, capacity + 1, rng.integers(1, 60))
    row, start, rows = pack(lengths, capacity)
    taken = np.zeros((rows, capacity), dtype=int)
    for r, s, length in zip(row, start, lengths, strict=True):
        assert s + length <= capacity
        taken[r, s : s + length] += 1
    assert taken.max() == 1 and taken.sum() == lengths.sum() and (taken.sum(axis=1) > 0).all()
    assert rows <= max(1.3 * np.ceil(lengths.sum() / capacity), len([n for n in lengths if 2 * n > capacity])) + 1


def test_laying_and_taking_are_inverse() -> None:
    torch.manual_seed(0)
    real = torch.arange(7) < torch.tensor([1, 7, 3, 2, 2])[:, None]
    tokens = torch.randn(5, 7, 3) * real[..., None]
    packing = Packing(real)
    rows = packing.lay(tokens)
    assert rows.shape == (3, 7, 3) and torch.equal(packing.take(rows), tokens)
    ends = tokens[torch.arange(5), real.sum(dim=1) - 1]
    assert torch.equal(rows.flatten(0, 1)[packing.last], ends)


def test_packed_encoder_equals_open_clips_masked_one(tokenizer: ClipsTokenizer, model: CLIPS) -> None:
    """Forward and backward, against one text a row under open_clip's additive pad mask, pooled at eos."""
    texts = ids(tokenizer)
    weights = torch.randn(len(TEXTS), CONFIG.embed_dim)
    gradients = []
    model.text.use_pad_mask, model.text.pool_type, model.text.pad_id, model.text.eos_id = True, "eos", PAD, EOS
    for forward in (model.text.forward, lambda text: open_clip.transformer.TextTransformer.forward(model.text, text)):
        model.zero_grad()
        result = forward(texts)
        feature = result[0] if isinstance(result, tuple) else result
        (feature * weights).sum().backward()
        gradients.append([feature.detach(), *(p.grad for p in model.text.parameters() if p.grad is not None)])
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp(min=1e-3)


def test_a_text_does_not_depend_on_its_neighbours_or_its_padding(tokenizer: ClipsTokenizer, model: CLIPS) -> None:
    texts, image = ids(tokenizer), torch.randn(len(TEXTS), 3, 16, 16)
    target = torch.randint(1, 400, (len(TEXTS), 8))
    with torch.no_grad():
        together = model.encode(image, texts[:, None])
        states = model.caption_states(together, target)
        for i in range(len(TEXTS)):
            alone = model.encode(image[i : i + 1], texts[i : i + 1, None])
            assert (alone.text[0] - together.text[i]).abs().max() < 1e-5
            assert (model.caption_states(alone, target[i : i + 1])[0] - states[i]).abs().max() < 1e-5
    assert (together.web_tokens * ~together.web_mask[..., None] == 0).all()  # type: ignore[operator]


def test_the_decoder_under_a_mask_equals_one_that_never_saw_the_pads(tokenizer: ClipsTokenizer, model: CLIPS) -> None:
    assert model.decoder is not None
    image_tokens, web = torch.randn(2, 4, 32), torch.randn(2, 9, 32)
    mask = torch.arange(9) < torch.tensor([4, 9])[:, None]
    masked = model.decoder(image_tokens, web, 5, text_mask=mask)
    short = model.decoder(image_tokens[:1], web[:1, :4], 5)
    assert (masked[0] - short[0]).abs().max() < 1e-5
    assert (masked[1] - model.decoder(image_tokens[1:], web[1:], 5)[0]).abs().max() < 1e-5


def test_pads_are_not_computed(model: CLIPS) -> None:
    """15 real tokens of 80, as web captions have: the encoder's work falls with the share of real tokens."""
    long = ModelConfig(image_size=16, patch_size=8, vision=SIZES, text=SIZES, embed_dim=16, vocab_size=400)
    texts = torch.randint(103, 400, (64, 80))
    flops = {}
    for padding in ("attended", "masked"):
        tower = CLIPS(ModelConfig(**{**vars(long), "text_padding": padding})).text
        shown = texts if padding == "attended" else texts * (torch.arange(80) < 15)
        with FlopCounterMode(display=False) as counter:
            tower(shown)
        flops[padding] = counter.get_total_flops()
    assert flops["masked"] / flops["attended"] == pytest.approx(1 / 5, rel=0.05)  # five texts a row


def test_the_export_comes_back_and_stock_open_clip_refuses_it(
    tokenizer: ClipsTokenizer, model: CLIPS, tmp_path: Path
) -> None:
    """Its configs cannot ask for the mask: a folder that it opened would attend to pads without a word."""
    formats.export(model, tokenizer, tmp_path)
    with pytest.raises(TypeError, match="text_padding"):
        open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'open_clip'}")
    loaded, loaded_tokenizer = formats.load_model(tmp_path / "open_clip")
    assert loaded.config.text_padding == "masked" and loaded.decoder is not None
    again = torch.from_numpy(loaded_tokenizer.encode(TEXTS, CONFIG.context_length))
    with torch.no_grad():
        ours = model.eval().encode_text(ids(tokenizer))
        assert torch.equal(again, ids(tokenizer)) and torch.equal(loaded.eval().encode_text(again), ours)


def test_every_text_has_a_token_to_pool(tokenizer: ClipsTokenizer) -> None:
    found = ids(tokenizer)
    real = found != PAD
    assert real.sum(dim=1).min() == 2  # bos and eos
    assert (F.pad(real[:, 1:], (0, 1)).long() <= real.long()).all()  # real tokens first
