"""Makes batches ahead in a thread, in pinned memory that a GPU copies from while it computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from contextlib import suppress
from enum import Enum, auto
from typing import Any, NamedTuple, TypeVar

import torch

from trainer.data.batches.collate import map_tensors

Item = TypeVar("Item")
PREFETCH = 2
"""Batches (in training: those of a whole step) that are made ahead."""


def pin_batch(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A copy of the batch in pinned memory, from which a GPU copies without waiting. For a CPU, the batch itself."""
    return map_tensors(batch, torch.Tensor.pin_memory) if device.type == "cuda" else batch


def prefetch(items: Iterator[Item]) -> Generator[Item, None, None]:
    """Yield the items in order, while a background thread takes up to `PREFETCH` of them from the iterator ahead of the consumer.

    Close the generator (or exhaust it) to stop the thread. An exception that the iterator raises in the thread is raised here.
    """
    messages: queue.Queue[_Message] = queue.Queue(maxsize=PREFETCH)
    should_stop = threading.Event()
    thread = threading.Thread(target=_produce, args=(items, messages, should_stop), name="loader", daemon=True)
    thread.start()
    try:
        message = messages.get()
        while message.kind is _MessageKind.item:
            yield message.payload
            message = messages.get()
        if message.kind is _MessageKind.error:
            raise message.payload
    finally:
        should_stop.set()
        thread.join()


class _MessageKind(Enum):
    """What the thread has to say."""

    item = auto()
    error = auto()
    exhausted = auto()


class _Message(NamedTuple):
    """What the thread puts into the queue."""

    kind: _MessageKind
    payload: Any = None
    """The item, or the exception."""


def _produce(items: Iterator[Any], messages: queue.Queue[_Message], should_stop: threading.Event) -> None:
    """Run in the background thread of `prefetch`: send all items, then whether the iterator is exhausted or has failed."""
    try:
        for item in items:
            _send(_Message(_MessageKind.item, item), messages, should_stop)
            if should_stop.is_set():
                return
        _send(_Message(_MessageKind.exhausted), messages, should_stop)
    except BaseException as error:  # noqa: BLE001 - handed to the consumer, which raises it
        _send(_Message(_MessageKind.error, error), messages, should_stop)


def _send(message: _Message, messages: queue.Queue[_Message], should_stop: threading.Event) -> None:
    """Put a message into the queue, waiting for room; give up once `should_stop` is set, since nobody takes it then."""
    # With a timeout, so that the thread notices `should_stop` although nobody takes anything any more.
    while not should_stop.is_set():
        with suppress(queue.Full):
            messages.put(message, timeout=0.1)
            return
