"""Draws two answers side by side in a terminal while they are generated."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.serve.conversation import Talk


def columns(talks: list[Talk], prompt: str, console: Any = None) -> None:
    """Ask all at once (in turn where they draw) and show each in a column; Ctrl-C ends the answers, not the program.

    What one of them raises is raised when the others are done.
    """
    from rich.console import Console
    from rich.live import Live

    console = console or Console()
    texts = ["" for _ in talks]
    errors: list[BaseException] = []

    def write(numbers: list[int]) -> None:
        try:
            for number in numbers:
                for piece in talks[number].ask(prompt):
                    texts[number] += piece
        except BaseException as error:  # noqa: BLE001 - raised below, in the thread that shows them
            errors.append(error)

    each = list(range(len(talks)))
    alone = any(talk.draws for talk in talks)  # the seed is one for the process
    groups = [each] if alone else [[number] for number in each]
    threads = [threading.Thread(target=write, args=(group,), daemon=True) for group in groups]
    for thread in threads:
        thread.start()
    with Live(_table(talks, texts), console=console, refresh_per_second=10, vertical_overflow="visible") as live:
        while any(thread.is_alive() for thread in threads):
            try:
                for thread in threads:
                    thread.join(0.05)
            except KeyboardInterrupt:
                for talk in talks:
                    talk.stop()
            live.update(_table(talks, texts))
        live.update(_table(talks, texts))
    if errors:
        raise errors[0]
    for talk in talks:
        if talk.cut:
            console.print(f"({talk.talking.name}: cut at max_tokens={talk.settings.max_tokens})", style="dim")


def _table(talks: list[Talk], texts: list[str]) -> Any:
    from rich.table import Table
    from rich.text import Text

    from launch.streams import printable

    table = Table.grid(padding=(0, 2), expand=True)
    for _ in talks:
        table.add_column(ratio=1, overflow="fold")
    if len(talks) > 1:
        table.add_row(*(Text(talk.talking.name, style="bold") for talk in talks))
    table.add_row(*(Text(printable(text)) for text in texts))
    return table
