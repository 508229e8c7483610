"""Samples → the order in which they are seen → batches, padded or packed.

What is seen when follows from the data, the seed and the batch size alone: an exact resume rests on that.

A *batch* is what one optimizer step sees; a *part* of it is what one process works on at once. The Trainer hands a batch out in
its order, part by part, to one process after the other.
"""

import heapq
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaNextProcessor, LlavaProcessor, PreTrainedModel

from clips_core.errors import InputError
from clips_core.images import open_image
from llava_bridge.config import Group
from llava_bridge.conversations import IGNORE, Conversation, Sample


class SampleDataset(torch.utils.data.Dataset[Sample]):
    """The samples of a whole training, in the order in which they are seen, encoded when they are.

    Kept, those of mix-665K would be 6 GB of tokens in every process.
    """

    def __init__(
        self, conversations: Sequence[Conversation], encode: Callable[[Conversation], Sample], order: Sequence[int]
    ):
        self.conversations, self.encode, self.order = conversations, encode, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> Sample:
        return self.encode(self.conversations[self.order[position]])


# ----------------------------------------------------------------------------------------------------------------- order


def draw(count: int, total: int, seed: int) -> list[int]:
    """Which of `count` samples are seen, `total` in all: each epoch is its own permutation."""
    epochs = -(-total // count)
    order = [np.random.default_rng((seed, epoch)).permutation(count) for epoch in range(epochs)]
    return [int(i) for i in np.concatenate(order)[:total]]


def grouped(
    drawn: Sequence[int],
    lengths: Mapping[int, int],
    pictured: Collection[int],
    batch_size: int,
    group: Group,
    seed: int,
) -> list[int]:
    """The drawn samples, reordered so that little of a padded batch is padding.

    Args:
        drawn: the samples in a random order.
        lengths: tokens of each sample, image tokens included.
        pictured: the samples that have a picture.
        group: `modality_length` (as in LLaVA): a batch is all with pictures or all without, and otherwise as it was drawn;
            `length`: its samples are of like length; `none`: as drawn.
    """
    if group == "modality_length":
        return group_by_modality(drawn, lengths, pictured, batch_size)
    if group == "length":
        return group_by_length(drawn, lengths, batch_size, seed)
    return list(drawn)


def group_by_modality(
    drawn: Sequence[int], lengths: Mapping[int, int], pictured: Collection[int], batch_size: int
) -> list[int]:
    """The drawn samples in batches that are all with pictures or all without, the longest sample of a batch first.

    A part of a batch, being a stretch of it, then holds like lengths, as do the parts that several processes work on at the same
    time. A batch stands where the last of its samples was drawn: which kind comes when is as random as the draw. What is left
    of the two kinds in the end, fewer than two batches, is seen last, mixed.
    """
    batches: list[list[int]] = []
    filling: dict[bool, list[int]] = {True: [], False: []}
    for i in drawn:
        batch = filling[i in pictured]
        batch.append(i)
        if len(batch) == batch_size:
            batches.append(batch)
            filling[i in pictured] = []
    rest = filling[True] + filling[False]
    batches += [rest[start : start + batch_size] for start in range(0, len(rest), batch_size)]
    return [i for batch in batches for i in _longest_first(batch, lengths)]


def group_by_length(drawn: Sequence[int], lengths: Mapping[int, int], batch_size: int, seed: int) -> list[int]:
    """The drawn samples in batches of like length, the longest sample of a batch first.

    Only within windows of 16 batches, so that the order stays a shuffle at large; the batches of a window come in random
    order. A last batch that is not full stays last.
    """
    rng = np.random.default_rng((seed, 1, 1))
    order: list[int] = []
    for start in range(0, len(drawn), 16 * batch_size):
        window = _longest_first(drawn[start : start + 16 * batch_size], lengths)
        batches = [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        full = [batch for batch in batches if len(batch) == batch_size]
        order += [i for k in rng.permutation(len(full)) for i in full[k]]
        order += [i for batch in batches[len(full) :] for i in batch]
    return order


def balanced(order: Sequence[int], lengths: Mapping[int, int], batch_size: int, part_size: int) -> list[int]:
    """Each batch of the order reordered so that its parts of `part_size` samples are of like many tokens in all.

    For packing, where a part costs what its tokens cost. A last batch that is not full stays as it is.
    """
    result: list[int] = []
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        if len(batch) == batch_size:
            parts = deal([lengths[i] for i in batch], math.ceil(batch_size / part_size), part_size)
            batch = [batch[k] for part in parts for k in part]
        result += batch
    return result


def deal(lengths: Sequence[int], hands: int, most: int) -> list[list[int]]:
    """Deal items out, the longest first, each to the hand that is the lightest so far and holds fewer than `most`.

    Returns:
        the items of each hand, by their place in `lengths`, ascending.
    """
    dealt: list[list[int]] = [[] for _ in range(hands)]
    lightest = [(0, hand) for hand in range(hands)]
    for item in _longest_first(range(len(lengths)), lengths):
        weight, hand = heapq.heappop(lightest)
        dealt[hand].append(item)
        if len(dealt[hand]) < most:
            heapq.heappush(lightest, (weight + lengths[item], hand))
    return [sorted(hand) for hand in dealt]


def _longest_first(items: Sequence[int], lengths: Mapping[int, int] | Sequence[int]) -> list[int]:
    return sorted(items, key=lambda i: -lengths[i])


# --------------------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Collator:
    """Samples → one batch of tensors on the CPU.

    Keys: input_ids, labels int64 [R, T]; what the image processor makes of the pictures, such as pixel_values fp32
    [pictures, 3, H, W], in the order of their image tokens (without a picture in the batch it is left out); and

    - padded (one sample a row, pads on the right): attention_mask int64 [R, T];
    - packed (several samples a row): position_ids int64 [R, T], which count from 0 in each sample. A row's pads are at position 0
      each, samples of one token that nobody reads. There must not be an attention mask: transformers tells the samples of a row
      apart by their positions alone, and only where there is none.

    A sample's first label is always IGNORE. It is predicted from nothing, and in a packed row it would be from another sample.
    """

    processor: LlavaProcessor | LlavaNextProcessor
    packing: bool = False
    row_length: int | None = None  # tokens of a packed row at most; None: one row takes all

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        lengths = [len(sample) for sample in samples]
        rows = packed_rows(lengths, self.row_length) if self.packing else [[i] for i in range(len(samples))]
        labels = [np.concatenate([[IGNORE], sample.labels[1:]]) for sample in samples]
        batch = {
            "input_ids": _stack(
                [[samples[i].input_ids for i in row] for row in rows], self.processor.tokenizer.pad_token_id
            ),
            "labels": _stack([[labels[i] for i in row] for row in rows], IGNORE),
        }
        if self.packing:
            batch["position_ids"] = _stack([[np.arange(lengths[i]) for i in row] for row in rows], 0)
        else:
            batch["attention_mask"] = _stack([[np.ones(lengths[i]) for i in row] for row in rows], 0)
        in_order = [samples[i] for row in rows for i in row]
        images = [open_image(path, f"{s.where}, picture {path}") for s in in_order for path in s.images]
        if images:
            batch |= self.processor.image_processor(images, return_tensors="pt")
        return batch


def packed_rows(lengths: Sequence[int], row_length: int | None) -> list[list[int]]:
    """Which samples of a part share a row: as few rows as hold them, and all about equally full.

    Args:
        lengths: tokens of each sample.
        row_length: tokens of a row at most (but a longer sample has a row of its own); None: one row takes all.
    """
    count = 1 if row_length is None else min(len(lengths), math.ceil(sum(lengths) / row_length))
    for rows in range(count, len(lengths)):
        dealt = deal(lengths, rows, len(lengths))
        if row_length is None or max(sum(lengths[i] for i in row) for row in dealt) <= row_length:
            return dealt
    return [[i] for i in range(len(lengths))]


def real_tokens(batch: Mapping[str, Tensor]) -> int:
    """How many of a batch's R × T places hold a token of a sample; the others are pads, work for nothing."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    positions = batch["position_ids"]
    # A sample has two tokens or more: its first is followed by a 1, a pad is not.
    return int((positions > 0).sum() + (positions == 1).sum())


def _stack(rows: Sequence[Sequence[np.ndarray]], value: int) -> Tensor:
    tensors = [torch.from_numpy(np.concatenate(row)).long() for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


# --------------------------------------------------------------------------------------------------------------- packing

# The kinds of layers, as transformers names them, in which a token sees what the mask lets it see and nothing else.
MASKED = {"full_attention", "sliding_attention", "chunked_attention", "dense", "sparse", "moe"}


def packed_row_length(llm: PreTrainedModel, max_length: int) -> int | None:
    """How long a packed row may be for this language model, for `Collator.row_length`.

    Flash attention tells the samples of a row apart only where there is one row, and what lies between them costs it nothing:
    None, one row. With other kinds of attention, which compute the whole square of a row, it is `max_length`.

    Raises:
        InputError: if the language model does not keep the samples of a row apart, saying why.
    """
    config = llm.config
    rope = getattr(config, "rope_parameters", None) or {}
    others = sorted(set(getattr(config, "layer_types", None) or []) - MASKED)
    if "mrope_section" in rope:
        raise _unpackable(llm, "its positions have several axes (M-RoPE), and packing restarts one")
    if others:
        raise _unpackable(llm, f"its layers of kind {', '.join(others)} may look past the start of a sample")
    if "flash" in config._attn_implementation:
        return None
    if not _keeps_apart(llm):
        raise _unpackable(llm, "a sample behind another comes out differently than alone")
    return max_length


def _unpackable(llm: PreTrainedModel, reason: str) -> InputError:
    return InputError(f"packing=true is not exact for {type(llm).__name__}: {reason}; set packing=false")


@torch.no_grad()
def _keeps_apart(llm: PreTrainedModel) -> bool:
    """Whether the second of two samples in a row comes out as it does alone, tried on a few tokens."""
    ids = torch.arange(1, 8, device=llm.device)[None]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]], device=llm.device)
    training = llm.training
    llm.eval()
    packed = llm(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[:, 3:]
    alone = llm(input_ids=ids[:, 3:], position_ids=positions[:, 3:], use_cache=False).last_hidden_state
    llm.train(training)
    rounding = torch.finfo(alone.dtype).eps ** 0.5
    return bool((packed - alone).norm() <= rounding * alone.norm())
