"""Draws two answers side by side in a terminal while they are generated."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.serve.conversation import Conversation


def stream_in_columns(conversations: list[Conversation], prompt: str, console: Any = None) -> None:
    """Ask all at once (in turn where they draw) and show each in a column; Ctrl-C ends the answers, not the program.

    What one of them raises is raised when the others are done.
    """
    from rich.console import Console
    from rich.live import Live

    console = console or Console()
    texts = ["" for _ in conversations]
    errors: list[BaseException] = []

    def write(numbers: list[int]) -> None:
        try:
            for number in numbers:
                for piece in conversations[number].stream_answer(prompt):
                    texts[number] += piece
        except BaseException as error:  # noqa: BLE001 - raised below, in the thread that shows them
            errors.append(error)

    indices = list(range(len(conversations)))
    in_turn = any(conversation.is_sampled for conversation in conversations)  # the seed is one for the process
    groups = [indices] if in_turn else [[number] for number in indices]
    threads = [threading.Thread(target=write, args=(group,), daemon=True) for group in groups]
    for thread in threads:
        thread.start()
    with Live(
        _table(conversations, texts), console=console, refresh_per_second=10, vertical_overflow="visible"
    ) as live:
        while any(thread.is_alive() for thread in threads):
            try:
                for thread in threads:
                    thread.join(0.05)
            except KeyboardInterrupt:
                for conversation in conversations:
                    conversation.stop()
            live.update(_table(conversations, texts))
        live.update(_table(conversations, texts))
    if errors:
        raise errors[0]
    for conversation in conversations:
        if conversation.is_cut:
            console.print(
                f"({conversation.chat_model.name}: cut at max_tokens={conversation.settings.max_tokens})", style="dim"
            )


def _table(conversations: list[Conversation], texts: list[str]) -> Any:
    from rich.table import Table
    from rich.text import Text

    from launch.streams import printable

    table = Table.grid(padding=(0, 2), expand=True)
    for _ in conversations:
        table.add_column(ratio=1, overflow="fold")
    if len(conversations) > 1:
        table.add_row(*(Text(conversation.chat_model.name, style="bold") for conversation in conversations))
    table.add_row(*(Text(printable(text)) for text in texts))
    return table
