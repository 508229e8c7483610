"""Conversations → samples of token ids and labels → batches.

A label is a token id where the model learns, -100 where it only reads. It learns the assistant's words and the mark that
ends them. Where those lie is found by rendering the chat template up to each turn, which works for any template; the
`{% generation %}` marks that some templates carry are missing in most.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaProcessor

from clips_core.errors import BadSample
from clips_core.images import open_image
from llava_bridge.records import IMAGE_MARK, Conversation, read_conversations

__all__ = ["IGNORE", "Collator", "Conversation", "Encoder", "Sample", "SampleDataset", "TextProcessor", "draw",
           "group_by_length", "learned_spans", "read_conversations"]  # fmt: skip

IGNORE = -100  # the label of a token that is only read


@dataclass(frozen=True)
class Sample:
    """One tokenized conversation of T tokens, image tokens included."""

    where: str
    images: tuple[Path, ...]
    input_ids: np.ndarray  # int32 [T]
    labels: np.ndarray  # int32 [T]: the token's own id, or IGNORE

    def __len__(self) -> int:
        return len(self.input_ids)


class TextProcessor(Protocol):
    """What of an MLLM's processor turns words into tokens; a LlavaProcessor has it all."""

    tokenizer: Any
    chat_template: str | None
    image_token_id: int


# -------------------------------------------------------------------------------------------------------------- encoding


@dataclass(frozen=True)
class Encoder:
    """Turns conversations into samples for one MLLM."""

    processor: TextProcessor
    num_image_tokens: int  # of one picture
    max_length: int  # tokens; a longer sample is cut at its end
    caption_end: str | None = (
        None  # ends a caption in stage 1; None: the eos token. LLaVA-1.5's own is a line's end, "\n"
    )

    def plain(self, conversation: Conversation) -> Sample:
        """Stage 1's template: bos, picture, caption, end. What the human asked is left out, as in LLaVA.

        Raises:
            BadSample: naming the sample, if it is not one picture and one caption or, cut, has nothing to learn from.
        """
        where = conversation.where
        if not conversation.images:
            raise BadSample("no picture", f"{where}: has no picture, and stage 1 learns from nothing else")
        if len(conversation.images) > 1 or len(conversation.messages) != 2:
            raise BadSample("not one caption", f"{where}: stage 1 takes one picture, one question and one caption each")
        tokenizer = self.processor.tokenizer
        caption = conversation.messages[-1]["content"] + (self.caption_end or "")
        read = tokenizer(IMAGE_MARK)["input_ids"]
        if tokenizer.bos_token_id is not None and read[0] != tokenizer.bos_token_id:
            # LLMs park spare attention on their first token. Were it an image token, the projector's gradient would be
            # mostly about that: measured on SmolLM2, it then hardly agrees from batch to batch, nor bf16 with fp32.
            read = [tokenizer.bos_token_id, *read]
        learned = tokenizer(caption, add_special_tokens=False)["input_ids"]
        if self.caption_end is None:
            learned = [*learned, tokenizer.eos_token_id]
        return self._sample(conversation, np.array(read + learned), np.arange(len(read) + len(learned)) >= len(read))

    def chat(self, conversation: Conversation) -> Sample:
        """Stage 2's template: the MLLM's own chat template. Each answer is learned, with the mark that ends it.

        Raises:
            BadSample: naming the sample, if the template can't be masked or, cut, nothing is left to learn.
        """
        text, spans = learned_spans(conversation, self.processor)
        tokenizer = self.processor.tokenizer
        # As transformers does at inference: the tokenizer adds its bos (whose span is empty) unless the template wrote it.
        has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        encoding = tokenizer(text, add_special_tokens=not has_bos, return_offsets_mapping=True)
        starts, ends = np.array(encoding["offset_mapping"]).T
        learned = np.zeros(len(starts), dtype=bool)
        for begin, end in spans:
            inside = (starts >= begin) & (ends <= end)
            # At inference the prompt ends at `begin`: a token across that border would never be seen there.
            if (((starts < begin) & (ends > begin)) | ((starts < end) & (ends > end))).any():
                where = conversation.where
                raise BadSample("token across a border", f"{where}: a token lies across the border of an answer")
            learned |= inside
        return self._sample(conversation, np.array(encoding["input_ids"]), learned)

    def _sample(self, conversation: Conversation, ids: np.ndarray, learned: np.ndarray) -> Sample:
        """Ids [T'] with one entry per picture, and which of them are learned [T'] → a sample."""
        is_image = ids == self.processor.image_token_id
        if is_image.sum() != len(conversation.images):
            found, wanted = int(is_image.sum()), len(conversation.images)
            raise BadSample(
                "image tokens differ from pictures",
                f"{conversation.where}: the template renders {found} {IMAGE_MARK} for {wanted} pictures",
            )
        repeats = np.where(is_image, self.num_image_tokens, 1)
        labels = np.repeat(np.where(learned, ids, IGNORE), repeats)
        ids = np.repeat(ids, repeats)
        if (ids[self.max_length :] == self.processor.image_token_id).any():
            raise BadSample(
                "picture beyond max_length",
                f"{conversation.where}: its picture lies beyond max_length {self.max_length}",
            )
        ids, labels = (array[: self.max_length].astype(np.int32) for array in (ids, labels))
        if not (labels[1:] != IGNORE).any():  # the first token is predicted from nothing
            raise BadSample(
                "nothing to learn", f"{conversation.where}: no token to learn within max_length {self.max_length}"
            )
        return Sample(conversation.where, conversation.images, ids, labels)


def learned_spans(conversation: Conversation, processor: TextProcessor) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and where in it (characters, end excluded) the model learns.

    An answer's span starts where the prompt for it ends, and ends with the template's mark after the answer.

    Raises:
        BadSample: naming the sample, if the template doesn't render it prefix by prefix, or each answer as it is and with a mark.
    """
    messages = list(conversation.messages)
    text = _render(processor, messages)
    spans = []
    for turn in range(1, len(messages), 2):
        prompt = _render(processor, messages[:turn], add_generation_prompt=True)
        answered = text if turn == len(messages) - 1 else _render(processor, messages[: turn + 1])
        if not text.startswith(answered) or not answered.startswith(prompt):
            raise _unfit(conversation, "is not prefix-stable: it renders a turn differently once another follows, so what "
                         "is learned can't be told from what is read")  # fmt: skip
        learned = answered[len(prompt) :].rstrip()  # white space after the mark is never generated
        answer = messages[turn]["content"]
        if not learned.lstrip().startswith(answer):
            raise _unfit(conversation, f"changes the answer {answer!r}")
        if learned.lstrip() == answer:
            raise _unfit(conversation, "puts no mark after an answer")
        spans.append((len(prompt), len(prompt) + len(learned)))
    _check_by_other_answers(conversation, processor, text, spans)
    return text, spans


def _check_by_other_answers(
    conversation: Conversation, processor: TextProcessor, text: str, spans: list[tuple[int, int]]
) -> None:
    """Rendered with other answers, the conversation must differ within the spans alone, and there in the answers alone."""
    messages, expected, read = list(conversation.messages), "", 0
    for turn, (begin, end) in zip(range(1, len(messages), 2), spans, strict=True):
        other = f"answer-{turn}"
        expected += text[read:begin] + text[begin:end].replace(messages[turn]["content"], other, 1)
        messages[turn] = {"role": "assistant", "content": other}
        read = end
    if _render(processor, messages) != expected + text[read:]:
        raise _unfit(conversation, "renders what is read differently with other answers")


def _unfit(conversation: Conversation, reason: str) -> BadSample:
    advice = "choose a template that can be masked, such as those in llava_bridge.templates"
    return BadSample("template cannot be masked", f"{conversation.where}: the chat template {reason}; {advice}")


def _render(processor: TextProcessor, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
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

    Padded on the right. Pictures come in the order of their image tokens, sample by sample; without a picture in the batch
    there are no pixel_values.
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
        images = [open_image(path, f"{s.where}, picture {path}") for s in samples for path in s.images]
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
