"""What the caption decoder makes of pictures, in one pass: `clips-llava caption`, and the captions in a training log."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from clips_core import pictures, zero_shot
from clips_core.config import FORBID
from clips_core.errors import InputError
from clips_core.folders import write_bytes
from clips_core.model import CLIPS
from clips_core.pictures import Picture, PicturesConfig
from clips_core.tokenizer import EOS, PAD, ClipsTokenizer


@dataclass(config=FORBID)
class CaptionConfig(PicturesConfig):
    """Which model captions which pictures."""

    web_caption: str | None = (
        None  # extension, or json.FIELD, of what the decoder reads beside the picture; null: nothing
    )


@torch.no_grad()
def decode_captions(
    model: CLIPS, tokenizer: ClipsTokenizer, images: Tensor, texts: Sequence[str], teacher_forced: bool = False
) -> list[str]:
    """The caption that the decoder writes of each picture: the likeliest word at every learnable token, up to the first eos.

    The learnable tokens are the decoder's only queries, so this is one forward pass, not one a word.

    Args:
        images: [B, 3, H, W], normalised, on the model's device.
        texts: the web captions, "" where there is none.
        teacher_forced: for a captioner trained by the method `coca`, which reads no web caption but the words before each
            place: it takes a pass a word.

    Raises:
        InputError: if the model has no caption decoder.
    """
    if model.decoder is None:
        raise InputError(
            "this model has no caption decoder: a released tower has none, nor has a run of clip or clip_mix"
        )
    was_training = model.training
    model.eval()
    ids = torch.from_numpy(tokenizer.encode(texts, model.config.context_length)).to(images.device)
    encoded = model.encode(images, ids[:, None])
    length = model.config.learnable_tokens
    words = torch.full((len(images), length), PAD, device=images.device)
    if teacher_forced:
        for place in range(length):
            # The decoder sees the words before each place of `words` and none after: its last one may be anything.
            states = model.caption_states(encoded, words[:, : place + 1], teacher_forced=True)
            words[:, place] = _likeliest(model.decoder.head, states[:, -1], len(tokenizer))
            if bool((words == EOS).any(dim=1).all()):
                break
    else:
        states = model.caption_states(encoded, words)  # [B, M, D]
        words = torch.stack([_likeliest(model.decoder.head, rows, len(tokenizer)) for rows in states])
    model.train(was_training)
    return [tokenizer.decode(row) for row in words.tolist()]


def _likeliest(head: nn.Linear, states: Tensor, vocabulary: int) -> Tensor:
    """The likeliest word at each state, [M, D] → [M]. The head has more rows than there are words (32,000 against 30,522)."""
    with torch.autocast(states.device.type, enabled=False):  # logits in fp32, also under autocast
        return (states.float() @ head.weight[:vocabulary].float().T).argmax(dim=-1)


def caption_pictures(config: CaptionConfig) -> Path:
    """Write the decoder's captions, a JSONL file a shard (or 10,000 files of a folder).

    A line is `{"key", "shard" (null for a file), "web_caption", "caption"}`.

    Returns:
        `config.out`, with the JSONL files, skipped.jsonl (pictures that could not be read) and manifest.json.

    Raises:
        InputError: if the model has no caption decoder; see also `formats.load_model` and `pictures.go_over`.
    """
    model, tokenizer, files = pictures.load(config)
    if model.decoder is None:
        raise InputError(f"{config.model}: has no caption decoder; give a pretraining run of the method clips or coca")
    teacher_forced = files.method == "coca"

    def answer(batch: list[Picture], pixels: Tensor) -> list[dict[str, Any]]:
        images = zero_shot.normalise(pixels.to(model.logit_scale.device))
        with pictures.autocast(config, model):
            captions = decode_captions(model, tokenizer, images, [p.caption for p in batch], teacher_forced)
        return [
            {"key": picture.key, "shard": picture.shard, "web_caption": picture.caption, "caption": caption}
            for picture, caption in zip(batch, captions, strict=True)
        ]

    def write(path: Path, rows: list[dict[str, Any]]) -> None:
        write_bytes(path, pictures.json_lines(rows))

    size = model.config.image_size
    return pictures.go_over("caption", config, config.web_caption, size, files, answer, write, ".jsonl")
