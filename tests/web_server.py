"""A web server of a folder, on this machine, that fails when told to."""

import contextlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[tuple[str, dict[str, int]]]:
    """Its address, and a dict that says how often each path shall fail first."""
    failures: dict[str, int] = {}

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any):
            super().__init__(*args, directory=str(folder))

        def do_GET(self) -> None:
            if failures.get(self.path, 0) > 0:
                failures[self.path] -= 1
                self.send_error(503)
            else:
                super().do_GET()

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", failures
    finally:
        server.shutdown()
        server.server_close()
