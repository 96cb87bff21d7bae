"""The app's front door: hostile addresses, floods of bytes and unknown names are answered in words of our own.

It stands before gradio's own routes, as a layer of ASGI. ``/health`` says that the app answers, ``/status`` how it is
doing (see ``studio.status``); neither tells anything of visitors.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import asdict
from typing import Any

from starlette.middleware import Middleware

from diffusion_lens.base.types import LensError
from diffusion_lens.studio.status import Status, status
from diffusion_lens.studio.studio import Studio

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger(__name__)

HOST = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(:\d{1,5})?")
HOST_HEADERS = (b"host", b"x-forwarded-host")
MAX_BODY = 4 * 2**20
"""Bytes of a request that uploads nothing: the values of a page's components are far less."""
MAX_FILE = 32 * 2**20
"""Bytes of one uploaded file."""
MAX_UPLOADS = 512 * 2**20
"""Bytes that all visitors may upload in an hour; uploaded files are deleted after one."""
HOUR = 3600.0

ADDRESS = "This address cannot be: open the app by the one that it printed when it was started."
TOO_LARGE = "This is larger than the app takes."
UPLOADS = "The app has taken as much as it can hold for now; try again in an hour."
BUSY = "The app is busy: its queue is full. Try again in a minute."
UNKNOWN = "There is nothing of this name here; reload the page."
FAILED = "This did not work, and the reason is in the app's log; reload the page."


def options(studios: Sequence[Studio]) -> dict[str, Any]:
    """What ``gr.Blocks.launch`` needs to stand behind a ``Front``."""
    return {"app_kwargs": {"middleware": [Middleware(Front, status=lambda: status(studios))]}}


class Front:
    """Wraps an ASGI app; ``status`` makes what ``/status`` shows."""

    def __init__(self, app: App, status: Callable[[], Status], clock: Callable[[], float] = time.monotonic) -> None:
        self.app = app
        self.status = status
        self._uploads = Uploads(clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"].rstrip("/")
        if not _addresses_can_be(scope["headers"]):
            await _say(send, 400, ADDRESS)
        elif path in ("/health", "/status"):
            await _send_json(send, 200, asdict(self.status()) if path == "/status" else {"ok": True})
        else:
            await self._hand_on(scope, receive, send, uploads=path.endswith("/upload"))

    async def _hand_on(self, scope: Scope, receive: Receive, send: Send, *, uploads: bool) -> None:
        """Let gradio answer; count the bytes that come in, and put what it says of errors into our words."""
        taken = 0
        answer = Answer(send)

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            size = len(message.get("body", b""))
            taken += size
            if taken > (MAX_FILE if uploads else MAX_BODY):
                answer.refused = (413, TOO_LARGE)
            elif uploads and not self._uploads.take(size):
                answer.refused = (503, UPLOADS)
            if answer.refused is not None:
                raise Refused(*answer.refused)
            return message

        try:
            await self.app(scope, counted, answer)
        except Exception as error:
            if answer.started:
                raise
            refused = answer.refused or _refused(error)
            if refused is None:
                log.exception("A request for %s failed.", scope["path"][:200])
            await _say(send, *(refused or (500, FAILED)))


class Uploads:
    """Bytes that came in within the last hour."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._taken: deque[tuple[float, int]] = deque()
        self._sum = 0

    def take(self, size: int) -> bool:
        """Whether so many bytes more may come; they are counted if so."""
        now = self._clock()
        while self._taken and self._taken[0][0] < now - HOUR:
            self._sum -= self._taken.popleft()[1]
        if self._sum + size > MAX_UPLOADS:
            return False
        self._taken.append((now, size))
        self._sum += size
        return True


class Refused(Exception):
    """Ends a request whose bytes are not wanted."""


class Answer:
    """Passes on what an app sends; an error's body becomes a sentence of ours.

    ``refused``: status and sentence of a request that was cut off, whatever the app makes of that.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._instead: tuple[int, str] | None = None
        self.refused: tuple[int, str] | None = None
        self.started = False

    async def __call__(self, message: Message) -> None:
        """One message of the app's."""
        if message["type"] == "http.response.start":
            self.started = True
            self._instead = self.refused or _instead_of(message["status"])
            if self._instead is not None:
                await _say(self._send, *self._instead)
                return
        if self._instead is None:
            await self._send(message)


def _instead_of(status: int) -> tuple[int, str] | None:
    """Status and sentence in place of what gradio says; ``None`` to leave it."""
    known = {500: (500, FAILED), 503: (503, BUSY), 413: (413, TOO_LARGE)}
    return known.get(status)


def _refused(error: BaseException | None) -> tuple[int, str] | None:
    """What an error that came through gradio says; ``None`` for a surprise."""
    while error is not None:
        if isinstance(error, LensError):
            return 400, str(error)
        if isinstance(error, KeyError) or type(error).__name__ == "FnIndexInferError":
            return 404, UNKNOWN
        error = error.__cause__ or error.__context__
    return None


def _addresses_can_be(headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether every address that the request names is one: gradio puts them into the page."""
    named = [value for name, value in headers if name.lower() in HOST_HEADERS]
    return all(HOST.fullmatch(part.strip()) for value in named for part in value.decode("latin-1").split(","))


async def _say(send: Send, status: int, sentence: str) -> None:
    await _send_json(send, status, {"detail": sentence})


async def _send_json(send: Send, status: int, values: Any) -> None:
    body = json.dumps(values, ensure_ascii=False).encode()
    headers = [
        (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff"),
    ]  # fmt: skip
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
