"""Who writes a synthetic caption: a vision-language model in this process, or a server that speaks the chat-completions protocol.

Both take the same tasks, judge every caption by the same rules and ask a second time, in other words as it were, where
one fails them. torch, transformers and the HTTP client are imported when a captioner is made.
"""

import asyncio
import base64
import datetime
import email.utils
import io
import itertools
import os
import random
import re
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar
from urllib.parse import urlsplit

from PIL import Image
from tqdm import tqdm

from clips_core.errors import InputError
from clips_core.folders import MANIFEST, read_manifest, sha256_file

Messages = list[dict[str, Any]]  # of the chat-completions protocol
DType = Literal["auto", "bfloat16", "float16", "float32"]
RETRY_TEMPERATURE = 0.7  # of the second try: a greedy model would only repeat itself
LONGEST_WAIT = 600.0  # seconds; a server that wants to be left alone for longer stops the run
LONGEST_BACKOFF = 60.0  # seconds
FAILURES = 3  # pictures in a row that a server fails on before it is asked about one that is surely good

# A picture's caption never begins like this. Anchored: "A sign that says: I'm sorry, we are closed" is a caption.
REFUSAL = re.compile(
    r"(unfortunately,? |apologies[,.!]? |sorry[,.!]? (but )?)?"
    r"(i'?m |i am )(really |very |so )?(sorry|unable|not able|afraid)\b"
    r"|(unfortunately,? |sorry[,.!]? (but )?)?i (can't|cannot|can not|won't|don't see|do not see|apologi[sz]e)\b"
    r"|as an ai\b|there is no (image|picture|photo)|no (image|picture|photo) (was|is|has been)\b"
    r"|(please )?(provide|upload|share) (an|the|your) (image|picture|photo)",
    re.IGNORECASE,
)
# Where a sentence ends: a mark, perhaps closing quotes, then white space or the end; CJK marks need no space.
SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*(?=\s|$)|[。！？][”’」』）]*")
RUN = 16  # characters, see `repeats`


class Request(NamedTuple):
    """One picture to describe."""

    picture: Image.Image  # RGB, upright, no larger than wanted
    prompt: str
    seed: int  # 0 ≤ seed < 2³¹ − 1: what is drawn for this picture, whatever its neighbours


class Reply(NamedTuple):
    """What a model has said."""

    text: str
    cut_off: bool  # it was stopped at the longest length allowed
    filtered: bool = False  # the server withheld it


class Outcome(NamedTuple):
    """What became of one picture. `kind` is one of

    - captioned: `caption` is new;
    - kept: `caption` was there before;
    - uncaptioned: the sample stays, without a synthetic caption, for `cause`;
    - skipped: the sample is unusable and left out, for `cause`.
    """

    kind: Literal["captioned", "kept", "uncaptioned", "skipped"]
    caption: str = ""
    cause: str = ""
    detail: str = ""
    retried: str = ""  # what was wrong with the first caption
    trimmed: bool = False  # cut off by the model, and trimmed to its last whole sentence


class Task(Protocol):
    """One picture that has no caption yet."""

    @property
    def batch(self) -> Hashable:
        """Consecutive tasks with equal values are put to a local model together."""

    def read(self) -> Request | Outcome:
        """The request, or why there is none: an outcome that is kept or skipped. Called in another thread."""


AnyTask = TypeVar("AnyTask", bound=Task)


class Captioner(Protocol):
    """Captions tasks, in whatever order; the iterator of tasks is read in the caller's thread, and only as needed."""

    def captions(self, tasks: Iterator[AnyTask]) -> Iterator[tuple[AnyTask, Outcome]]: ...


# --- what counts as a caption ---------------------------------------------------------------------------------------


def judge(reply: Reply) -> Outcome:
    """A caption, white space normalised, or why the reply is none.

    In this order: *refusal* (it begins like one, or the server withheld it); *empty* (it has no letter); *cut off* (the
    model was stopped before it ended a sentence; else what follows the last whole one is trimmed); *repetition*.
    """
    text = reply.text.rpartition("</think>")[2]  # what a reasoning model has thought aloud is no caption
    text = "" if text.lstrip().startswith("<think>") else " ".join(text.split())
    if reply.filtered or REFUSAL.match(text.replace("’", "'")):
        return Outcome("uncaptioned", cause="refusal", detail=text[:200])
    if not _has_letter(text):
        return Outcome("uncaptioned", cause="empty", detail=text[:200])
    trimmed = False
    if reply.cut_off:
        whole = whole_sentences(text)
        if not _has_letter(whole):
            return Outcome("uncaptioned", cause="cut off", detail=text[:200])
        text, trimmed = whole, whole != text
    if repeats(text):
        return Outcome("uncaptioned", cause="repetition", detail=text[:200])
    return Outcome("captioned", text, trimmed=trimmed)


def _has_letter(text: str) -> bool:
    return any(character.isalpha() for character in text)


def whole_sentences(text: str) -> str:
    """`text` up to the end of its last whole sentence; "" if it has none."""
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else ""


def repeats(text: str) -> bool:
    """Whether fewer than half of the runs of 16 characters differ from one another: a model caught in a loop.

    By characters, since not every language puts spaces between its words. Ordinary prose repeats a few runs in a hundred.
    """
    count = len(text) - RUN + 1
    return count > RUN and len({text[i : i + RUN] for i in range(count)}) < count / 2


def _second(first: Outcome, second: Outcome) -> Outcome:
    return second._replace(retried=first.cause)


# --- a model in this process ----------------------------------------------------------------------------------------


class LocalModel:
    """A vision-language model with a chat template, in HF layout, on one device: GPU `LOCAL_RANK` (0 without torchrun) or CPU.

    Args:
        name: its folder, the folder of a trained LLaVA's stage (whose weights must be the ones that it wrote), or a hub name.
        temperature: 0: greedy. Otherwise every picture has noise of its own, so that its caption does not depend on its batch.
        dtype: of the weights; auto: bfloat16 on a GPU that has it, else float32.

    Raises:
        InputError: if it cannot be loaded, lacks weights, or has no chat template, picture processor or end token.
    """

    def __init__(self, name: str, max_new_tokens: int, temperature: float = 0.0, dtype: DType = "auto"):
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.name, self.max_new_tokens, self.temperature = name, max_new_tokens, temperature
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if dtype == "auto":
            dtype = "bfloat16" if self.device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
        folder = model_folder(name)
        try:
            self.processor = AutoProcessor.from_pretrained(folder or name)
            self.model, report = AutoModelForImageTextToText.from_pretrained(
                folder or name, dtype=getattr(torch, dtype), output_loading_info=True, use_safetensors=True
            )
        except (OSError, RuntimeError, ValueError, KeyError, ImportError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"model {name}: cannot be loaded as a vision-language model ({reason})") from None
        lacking = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
        if lacking:
            raise InputError(f"model {name}: weights are missing or of another shape: {', '.join(lacking[:5])}")
        tokenizer = getattr(self.processor, "tokenizer", None)
        if tokenizer is None or getattr(self.processor, "image_processor", None) is None:
            raise InputError(f"model {name}: its processor takes no pictures with text; take a vision-language model")
        if getattr(self.processor, "chat_template", None) is None:
            raise InputError(f"model {name}: has no chat template; take an instruction-tuned model that has one")
        end = self.model.generation_config.eos_token_id
        end = tokenizer.eos_token_id if end is None else end
        if end is None:
            raise InputError(
                f"model {name}: no eos token, in generation_config.json or the tokenizer, would end a caption"
            )
        self.end = {end} if isinstance(end, int) else set(end)
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(self.end)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"  # every caption then begins right behind its prompt
        self.model.to(self.device).eval()
        self._processor_lock = threading.Lock()  # a fast tokenizer cannot be used by two threads at once

    def captions(self, tasks: Iterator[AnyTask]) -> Iterator[tuple[AnyTask, Outcome]]:
        """In order, batch by batch; the next two batches are read and encoded meanwhile."""
        with ThreadPoolExecutor(1) as thread:
            ahead: deque[Future[_Batch]] = deque()
            for _, batch in itertools.groupby(tasks, key=lambda task: task.batch):
                ahead.append(thread.submit(self._prepare, list(batch)))
                if len(ahead) > 2:
                    yield from self._caption(ahead.popleft().result())
            while ahead:
                yield from self._caption(ahead.popleft().result())

    def encode(self, requests: Sequence[Request]) -> Any:
        """Model inputs of a batch: `input_ids`, `attention_mask` [B, T], padded on the left, and the pictures' tensors."""
        conversations = [
            [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": prompt}]}]
            for picture, prompt, _ in requests
        ]
        with self._processor_lock:
            return self.processor.apply_chat_template(
                conversations,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )

    def generate(self, inputs: Any, seeds: Sequence[int], temperature: float) -> list[Reply]:
        """One reply per row of `encode`'s inputs."""
        import torch
        from transformers import LogitsProcessorList

        sampler = [_Sampler(temperature, seeds, self.device)] if temperature else []
        greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
        inputs = inputs.to(self.device, self.model.dtype)
        try:
            with torch.inference_mode():
                ids = self.model.generate(
                    **inputs,
                    **greedy,  # the sampler, if any, adds its noise before the largest is taken
                    max_new_tokens=self.max_new_tokens,
                    eos_token_id=sorted(self.end),
                    pad_token_id=self.pad,
                    logits_processor=LogitsProcessorList(sampler),
                )
        except torch.OutOfMemoryError:
            raise InputError(
                f"{self.device}: out of memory with {len(seeds)} pictures at once: lower batch_size or max_side"
            ) from None
        rows = ids[:, inputs["input_ids"].shape[1] :].tolist()
        texts = self.processor.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [Reply(text, self.end.isdisjoint(row)) for text, row in zip(texts, rows, strict=True)]

    def _prepare(self, tasks: list[AnyTask]) -> "_Batch":
        """Read and encode. What the processor cannot take (a picture of 1 × 500 pixels, say) is uncaptioned, alone."""
        read = [(task, task.read()) for task in tasks]
        done = [(task, outcome) for task, outcome in read if isinstance(outcome, Outcome)]
        asked = [(task, request) for task, request in read if isinstance(request, Request)]
        try:
            return _Batch(asked, self.encode([request for _, request in asked]) if asked else None, done)
        except Exception:  # processors raise nearly anything; which picture it was is found below
            good = []
            for task, request in asked:
                try:
                    self.encode([request])
                    good.append((task, request))
                except Exception as error:
                    detail = f"{type(error).__name__}: {error}"[:200]
                    done.append((task, Outcome("uncaptioned", cause="the model cannot take it", detail=detail)))
            return _Batch(good, self.encode([request for _, request in good]) if good else None, done)

    def _caption(self, batch: "_Batch") -> Iterator[tuple[Any, Outcome]]:
        yield from batch.done
        if not batch.asked:
            return
        requests = [request for _, request in batch.asked]
        outcomes = [judge(r) for r in self.generate(batch.inputs, [r.seed for r in requests], self.temperature)]
        again = [i for i, outcome in enumerate(outcomes) if outcome.kind != "captioned"]
        if again:
            seeds = [requests[i].seed + 1 for i in again]
            temperature = max(self.temperature, RETRY_TEMPERATURE)
            replies = self.generate(self.encode([requests[i] for i in again]), seeds, temperature)
            for i, reply in zip(again, replies, strict=True):
                outcomes[i] = _second(outcomes[i], judge(reply))
        for (task, _), outcome in zip(batch.asked, outcomes, strict=True):
            yield task, outcome


class _Batch(NamedTuple):
    asked: list[tuple[Any, Request]]
    inputs: Any  # of `asked`
    done: list[tuple[Any, Outcome]]


class _Sampler:
    """Adds Gumbel noise to logits [B, V]: the largest is then a draw from softmax(logits / temperature).

    Each row has a generator of its own, so a caption depends on its seed alone, not on the pictures beside it.
    """

    def __init__(self, temperature: float, seeds: Sequence[int], device: Any):
        import torch

        self.temperature = temperature
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        import torch

        rows = [torch.rand(scores.shape[1], generator=each, device=scores.device) for each in self.generators]
        return scores.float() / self.temperature - torch.log(-torch.log(torch.stack(rows)))


def model_folder(name: str) -> Path | None:
    """The folder in HF layout that `name` means, `model/` of a trained LLaVA's stage included; None for a hub name.

    Raises:
        InputError: if the stage has not finished, its weights have changed since, or `name` can be neither.
    """
    folder = Path(name)
    if (folder / "config.json").is_file():
        return folder
    if not folder.is_dir():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
            return None
        raise InputError(f"model {name}: no such folder, and no hub name, which looks like ORGANISATION/MODEL")
    recorded = {file: hashed for file, hashed in read_manifest(folder)["weights"].items() if file.startswith("model/")}
    if not recorded:
        raise InputError(f"model {name}: neither has a config.json nor records a trained model in its {MANIFEST}")
    for file, expected in recorded.items():
        if not (folder / file).is_file() or sha256_file(folder / file) != expected:
            raise InputError(f"{folder / file}: is not what {folder / MANIFEST} records; run that stage again")
    return folder / "model"


# --- a server -------------------------------------------------------------------------------------------------------


class Endpoint:
    """A server that speaks the OpenAI chat-completions protocol, asked `concurrency` pictures at a time.

    Pictures travel inside the request, as JPEG in a base64 data URL, and to no other host: redirects are not followed.

    What goes wrong once is tried again after a wait that doubles, with jitter, or that the server asks for (Retry-After,
    which makes all requests wait): 408, 409, 425, 429, 5xx, a reply that is no chat completion, no answer in time. What goes
    wrong `retries` + 1 times may be one picture's fault, or the server's: the picture's if the server answers for others,
    or for a plain test picture, which it is shown after 3 failures in a row or when nothing else is left to ask. Then
    that one picture has no caption. Otherwise the run stops; so it does if the server can't be reached or keeps saying 429,
    and at once at any other 4xx. Only 400, 413 and 422 speak of one request: they count like a picture that was tried
    often enough.

    Args:
        url: up to and with `/v1`.
        key: sent as a bearer token, and blotted out in whatever comes back.
        timeout: seconds for one answer.
        retry_wait: seconds before the second try.
        extra: more keys of the request's JSON; None takes one out.
    """

    EARNED = "captions"  # what replies become

    def __init__(
        self,
        url: str,
        model: str,
        max_new_tokens: int,
        key: str = "",
        temperature: float = 0.0,
        concurrency: int = 32,
        timeout: float = 300.0,
        retries: int = 5,
        retry_wait: float = 1.0,
        extra: dict[str, Any] | None = None,
    ):
        try:
            import httpx2
        except ImportError:
            raise InputError("an endpoint needs an HTTP client: pip install httpx2") from None
        self.http = httpx2
        self.url, self.model, self.max_new_tokens, self.key = url.rstrip("/"), model, max_new_tokens, key
        self.temperature, self.concurrency, self.timeout = temperature, concurrency, timeout
        self.retries, self.retry_wait, self.extra = retries, retry_wait, extra or {}
        self.host = urlsplit(url).netloc
        self._resume_at = 0.0  # on the event loop's clock: no request before that
        self._told: set[str] = set()

    def captions(self, tasks: Iterator[AnyTask]) -> Iterator[tuple[AnyTask, Outcome]]:
        """As they come back. The event loop runs while the caller waits for the next one."""
        failed: list[tuple[AnyTask, _Failure]] = []  # since the server's last answer
        pending: set[asyncio.Task[tuple[AnyTask, Outcome | _Failure]]] = set()
        with asyncio.Runner() as runner:
            client = runner.run(self._open())
            try:
                while True:
                    for task in itertools.islice(tasks, self.concurrency - len(pending)):
                        pending.add(runner.get_loop().create_task(self._caption(client, task)))
                    if not pending:
                        break
                    done, pending = runner.run(_first_of(pending))
                    answered = False
                    for task, result in (each.result() for each in done if each.exception() is None):
                        if isinstance(result, _Failure):
                            failed.append((task, result))
                        else:
                            answered = answered or result.kind in ("captioned", "uncaptioned")
                            yield task, result
                    for error in filter(None, (each.exception() for each in done)):
                        raise error
                    if failed and not answered:
                        if pending and len(failed) < FAILURES:
                            continue
                        problem = runner.run(self._probe(client))
                        if problem is not None:
                            raise self._stopped(problem)
                    yield from ((task, Outcome("uncaptioned", cause=f.cause, detail=f.detail)) for task, f in failed)
                    failed.clear()
            finally:
                runner.run(_close(client, pending))

    async def _open(self) -> Any:
        http = self.http
        return http.AsyncClient(
            headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
            timeout=http.Timeout(self.timeout, connect=min(10.0, self.timeout), pool=None),
            limits=http.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency),
            follow_redirects=False,
        )

    async def _caption(self, client: Any, task: AnyTask) -> tuple[AnyTask, "Outcome | _Failure"]:
        request = await asyncio.to_thread(task.read)
        if isinstance(request, Outcome):
            return task, request
        picture = await asyncio.to_thread(data_url, request.picture)
        messages = _about(picture, request.prompt)
        first = await self._ask(client, messages, request.seed, self.temperature)
        if isinstance(first, _Failure):
            return task, first
        outcome = judge(first)
        if outcome.kind != "captioned":
            temperature = max(self.temperature, RETRY_TEMPERATURE)
            second = await self._ask(client, messages, request.seed + 1, temperature)
            if isinstance(second, _Failure):
                return task, second
            outcome = _second(outcome, judge(second))
        return task, outcome

    async def _probe(self, client: Any) -> "_Failure | None":
        """What is wrong with the server, asked about a picture that has no fault of its own."""
        picture = data_url(Image.new("RGB", (224, 224), (128, 160, 192)))
        answer = await self._ask(client, _about(picture, "Describe this picture."), 0, self.temperature)
        return answer if isinstance(answer, _Failure) else None

    async def _ask(self, client: Any, messages: Messages, seed: int, temperature: float) -> "Reply | _Failure":
        """Put one question until there is an answer.

        Raises:
            InputError: where the server, not this picture, is at fault.
        """
        body = self._body(messages, seed, temperature)
        for attempt in itertools.count():
            await self._rest()
            wait = min(LONGEST_BACKOFF, self.retry_wait * 2**attempt) * random.uniform(0.5, 1.0)
            away = False
            try:
                response = await client.post(f"{self.url}/chat/completions", json=body)
            except self.http.ConnectError as error:
                away, problem = True, _Failure("no connection", self._clean(str(error)))
            except self.http.TimeoutException:
                problem = _Failure("no answer in time", f"none within {self.timeout:g} s")
            except self.http.TransportError as error:
                problem = _Failure("connection lost", f"{type(error).__name__}: {self._clean(str(error))}")
            else:
                status = response.status_code
                if status == 200:
                    reply = self._parse(response)
                    if reply is not None:
                        return reply
                    problem = _Failure("no chat completion", self._clean(response.text[:200]))
                else:
                    problem = _Failure(f"HTTP {status}", self._message(response))
                    if status in (400, 413, 422):
                        return problem
                    if status < 500 and status not in (408, 409, 425, 429):
                        raise self._stopped(problem)
                    asked = retry_after(response.headers.get("retry-after", ""))
                    if asked > LONGEST_WAIT:
                        raise self._stopped(problem, f"it asks to wait {asked:.0f} s")
                    wait = max(wait, asked)
                    if asked or status == 429:
                        self._resume_at = max(self._resume_at, asyncio.get_running_loop().time() + wait)
                    away = status == 429
            if attempt >= self.retries:
                if away:
                    raise self._stopped(problem, f"tried {attempt + 1} times")
                return problem
            self._tell(problem)
            await asyncio.sleep(wait)
        raise AssertionError("unreachable")

    async def _rest(self) -> None:
        """Wait as long as the server has asked for; then not all at the same moment."""
        clock = asyncio.get_running_loop()
        while (left := self._resume_at - clock.time()) > 0:
            await asyncio.sleep(left * random.uniform(1.0, 1.2))

    def _body(self, messages: Messages, seed: int, temperature: float) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "max_tokens": self.max_new_tokens,
            "temperature": temperature,
        }
        if temperature:
            body["seed"] = seed
        return {name: value for name, value in (body | self.extra).items() if value is not None}

    def _parse(self, response: Any) -> Reply | None:
        """The reply inside a chat completion; None if it is none."""
        try:
            choice = response.json()["choices"][0]
            text, reason = choice["message"].get("content"), choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError):
            return None
        if text is not None and not isinstance(text, str):
            return None
        return Reply(self._clean(text or ""), reason == "length", reason == "content_filter")

    def _message(self, response: Any) -> str:
        """What the server says of an error, as one line."""
        if response.is_redirect:
            return f"it redirects to {response.headers.get('location')}; give the address that answers itself"
        text = response.text
        try:
            error = response.json()
            for name in ("error", "message"):
                error = error.get(name, error) if isinstance(error, dict) else error
            text = error if isinstance(error, str) else text
        except ValueError:
            pass
        return self._clean(" ".join(text.split()))[:500]

    def _clean(self, text: str) -> str:
        return text.replace(self.key, "[key]") if self.key else text

    def _stopped(self, problem: "_Failure", also: str = "") -> InputError:
        hints = {
            "no connection": "is the server running?",
            "HTTP 401": "is the key in the variable that api_key_env names?",
            "HTTP 404": "does the address end in /v1, and is endpoint_model a name that the server knows?",
            "HTTP 429": "lower concurrency",
        }
        parts = [f"{self.url}: {problem.cause}: {problem.detail}", also, hints.get(problem.cause, "")]
        return InputError("; ".join(filter(None, [*parts, f"{self.EARNED} so far are kept: run again to go on"])))

    def _tell(self, problem: "_Failure") -> None:
        if problem.cause not in self._told:  # once each: thousands may follow
            self._told.add(problem.cause)
            tqdm.write(f"{self.host}: {problem.cause}: {problem.detail}; trying again, and silently from now on")


class _Failure(NamedTuple):
    """Why the server gave no answer."""

    cause: str
    detail: str


def check_endpoint(url: str) -> None:
    """Raise a `ValueError` unless this is the address of a server, without a password in it."""
    parts = urlsplit(url)
    if parts.username or parts.password:
        raise ValueError("endpoint: holds a password; put it in a variable and name that in api_key_env")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"endpoint: must be an address like http://localhost:8000/v1, not {url!r}")


def read_key(api_key_env: str | None) -> str:
    """The key in this environment variable; "" where none is named."""
    if api_key_env is None:
        return ""
    key = os.environ.get(api_key_env, "").strip()
    if not key:
        raise InputError(f"api_key_env: there is no environment variable {api_key_env}, or it is empty")
    return key


def _about(picture: str, prompt: str) -> Messages:
    """A question about a picture, given as a data URL."""
    content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": prompt}]
    return [{"role": "user", "content": content}]


async def _first_of(pending: set[Any]) -> tuple[set[Any], set[Any]]:
    return await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)


async def _close(client: Any, pending: set[Any]) -> None:
    for each in pending:
        each.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    await client.aclose()


def data_url(picture: Image.Image) -> str:
    """An RGB picture as JPEG in a base64 data URL; pixels only, no metadata."""
    picture = picture.copy()
    picture.info = {}
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def retry_after(value: str, now: Callable[[], datetime.datetime] | None = None) -> float:
    """Seconds of a Retry-After header, which holds seconds or a date; 0 if it holds neither."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        moment = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return max(0.0, (moment - (now or (lambda: datetime.datetime.now(datetime.UTC)))()).total_seconds())
