"""LLaVA JSON → conversations → samples of token ids and labels → batches.

A label is a token id where the model learns, -100 where it only reads. It learns the assistant's words and the mark that
ends them. Where those lie is found by rendering the chat template up to each turn, which works for any template; the
`{% generation %}` marks that some templates carry are missing in most.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaProcessor

from clips_core.errors import InputError
from clips_core.folders import read_json
from clips_core.images import open_image
from llava_bridge.mllm import IMAGE_TOKEN

IGNORE = -100  # the label of a token that is only read
ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Conversation:
    """One sample of a LLaVA file."""

    where: str  # file and id, for messages
    image: Path | None  # None: text only
    messages: tuple[dict[str, str], ...]  # {"role": "user" | "assistant", "content"} in turn, the user first


@dataclass(frozen=True)
class Sample:
    """One tokenized conversation of T tokens, image tokens included."""

    where: str
    image: Path | None
    input_ids: np.ndarray  # int32 [T]
    labels: np.ndarray  # int32 [T]: the token's own id, or IGNORE

    def __len__(self) -> int:
        return len(self.input_ids)


# --------------------------------------------------------------------------------------------------------------- reading


def read_conversations(file: Path, images: Path) -> list[Conversation]:
    """All conversations of a LLaVA JSON file (the shapes of LCS-558K and mix-665K), checked.

    Args:
        file: a list of {"id", "image" (optional), "conversations": [{"from": "human" | "gpt", "value"}, …]}.
        images: the folder that "image" is relative to.

    Raises:
        InputError: naming file and line or sample id, at the first thing that is wrong; a picture that is not there too.
    """
    entries = read_json(file)
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{file}: must be a list of conversations, and not empty")
    if not images.is_dir():
        raise InputError(f"{images}: no such folder of pictures")
    root = images.resolve()
    conversations = [_read_conversation(entry, number, file, root) for number, entry in enumerate(entries, start=1)]
    for path, where in {c.image: c.where for c in reversed(conversations) if c.image is not None}.items():
        if not path.is_file():
            raise InputError(f"{where}: its picture {path} does not exist")
    return conversations


def _read_conversation(entry: Any, number: int, file: Path, images: Path) -> Conversation:
    where = f"{file}, sample {number}"
    if not isinstance(entry, dict):
        raise InputError(f"{where}: must be an object, not {json.dumps(entry)[:60]}")
    where += f" (id {entry['id']!r})" if "id" in entry else ""
    turns = entry.get("conversations")
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise InputError(f'{where}: "conversations" must be pairs of human and gpt turns')
    messages = tuple(
        _read_turn(turn, expected, where)
        for turn, expected in zip(turns, ("human", "gpt") * (len(turns) // 2), strict=True)
    )
    image = entry.get("image")
    if image is not None and not isinstance(image, str):
        raise InputError(f'{where}: "image" must be one path')
    marks = [message["content"].count(IMAGE_TOKEN) for message in messages]
    expected_marks = 0 if image is None else 1
    if sum(marks) != expected_marks or marks[0] != expected_marks:
        raise InputError(
            f"{where}: has {sum(marks)} {IMAGE_TOKEN} and {expected_marks} picture; "
            f"each picture needs one {IMAGE_TOKEN}, in the first human turn"
        )
    return Conversation(where, None if image is None else _inside(images, image, where), messages)


def _read_turn(turn: Any, expected: str, where: str) -> dict[str, str]:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise InputError(f'{where}: each turn must be {{"from": …, "value": text}}')
    if turn.get("from") != expected:
        raise InputError(f"{where}: a turn is from {turn.get('from')!r} where {expected!r} must come")
    content = turn["value"].strip()
    if not content:
        raise InputError(f"{where}: an empty {'answer' if expected == 'gpt' else 'question'}")
    return {"role": ROLES[expected], "content": content}


def _inside(folder: Path, name: str, where: str) -> Path:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder):
        raise InputError(f"{where}: its picture {name!r} lies outside {folder}")
    return path


# -------------------------------------------------------------------------------------------------------------- encoding


@dataclass(frozen=True)
class Encoder:
    """Turns conversations into samples for one MLLM."""

    processor: LlavaProcessor
    num_image_tokens: int  # of one picture
    max_length: int  # tokens; a longer sample is cut at its end

    def plain(self, conversation: Conversation) -> Sample:
        """Stage 1's template: bos, picture, caption, eos. What the human asked is left out, as in LLaVA.

        Raises:
            InputError: naming the sample, if it has no picture or, cut, nothing to learn from.
        """
        if conversation.image is None:
            raise InputError(f"{conversation.where}: has no picture, and stage 1 learns from nothing else")
        tokenizer = self.processor.tokenizer
        caption = conversation.messages[-1]["content"]
        read = tokenizer(IMAGE_TOKEN)["input_ids"]
        if tokenizer.bos_token_id is not None and read[0] != tokenizer.bos_token_id:
            # LLMs park spare attention on their first token. Were it an image token, the projector's gradient would be
            # mostly about that: measured on SmolLM2, it then hardly agrees from batch to batch, nor bf16 with fp32.
            read = [tokenizer.bos_token_id, *read]
        learned = [*tokenizer(caption, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        return self._sample(conversation, np.array(read + learned), np.arange(len(read) + len(learned)) >= len(read))

    def chat(self, conversation: Conversation) -> Sample:
        """Stage 2's template: the MLLM's own chat template. Each answer is learned, with the mark that ends it.

        Raises:
            InputError: naming the sample, if the template can't be masked or, cut, nothing is left to learn.
        """
        text, spans = learned_spans(conversation, self.processor)
        encoding = self.processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts, ends = np.array(encoding["offset_mapping"]).T
        learned = np.zeros(len(starts), dtype=bool)
        for begin, end in spans:
            inside = (starts >= begin) & (ends <= end)
            # At inference the prompt ends at `begin`: a token across that border would never be seen there.
            if (((starts < begin) & (ends > begin)) | ((starts < end) & (ends > end))).any():
                raise InputError(f"{conversation.where}: a token lies across the border of an answer")
            learned |= inside
        return self._sample(conversation, np.array(encoding["input_ids"]), learned)

    def _sample(self, conversation: Conversation, ids: np.ndarray, learned: np.ndarray) -> Sample:
        """Ids [T'] with one entry per picture, and which of them are learned [T'] → a sample."""
        is_image = ids == self.processor.image_token_id
        repeats = np.where(is_image, self.num_image_tokens, 1)
        labels = np.repeat(np.where(learned, ids, IGNORE), repeats)
        ids = np.repeat(ids, repeats)
        if (ids[self.max_length :] == self.processor.image_token_id).any():
            raise InputError(f"{conversation.where}: its picture lies beyond max_length {self.max_length}")
        ids, labels = (array[: self.max_length].astype(np.int32) for array in (ids, labels))
        if not (labels[1:] != IGNORE).any():  # the first token is predicted from nothing
            raise InputError(f"{conversation.where}: no token to learn within max_length {self.max_length}")
        return Sample(conversation.where, conversation.image, ids, labels)


def learned_spans(conversation: Conversation, processor: LlavaProcessor) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and where in it (characters, end excluded) the model learns.

    An answer's span starts where the prompt for it ends, and ends with the template's mark after the answer.
    """
    messages = list(conversation.messages)
    text = _render(processor, messages)
    spans = []
    for turn in range(1, len(messages), 2):
        prompt = _render(processor, messages[:turn], add_generation_prompt=True)
        answered = _render(processor, messages[: turn + 1])
        if not text.startswith(answered) or not answered.startswith(prompt):
            raise InputError(
                f"{conversation.where}: the chat template renders a turn differently once another follows, "
                "so what is learned can't be told from what is read"
            )
        learned = answered[len(prompt) :].rstrip()  # white space after the mark is never generated
        answer = messages[turn]["content"]
        if not learned.lstrip().startswith(answer):
            raise InputError(f"{conversation.where}: the chat template changes the answer {answer!r}")
        if learned.lstrip() == answer:
            raise InputError(f"{conversation.where}: the chat template puts no mark after an answer")
        spans.append((len(prompt), len(prompt) + len(learned)))
    return text, spans


def _render(processor: LlavaProcessor, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
    rendered: str = processor.tokenizer.apply_chat_template(
        messages,
        chat_template=processor.chat_template,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    return rendered


# -------------------------------------------------------------------------------------------------------------- batching


class SampleDataset(torch.utils.data.Dataset[Sample]):
    """The samples of a whole training, in the order in which they are seen."""

    def __init__(self, samples: Mapping[int, Sample], order: Sequence[int]):
        self.samples, self.order = samples, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> Sample:
        return self.samples[self.order[position]]


@dataclass(frozen=True)
class Collator:
    """Samples → one batch: input_ids, attention_mask, labels int64 [B, T], pixel_values fp32 [pictures, 3, H, W].

    Padded on the right. Without a picture in the batch there are no pixel_values.
    """

    processor: LlavaProcessor

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        pad = self.processor.tokenizer.pad_token_id
        lengths = torch.tensor([len(sample) for sample in samples])
        batch = {
            "input_ids": _padded([sample.input_ids for sample in samples], pad),
            "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
            "labels": _padded([sample.labels for sample in samples], IGNORE),
        }
        images = [open_image(s.image, f"{s.where}, picture {s.image}") for s in samples if s.image is not None]
        if images:
            batch["pixel_values"] = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        return batch


def _padded(rows: Sequence[np.ndarray], value: int) -> Tensor:
    tensors = [torch.from_numpy(row).long() for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def draw(count: int, total: int, seed: int) -> list[int]:
    """Which of `count` samples are seen, `total` in all: each epoch is its own permutation."""
    epochs = -(-total // count)
    order = [np.random.default_rng((seed, epoch)).permutation(count) for epoch in range(epochs)]
    return [int(i) for i in np.concatenate(order)[:total]]


def group_by_length(drawn: Sequence[int], lengths: Mapping[int, int], batch_size: int, seed: int) -> list[int]:
    """The drawn samples, reordered so that those of one batch are of like length and little is padding.

    Only within windows of 16 batches, so that the order stays a shuffle at large; the batches of a window come in random
    order. A last batch that is not full stays last.
    """
    rng = np.random.default_rng((seed, 1, 1))
    order: list[int] = []
    for start in range(0, len(drawn), 16 * batch_size):
        window = sorted(drawn[start : start + 16 * batch_size], key=lambda i: lengths[i])
        batches = [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        full = [batch for batch in batches if len(batch) == batch_size]
        order += [i for k in rng.permutation(len(full)) for i in full[k]]
        order += [i for batch in batches[len(full) :] for i in batch]
    return order
