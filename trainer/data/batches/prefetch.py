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
    """The same items, made by one background thread up to `PREFETCH` ahead.

    Close it (or exhaust it) to stop the thread. Errors of the thread are raised here.
    """
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=PREFETCH)
    stop = threading.Event()

    def put(what: str, given: Any = None) -> None:
        while not stop.is_set():
            with suppress(queue.Full):
                ready.put((what, given), timeout=0.1)
                return

    def produce() -> None:
        try:
            for item in items:
                put("item", item)
                if stop.is_set():
                    return
            put("over")
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, which raises it
            put("error", error)

    thread = threading.Thread(target=produce, name="loader", daemon=True)
    thread.start()
    try:
        while (got := ready.get())[0] == "item":
            yield got[1]
        if got[0] == "error":
            raise got[1]
    finally:
        stop.set()
        thread.join()
