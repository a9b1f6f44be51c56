"""Middleware in front of transformers' application: API key, limits, one model, few addresses."""

from __future__ import annotations

import hmac
import json
import os
import re
from collections.abc import Awaitable, Callable
from typing import Any

from launch.serve.config import LOOPBACK_HOSTS, ServeConfig
from launch.serve.requests import CHAT_PATH, COMPLETION_PATH, RefusedRequest, ServedTextModel, translate_request
from launch.serve.stops import StopCuttingStream

Message = dict[str, Any]
"""A message of ASGI, the interface between Python's web servers and applications. A `scope` has the same type."""
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
METHOD_BY_OPEN_PATH = {"/health": "GET", "/v1/models": "GET", CHAT_PATH: "POST", COMPLETION_PATH: "POST"}
"""The only addresses that are answered. The application has others, for example to load and unload models."""


class GatewayMiddleware:
    """An ASGI application around another one. It checks the key and the address, and limits the requests at a time."""

    def __init__(self, app: Any, config: ServeConfig) -> None:
        self.app = app
        self.config = config
        self.api_key = config.api_key
        self.active_requests = 0
        """Requests that are answered or wait."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle one connection, as a web server calls an application (ASGI): HTTP requests; nothing is offered by websocket.

        The server's start and end (`lifespan`) are passed on.
        """
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            await self._handle_http_request(scope, receive, send)
        except RefusedRequest as refused:
            await _send_refusal(send, refused)

    async def _handle_http_request(self, scope: Message, receive: Receive, send: Send) -> None:
        """Admit a request, check its body, and pass it on to the application, whose answer goes to `send`.

        Raises RefusedRequest; with status 429 if `serve.max_requests` requests with a body are under way already.
        """
        headers = {}  # by name in lower case
        for name, value in scope["headers"]:
            headers[name.decode("latin-1").lower()] = value.decode("latin-1")
        self._check_access(scope["path"], scope["method"], headers)
        if scope["method"] == "GET":
            await self.app(scope, receive, send)
            return
        if self.active_requests >= self.config.max_requests:
            raise RefusedRequest(
                429, f"{self.active_requests} requests are under way (serve.max_requests); try again later"
            )
        self.active_requests += 1
        try:
            content = await self._receive_body(receive, headers)
            checked_body = self._parse_body(scope["path"], content)
            await self._call_application(scope, receive, send, checked_body)
        finally:
            self.active_requests -= 1

    def _check_access(self, path: str, method: str, headers: dict[str, str]) -> None:
        """Keep out requests that may not use this server; raises RefusedRequest for these, with the status:

        - an unknown address: status 404; its wrong method: 405;
        - a missing or wrong API key, except at /health: 401;
        - a Host header of another machine, if the server has no key: 403.
        """
        if path not in METHOD_BY_OPEN_PATH:
            raise RefusedRequest(
                404, f"{path}: there is no such address here; there are {', '.join(METHOD_BY_OPEN_PATH)}"
            )
        if method != METHOD_BY_OPEN_PATH[path]:
            raise RefusedRequest(405, f"{method} {path}: is asked with {METHOD_BY_OPEN_PATH[path]}")
        if self.api_key and path != "/health":
            scheme, _, sent_key = headers.get("authorization", "").partition(" ")
            # compare_digest takes the same time wherever two keys differ, so that a key cannot be guessed letter by letter.
            is_right_key = hmac.compare_digest(sent_key.strip().encode(), self.api_key.encode())
            if scheme.lower() != "bearer" or not is_right_key:
                raise RefusedRequest(
                    401, "the key is missing or wrong; send Authorization: Bearer <key>", code="invalid_api_key"
                )
        # A page in a browser on this machine may have its own name point here (DNS rebinding).
        host = re.sub(r":\d+$", "", headers.get("host", "")).strip("[]")
        if not self.api_key and host not in LOOPBACK_HOSTS:
            raise RefusedRequest(
                403, f"this server without a key answers to {', '.join(LOOPBACK_HOSTS)}, not to {host!r}"
            )

    async def _receive_body(self, receive: Receive, headers: dict[str, str]) -> bytes:
        """Receive the whole body of a request, which comes in parts.

        Raises RefusedRequest if it is no JSON by its header, larger than `serve.max_body_kib`, or if the client goes away.
        """
        content_type = headers.get("content-type", "").partition(";")[0]
        if content_type.strip().lower() != "application/json":
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

    def _parse_body(self, path: str, content: bytes) -> dict[str, Any]:
        """Parse the body of a request as JSON; subclasses also check its fields. Raises RefusedRequest."""
        try:
            body = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise RefusedRequest(400, f"the body is no JSON: {error}") from None
        if not isinstance(body, dict):
            raise RefusedRequest(400, f"the body must be a JSON object, not {type(body).__name__}")
        return body

    def _wrap_send(self, send: Send, request_body: dict[str, Any]) -> _RefusalFormatter:
        """Wrap `send`, so that answers can be changed on their way out.

        `request_body`: what the application was given, since a subclass cuts answers at the stop sequences of the request.
        """
        return _RefusalFormatter(send)

    async def _call_application(self, scope: Message, receive: Receive, send: Send, body: dict[str, Any]) -> None:
        """Call the application with the checked body in place of the one that was received; its answer goes through `_wrap_send`.

        The body was read already, so that the application gets it from a `receive` of our own.
        """
        content = json.dumps(body).encode()
        # The application would name its answer by the client's x-request-id.
        dropped = (b"content-length", b"transfer-encoding", b"x-request-id")
        headers = [header for header in scope["headers"] if header[0].lower() not in dropped]
        headers.append((b"content-length", str(len(content)).encode()))
        body_sent = False

        async def receive_checked_body() -> Message:
            nonlocal body_sent
            if body_sent:
                return await receive()  # that the client went away
            body_sent = True
            return {"type": "http.request", "body": content, "more_body": False}

        await self.app({**scope, "headers": headers}, receive_checked_body, self._wrap_send(send, body))


class TransformersMiddleware(GatewayMiddleware):
    """The middleware in front of transformers' application, which also checks each field of a request."""

    def __init__(self, app: Any, served: ServedTextModel, config: ServeConfig) -> None:
        super().__init__(app, config)
        self.served = served
        self.close: Callable[[], None] = lambda: None
        """Ends the threads that generate answers, once the server has stopped."""

    def _parse_body(self, path: str, content: bytes) -> dict[str, Any]:
        return translate_request(path, super()._parse_body(path, content), self.served)

    def _wrap_send(self, send: Send, request_body: dict[str, Any]) -> _RefusalFormatter:
        if "stop" not in request_body:
            return _RefusalFormatter(send)
        if request_body["stream"]:
            return _RefusalFormatter(StopCuttingStream(send, request_body["stop"]))
        return _StopCuttingResponse(send, request_body["stop"])


class VllmMiddleware(GatewayMiddleware):
    """The middleware as vLLM's `--middleware` takes it, configured by `other_servers.vllm_environment`.

    vLLM checks the fields of a request itself. But its own key leaves addresses beside /v1 open, and it would offer an
    adapter's base as a second model.
    """

    def __init__(self, app: Any) -> None:
        settings = json.loads(os.environ["SHARDTUNE_SERVE"])
        super().__init__(app, ServeConfig(**settings))

    def _parse_body(self, path: str, content: bytes) -> dict[str, Any]:
        body = super()._parse_body(path, content)
        if body.setdefault("model", self.config.name) != self.config.name:
            message = f"model: there is no {body['model']!r} here; this server has {self.config.name!r} alone"
            raise RefusedRequest(404, message, param="model", code="model_not_found")
        return body


class _RefusalFormatter:
    """Wraps ASGI's `send`: passes messages on, and rewrites errors of the application into OpenAI's format."""

    def __init__(self, send: Send) -> None:
        self.send = send
        self._start_message: Message | None = None
        """The first message of an answer that is kept until it is complete; None if the answer is passed on as it comes."""
        self._buffered_body = b""

    async def __call__(self, message: Message) -> None:
        """Take the place of `send` for the application: pass its messages on, or keep an answer and send it rewritten.

        An answer is one message that begins it, with status and headers, and one or more with its body.
        """
        if message["type"] == "http.response.start" and self._must_be_buffered(message):
            self._start_message = message
            return
        if self._start_message is None:  # the answer is passed on as it comes
            await self.send(message)
            return
        self._buffered_body += message.get("body", b"")
        is_complete = not message.get("more_body")
        if not is_complete:
            return
        body = self.rewrite_answer_body(self._start_message["status"], self._buffered_body)
        headers = [header for header in self._start_message["headers"] if header[0].lower() != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        await self.send({**self._start_message, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    def _must_be_buffered(self, start_message: Message) -> bool:
        """Whether an answer must be kept until it is complete, because it is rewritten: an error must, by its status."""
        return bool(start_message["status"] >= 400)

    def rewrite_answer_body(self, status: int, content: bytes) -> bytes:
        """Bring the body of an error into OpenAI's format, by which clients tell users what went wrong; other bodies stay.

        The message of an error comes from the fields `detail` or `error`, else it is the whole body.
        """
        if status < 400:
            return content
        try:
            message = json.loads(content)
        except ValueError:
            message = content.decode(errors="replace")
            if status == 500:  # may hold a traceback, which is not for clients
                message = "the model failed; the server's log says why"
        if isinstance(message, dict):
            message = message.get("detail") or message.get("error") or message
        if not isinstance(message, str):
            message = json.dumps(message)
        return json.dumps(RefusedRequest(status, message).body()).encode()


class _StopCuttingResponse(_RefusalFormatter):
    """Also cuts the generated text before the first stop sequence, as OpenAI's servers do; transformers leaves it in."""

    def __init__(self, send: Send, stops: list[str]) -> None:
        super().__init__(send)
        self.stops = stops

    def _must_be_buffered(self, start_message: Message) -> bool:
        return True

    def rewrite_answer_body(self, status: int, content: bytes) -> bytes:
        """Cut the generated text of a complete answer before the first stop sequence; errors get OpenAI's format.

        `content`: the answer as JSON, with one text for each of its `choices`. `finish_reason` of a cut one becomes "stop".
        """
        content = super().rewrite_answer_body(status, content)
        if status >= 400:
            return content
        answer = json.loads(content)
        for choice in answer["choices"]:
            # A chat has its text in choice.message.content, a completion in choice.text.
            text_holder = choice
            text_key = "text"
            if "message" in choice:
                text_holder = choice["message"]
                text_key = "content"
            text = text_holder.get(text_key) or ""
            stop_positions = [text.find(stop) for stop in self.stops if stop in text]
            if stop_positions:
                text_holder[text_key] = text[: min(stop_positions)]
                choice["finish_reason"] = "stop"
        return json.dumps(answer).encode()


async def _send_refusal(send: Send, refused: RefusedRequest) -> None:
    """Answer a refused request: the error as JSON in OpenAI's format, with the headers that clients expect of its status."""
    content = json.dumps(refused.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if refused.status == 429:
        headers.append((b"retry-after", b"1"))
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
