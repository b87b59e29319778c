"""Serves a saved model over HTTP, with the handler of Inference Endpoints.

    python -m solarchip_hf.hub.serve solarchip/vit-base --port 8000
    curl --data-binary @AIA20240101_0000_0171.fits http://127.0.0.1:8000/
    curl -H 'Content-Type: application/json' -d '{"inputs": "U0lNUExFICA9..."}' http://127.0.0.1:8000/

One request is computed at a time; a few wait, and more are told to come back. Answers are JSON, errors too.
"""

import argparse
import json
import logging
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from .handler import MAX_BYTES, MAX_IMAGES, EndpointHandler, RequestError

logger = logging.getLogger(__name__)

MAX_BODY = 256 * 2**20  # bytes of a request; as many requests as may wait hold as much each


class EndpointServer(ThreadingHTTPServer):
    """An HTTP server with one handler.

    Args:
        address: Host and port; port 0 takes a free one.
        handler: What answers.
        max_body: Largest request in bytes.
        queue: Requests that may be held at a time, the one at work included.
    """

    daemon_threads = True

    def __init__(
        self, address: tuple[str, int], handler: EndpointHandler, *, max_body: int | None = None, queue: int = 8
    ):
        super().__init__(address, _Requests)
        self.handler = handler
        files = min(MAX_IMAGES, handler.limits["images"]) * handler.limits["bytes"]
        self.max_body = max_body or min(MAX_BODY, 4 * files // 3 + 2**20)  # base64 makes four bytes of three
        self.places = threading.BoundedSemaphore(queue)
        self.work = threading.Lock()


class _Requests(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds without a byte
    server: EndpointServer

    def do_GET(self) -> None:
        if urlsplit(self.path).path != "/health":
            return self._refuse(RequestError(404, "not_found", "path: expected POST / or GET /health."))
        self._send(200, {"status": "ok", "task": self.server.handler.task})

    def do_POST(self) -> None:
        parts = urlsplit(self.path)
        if parts.path != "/":
            return self._refuse(RequestError(404, "not_found", f"path: expected /, got {parts.path:.100}."))
        try:
            answer = self._answer(parts.query)
            error = answer.get("error") if isinstance(answer, dict) else None
            self._send(error["status"] if error else 200, answer)
        except RequestError as error:
            self._refuse(error)
        except TimeoutError:
            self._refuse(RequestError(408, "timeout", f"body: expected a part of it every {self.timeout} s."))
        except ConnectionError:
            self.close_connection = True  # nobody is there to be answered
        except Exception:
            logger.exception("A request failed")
            self._refuse(RequestError(500, "internal_error", "The server failed; the reason is in its log."))

    def _answer(self, query: str) -> Any:
        """What the handler says; the place is free again before the caller hears it, who may come back at once."""
        if not self.server.places.acquire(blocking=False):
            raise RequestError(429, "busy", "Too many requests are waiting: come back in a moment.")
        try:
            data = self._data(self._body(), query)
            with self.server.work:
                return self.server.handler(data)
        finally:
            self.server.places.release()

    def _body(self) -> bytes:
        written = self.headers.get("Content-Length")
        if written is None or not (written.isascii() and written.isdigit()):
            raise RequestError(
                411, "length_required", f"Content-Length: expected the body's bytes, got {written!r:.50}."
            )
        length = int(written) if len(written) < 20 else sys.maxsize  # int() refuses thousands of digits
        if length > self.server.max_body:
            raise RequestError(413, "too_large", f"body: expected at most {self.server.max_body} bytes, got {length}.")
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionError("the body ended early")
        return body

    def _data(self, body: bytes, query: str) -> Any:
        kind = (self.headers.get("Content-Type") or "").partition(";")[0].strip().lower()
        if kind != "application/json":
            parameters = {name: _value(text) for name, text in parse_qsl(query)}
            return {"inputs": body, "parameters": parameters}
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise RequestError(400, "bad_request", f"body: expected JSON: {error!s:.200}.") from error

    def _refuse(self, error: RequestError) -> None:
        self.close_connection = True  # the body may not have been read
        self._send(error.status, error.answer())

    def _send(self, status: int, content: Any) -> None:
        body = json.dumps(content, allow_nan=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Requests that the base class refuses (a malformed line, a method without a name here), as JSON too."""
        self.request_version = self.protocol_version  # of a line that is no HTTP it is 0.9, which has no status
        status = {501: 405}.get(code, code if 400 <= code < 500 else 400)
        self._refuse(RequestError(status, "bad_request", message or explain or "The request was not understood."))

    def log_message(self, *arguments: Any) -> None:
        """To the log instead of the standard error."""
        logger.debug(*arguments)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text  # a word, as `modality=hmi`


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 0, or 2 with the reason on the standard error."""
    parser = argparse.ArgumentParser(prog="python -m solarchip_hf.hub.serve", description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="a saved backbone, flare model or translation pipeline")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port; 0 takes a free one (8000)")
    parser.add_argument("--max_megabytes", type=int, default=MAX_BYTES // 2**20, help="largest file (64)")
    parser.add_argument("--device", help="where to compute; default: a GPU if there is one")
    options = parser.parse_args(arguments)
    try:
        handler = EndpointHandler(options.folder, max_bytes=options.max_megabytes * 2**20, device=options.device)
        server = EndpointServer((options.host, options.port), handler)
    except (OSError, ValueError) as error:
        print(f"serve: {error}", file=sys.stderr)
        return 2
    print(f"{handler.task} at http://{options.host}:{server.server_port}/", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("stopped")
    finally:
        server.server_close()
    return 0


__all__ = ["EndpointServer", "main"]

if __name__ == "__main__":
    sys.exit(main())
