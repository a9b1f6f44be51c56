"""TensorBoard event files under `tensorboard/`."""

from __future__ import annotations

from typing import Any

from trainer.reporting.trackers.base import LoggedTable, RunEnding, TrackedRun


class TensorboardFiles:
    """Rows as scalars, and tables as texts; TensorBoard has no place for more."""

    def __init__(self, tracked_run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        directory = tracked_run.run_dir / "tensorboard"
        self._writer = SummaryWriter(str(directory))
        self.hint: tuple[str, str] | None = None

    def log(self, metrics: dict[str, Any], *, step: int) -> None:
        for key, value in metrics.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(key, value, step)

    def log_table(self, name: str, table: LoggedTable, *, step: int) -> None:
        """Show a table under TensorBoard's texts, since it has no tables: as Markdown, each cell on one line."""
        lines = []
        separator = ["---"] * len(table.columns)
        for row in (table.columns, separator, *table.rows):
            cells = []
            for cell in row:
                escaped = str(cell).replace("|", "\\|")
                cells.append(" ".join(escaped.split()))
            lines.append(f"| {' | '.join(cells)} |")
        self._writer.add_text(name, "\n".join(lines), step)

    def summarise(self, values: dict[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(key, value)

    def close(self, ending: RunEnding) -> None:
        self._writer.add_text("state", f"{ending.tracked_state} {ending.reason}".strip())
        self._writer.close()
