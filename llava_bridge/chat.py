"""Talk to trained LLaVAs: one conversation as an object, several side by side, and the terminal around them.

The page in the browser is `chat_page.py`; both ask through the same `ChatSession`.
"""

import contextlib
import re
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import torch
from PIL import Image
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from transformers import (
    PreTrainedModel,
    ProcessorMixin,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from clips_core.errors import InputError
from clips_core.images import open_image
from llava_bridge.adapters import load_adapter
from llava_bridge.mllm import load_mllm
from llava_bridge.precision import resolve_precision

MAX_NEW_TOKENS = 512
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")  # what `open_image` reads
HELP = "/image FILE shows a picture (so does dropping one here) · /reset begins anew · Ctrl-C stops an answer · /quit"


class Turn(NamedTuple):
    """A question and its answer."""

    question: str
    images: tuple[Image.Image, ...]
    answer: str


class ChatSession:
    """One conversation with one LLaVA.

    Attributes:
        turns: what was said so far. A question is in it together with its answer or not at all, so that roles always alternate.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        turns: Sequence[Turn] = (),
    ):
        """
        Args:
            temperature: 0: greedy, the likeliest token each time.

        Raises:
            InputError: if a setting is out of range, or the model has no end-of-answer token.
        """
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}, but an answer takes at least 1")
        if temperature < 0:
            raise InputError(f"temperature is {temperature}, but must be 0 (greedy) or more")
        if model.generation_config.eos_token_id is None:
            raise InputError("the model's generation_config.json has no eos_token_id, so its answers would never end")
        self.model, self.processor = model, processor
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.turns = list(turns)

    def ask(self, text: str, images: Sequence[Image.Image] = ()) -> Generator[str, None, None]:
        """The answer, piece by piece as it is generated. Closing the iterator stops the model.

        The finished answer joins `turns`. A stopped one does as far as it came; stopped before its first word, it is as if
        the question had never been asked.

        Args:
            images: shown with the question, before its words.

        Raises:
            InputError: at once, if the conversation has become too long for the model, the text has an image token in it,
                or nothing is asked.
        """
        question = Turn(text.strip(), tuple(images), "")
        if not question.question and not question.images:
            raise InputError("nothing was asked: no words, and no picture")
        return self._answer(question, self.encode([*self.turns, question]))

    def encode(self, turns: Sequence[Turn]) -> Any:
        """Model inputs of a conversation whose last turn awaits its answer, through the processor's own chat template:
        `input_ids`, `attention_mask` [1, T], and `pixel_values` of all pictures in order.
        """
        mark = self.processor.image_token
        if any(mark in turn.question for turn in turns):
            raise InputError(f"a question must not have {mark} in it: pictures are marked where they are shown")
        messages: list[dict[str, Any]] = []
        for turn in turns:
            parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in turn.images]
            parts += [{"type": "text", "text": turn.question}] if turn.question else []
            messages.append({"role": "user", "content": parts})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        inputs = self.processor.apply_chat_template(
            messages[:-1], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        used, room = inputs["input_ids"].shape[1], self.model.config.get_text_config().max_position_embeddings
        if used + self.max_new_tokens > room:
            raise InputError(
                f"the conversation has {used} tokens and the answer may take {self.max_new_tokens}, but the model has room "
                f"for {room}: begin anew (/reset), or allow shorter answers (--max-new-tokens)"
            )
        return inputs.to(self.model.device, self.model.dtype)

    def _answer(self, question: Turn, inputs: Any) -> Generator[str, None, None]:
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop, results, failures = threading.Event(), [], []

        def generate() -> None:
            try:
                stopping = StoppingCriteriaList([_Stop(stop)])
                results.append(
                    self.model.generate(**inputs, **self._settings(), streamer=streamer, stopping_criteria=stopping)
                )
            except Exception as error:  # of another thread: handed to who asked
                failures.append(error)
                streamer.on_finalized_text("", stream_end=True)

        thread = threading.Thread(target=generate, daemon=True)
        finished = False
        thread.start()
        try:
            yield from filter(None, streamer)
            finished = True
        finally:
            stop.set()
            thread.join()
            if results:
                # Decoded as a whole: pieces lose the spaces before them with some tokenizers.
                ids = results[0][0, inputs["input_ids"].shape[1] :]
                answer = self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
                if answer or finished:
                    self.turns.append(question._replace(answer=answer))
        if failures:
            raise failures[0]

    def _settings(self) -> dict[str, Any]:
        settings = {"max_new_tokens": self.max_new_tokens, "pad_token_id": self.processor.tokenizer.pad_token_id}
        if self.temperature > 0:
            return {**settings, "do_sample": True, "temperature": self.temperature}
        # As the model's folder may set them; greedy has none.
        return {**settings, "do_sample": False, **dict.fromkeys(("temperature", "top_p", "top_k"))}


class _Stop(StoppingCriteria):
    """Ends every sequence once an event is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


def ask_all(
    sessions: Sequence[ChatSession], text: str, images: Sequence[Image.Image] = ()
) -> Generator[list[str], None, None]:
    """The same question to every session; after each new piece, the answers so far. Closing the iterator stops them all.

    The conversations stay alike: if a stop reaches one before its first word, no one was asked.

    Raises:
        InputError: as `ChatSession.ask`, before any of them answers.
    """
    return _lockstep(sessions, [session.ask(text, images) for session in sessions])


def _lockstep(
    sessions: Sequence[ChatSession], answers: Sequence[Generator[str, None, None]]
) -> Generator[list[str], None, None]:
    before = len(sessions[0].turns)
    texts = ["" for _ in answers]
    going = dict(enumerate(answers))
    try:
        while going:
            for number, answer in list(going.items()):
                piece = next(answer, None)
                if piece is None:
                    del going[number]
                    continue
                texts[number] += piece
                yield list(texts)
    finally:
        for answer in answers:
            answer.close()
        if any(len(session.turns) == before for session in sessions):
            for session in sessions:
                del session.turns[before:]


# ------------------------------------------------------------------------------------------------------------- models


def load_chat_models(
    folders: Sequence[Path], max_new_tokens: int = MAX_NEW_TOKENS, temperature: float = 0.0
) -> dict[str, ChatSession]:
    """A session for each folder, under the folder's name as given.

    Raises:
        InputError: as `load_chat_model`, for settings out of range, or for one folder twice.
    """
    if len(set(folders)) != len(folders):
        raise InputError("the same model is named twice: two different ones can be compared")
    return {str(folder): ChatSession(*load_chat_model(folder), max_new_tokens, temperature) for folder in folders}


def load_chat_model(folder: Path) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A LLaVA to talk to, on the GPU if there is one.

    Args:
        folder: a run of stage 1 or 2 (its weights must be the ones it wrote), a stock LLaVA's folder, or the folder of
            adapters that stage 2 wrote with `save=adapter`, whose stage 1 must still be there.

    Raises:
        InputError: if it is none of these, or not what it was.
    """
    dtype = resolve_precision("auto")
    run = _adapter_run(folder)
    model, processor = load_mllm(folder, dtype) if run is None else load_adapter(run, dtype)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), processor


def _adapter_run(folder: Path) -> Path | None:
    """The run of stage 2 that saved its adapters apart, named by its own folder or by the adapters'; None: a model is there."""
    if (folder / "adapter_config.json").is_file():
        return folder.parent
    return folder if (folder / "adapter").is_dir() and not (folder / "model").exists() else None


# ----------------------------------------------------------------------------------------------------------- terminal


def chat(folders: Sequence[Path], max_new_tokens: int = MAX_NEW_TOKENS, temperature: float = 0.0) -> None:
    """Talk to one model, or to two at once, in the terminal.

    Raises:
        InputError: as `load_chat_models`.
    """
    sessions = load_chat_models(folders, max_new_tokens, temperature)
    with contextlib.suppress(ImportError):  # where it is there, `input` has a history and arrow keys
        import readline  # noqa: F401
    talk(sessions, input, Console(highlight=False))


def talk(sessions: dict[str, ChatSession], read: Callable[[str], str], console: Console) -> None:
    """Read questions and commands until /quit or the end of input, and print the answers.

    Args:
        sessions: by the name that is shown for each.
        read: gets the prompt and returns a line, as `input` does.
    """
    console.out(HELP)
    pictures: list[Image.Image] = []
    while True:
        try:
            line = read(f"[{len(pictures)} to show] you: " if pictures else "you: ").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            console.out("\n/quit ends the program")
            continue
        try:
            command, _, rest = line.partition(" ")
            if command == "/quit":
                return
            if command == "/reset":
                pictures.clear()
                for session in sessions.values():
                    session.turns.clear()
            elif command == "/image":
                if not rest.strip():
                    raise InputError("/image needs the path of a picture behind it")
                path = Path(_unquote(rest.strip())).expanduser()
                pictures.append(open_image(path, str(path)))
            else:
                text, paths = split_pictures(line)
                pictures += [open_image(path, str(path)) for path in paths]
                if text.startswith("/") and " " not in text:
                    raise InputError(f"{text}: neither a command nor a picture that is there. {HELP}")
                if text:
                    _answer(sessions, text, pictures, console)
                    pictures = []
        except InputError as error:
            console.out(f"error: {error}")


def split_pictures(line: str) -> tuple[str, list[Path]]:
    """A line without the pictures that were dropped into it, and their paths.

    A terminal writes a dropped file as its path, with quotes or backslashes around what is special, or as a file: address. Only
    whole paths (from /, ~, ./, ../ or file:) to files with a picture's extension count.
    """
    paths = []

    def take(found: re.Match[str]) -> str:
        with contextlib.suppress(OSError, ValueError):  # too long for a path, a zero byte
            path = Path(_unquote(found[0])).expanduser()
            if path.suffix.lower() in PICTURES and path.is_file():
                paths.append(path)
                return ""
        return found[0]

    start = r"(?:file://|~?/|\.{1,2}/)"
    quoted = rf"'{start}[^']+'|\"{start}[^\"]+\""
    text = re.sub(rf"{quoted}|(?<!\S){start}(?:\\.|\S)+", take, line)
    return (" ".join(text.split()) if paths else line), paths


def _unquote(path: str) -> str:
    """A path as it is, from the way a shell or a terminal writes it."""
    if path[:1] in ("'", '"') and path[-1:] == path[:1]:
        path = path[1:-1]
    elif not Path(path).exists():
        path = re.sub(r"\\(.)", r"\1", path)
    return unquote(urlsplit(path).path) if path.startswith("file://") else path


def _answer(sessions: dict[str, ChatSession], text: str, images: Sequence[Image.Image], console: Console) -> None:
    """Ask, and print the answers as they grow; Ctrl-C stops them."""
    answers = ask_all(list(sessions.values()), text, images)
    with contextlib.closing(answers):
        try:
            if len(sessions) == 1:
                _print_answer(answers, console)
            else:
                _print_columns(list(sessions), answers, console)
        except KeyboardInterrupt:
            answers.close()
            console.out("\n(stopped)")


def _print_answer(answers: Iterator[list[str]], console: Console) -> None:
    shown = 0
    for (text,) in answers:
        console.out(_printable(text[shown:]), end="")
        shown = len(text)
    console.out("")


def _print_columns(names: Sequence[str], answers: Iterator[list[str]], console: Console) -> None:
    texts = ["" for _ in names]
    try:
        # What grows is drawn over and over, and would be cut off where the screen ends: so the whole is printed at the end.
        with Live(console=console, transient=True) as live:
            for texts in answers:
                live.update(_columns(names, texts))
    finally:
        console.print(_columns(names, texts))


def _columns(names: Sequence[str], texts: Sequence[str]) -> Table:
    table = Table(expand=True)
    for name in names:
        table.add_column(Text(name), ratio=1, overflow="fold")
    table.add_row(*(Text(_printable(text)) for text in texts))
    return table


def _printable(text: str) -> str:
    """Without control characters, which a terminal would obey."""
    return "".join(character for character in text if character.isprintable() or character in "\n\t")
