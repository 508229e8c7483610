"""The model class that answers lmms-eval's tasks: a stock LLaVA folder through plain transformers, in batches.

Imports torch, transformers and lmms-eval, so `benchmarks.py` imports it when there is something to answer.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmms_eval.api.task  # noqa: F401  imported for its side effect, which is undone below
import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image, ImageFile
from tqdm import tqdm

from clips_core.errors import InputError
from clips_core.folders import write_bytes
from eval_suites.pictures import Swap
from llava_bridge.mllm import load_mllm

# lmms-eval makes PIL fill what is missing of a truncated picture with grey. Here a damaged picture is an error.
ImageFile.LOAD_TRUNCATED_IMAGES = False

Message = dict[str, Any]  # {"role", "content": [{"type": "image", "url": PIL image} | {"type": "text", "text"}]}


class AnswerLog:
    """The answers of one task, one JSON line each, written batch by batch as they are made."""

    def __init__(self, path: Path):
        self.path = path
        self.answers: dict[int, str] = {}
        if path.exists():
            whole = path.read_text(encoding="utf-8").split("\n")[
                :-1
            ]  # what follows the last newline was cut off by a kill
            self.answers = {row["doc_id"]: row["answer"] for row in map(json.loads, whole)}
            write_bytes(path, "".join(f"{line}\n" for line in whole).encode())

    def add(self, answers: dict[int, str]) -> None:
        rows = [json.dumps({"doc_id": doc_id, "answer": text}, ensure_ascii=False) for doc_id, text in answers.items()]
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(f"{row}\n" for row in rows))
        self.answers |= answers


@dataclass
class Sitting:
    """One pass over the questions of one task: what the model needs beside the questions themselves."""

    swap: Swap
    generation: dict[str, Any]
    """Settings that overrule the task's own."""
    log: AnswerLog
    progress: tqdm


class ChatLlava(lmms):
    """A `LlavaForConditionalGeneration` folder as an lmms-eval model of the chat class. Greedy; any error is raised."""

    is_simple = False  # requests come as chat messages
    accelerator = None  # one process; where lmms-eval finds this attribute it makes no Accelerator of its own

    def __init__(self, folder: Path, dtype: torch.dtype, attention: str, batch_size: int):
        super().__init__()
        self.batch_size = batch_size
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, self.processor = load_mllm(folder, dtype)
        self.model.to(self.device).eval().set_attn_implementation(attention)
        if self.model.generation_config.eos_token_id is None:
            raise InputError(f"{folder}/generation_config.json: no eos_token_id, so answers would never end")
        self.processor.tokenizer.padding_side = "left"  # every answer then starts right behind its question
        self.sitting: Sitting | None = None

    @property
    def mean_colour(self) -> tuple[float, float, float]:
        """The image processor's mean, RGB in 0-1."""
        red, green, blue = self.processor.image_processor.image_mean
        return red, green, blue

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """One answer per request, in their order; all are of one task.

        Batches hold questions of similar length, longest first, and follow from the list of questions alone. A batch with
        an answer missing is answered as a whole, so that a resumed run repeats the batches of an uninterrupted one:
        in bfloat16 a neighbour's padding can change an answer.
        """
        assert self.sitting is not None
        sitting, answers = self.sitting, self.sitting.log.answers
        by_doc = {request.args[3]: request for request in requests}
        lengths = {
            doc_id: len(self.processor.tokenizer(request.args[0]).input_ids) for doc_id, request in by_doc.items()
        }
        order = sorted(by_doc, key=lambda doc_id: (-lengths[doc_id], doc_id))
        sitting.progress.update(len(by_doc.keys() & answers.keys()))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            if all(doc_id in answers for doc_id in batch):
                continue
            texts = self._answer([by_doc[doc_id] for doc_id in batch])
            new = {doc_id: text for doc_id, text in zip(batch, texts, strict=True) if doc_id not in answers}
            sitting.log.add(new)
            sitting.progress.update(len(new))
        return [answers[request.args[3]] for request in requests]

    def _answer(self, requests: list[Instance]) -> list[str]:
        assert self.sitting is not None
        conversations = [self._messages(request) for request in requests]
        inputs = self.encode(conversations).to(self.device, self.model.dtype)
        settings, stops = generation_settings(requests[0].args[2], self.sitting.generation)
        with torch.inference_mode():
            ids = self.model.generate(**inputs, **settings)
        texts = self.processor.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers = [cut(text, stops) for text in texts]
        for request, answer in zip(requests, answers, strict=True):
            if not answer:
                raise RuntimeError(
                    f"{request.task_name}, doc_id {request.doc_id}: the model generated no text, which is not an answer to"
                    " score (`generation: {min_new_tokens: 1}` in the suite makes it say something)"
                )
        return answers

    def _messages(self, request: Instance) -> list[Message]:
        """The request's chat messages, with the pictures of this sitting."""
        assert self.sitting is not None
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        for position, part in enumerate(picture_parts(messages)):
            part["url"] = self.sitting.swap(doc_id, position, part["url"])
        return messages

    def encode(self, conversations: list[list[Message]]) -> Any:
        """Model inputs of a batch: `input_ids`, `attention_mask` [B, T] padded on the left, `pixel_values` [P, 3, H, W]."""
        texts = [
            self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            for messages in conversations
        ]
        pictures = [part["url"] for messages in conversations for part in picture_parts(messages)]
        bos = self.processor.tokenizer.bos_token
        written = bos is not None and texts[0].startswith(
            bos
        )  # by the template: don't let the tokenizer write a second
        return self.processor(
            text=texts, images=pictures or None, add_special_tokens=not written, padding=True, return_tensors="pt"
        )

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("tasks scored by likelihood are not supported: choose one that generates its answers")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("tasks of several rounds are not supported")

    def clean(self) -> None:
        """lmms-eval would drop the weights after each task; this model answers the next one too."""


def picture_parts(messages: Iterable[Message]) -> list[Message]:
    """The image parts of chat messages, in order.

    Raises:
        InputError: at a video or a sound, which this model can't be shown.
    """
    parts = [part for message in messages for part in message["content"]]
    for part in parts:
        if part["type"] not in ("text", "image") or (
            part["type"] == "image" and not isinstance(part["url"], Image.Image)
        ):
            raise InputError(
                f"a question holds a {part['type']} ({type(part.get('url')).__name__}): only pictures can be shown"
            )
    return [part for part in parts if part["type"] == "image"]


def generation_settings(task: dict[str, Any], overrules: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Keyword arguments of `generate`, and the strings that end an answer; a setting overruled by None is dropped.

    Raises:
        InputError: if no one says how long an answer may be, or the task samples.
    """
    settings = {key: value for key, value in {**task, **overrules}.items() if value is not None}
    until = settings.pop("until", [])
    if settings.pop("do_sample", False) or settings.pop("temperature", 0) > 0:
        raise InputError(
            "the task samples its answers: set `generation: {do_sample: false, temperature: 0}` in the suite"
        )
    if "max_new_tokens" not in settings:
        raise InputError("the task sets no max_new_tokens: set it under `generation` in the suite")
    sampling = dict.fromkeys(("temperature", "top_p", "top_k"))  # as the model folder may set them; greedy has none
    return {**settings, **sampling, "do_sample": False}, [until] if isinstance(until, str) else list(until)


def cut(text: str, stops: list[str]) -> str:
    """The answer: up to the first stop string, without white space around it."""
    text = text.lstrip()  # first, or a leading newline would end the answer before it began
    ends = [text.find(stop) for stop in stops if stop in text]
    return text[: min(ends, default=len(text))].strip()
