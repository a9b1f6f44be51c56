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


class HeldText:
    """Passes text on up to the first stop. What may be the beginning of a stop is held back until more is known."""

    def __init__(self, stops: list[str]) -> None:
        self.stops = stops
        self.is_cut = False
        """Whether a stop was met: what follows is dropped."""
        self._held = ""

    def take(self, text: str) -> str:
        """Take the next piece of the answer; returns the text that may be sent now, of this piece and of what was held."""
        if self.is_cut:
            return ""
        self._held += text
        places = [self._held.find(stop) for stop in self.stops if stop in self._held]
        if places:
            self.is_cut = True
            ready = self._held[: min(places)]
            self._held = ""
            return ready
        keep = max(self._begun(stop) for stop in self.stops)
        ready = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return ready

    def rest(self) -> str:
        """What is still held when the answer ends by itself."""
        rest = self._held
        self._held = ""
        return rest

    def _begun(self, stop: str) -> int:
        """How many letters at the end are the beginning of a stop."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:length]):
                return length
        return 0


class CutStream:
    """Passes a stream of server-sent events on, with the text cut before the first stop, as OpenAI's servers do."""

    def __init__(self, send: Send, stops: list[str]) -> None:
        self.send = send
        self._text = HeldText(stops)
        self._buffer = b""
        self._is_over = False

    async def __call__(self, message: Message) -> None:
        """Take a message of the application."""
        if self._is_over:
            return
        if message["type"] != "http.response.body":
            await self.send(message)
            return
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
        """An event as it is sent; empty if nothing of it is."""
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
        """Put into a choice what may be sent of its text; whether anything of it is to be sent."""
        place = choice
        key = "text"
        if "delta" in choice:
            place = choice["delta"]
            key = "content"
        ready = self._text.take(place.get(key) or "")
        if self._text.is_cut:
            choice["finish_reason"] = "stop"
        elif choice.get("finish_reason") is not None:
            ready += self._text.rest()
        had_text = bool(place.get(key))
        if had_text or ready:
            place[key] = ready
        return bool(ready) or not had_text or choice.get("finish_reason") is not None
