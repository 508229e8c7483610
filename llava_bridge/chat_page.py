"""Talk to trained LLaVAs in the browser: one model, or two side by side. A Gradio page that calls nowhere else.

gradio is an optional dependency (`pip install "gradio>=6"`), imported when a page is wanted.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clips_core.errors import InputError
from clips_core.images import open_image
from llava_bridge.chat import MAX_NEW_TOKENS, PICTURES, ChatSession, Turn, ask_all, load_chat_models

LOOPBACK = ("127.0.0.1", "::1", "localhost")
LARGEST_UPLOAD = "32mb"
KEEP_UPLOADS = 24 * 3600  # seconds
FONTS = ("ui-sans-serif", "system-ui", "sans-serif"), ("ui-monospace", "monospace")  # none that must be fetched


def chat_page(
    folders: Sequence[Path],
    host: str = "127.0.0.1",
    port: int = 7860,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 0.0,
) -> None:
    """Serve the page until it is interrupted. Whoever reaches host and port can talk to the models: there is no password.

    Raises:
        InputError: if gradio is missing, the port is taken, or as `load_chat_models`.
    """
    _import_gradio()  # before the models, which take longer
    page = build_page(load_chat_models(folders, max_new_tokens, temperature))
    address = launch_page(page, host, port)
    print(f"the page is at {address} (Ctrl-C ends it)", flush=True)
    if host not in LOOPBACK:
        print("anyone who can reach this address can use the models and show them pictures", flush=True)
    try:
        page.block_thread()
    finally:
        page.close(verbose=False)


def build_page(sessions: dict[str, ChatSession]) -> Any:
    """The page (a `gradio.Blocks`), not yet served.

    Args:
        sessions: by the name that is shown for each. They only lend model and settings: each visitor has conversations of
            their own. One question is answered at a time.
    """
    gradio = _import_gradio()
    models = list(sessions.values())

    def answer(message: dict[str, Any], *state: Any) -> Iterator[list[Any]]:
        """What was typed, each model's turns, and what each column shows → the same, again and again while it grows."""
        turns, shown = state[: len(models)], state[len(models) :]
        files = [Path(file) for file in message["files"]]
        mine = [
            ChatSession(s.model, s.processor, s.max_new_tokens, s.temperature, said)
            for s, said in zip(models, turns, strict=True)
        ]
        try:
            images = [open_image(file, file.name) for file in files]
            texts, typed = (
                ["" for _ in mine],
                None,
            )  # the first answer empties the field; then it is left to who types in it
            with contextlib.closing(ask_all(mine, message["text"], images)) as answers:
                for texts in answers:
                    # The turns go along with every piece, so that a stopped answer is remembered as far as it came.
                    partial = [
                        [*said, Turn(message["text"].strip(), tuple(images), text.strip())]
                        for said, text in zip(turns, texts, strict=True)
                    ]
                    yield [typed, *partial, *_columns(shown, message, texts)]
                    typed = gradio.skip()
        except InputError as error:
            raise gradio.Error(str(error), print_exception=False) from None
        yield [typed, *(session.turns for session in mine), *_columns(shown, message, texts)]

    with gradio.Blocks(title="clips-llava chat", analytics_enabled=False, delete_cache=(3600, KEEP_UPLOADS)) as page:
        turns = [gradio.State([]) for _ in models]
        with gradio.Row():
            columns = [
                gradio.Chatbot(
                    label=name,
                    elem_id=f"model-{number}",
                    height="70vh",
                    render_markdown=False,  # an answer is shown as it is; Markdown could make the browser fetch pictures
                    buttons=["copy"],
                )
                for number, name in enumerate(sessions)
            ]
        question = gradio.MultimodalTextbox(
            label="Question",
            placeholder="A question, with pictures if you like",
            show_label=False,
            file_types=list(PICTURES),
            file_count="multiple",
            sources=["upload"],
            elem_id="question",
        )
        with gradio.Row():
            stop = gradio.Button("Stop", elem_id="stop")
            clear = gradio.Button("Clear", elem_id="clear")
        everything = [question, *turns, *columns]
        asked = question.submit(answer, everything, everything, show_progress="hidden", api_visibility="private")
        stop.click(None, cancels=[asked], api_visibility="private")
        clear.click(
            lambda: [None, *([] for _ in turns), *([] for _ in columns)],
            outputs=everything,
            cancels=[asked],
            api_visibility="private",
        )
    return page


def launch_page(page: Any, host: str, port: int) -> str:
    """Serve a page in the background; its address.

    Raises:
        InputError: if host or port cannot be had.
    """
    gradio = _import_gradio()
    sans, mono = FONTS
    try:
        _, address, _ = page.queue(default_concurrency_limit=1).launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            share=False,
            inbrowser=False,
            quiet=True,
            ssr_mode=False,
            run_history=False,  # else every question and picture is kept in the browser
            footer_links=[],
            max_file_size=LARGEST_UPLOAD,
            theme=gradio.themes.Default(font=sans, font_mono=mono),
        )
    except OSError as error:
        raise InputError(f"no page at {host}:{port} ({error}): choose another --port or --host") from None
    return str(address)


def _columns(shown: Sequence[Sequence[Any]], message: dict[str, Any], texts: Sequence[str]) -> list[list[Any]]:
    """What each column shows: what it did before, the question with its pictures, and the answer so far."""
    asked = [{"role": "user", "content": {"path": str(file)}} for file in message["files"]]
    if message["text"].strip():
        asked.append({"role": "user", "content": message["text"].strip()})
    return [
        [*before, *asked, {"role": "assistant", "content": text}] for before, text in zip(shown, texts, strict=True)
    ]


def _import_gradio() -> Any:
    # Read by gradio when it is imported: it would ask its makers for the newest version, and count its uses.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio
    except ImportError:
        raise InputError("the page needs gradio: run  pip install 'gradio>=6'") from None
    return gradio
