"""Makes batches ahead in a thread, in pinned memory that a GPU copies from while it computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from contextlib import suppress
from typing import Any, TypeVar

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
    # Holds ("item", an item), ("error", an exception) or ("exhausted", None).
    messages: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=PREFETCH)
    should_stop = threading.Event()

    def send(kind: str, payload: Any = None) -> None:
        """Put a message into the queue, waiting for room; give up once `should_stop` is set."""
        # With a timeout, so that the thread notices `should_stop` although nobody takes anything any more.
        while not should_stop.is_set():
            with suppress(queue.Full):
                messages.put((kind, payload), timeout=0.1)
                return

    def produce() -> None:
        """The body of the thread: send all items, then whether the iterator is exhausted or has failed."""
        try:
            for item in items:
                send("item", item)
                if should_stop.is_set():
                    return
            send("exhausted")
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, which raises it
            send("error", error)

    thread = threading.Thread(target=produce, name="loader", daemon=True)
    thread.start()
    try:
        kind, payload = messages.get()
        while kind == "item":
            yield payload
            kind, payload = messages.get()
        if kind == "error":
            raise payload
    finally:
        should_stop.set()
        thread.join()
