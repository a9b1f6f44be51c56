"""Middleware in front of transformers' application: API key, limits, one model, few addresses."""

from __future__ import annotations

import hmac
import json
import os
import re
from collections.abc import Awaitable, Callable
from typing import Any

from launch.serve.config import LOOPBACK, ServeConfig
from launch.serve.requests import CHAT, TEXT, RefusedRequest, Served, checked
from launch.serve.stops import CutStream

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
OPEN = {"/health": "GET", "/v1/models": "GET", CHAT: "POST", TEXT: "POST"}
"""All that is answered; whatever else the application has (loading and unloading models among it) is closed."""


class Door:
    """An ASGI application around another one: who may enter, where to, and how many at a time."""

    def __init__(self, app: Any, config: ServeConfig) -> None:
        self.app, self.config = app, config
        self.key = config.key
        self.under_way = 0
        """Requests that are answered or wait."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One connection."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            await self._answer(scope, receive, send)
        except RefusedRequest as refused:
            await _tell(send, refused)

    async def _answer(self, scope: Message, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        self._enter(scope["path"], scope["method"], headers)
        if scope["method"] == "GET":
            await self.app(scope, receive, send)
            return
        if self.under_way >= self.config.max_requests:
            raise RefusedRequest(429, f"{self.under_way} requests are under way (serve.max_requests); try again later")
        self.under_way += 1
        try:
            content = await self._body(receive, headers)
            await self._pass_on(scope, receive, send, self._asked(scope["path"], content))
        finally:
            self.under_way -= 1

    def _enter(self, path: str, method: str, headers: dict[str, str]) -> None:
        if path not in OPEN:
            raise RefusedRequest(404, f"{path}: there is no such address here; there are {', '.join(OPEN)}")
        if method != OPEN[path]:
            raise RefusedRequest(405, f"{method} {path}: is asked with {OPEN[path]}")
        if self.key and path != "/health":
            kind, _, sent = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(sent.strip().encode(), self.key.encode()):
                raise RefusedRequest(
                    401, "the key is missing or wrong; send Authorization: Bearer <key>", code="invalid_api_key"
                )
        host = re.sub(r":\d+$", "", headers.get("host", "")).strip("[]")
        if (
            not self.key and host not in LOOPBACK
        ):  # a page in a browser here may have its own name point to this machine
            raise RefusedRequest(403, f"this server without a key answers to {', '.join(LOOPBACK)}, not to {host!r}")

    async def _body(self, receive: Receive, headers: dict[str, str]) -> bytes:
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RefusedRequest(415, "send Content-Type: application/json")
        most, content = self.config.max_body_kib * 1024, b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise RefusedRequest(400, "the connection was closed")
            content += message.get("body", b"")
            if len(content) > most:
                raise RefusedRequest(
                    413, f"the request is larger than {self.config.max_body_kib} KiB (serve.max_body_kib)"
                )
            if not message.get("more_body"):
                return content

    def _asked(self, path: str, content: bytes) -> dict[str, Any]:
        """The body that is passed on. Raises RefusedRequest."""
        try:
            body = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise RefusedRequest(400, f"the body is no JSON: {error}") from None
        if not isinstance(body, dict):
            raise RefusedRequest(400, f"the body must be a JSON object, not {type(body).__name__}")
        return body

    def _out(self, send: Send, asked: dict[str, Any]) -> _Watched:
        """What answers go out through."""
        return _Watched(send)

    async def _pass_on(self, scope: Message, receive: Receive, send: Send, asked: dict[str, Any]) -> None:
        content = json.dumps(asked).encode()
        dropped = (
            b"content-length",
            b"transfer-encoding",
            b"x-request-id",
        )  # whose name is also that of the answer inside
        headers = [each for each in scope["headers"] if each[0].lower() not in dropped]
        headers.append((b"content-length", str(len(content)).encode()))
        told = False

        async def replay() -> Message:
            nonlocal told
            if told:
                return await receive()  # that the client went away
            told = True
            return {"type": "http.request", "body": content, "more_body": False}

        await self.app({**scope, "headers": headers}, replay, self._out(send, asked))


class Guard(Door):
    """The door of transformers' application, which also checks what is asked, field by field."""

    def __init__(self, app: Any, served: Served, config: ServeConfig) -> None:
        super().__init__(app, config)
        self.served = served
        self.close: Callable[[], None] = lambda: None
        """Ends what computes, once nothing is asked any more."""

    def _asked(self, path: str, content: bytes) -> dict[str, Any]:
        return checked(path, super()._asked(path, content), self.served)

    def _out(self, send: Send, asked: dict[str, Any]) -> _Watched:
        if "stop" not in asked:
            return _Watched(send)
        if asked["stream"]:
            return _Watched(CutStream(send, asked["stop"]))
        return _Cut(send, asked["stop"])


class VllmDoor(Door):
    """The middleware as vLLM's `--middleware` takes it, configured by `other_servers.environment`. vLLM checks fields itself.

    Its own key leaves addresses beside /v1 open, and an adapter's base would be a second model.
    """

    def __init__(self, app: Any) -> None:
        told = json.loads(os.environ["SHARDTUNE_SERVE"])
        super().__init__(app, ServeConfig(**told))

    def _asked(self, path: str, content: bytes) -> dict[str, Any]:
        body = super()._asked(path, content)
        if body.setdefault("model", self.config.name) != self.config.name:
            message = f"model: there is no {body['model']!r} here; this server has {self.config.name!r} alone"
            raise RefusedRequest(404, message, "model", "model_not_found")
        return body


class _Watched:
    """Passes messages on; refusals of the application that are not in OpenAI's form get it."""

    def __init__(self, send: Send) -> None:
        self.send = send
        self._begin: Message | None = None
        self._content = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and self._holds(message):
            self._begin = message
            return
        if self._begin is None:
            await self.send(message)
            return
        self._content += message.get("body", b"")
        if message.get("more_body"):
            return
        content = self.changed(self._begin["status"], self._content)
        headers = [each for each in self._begin["headers"] if each[0].lower() != b"content-length"]
        headers.append((b"content-length", str(len(content)).encode()))
        await self.send({**self._begin, "headers": headers})
        await self.send({"type": "http.response.body", "body": content})

    def _holds(self, begin: Message) -> bool:
        return bool(begin["status"] >= 400)

    def changed(self, status: int, content: bytes) -> bytes:
        """The whole answer as it is sent."""
        if status < 400:
            return content
        try:
            said = json.loads(content)
        except ValueError:
            said = "the model failed; the server's log says why" if status == 500 else content.decode(errors="replace")
        if isinstance(said, dict):
            said = said.get("detail") or said.get("error") or said
        return json.dumps(RefusedRequest(status, said if isinstance(said, str) else json.dumps(said)).body()).encode()


class _Cut(_Watched):
    """Also ends the text before the first stop, as OpenAI's servers do; transformers leaves the stop in."""

    def __init__(self, send: Send, stops: list[str]) -> None:
        super().__init__(send)
        self.stops = stops

    def _holds(self, begin: Message) -> bool:
        return True

    def changed(self, status: int, content: bytes) -> bytes:
        content = super().changed(status, content)
        if status >= 400:
            return content
        answer = json.loads(content)
        for choice in answer["choices"]:
            place, key = (choice["message"], "content") if "message" in choice else (choice, "text")
            text = place.get(key) or ""
            cuts = [at for stop in self.stops if (at := text.find(stop)) >= 0]
            if cuts:
                place[key], choice["finish_reason"] = text[: min(cuts)], "stop"
        return json.dumps(answer).encode()


async def _tell(send: Send, refused: RefusedRequest) -> None:
    content = json.dumps(refused.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if refused.status == 429:
        headers.append((b"retry-after", b"1"))
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
