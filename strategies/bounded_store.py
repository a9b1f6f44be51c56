"""The ranks' store, with calls that end within a time limit even if the link to its host is down.

A TCPStore waits for an answer without a limit. A host that has died resets the connection. One that cannot be reached does not,
and the kernel gives up only after a quarter of an hour or more. So a thread makes the calls, and the caller waits for the thread
only for a limited time.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

Call = tuple[Callable[..., Any], tuple[Any, ...], "Future[Any]"]


class Unanswered(RuntimeError):
    """The host of the store has not answered in time."""


class BoundedStore:
    """A connection of its own to a store. Calls raise RuntimeError if the store is gone, Unanswered after `limit_s`.

    After an unanswered call, others fail at once until the answer comes.
    """

    def __init__(self, store: Any, limit_s: float) -> None:
        self._store = store.clone()  # a connection of its own: a call of the process group may block the other one
        self._limit_s = limit_s
        self._calls: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self._late_answer: Future[Any] | None = None
        self._answered_at = time.monotonic()
        threading.Thread(target=self._make_calls, name="store", daemon=True).start()

    def set(self, key: str, value: str) -> None:
        """Store a value."""
        self._call_in_store_thread(self._store.set, key, value)

    def get(self, key: str) -> bytes:
        """The value of a key. Waits, as the store does, until the key has one."""
        value: bytes = self._call_in_store_thread(self._store.get, key)
        return value

    def check(self, keys: list[str]) -> bool:
        """Whether all keys have a value."""
        return bool(self._call_in_store_thread(self._store.check, keys))

    def unanswered_s(self) -> float:
        """Seconds since the last answer if a call has exceeded its limit and is still unanswered, else 0."""
        if self._late_answer is None or self._late_answer.done():
            return 0.0
        return time.monotonic() - self._answered_at

    def _call_in_store_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Make a call to the ranks' store in a thread of its own, so that this one waits no longer than the limit for its result.

        Raises the call's own error; Unanswered after the limit, and at once while an earlier call is unanswered.
        """
        if self._late_answer is not None and not self._late_answer.done():
            raise Unanswered(f"the ranks' store has not answered for {self.unanswered_s():.0f} s")
        answer: Future[Any] = Future()
        self._calls.put((function, arguments, answer))
        try:
            value = answer.result(timeout=self._limit_s)
        except TimeoutError:
            self._late_answer = answer
            raise Unanswered(f"the ranks' store has not answered for {self._limit_s:.0f} s") from None
        self._answered_at = time.monotonic()
        return value

    def _make_calls(self) -> None:
        """Body of the thread: make the calls in the queue, one after the other."""
        while True:
            function, arguments, answer = self._calls.get()
            try:
                answer.set_result(function(*arguments))
            except BaseException as error:  # noqa: BLE001 - raised in the thread that waits for the answer
                answer.set_exception(error)
