"""Stop sequences in a stream: the text ends before the first one, even if it arrives in pieces."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

EVENT_END = b"\n\n"
DATA = b"data: "
DONE = b"[DONE]"

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
        """Take the next piece of the answer; returns the text that may be sent now, of this piece and of what was held back.

        Held back is what may be the beginning of a stop text. After a whole one, `is_cut` is set and nothing is sent any more.
        With the stop text "END": "a E" -> "a ", then "x" -> "Ex", then "END b" -> "".
        """
        if self.is_cut:
            return ""
        self._held += text
        stop_positions = [self._held.find(stop) for stop in self.stops if stop in self._held]
        if stop_positions:
            self.is_cut = True
            ready = self._held[: min(stop_positions)]
            self._held = ""
            return ready
        held_length = max(self._length_of_begun(stop) for stop in self.stops)
        ready_length = len(self._held) - held_length
        ready = self._held[:ready_length]
        self._held = self._held[ready_length:]
        return ready

    def flush_text(self) -> str:
        """The text that is still held when the answer ends by itself: no stop sequence came after all."""
        held = self._held
        self._held = ""
        return held

    def _length_of_begun(self, stop: str) -> int:
        """How many characters at the end of the held text are the beginning of a stop sequence."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:length]):
                return length
        return 0


class StopCuttingStream:
    """Wraps ASGI's `send` for a stream of server-sent events: cuts the text before the first stop sequence, as OpenAI does."""

    def __init__(self, send: Send, stops: list[str]) -> None:
        self.send = send
        self._text = StopScanner(stops)
        self._buffer = b""
        self._is_over = False

    async def __call__(self, message: Message) -> None:
        """Pass on a message of the application, with the events in it changed."""
        if self._is_over:
            return
        if message["type"] != "http.response.body":
            await self.send(message)
            return
        # A message may end within an event: the rest waits for the next message.
        self._buffer += message.get("body", b"")
        *events, self._buffer = self._buffer.split(EVENT_END)
        body = b"".join(self._changed(event) for event in events)
        if self._text.is_cut:
            # The end of the stream tells the application that nobody reads any more, and so ends the computation.
            self._is_over = True
            await self.send({**message, "body": body + DATA + DONE + EVENT_END, "more_body": False})
            return
        if not message.get("more_body"):
            body += self._buffer
            self._buffer = b""
        await self.send({**message, "body": body})

    def _changed(self, event: bytes) -> bytes:
        """One event of the stream as it is sent to the client; empty if it is held or dropped.

        An event is `data: {"choices": [...]}`. What is no such chunk passes as it is: the end of the stream (`DONE`), the token
        counts, an error. After a stop text was found, everything is dropped.
        """
        if self._text.is_cut:
            return b""
        content = event.removeprefix(DATA)
        if content == event or content.strip() == DONE:
            return event + EVENT_END
        try:
            chunk = json.loads(content)
        except ValueError:
            return event + EVENT_END
        if not isinstance(chunk, dict) or not chunk.get("choices"):
            return event + EVENT_END  # the usage, or an error
        (choice,) = chunk["choices"]  # this server computes one (`n` is 1)
        if not self._cut(choice):
            return b""
        return DATA + json.dumps(chunk).encode() + EVENT_END

    def _cut(self, choice: dict[str, Any]) -> bool:
        """Replace the text of a `choice` by what may be sent of it now; returns whether the event is to be sent at all.

        `finish_reason` becomes "stop" if a stop text was found.
        """
        # A chat has its text in choice.delta.content, a completion in choice.text.
        text_holder = choice
        text_key = "text"
        if "delta" in choice:
            text_holder = choice["delta"]
            text_key = "content"
        ready = self._text.add_text(text_holder.get(text_key) or "")
        if self._text.is_cut:
            choice["finish_reason"] = "stop"
        elif choice.get("finish_reason") is not None:
            ready += self._text.flush_text()
        had_text = bool(text_holder.get(text_key))
        if had_text or ready:
            text_holder[text_key] = ready
        # Events without text tell the role or a tool call.
        return bool(ready) or not had_text or choice.get("finish_reason") is not None
