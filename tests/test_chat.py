"""Conversations with a model: what it is shown, when it stops, and the terminal around it."""

import io
import itertools
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from llava_samples import save_two_llavas
from PIL import Image
from rich.console import Console
from transformers import AutoTokenizer

from clips_core.errors import InputError
from llava_bridge.chat import ChatSession, ask_all, load_chat_model, load_chat_models, split_pictures, talk
from llava_bridge.mllm import build_mllm
from llava_bridge.towers import load_tower

SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_two_llavas(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def models(folders: tuple[Path, Path]) -> list[tuple]:
    return [load_chat_model(folder) for folder in folders]


def pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)) for _ in range(count)]


def plain_answer(model: tuple, turns: list[tuple[str, list[Image.Image], str]], max_new_tokens: int) -> str:
    """The answer to the last question by one `generate` over the conversation, its prompt put together by hand."""
    llava, processor = model
    text, shown = SYSTEM, []
    for question, images, answer in turns:
        marks = "".join("<image>" * llava.config.image_seq_length + "\n" for _ in images)
        text += f"<|im_start|>user\n{marks}{question}<|im_end|>\n<|im_start|>assistant\n"
        text += f"{answer}<|im_end|>\n" if answer else ""
        shown += images
    ids = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    pixels = processor.image_processor(shown, return_tensors="pt")["pixel_values"].to(llava.dtype) if shown else None
    with torch.no_grad():
        out = llava.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **({} if pixels is None else {"pixel_values": pixels}),
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
    return processor.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def no_model_at_work() -> bool:
    return all("generate" not in thread.name for thread in threading.enumerate())


# -------------------------------------------------------------------------------------------------------------- session


def test_answers_equal_plain_generation_over_the_whole_conversation(models: list[tuple]) -> None:
    session = ChatSession(*models[0], max_new_tokens=12)
    one, two, three = pictures(3)
    turns: list[tuple[str, list[Image.Image], str]] = []
    for question, images in (("Who are you?", []), ("What differs?", [one, two]), ("", [three]), ("And now?", [])):
        expected = plain_answer(models[0], [*turns, (question, images, "")], 12)
        pieces = list(session.ask(question, images))
        assert len(pieces) > 1 and "".join(pieces).strip() == expected
        turns.append((question, images, expected))
    assert [(turn.question, list(turn.images), turn.answer) for turn in session.turns] == turns


def test_pictures_in_tiles(folders: tuple[Path, Path]) -> None:
    """A LLaVA-NeXT, whose pictures have a number of tokens each: the processor counts them."""
    root = folders[0].parent
    llava, processor = build_mllm(load_tower(f"hf:{root / 'tower'}"), root / "llm", image_mode="anyres")
    images = [picture.resize(size) for picture, size in zip(pictures(2), ((40, 90), (100, 50)), strict=True)]
    session = ChatSession(llava.eval(), processor, max_new_tokens=8)
    list(session.ask("What differs?", images))
    prompt = f"{SYSTEM}<|im_start|>user\n<image>\n<image>\nWhat differs?<|im_end|>\n<|im_start|>assistant\n"
    inputs = processor(text=prompt, images=images, add_special_tokens=False, return_tensors="pt")
    out = llava.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert session.turns[0].answer == processor.tokenizer.decode(out, skip_special_tokens=True).strip() != ""


def test_pictures_come_in_order(models: list[tuple]) -> None:
    session = ChatSession(*models[0], max_new_tokens=8)
    one, two = pictures(2)
    inputs = session.encode([*_turns(("a", (one,))), *_turns(("b", (two,)))])
    expected = models[0][1].image_processor([one, two], return_tensors="pt")["pixel_values"].to(models[0][0].dtype)
    assert torch.equal(inputs["pixel_values"], expected)
    assert not torch.equal(expected[0], expected[1])


def _turns(*asked: tuple[str, tuple[Image.Image, ...]]) -> list:
    from llava_bridge.chat import Turn

    return [Turn(text, images, "yes") for text, images in asked]


def test_a_stopped_answer_stays_as_far_as_it_came(models: list[tuple]) -> None:
    session = ChatSession(*models[0], max_new_tokens=600)
    answer = session.ask("Tell me everything.", pictures(1))
    begun = next(answer) + next(answer)
    answer.close()
    assert no_model_at_work()
    (turn,) = session.turns
    assert turn.answer.startswith(begun.strip()[:3]) and len(session.processor.tokenizer(turn.answer).input_ids) < 500
    # What follows is answered as if the stopped answer had been all.
    session.max_new_tokens = 12
    expected = plain_answer(models[0], [("Tell me everything.", list(turn.images), turn.answer), ("Why?", [], "")], 12)
    list(session.ask("Why?"))
    assert session.turns[1].answer == expected


def test_stopped_before_its_first_word_nothing_was_asked(models: list[tuple]) -> None:
    session = ChatSession(*models[0])
    session.ask("Hello?").close()
    assert session.turns == [] and no_model_at_work()


def test_an_error_of_the_model_reaches_who_asked(models: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    session = ChatSession(*models[0], max_new_tokens=4)
    monkeypatch.setattr(session, "_settings", lambda: {"max_new_tokens": 4, "no_such_setting": 1})
    with pytest.raises(ValueError, match="no_such_setting"):
        list(session.ask("Hello?"))
    assert session.turns == [] and no_model_at_work()
    monkeypatch.undo()
    assert list(session.ask("Hello?"))


def test_temperature(models: list[tuple]) -> None:
    def answer(temperature: float) -> str:
        session = ChatSession(*models[0], max_new_tokens=12, temperature=temperature)
        return "".join(session.ask("Who are you?", pictures(1)))

    assert answer(1e-6) == answer(0)
    assert len({answer(5.0) for _ in range(3)} | {answer(0)}) > 2


def test_what_cannot_be_asked_is_refused_at_once(models: list[tuple]) -> None:
    session = ChatSession(*models[0], max_new_tokens=16)
    list(session.ask("Who are you?"))
    before = list(session.turns)
    with pytest.raises(InputError, match="must not have <image> in it"):
        session.ask("What is <image>?")
    with pytest.raises(InputError, match=r"has \d+ tokens and the answer may take 16, .* room for 2048: .*/reset"):
        session.ask("word " * 2048)
    with pytest.raises(InputError, match="nothing was asked"):
        session.ask(" ")
    with pytest.raises(InputError, match="at least 1"):
        ChatSession(*models[0], max_new_tokens=0)
    with pytest.raises(InputError, match=r"0 \(greedy\) or more"):
        ChatSession(*models[0], temperature=-0.5)
    assert session.turns == before


def test_room_is_used_to_the_last_token(models: list[tuple]) -> None:
    room = models[0][0].config.text_config.max_position_embeddings
    used = ChatSession(*models[0]).encode(_turns(("Hi", ())))["input_ids"].shape[1]
    assert ChatSession(*models[0], max_new_tokens=room - used).ask("Hi")
    with pytest.raises(InputError, match=f"room for {room}"):
        ChatSession(*models[0], max_new_tokens=room - used + 1).ask("Hi")


# ----------------------------------------------------------------------------------------------------------------- two


def test_two_models_answer_as_each_does_alone(models: list[tuple]) -> None:
    alone = ["".join(ChatSession(*model, max_new_tokens=10).ask("What?", pictures(2))) for model in models]
    sessions = [ChatSession(*model, max_new_tokens=10) for model in models]
    grown = list(ask_all(sessions, "What?", pictures(2)))
    assert grown[-1] == alone and alone[0] != alone[1]
    assert any(all(texts) and texts != alone for texts in grown), "one waited for the other to end"
    for before, after in itertools.pairwise(grown):
        assert all(new.startswith(old) for old, new in zip(before, after, strict=True))


def test_stopped_conversations_stay_alike(models: list[tuple]) -> None:
    sessions = [ChatSession(*model, max_new_tokens=600) for model in models]
    answers = ask_all(sessions, "Tell me everything.")
    next(answers)  # a first word of one of them
    answers.close()
    assert len(sessions[0].turns) == len(sessions[1].turns)
    answers = ask_all(sessions, "Tell me everything.")
    while not all(next(answers)):
        pass
    answers.close()
    assert [len(session.turns) for session in sessions] in ([1, 1], [2, 2])
    assert no_model_at_work()


# ------------------------------------------------------------------------------------------------------------- terminal


class Screen(io.StringIO):
    """What the terminal shows. Once `stop_at` appears on it, Ctrl-C is pressed."""

    stop_at: str | None = None

    def write(self, text: str) -> int:
        written = super().write(text)
        if self.stop_at is not None and text.strip() and self.getvalue().count(self.stop_at):
            self.stop_at = None
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return written


def run(sessions: dict[str, ChatSession], lines: list[str], screen: Screen | None = None) -> str:
    """What is shown for these typed lines."""
    screen = Screen() if screen is None else screen
    typed = iter(lines)

    def read(prompt: str) -> str:
        screen.write(prompt)
        line = next(typed, None)
        if line is None:
            raise EOFError
        screen.write(line + "\n")
        return line

    talk(sessions, read, Console(file=screen, width=100, force_terminal=False))
    return screen.getvalue()


def test_the_terminal(models: list[tuple], tmp_path: Path) -> None:
    one, two = pictures(2)
    one.save(tmp_path / "a picture.png")
    two.save(tmp_path / "two.jpg", quality=100)
    (tmp_path / "notes.png").write_text("no picture")
    session = ChatSession(*models[0], max_new_tokens=6)
    shown = run(
        {"left": session},
        [
            "Who are you?",
            f"/image {tmp_path / 'a picture.png'}",
            f"And this? {tmp_path / 'two.jpg'}",
            f"/image {tmp_path / 'none.png'}",
            f"/image {tmp_path / 'notes.png'}",
            "/image",
            "/imgae",
            "",
        ],
    )
    assert [turn.question for turn in session.turns] == ["Who are you?", "And this?"]
    assert [image.size for image in session.turns[1].images] == [one.size, two.size]
    assert list(session.turns[1].images[0].getdata()) == list(one.getdata())
    assert "[1 to show] you: " in shown
    for turn in session.turns:
        first, *_ = [line for line in turn.answer.splitlines() if line.isprintable() and line.strip()] or [""]
        assert first.strip() in shown
    for error in ("none.png: no such file", "notes.png: not a readable picture", "/image needs", "/imgae: neither"):
        assert re.search(f"error: .*{re.escape(error)}", shown), error


def test_reset_and_quit(models: list[tuple], tmp_path: Path) -> None:
    pictures(1)[0].save(tmp_path / "a.png")
    session = ChatSession(*models[0], max_new_tokens=4)
    run({"left": session}, ["Hello?", f"{tmp_path / 'a.png'}", "/reset", "What?", "/quit", "never read"])
    assert [(turn.question, turn.images) for turn in session.turns] == [("What?", ())]


def test_ctrl_c_stops_the_answer_and_not_the_program(models: list[tuple]) -> None:
    session = ChatSession(*models[0], max_new_tokens=1500)
    answer = plain_answer(models[0], [("Tell me everything.", [], "")], 3)
    screen = Screen()
    screen.stop_at = next(word for word in answer.split() if word.isprintable())
    typed = ["Tell me everything.", "/reset", "/quit"]
    steps: list[int] = []
    hook = models[0][0].register_forward_hook(lambda *_: steps.append(1))
    shown = run({"left": session}, typed, screen)
    hook.remove()
    assert "(stopped)" in shown and shown.count("you: ") == 3
    assert no_model_at_work() and 0 < len(steps) < 1500
    assert session.turns == []  # /reset


def test_ctrl_c_at_the_prompt_is_no_end(models: list[tuple]) -> None:
    typed: Iterator[str | BaseException] = iter([KeyboardInterrupt(), "/quit"])

    def read(prompt: str) -> str:
        event = next(typed)
        if isinstance(event, BaseException):
            raise event
        return event

    screen = Screen()
    talk({"left": ChatSession(*models[0])}, read, Console(file=screen))
    assert "/quit ends the program" in screen.getvalue()


def test_two_models_in_columns(folders: tuple[Path, Path]) -> None:
    sessions = load_chat_models(folders, max_new_tokens=4)
    shown = run(sessions, ["What is it?"])
    assert list(sessions) == [str(folder) for folder in folders]
    joined = "".join(shown.split())
    for folder, session in zip(folders, sessions.values(), strict=True):
        assert folder.name in joined
        words = [word for word in session.turns[0].answer.split() if word.isprintable() and len(word) < 30]
        assert not words or words[0] in shown
    with pytest.raises(InputError, match="named twice"):
        load_chat_models([folders[0], folders[0]])


def test_control_characters_do_not_reach_the_terminal(models: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    session = ChatSession(*models[0], max_new_tokens=4)
    monkeypatch.setattr(session, "ask", lambda text, images: iter(_Pieces(["red \x1b[2J", "\x07\rblue\n", "ok"])))
    shown = run({"left": session}, ["Colours?", "/quit"])
    assert "red [2Jblue\nok" in shown and "\x1b" not in shown


class _Pieces(list[str]):
    """Pieces that can be closed, as a session's are."""

    def __iter__(self) -> Iterator[str]:
        yield from super().__iter__()


@pytest.mark.parametrize(
    ("line", "text", "names"),
    [
        ("What's in {f}/plain.png ?", "What's in ?", ["plain.png"]),
        ("{f}/plain.png", "", ["plain.png"]),
        ("'{f}/two words.jpg' what is it", "what is it", ["two words.jpg"]),
        ('"{f}/two words.jpg"', "", ["two words.jpg"]),
        ("{f}/two\\ words.jpg {f}/plain.png which?", "which?", ["two words.jpg", "plain.png"]),
        ("file://{f}/two%20words.jpg", "", ["two words.jpg"]),
        ("what's '{f}/plain.png'?", "what's ?", ["plain.png"]),
        ("{f}/absent.png stays", "{f}/absent.png stays", []),
        ("{f}/text.txt  stays", "{f}/text.txt  stays", []),
        ("plain.png is a name, not a path", "plain.png is a name, not a path", []),
        ("/" + "long" * 200 + ".png", "/" + "long" * 200 + ".png", []),
    ],
)
def test_dropped_pictures(tmp_path: Path, line: str, text: str, names: list[str]) -> None:
    for name in ("plain.png", "two words.jpg", "text.txt"):
        (tmp_path / name).touch()
    expected = (text.format(f=tmp_path), [tmp_path / name for name in names])
    assert split_pictures(line.format(f=tmp_path)) == expected


@pytest.mark.slow
def test_a_real_terminal(folders: tuple[Path, Path]) -> None:
    """The program on a terminal of its own: typed questions, Ctrl-C as the key that sends SIGINT, /quit."""
    code = f"from pathlib import Path; from llava_bridge.chat import chat; chat([Path({str(folders[0])!r})], 1500)"
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        preexec_fn=_take_terminal, cwd=Path(__file__).parents[1], env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    os.close(slave)
    try:
        shown = _until(master, "you: ")
        os.write(master, b"Tell me everything.\n")
        time.sleep(2.0)
        os.write(master, b"\x03")
        shown = _until(master, "(stopped)")
        shown = _until(master, "you: ")
        assert process.poll() is None
        os.write(master, b"/quit\n")
        assert process.wait(timeout=60) == 0, shown
    finally:
        process.kill()
        os.close(master)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _until(master: int, text: str, seconds: float = 180) -> str:
    """What the terminal shows up to `text`."""
    shown, ends = "", time.monotonic() + seconds
    while text not in shown:
        ready, _, _ = select.select([master], [], [], max(0.0, ends - time.monotonic()))
        assert ready, f"no {text!r} in {shown!r}"
        shown += os.read(master, 4096).decode(errors="replace")
    return shown


def test_the_template_is_the_one_that_the_prompts_here_assume(folders: tuple[Path, Path]) -> None:
    """`plain_answer` writes the prompt itself: guard it against another SmolLM2."""
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False).startswith(SYSTEM)
