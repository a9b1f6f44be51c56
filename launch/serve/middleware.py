"""Middleware in front of transformers' application: API key, limits, one model, few addresses."""

from __future__ import annotations

import hmac
import json
import os
import re
from collections.abc import Awaitable, Callable
from typing import Any

from launch.serve.config import LOOPBACK, ServeConfig
from launch.serve.requests import CHAT, TEXT, RefusedRequest, Served, check_request
from launch.serve.stops import CutStream

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
OPEN_PATHS = {"/health": "GET", "/v1/models": "GET", CHAT: "POST", TEXT: "POST"}
"""The only addresses that are answered. The application has others, for example to load and unload models."""


class GatewayMiddleware:
    """An ASGI application around another one. It checks the key and the address, and limits the requests at a time."""

    def __init__(self, app: Any, config: ServeConfig) -> None:
        self.app = app
        self.config = config
        self.key = config.key
        self.active_requests = 0
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
            await _send_refusal(send, refused)

    async def _answer(self, scope: Message, receive: Receive, send: Send) -> None:
        """Admit a request, check its body, and pass it on. Raises RefusedRequest."""
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        self._admit(scope["path"], scope["method"], headers)
        if scope["method"] == "GET":
            await self.app(scope, receive, send)
            return
        if self.active_requests >= self.config.max_requests:
            raise RefusedRequest(
                429, f"{self.active_requests} requests are under way (serve.max_requests); try again later"
            )
        self.active_requests += 1
        try:
            content = await self._body(receive, headers)
            await self._pass_on(scope, receive, send, self._checked_body(scope["path"], content))
        finally:
            self.active_requests -= 1

    def _admit(self, path: str, method: str, headers: dict[str, str]) -> None:
        """Refuse another address or method, a missing key, and other names of this host. Raises RefusedRequest."""
        if path not in OPEN_PATHS:
            raise RefusedRequest(404, f"{path}: there is no such address here; there are {', '.join(OPEN_PATHS)}")
        if method != OPEN_PATHS[path]:
            raise RefusedRequest(405, f"{method} {path}: is asked with {OPEN_PATHS[path]}")
        if self.key and path != "/health":
            kind, _, sent = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(sent.strip().encode(), self.key.encode()):
                raise RefusedRequest(
                    401, "the key is missing or wrong; send Authorization: Bearer <key>", code="invalid_api_key"
                )
        # A page in a browser on this machine may have its own name point here (DNS rebinding).
        host = re.sub(r":\d+$", "", headers.get("host", "")).strip("[]")
        if not self.key and host not in LOOPBACK:
            raise RefusedRequest(403, f"this server without a key answers to {', '.join(LOOPBACK)}, not to {host!r}")

    async def _body(self, receive: Receive, headers: dict[str, str]) -> bytes:
        """The whole body of a request. Raises RefusedRequest if it is no JSON by its header, or too large."""
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RefusedRequest(415, "send Content-Type: application/json")
        content = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise RefusedRequest(400, "the connection was closed")
            content += message.get("body", b"")
            if len(content) > self.config.max_body_kib * 1024:
                raise RefusedRequest(
                    413, f"the request is larger than {self.config.max_body_kib} KiB (serve.max_body_kib)"
                )
            if not message.get("more_body"):
                return content

    def _checked_body(self, path: str, content: bytes) -> dict[str, Any]:
        """The body that is passed on. Raises RefusedRequest."""
        try:
            body = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise RefusedRequest(400, f"the body is no JSON: {error}") from None
        if not isinstance(body, dict):
            raise RefusedRequest(400, f"the body must be a JSON object, not {type(body).__name__}")
        return body

    def _response_sender(self, send: Send, asked: dict[str, Any]) -> _RefusalFormatter:
        """Wraps `send`, so that answers can be changed on their way out."""
        return _RefusalFormatter(send)

    async def _pass_on(self, scope: Message, receive: Receive, send: Send, body: dict[str, Any]) -> None:
        """Call the application with the checked body instead of the one that was received."""
        content = json.dumps(body).encode()
        # The application would name its answer by the client's x-request-id.
        dropped = (b"content-length", b"transfer-encoding", b"x-request-id")
        headers = [header for header in scope["headers"] if header[0].lower() not in dropped]
        headers.append((b"content-length", str(len(content)).encode()))
        body_sent = False

        async def replay() -> Message:
            nonlocal body_sent
            if body_sent:
                return await receive()  # that the client went away
            body_sent = True
            return {"type": "http.request", "body": content, "more_body": False}

        await self.app({**scope, "headers": headers}, replay, self._response_sender(send, body))


class TransformersMiddleware(GatewayMiddleware):
    """In front of transformers' application: also checks each field of a request."""

    def __init__(self, app: Any, served: Served, config: ServeConfig) -> None:
        super().__init__(app, config)
        self.served = served
        self.close: Callable[[], None] = lambda: None
        """Ends what computes, once nothing is asked any more."""

    def _checked_body(self, path: str, content: bytes) -> dict[str, Any]:
        return check_request(path, super()._checked_body(path, content), self.served)

    def _response_sender(self, send: Send, asked: dict[str, Any]) -> _RefusalFormatter:
        if "stop" not in asked:
            return _RefusalFormatter(send)
        if asked["stream"]:
            return _RefusalFormatter(CutStream(send, asked["stop"]))
        return _StopCutter(send, asked["stop"])


class VllmMiddleware(GatewayMiddleware):
    """The middleware as vLLM's `--middleware` takes it, configured by `other_servers.vllm_environment`.

    vLLM checks the fields of a request itself. But its own key leaves addresses beside /v1 open, and it would offer an
    adapter's base as a second model.
    """

    def __init__(self, app: Any) -> None:
        settings = json.loads(os.environ["SHARDTUNE_SERVE"])
        super().__init__(app, ServeConfig(**settings))

    def _checked_body(self, path: str, content: bytes) -> dict[str, Any]:
        body = super()._checked_body(path, content)
        if body.setdefault("model", self.config.name) != self.config.name:
            message = f"model: there is no {body['model']!r} here; this server has {self.config.name!r} alone"
            raise RefusedRequest(404, message, "model", "model_not_found")
        return body


class _RefusalFormatter:
    """Passes messages on; refusals of the application that are not in OpenAI's form get it."""

    def __init__(self, send: Send) -> None:
        self.send = send
        self._start: Message | None = None
        self._content = b""

    async def __call__(self, message: Message) -> None:
        """Pass a message on at once, or keep an answer until it is complete and send it rewritten."""
        if message["type"] == "http.response.start" and self._is_buffered(message):
            self._start = message
            return
        if self._start is None:
            await self.send(message)
            return
        self._content += message.get("body", b"")
        if message.get("more_body"):
            return
        content = self.rewritten(self._start["status"], self._content)
        headers = [header for header in self._start["headers"] if header[0].lower() != b"content-length"]
        headers.append((b"content-length", str(len(content)).encode()))
        await self.send({**self._start, "headers": headers})
        await self.send({"type": "http.response.body", "body": content})

    def _is_buffered(self, begin: Message) -> bool:
        return bool(begin["status"] >= 400)

    def rewritten(self, status: int, content: bytes) -> bytes:
        """The body of an answer as it is sent to the client."""
        if status < 400:
            return content
        try:
            message = json.loads(content)
        except ValueError:
            message = content.decode(errors="replace")
            if status == 500:
                message = "the model failed; the server's log says why"
        if isinstance(message, dict):
            message = message.get("detail") or message.get("error") or message
        if not isinstance(message, str):
            message = json.dumps(message)
        return json.dumps(RefusedRequest(status, message).body()).encode()


class _StopCutter(_RefusalFormatter):
    """Also ends the text before the first stop, as OpenAI's servers do; transformers leaves the stop in."""

    def __init__(self, send: Send, stops: list[str]) -> None:
        super().__init__(send)
        self.stops = stops

    def _is_buffered(self, begin: Message) -> bool:
        return True

    def rewritten(self, status: int, content: bytes) -> bytes:
        content = super().rewritten(status, content)
        if status >= 400:
            return content
        answer = json.loads(content)
        for choice in answer["choices"]:
            place = choice
            key = "text"
            if "message" in choice:
                place = choice["message"]
                key = "content"
            text = place.get(key) or ""
            cuts = [text.find(stop) for stop in self.stops if stop in text]
            if cuts:
                place[key] = text[: min(cuts)]
                choice["finish_reason"] = "stop"
        return json.dumps(answer).encode()


async def _send_refusal(send: Send, refused: RefusedRequest) -> None:
    content = json.dumps(refused.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if refused.status == 429:
        headers.append((b"retry-after", b"1"))
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
