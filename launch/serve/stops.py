"""Stop sequences in a stream: the text ends before the first one, even if it arrives in pieces."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

EVENT_END_BYTES = b"\n\n"
DATA_PREFIX = b"data: "
DONE_MARKER = b"[DONE]"

Message = dict[str, Any]
Send = Callable[[Message], Awaitable[None]]


class StopScanner:
    """Passes generated text on up to the first stop sequence. What may be the beginning of one is held until more is known."""

    def __init__(self, stops: list[str]) -> None:
        self.stops = stops
        self.is_cut = False
        """Whether a stop sequence was met: what follows is dropped."""
        self._held = ""
        """Text that was not sent yet, since a stop sequence may begin in it."""

    def add_text(self, text: str) -> str:
        """Take the next piece of a streamed answer; returns what may be sent now, of this piece and of what was held back.

        Held back is what may be the beginning of a stop sequence. After a complete one, `is_cut` is set and nothing is sent any
        more. With the stop sequence "END": "a E" -> "a ", then "x" -> "Ex", then "END b" -> "".
        """
        if self.is_cut:
            return ""
        self._held += text
        stop_positions = [self._held.find(stop) for stop in self.stops if stop in self._held]
        if stop_positions:
            self.is_cut = True
            ready_text = self._held[: min(stop_positions)]
            self._held = ""
            return ready_text
        num_held = max(self._num_held_characters(stop) for stop in self.stops)
        num_ready = len(self._held) - num_held
        ready_text = self._held[:num_ready]
        self._held = self._held[num_ready:]
        return ready_text

    def flush_text(self) -> str:
        """The text that is still held when the answer ends by itself: no stop sequence came after all."""
        held = self._held
        self._held = ""
        return held

    def _num_held_characters(self, stop: str) -> int:
        """How many characters at the end of the held text are the beginning of a stop sequence: "a EN", "END" -> 2."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:length]):
                return length
        return 0


class StopCuttingStream:
    """Wraps ASGI's `send` for a stream of server-sent events: cuts the text before the first stop sequence, as OpenAI does."""

    def __init__(self, send: Send, stops: list[str]) -> None:
        self.send = send
        self._stop_scanner = StopScanner(stops)
        self._buffer = b""
        self._is_over = False

    async def __call__(self, message: Message) -> None:
        """Take the place of `send` for an application that streams an answer: pass each message on without stop sequences.

        A message holds events, each with a piece of the answer.
        Once a stop sequence was found, the end of the stream is sent and everything after it is dropped. That tells the
        application that nobody reads any more, and so ends the computation.
        """
        if self._is_over:
            return
        if message["type"] != "http.response.body":
            await self.send(message)
            return
        # A message may end within an event: the rest waits for the next message.
        self._buffer += message.get("body", b"")
        *events, self._buffer = self._buffer.split(EVENT_END_BYTES)
        body = b"".join(self._rewrite_event(event) for event in events)  # gives their text to the scanner
        if self._stop_scanner.is_cut:
            self._is_over = True
            await self.send({**message, "body": body + DATA_PREFIX + DONE_MARKER + EVENT_END_BYTES, "more_body": False})
            return
        is_last_message = not message.get("more_body")
        if is_last_message:
            body += self._buffer
            self._buffer = b""
        await self.send({**message, "body": body})

    def _rewrite_event(self, event: bytes) -> bytes:
        """Turn an event of the application's stream (server-sent events) into what the client gets, without stop sequences.

        - after a stop sequence was found: nothing;
        - no chunk of an answer (the end of the stream, the token counts, an error): as it is;
        - a chunk, `data: {"choices": [...]}`: with the text that may be sent now; nothing if all of it is held back.
        """
        if self._stop_scanner.is_cut:
            return b""
        unchanged_event = event + EVENT_END_BYTES
        content = event.removeprefix(DATA_PREFIX)
        if content == event or content.strip() == DONE_MARKER:
            return unchanged_event
        try:
            chunk = json.loads(content)
        except ValueError:
            return unchanged_event
        if not isinstance(chunk, dict) or not chunk.get("choices"):
            return unchanged_event
        (choice,) = chunk["choices"]  # this server computes one (`n` is 1)
        if not self._replace_by_sendable_text(choice):
            return b""
        return DATA_PREFIX + json.dumps(chunk).encode() + EVENT_END_BYTES

    def _replace_by_sendable_text(self, choice: dict[str, Any]) -> bool:
        """Cut one piece of a streamed answer: replace the text of `choice` by what may be sent now; returns whether to send it.

        Sets `finish_reason` to "stop" if a stop sequence was found. At the end of the answer, what was held back is sent too.
        Not sent are events all of whose text is held back. Events that had no text are sent: they tell the role or a tool call.
        """
        # A chat has its text in choice.delta.content, a completion in choice.text.
        text_holder = choice
        text_key = "text"
        if "delta" in choice:
            text_holder = choice["delta"]
            text_key = "content"
        ready_text = self._stop_scanner.add_text(text_holder.get(text_key) or "")
        if self._stop_scanner.is_cut:
            choice["finish_reason"] = "stop"
        elif choice.get("finish_reason") is not None:
            ready_text += self._stop_scanner.flush_text()
        had_text = bool(text_holder.get(text_key))
        if had_text or ready_text:
            text_holder[text_key] = ready_text
        return bool(ready_text) or not had_text or choice.get("finish_reason") is not None
