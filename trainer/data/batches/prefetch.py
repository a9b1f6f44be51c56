"""Batches made ahead by a thread, in memory that a GPU copies from while it computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

import torch

from trainer.data.batches.collate import each_tensor

Made = TypeVar("Made")
PREFETCH = 2
"""Batches (in training: those of a whole step) that are made ahead."""


def pinned(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch in memory from which a GPU copies without being waited for; as it is for a CPU."""
    return each_tensor(batch, torch.Tensor.pin_memory) if device.type == "cuda" else batch


def prefetched(items: Iterator[Made]) -> Generator[Made, None, None]:
    """The same items, made by one background thread up to `PREFETCH` ahead.

    Close it (or exhaust it) to stop the thread. Errors of the thread are raised here.
    """
    ready: queue.Queue[tuple[Made | None, BaseException | None, bool]] = queue.Queue(maxsize=PREFETCH)
    stop = threading.Event()

    def produce() -> None:
        while not stop.is_set():
            try:
                given: tuple[Made | None, BaseException | None, bool] = (next(items), None, False)
            except StopIteration:
                given = (None, None, True)
            except BaseException as error:  # noqa: BLE001 - handed to the consumer, which raises it
                given = (None, error, True)
            while not stop.is_set():
                try:
                    ready.put(given, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if given[2]:
                return

    thread = threading.Thread(target=produce, name="loader", daemon=True)
    thread.start()
    try:
        while True:
            item, error, over = ready.get()
            if error is not None:
                raise error
            if over:
                return
            yield item  # type: ignore[misc]
    finally:
        stop.set()
        thread.join()
