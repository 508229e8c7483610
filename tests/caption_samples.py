"""Who can write captions in the tests: a LLaVA of random weights, and a server on this machine."""

import base64
import io
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from llava_samples import save_llm, save_tower
from PIL import Image

from llava_bridge.mllm import build_mllm, save_mllm
from llava_bridge.towers import load_tower

WORDS = (
    " red",
    " blue",
    " bird",
    " house",
    " left",
    " of",
    " two",
    " stars",
    " small",
    " near",
    ".",
    "!",
    " it",
    " is",
)
TEST_PICTURE = -1  # the number of a picture that is not one of ours


def save_talker(folder: Path) -> Path:
    """A LLaVA of random weights that says little but `WORDS`: the other rows of its vocabulary are nearly zero."""
    model, processor = build_mllm(load_tower(f"hf:{save_tower(folder / 'tower')}"), save_llm(folder / "llm"))
    rows = model.get_input_embeddings().weight
    others = torch.ones(len(rows), dtype=torch.bool)
    others[[processor.tokenizer.encode(word)[0] for word in WORDS]] = False
    with torch.no_grad():
        rows[others] *= 0.1
    save_mllm(model, processor, folder / "model")
    return folder / "model"


def numbered_picture(number: int, size: tuple[int, int] = (12, 8)) -> Image.Image:
    """A grey picture that a server can tell from the others after any JPEG compression: 0 ≤ number < 60."""
    return Image.new("RGB", size, (4 * number + 8,) * 3)


def caption_of(number: int) -> str:
    """What the server says of a picture, if nothing else is arranged."""
    return f"A plain grey picture with the number {number}. It is as grey as can be! Nothing else can be seen."


def completion(text: str | None, reason: str = "stop") -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of a chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
    return 200, {}, json.dumps({"object": "chat.completion", "choices": [choice]}).encode()


def failure(status: int, message: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    return (
        status,
        {k.replace("_", "-"): v for k, v in headers.items()},
        json.dumps({"error": {"message": message}}).encode(),
    )


class Server:
    """A loopback HTTP server that speaks the chat-completions protocol about numbered pictures.

    Args:
        behave: the answer by the picture's number and how often it was asked about before; None: the usual one.
        delay: seconds before every answer.
    """

    def __init__(self, behave: Callable[[int, int], tuple[int, dict[str, str], bytes] | None] = lambda *_: None,
                 delay: float = 0.0):  # fmt: skip
        self.behave, self.delay = behave, delay
        self.asked: list[int] = []  # the pictures' numbers
        self.bodies: list[dict[str, Any]] = []
        self.pictures: list[Image.Image] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.most_at_once = self._at_once = 0
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                [message] = body["messages"]
                url = message["content"][0]["image_url"]["url"]
                picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
                red, green, blue = picture.getpixel((0, 0))
                number = round((red - 8) / 4) if abs(red - blue) < 4 and abs(red - green) < 4 else TEST_PICTURE
                with lock:
                    before = Counter(outer.asked)[number]
                    outer.asked.append(number)
                    outer.bodies.append(body)
                    outer.pictures.append(picture)
                    outer.headers.append(dict(self.headers))
                    outer.times.append(time.monotonic())
                    outer._at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer._at_once)
                time.sleep(outer.delay)
                found = self.path == "/v1/chat/completions"
                answer = outer.behave(number, before) if found else failure(404, "Not Found")
                status, headers, data = answer or completion(caption_of(number))
                with lock:
                    outer._at_once -= 1
                try:
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(data)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:  # the client has stopped waiting
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        self.url = f"http://{self.host}/v1"

    def __enter__(self) -> "Server":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
