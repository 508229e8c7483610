"""The models that answer lmms-eval's tasks: a stock LLaVA folder through plain transformers, or one of lmms-eval's own.

Imports torch, transformers and lmms-eval, so `benchmarks.py` imports it when there is something to answer.
"""

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lmms_eval.api.task  # noqa: F401  imported for its side effect, which is undone below
import torch
from lmms_eval import models
from lmms_eval.api.instance import Instance, unwrap_generation_output
from lmms_eval.api.model import lmms
from PIL import Image, ImageFile

from clips_core.errors import InputError
from eval_suites.answering import batches
from eval_suites.pictures import Swap, own
from llava_bridge.methods import merge_lora
from llava_bridge.mllm import Mllm, load_mllm

# lmms-eval makes PIL fill what is missing of a truncated picture with grey. Here a damaged picture is an error.
ImageFile.LOAD_TRUNCATED_IMAGES = False

Message = dict[str, Any]  # {"role", "content": [{"type": "image", "url": PIL image} | {"type": "text", "text"}]}


class ChatLlava(lmms):
    """A LLaVA folder as an lmms-eval model of the chat class. Greedy; any error is raised.

    lmms-eval's own evaluator takes it too: it then answers with the questions' own pictures and the tasks' own settings.

    Args:
        folder: a stock LLaVA's (LlavaNext included), or a run folder of stage 1 or 2, whose adapter is merged.
        attention: the kernel, by transformers' name.
        adapter: a LoRA adapter's folder in PEFT's layout, which is merged into it.
    """

    is_simple = False  # requests come as chat messages
    accelerator = None  # one process; where lmms-eval finds this attribute it makes no Accelerator of its own

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        attention: str,
        batch_size: int = 1,
        device: torch.device | None = None,
        adapter: Path | None = None,
    ):
        super().__init__()
        self.batch_size = batch_size
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, self.processor = load_mllm(folder, dtype)
        if adapter is not None:
            self.model = with_adapter(self.model, adapter)
        self.model.to(self.device).eval().set_attn_implementation(attention)
        if self.model.generation_config.eos_token_id is None:
            raise InputError(f"{folder}/generation_config.json: no eos_token_id, so answers would never end")
        self.processor.tokenizer.padding_side = "left"  # every answer then starts right behind its question

    @property
    def mean_colour(self) -> tuple[float, float, float]:
        """The image processor's mean, RGB in 0-1."""
        red, green, blue = self.processor.image_processor.image_mean
        return red, green, blue

    def lengths(self, requests: Sequence[Instance]) -> dict[int, int]:
        """Tokens of each question's text, by doc_id."""
        texts = {request.args[3]: request.args[0] for request in requests}
        return {doc_id: len(self.processor.tokenizer(text).input_ids) for doc_id, text in texts.items()}

    def answer(self, requests: Sequence[Instance], swap: Swap, generation: Mapping[str, Any]) -> list[str]:
        """One answer to each of a batch of one task, with the pictures of `swap`; `generation` overrules the task's settings."""
        inputs = self.encode([self._messages(request, swap) for request in requests])
        settings, stops = generation_settings(requests[0].args[2], generation)
        ids = self.generate(inputs, **settings)
        texts = self.processor.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [cut(text, stops) for text in texts]

    def generate(self, inputs: Any, **settings: Any) -> Any:
        """transformers' `generate` on `encode`'s inputs. In float32 nothing is rounded to TF32."""
        exact = self.model.dtype == torch.float32
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=not exact):
            return self.model.generate(**inputs.to(self.device, self.model.dtype), **settings)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """One answer per request, in their order. What lmms-eval's own evaluator calls, with several tasks at once."""
        by_task: dict[str, dict[int, Instance]] = {}
        for request in requests:
            by_task.setdefault(request.args[4], {})[request.args[3]] = request
        answers: dict[tuple[str, int], str] = {}
        for task, by_doc in by_task.items():
            for batch in batches(self.lengths(list(by_doc.values())), self.batch_size):
                said = self.answer([by_doc[doc_id] for doc_id in batch], own, {})
                answers |= {(task, doc_id): text for doc_id, text in zip(batch, said, strict=True)}
        return [answers[request.args[4], request.args[3]] for request in requests]

    def _messages(self, request: Instance, swap: Swap) -> list[Message]:
        """The request's chat messages, with the pictures of `swap`."""
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages: list[Message] = doc_to_messages(self.task_dict[task][split][doc_id])
        for position, part in enumerate(picture_parts(messages)):
            part["url"] = swap(doc_id, position, part["url"])
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


def with_adapter(model: Mllm, folder: Path) -> Mllm:
    """The LLaVA with a LoRA adapter merged into it.

    Raises:
        InputError: if the adapter is damaged, or one of another model: PEFT itself would leave what it does not find untrained.
    """
    import peft
    from safetensors import SafetensorError

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys")
            adapted = peft.PeftModel.from_pretrained(model, folder)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, UserWarning, SafetensorError) as error:
        raise InputError(f"{folder}: not an adapter of its base model ({' '.join(str(error).split())[:300]})") from None
    return merge_lora(adapted, model.dtype)


class LmmsModel:
    """Any model of lmms-eval's own registry, of the simple class or the chat class, as its `--model` names it.

    How it answers is its own affair; an answer that it left empty (many of these models catch their errors) is refused.

    Args:
        arguments: as lmms-eval's `--model_args`.
    """

    def __init__(self, name: str, arguments: str, batch_size: int, device: torch.device):
        try:
            kind = models.get_model(name)
        except ValueError as error:
            raise InputError(
                f"lmms:{name}: lmms-eval has no such model ({' '.join(str(error).split())[:300]})"
            ) from None
        except ImportError as error:
            raise InputError(f"lmms:{name}: its own requirements are not installed ({error})") from None
        self.model = kind.create_from_arg_string(arguments, {"batch_size": batch_size, "device": str(device)})

    @property
    def is_simple(self) -> bool:
        """Whether it takes a prompt and pictures; else it takes chat messages."""
        return bool(self.model.is_simple)

    def lengths(self, requests: Sequence[Instance]) -> dict[int, int]:
        """Characters of each question's text, by doc_id."""
        return {request.args[3]: len(request.args[0]) for request in requests}

    def answer(self, requests: Sequence[Instance], swap: Swap, generation: Mapping[str, Any]) -> list[str]:
        """As `ChatLlava.answer`; the pictures are the questions' own."""
        assert swap is own
        place = 1 if self.is_simple else 2
        asked = []
        for request in requests:
            settings = {k: v for k, v in {**request.args[place], **generation}.items() if v is not None}
            asked.append(copy.copy(request))
            asked[-1].arguments = (*request.args[:place], settings, *request.args[place + 1 :])
        return [str(unwrap_generation_output(reply)[0] or "").strip() for reply in self.model.generate_until(asked)]


class Answered(lmms):
    """Answers that were given before, for lmms-eval's evaluator to score."""

    is_simple = False
    accelerator = None

    def __init__(self, answers: Mapping[int, str]):
        super().__init__()
        self.answers = answers

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return [self.answers[request.args[3]] for request in requests]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("tasks scored by likelihood are not supported: choose one that generates its answers")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("tasks of several rounds are not supported")

    def clean(self) -> None:
        """There is nothing to drop."""


def requests_of(task: Any, limit: int | None) -> list[Instance]:
    """The requests that lmms-eval makes of a task's first questions, in their order.

    Raises:
        InputError: if the task is not one of a single answer to a question.
    """
    if task.OUTPUT_TYPE != "generate_until":
        raise InputError(
            f"{task.config.task}: its answers are of the kind {task.OUTPUT_TYPE!r}; only generate_until is supported"
        )
    task.build_all_requests(limit=limit)
    return list(task.instances)


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


def generation_settings(task: Mapping[str, Any], overrules: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
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
