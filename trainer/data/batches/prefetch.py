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
    """The batch in memory from which a GPU copies without being waited for; as it is for a CPU."""
    return map_tensors(batch, torch.Tensor.pin_memory) if device.type == "cuda" else batch


def prefetch(items: Iterator[Item]) -> Generator[Item, None, None]:
    """Yield the items, which one background thread takes from the iterator up to `PREFETCH` ahead of the consumer.

    Close it (or exhaust it) to stop the thread. Errors of the thread are raised here.
    """
    # ("item", an item), ("error", an exception) or ("over", None).
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=PREFETCH)
    stop = threading.Event()

    def put(kind: str, payload: Any = None) -> None:
        """Hand something over, waiting for room; gives up once `stop` is set."""
        # With a timeout, so that the thread notices `stop` although nobody takes anything any more.
        while not stop.is_set():
            with suppress(queue.Full):
                ready.put((kind, payload), timeout=0.1)
                return

    def produce() -> None:
        """Put all items, then how it ended."""
        try:
            for item in items:
                put("item", item)
                if stop.is_set():
                    return
            put("over")
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, which raises it
            put("error", error)

    # The consumer: items until the producer is over or has failed.
    thread = threading.Thread(target=produce, name="loader", daemon=True)
    thread.start()
    try:
        kind, payload = ready.get()
        while kind == "item":
            yield payload
            kind, payload = ready.get()
        if kind == "error":
            raise payload
    finally:
        stop.set()
        thread.join()
