"""The page, in a real browser without a window: two models, pictures, history, stop, clear, and no call to elsewhere."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import Page, find_browser, open_browser
from llava_samples import save_two_llavas
from PIL import Image

from clips_core.errors import InputError
from llava_bridge.chat import ChatSession, load_chat_models
from llava_bridge.chat_page import build_page, chat_page, launch_page

in_a_browser = pytest.mark.skipif(find_browser() is None, reason="no Chromium here")


def test_without_gradio_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(InputError, match=r"pip install .gradio>=6"):
        chat_page([tmp_path])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_two_llavas(tmp_path_factory.mktemp("page"))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with open_browser() as page:
        yield page


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def served(
    request: pytest.FixtureRequest, folders: tuple[Path, Path], browser: Page
) -> Iterator[dict[str, ChatSession]]:
    """The page of both models open in the browser; the parameter is the longest answer."""
    sessions = load_chat_models(folders, max_new_tokens=request.param)
    page = build_page(sessions)
    browser.requests.clear()
    browser.open(launch_page(page, "127.0.0.1", free_port()))
    browser.wait("document.querySelector('#question textarea')")
    yield sessions
    browser.open("about:blank")
    page.close(verbose=False)


def ask(browser: Page, text: str, files: list[Path] | None = None) -> None:
    if files:
        browser.choose_files("#question input[type=file]", files)
        browser.wait(f"document.querySelectorAll('#question .thumbnail-item').length == {len(files)}")
    browser.type("#question textarea", text)
    browser.wait("!document.querySelector('#question .submit-button').disabled")
    browser.click("#question .submit-button")


def answers(browser: Page, column: int) -> list[str]:
    """The model's bubbles, words alone."""
    bubbles = browser.run(f"[...document.querySelectorAll('#model-{column} .message.bot')].map(b => b.innerText)")
    return [" ".join(bubble.split()) for bubble in bubbles]


def wait_for(browser: Page, expected: list[list[str]]) -> None:
    """Until both columns show these answers."""
    wanted = [[" ".join(text.split()) for text in column] for column in expected]
    ends = time.monotonic() + 120
    while (shown := [answers(browser, column) for column in range(len(wanted))]) != wanted:
        assert time.monotonic() < ends, f"{shown}\n{wanted}\n{browser.errors}"
        time.sleep(0.1)


def models_at_work() -> bool:
    return any("generate" in thread.name for thread in threading.enumerate())


@pytest.mark.slow
@in_a_browser
@pytest.mark.parametrize("served", [12], indirect=True)
def test_two_models_side_by_side(served: dict[str, ChatSession], browser: Page, picture: Path) -> None:
    image = Image.open(picture).convert("RGB")
    alone = [ChatSession(s.model, s.processor, 12) for s in served.values()]
    for session in alone:
        list(session.ask("What is it?", [image]))
        list(session.ask("And why?"))
    ask(browser, "What is it?", [picture])
    wait_for(browser, [[session.turns[0].answer] for session in alone])
    assert browser.run("document.querySelectorAll('#model-0 .message.user img').length") == 1
    ask(browser, "And why?")
    wait_for(browser, [[turn.answer for turn in session.turns] for session in alone])
    assert all(str(name) in browser.run("document.body.innerText") for name in served)

    browser.click("#clear")
    wait_for(browser, [[], []])
    for session in alone:
        session.turns.clear()
        list(session.ask("And why?"))
    ask(browser, "And why?")
    wait_for(browser, [[session.turns[0].answer] for session in alone])
    assert all(not session.turns for session in served.values()), "a visitor's words ended up in the shared sessions"


@pytest.mark.slow
@in_a_browser
@pytest.mark.parametrize("served", [1500], indirect=True)
def test_stop(served: dict[str, ChatSession], browser: Page) -> None:
    ask(browser, "Tell me everything.")
    browser.wait("(document.querySelector('#model-1 .message.bot')?.innerText ?? '').length > 20")
    assert models_at_work()
    browser.click("#stop")
    ends = time.monotonic() + 30
    while models_at_work():
        assert time.monotonic() < ends, "the models go on"
        time.sleep(0.1)
    stopped = answers(browser, 0)
    assert len(stopped) == 1 and stopped[0]
    browser.click("#clear")
    wait_for(browser, [[], []])


@pytest.mark.slow
@in_a_browser
@pytest.mark.parametrize("served", [4], indirect=True)
def test_a_bad_picture_is_said_and_nothing_is_called_elsewhere(
    served: dict[str, ChatSession], browser: Page, tmp_path: Path
) -> None:
    (tmp_path / "notes.png").write_text("no picture")
    ask(browser, "What is it?", [tmp_path / "notes.png"])
    browser.wait("document.body.innerText.includes('not a readable picture')")
    assert answers(browser, 0) == []
    address = browser.run("location.origin")
    elsewhere = {url for url in browser.requests if not url.startswith((address, "data:", "blob:", "about:"))}
    assert not elsewhere


@pytest.mark.slow
def test_a_taken_port_is_said(folders: tuple[Path, Path]) -> None:
    page = build_page(load_chat_models(folders[:1], max_new_tokens=4))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"no page at 127.0.0.1:{port} .*--port"):
            launch_page(page, "127.0.0.1", port)
