"""Conversations → samples of token ids and labels.

A label is a token id where the model learns, -100 where it only reads. It learns the assistant's words and the mark that
ends them. Where those lie is found by rendering the chat template up to each turn, which works for any template; the
`{% generation %}` marks that some templates carry are missing in most.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jinja2 import TemplateError
from PIL import Image

from clips_core.errors import BadSample, InputError
from clips_core.images import FORMATS
from llava_bridge.records import IMAGE_MARK, Conversation, read_conversations

__all__ = ["IGNORE", "Conversation", "Encoder", "Sample", "TextProcessor", "count_image_tokens", "learned_spans",
           "read_conversations"]  # fmt: skip

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
    # Of one picture. None: each picture has a number of its own, which follows from its size (image_mode anyres).
    num_image_tokens: int | None
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
            # A special token may swallow the white space after it (Phi-3's do), which belongs to no answer.
            across = np.flatnonzero((starts < end) & (ends > end))
            ends[[i for i in across if not text[end : ends[i]].strip()]] = end
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
        repeats = np.ones(len(ids), dtype=int)
        repeats[is_image] = self._image_tokens(conversation)
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

    def _image_tokens(self, conversation: Conversation) -> list[int]:
        """The number of tokens of each picture."""
        if self.num_image_tokens is not None:
            return [self.num_image_tokens] * len(conversation.images)
        sizes = [_picture_size(path, f"{conversation.where}, picture {path}") for path in conversation.images]
        return count_image_tokens(self.processor, sizes) if sizes else []


def count_image_tokens(processor: Any, sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Tokens of pictures of these sizes (height, width in pixels), as a LLaVA's processor counts them without seeing them."""
    counts: list[int] = processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens
    return counts


def _picture_size(path: Path, name: str) -> tuple[int, int]:
    """Height and width, from the header of the picture's file alone; whether the rest is sound shows when it is opened."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # nothing is decoded here
            with Image.open(path, formats=FORMATS) as image:
                return image.height, image.width
    except FileNotFoundError:
        raise InputError(f"{name}: no such file") from None
    except Exception as error:  # PIL's decoders raise nearly anything on damaged files
        raise BadSample("not a picture", f"{name}: not a readable picture ({type(error).__name__}: {error})") from None


def learned_spans(conversation: Conversation, processor: TextProcessor) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and where in it (characters, end excluded) the model learns.

    An answer's span starts where the prompt for it ends, and ends with the template's mark after the answer.

    Raises:
        BadSample: naming the sample, if the template doesn't render it prefix by prefix, or each answer as it is and with a mark.
    """
    try:
        return _learned_spans(conversation, processor)
    except TemplateError as error:  # a template may refuse what it is given, or be faulty itself
        raise _unfit(conversation, f"cannot render it ({' '.join(str(error).split())})") from None


def _learned_spans(conversation: Conversation, processor: TextProcessor) -> tuple[str, list[tuple[int, int]]]:
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
