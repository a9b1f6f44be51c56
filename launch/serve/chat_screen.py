"""Draws two answers side by side in a terminal while they are generated."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.serve.conversation import Conversation


def stream_in_columns(conversations: list[Conversation], prompt: str, console: Any = None) -> None:
    """Show the answers of all models to one prompt side by side in a terminal while they are generated.

    Ctrl-C ends the answers, not the program. `console`: rich's console; None for stdout. An error of one model is raised when
    the others are done.
    """
    from rich.console import Console
    from rich.live import Live

    console = console or Console()
    answers = _Answers(conversations, prompt)
    with Live(answers.table(), console=console, refresh_per_second=10, vertical_overflow="visible") as live:
        while answers.are_being_generated():
            try:
                answers.wait_briefly()
            except KeyboardInterrupt:
                for conversation in conversations:
                    conversation.stop()  # asks alone: the loop goes on until the threads have ended
            live.update(answers.table())
        live.update(answers.table())
    if answers.errors:
        raise answers.errors[0]
    for conversation in conversations:
        if conversation.is_cut:
            max_tokens = conversation.settings.max_tokens
            console.print(f"({conversation.chat_model.name}: cut at max_tokens={max_tokens})", style="dim")


class _Answers:
    """The answers of all models to a prompt, generated in threads while they are drawn.

    Each model has a thread of its own, or all share one and answer in turn if answers are sampled.
    """

    def __init__(self, conversations: list[Conversation], prompt: str) -> None:
        """Start the threads that generate the answers to `prompt`. Each of the conversations is with a model of its own."""
        self.errors: list[BaseException] = []
        self._conversations = conversations
        self._texts = ["" for _ in conversations]
        """The text of each answer so far."""
        indices = list(range(len(conversations)))
        # Which models each thread serves, by their indices. Sampled answers take turns: the process has one random state.
        if any(conversation.is_sampled for conversation in conversations):
            indices_by_thread = [indices]
        else:
            indices_by_thread = [[index] for index in indices]
        self._threads = []
        for thread_indices in indices_by_thread:
            thread = threading.Thread(target=self._generate, args=(thread_indices, prompt), daemon=True)
            self._threads.append(thread)
        for thread in self._threads:
            thread.start()

    def _generate(self, indices: list[int], prompt: str) -> None:
        """Generate the answers of the models with these indices, one after the other. Runs in a thread."""
        try:
            for index in indices:
                for piece in self._conversations[index].stream_answer(prompt):
                    self._texts[index] += piece
        except BaseException as error:  # noqa: BLE001 - raised in the thread that shows the answers
            self.errors.append(error)

    def are_being_generated(self) -> bool:
        """Whether any answer is still being generated."""
        return any(thread.is_alive() for thread in self._threads)

    def wait_briefly(self) -> None:
        """Wait a moment for each thread."""
        for thread in self._threads:
            thread.join(0.05)

    def table(self) -> Any:
        """The answers so far as rich's table."""
        return _table(self._conversations, self._texts)


def _table(conversations: list[Conversation], texts: list[str]) -> Any:
    """Lay the answers out side by side, as rich's table with a column and a title for each model.

    `texts`: of the answers so far, in the order of `conversations`.
    """
    from rich.table import Table
    from rich.text import Text

    from launch.streams import printable_text

    table = Table.grid(padding=(0, 2), expand=True)
    for _ in conversations:
        table.add_column(ratio=1, overflow="fold")
    if len(conversations) > 1:
        table.add_row(*(Text(conversation.chat_model.name, style="bold") for conversation in conversations))
    table.add_row(*(Text(printable_text(text)) for text in texts))
    return table
