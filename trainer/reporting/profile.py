"""Profiles a few steps by torch's profiler if `profile.steps` asks for it: a trace and a summary for each rank.

`profile/rank-0.json.gz` opens in https://ui.perfetto.dev and in Chrome's tracing; `profile/rank-0.summary.json` is what the
run's page shows of it. Nothing is imported or hooked where no steps are asked for.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from strategies.settings import DESCRIBES, setting
from trainer.reporting.jsonl import json_text
from trainer.reporting.status import write_text_atomic
from trainer.reporting.trace import summarise_trace

if TYPE_CHECKING:
    from strategies.runtime import Runtime

PROFILE_DIR_NAME = "profile"


@dataclass(kw_only=True, slots=True)
class ProfileConfig:
    """Which steps are traced."""

    steps: list[int] = setting(default_factory=list, reach=DESCRIBES)
    """First and last step that each rank traces with torch's profiler, such as [10,12], into `profile/`. Empty: none."""


def profile_problems(config: ProfileConfig, total_steps: int | None) -> list[str]:
    """Check that the run has the steps which `profile.steps` asks to trace; returns an error message in a list, or an empty one.

    `total_steps`: steps of the run; None if they are not known yet.
    """
    steps = config.steps
    if not steps:
        return []
    typed = f"profile.steps={str(steps).replace(' ', '')}"  # as on a command line
    if len(steps) != 2 or not 1 <= steps[0] <= steps[1]:
        return [f"{typed}: must be the first and the last step, 1 at least; profile.steps=[10,12] traces three"]
    if total_steps is not None and steps[1] > total_steps:
        return [f"{typed}: the run has {total_steps} steps; name steps up to that, or raise budget.steps"]
    return []


class Profiler:
    """Traces the steps of one rank; a context around training. Communicates nothing."""

    def __init__(
        self,
        config: ProfileConfig,
        run_dir: Path,
        runtime: Runtime,
        next_at_step: Callable[[int], None],
        print_line: Callable,
    ) -> None:
        """`config`: which steps are traced. `next_at_step`: what else is called before each step, with its number.

        `print_line`: prints a line on the screen.
        """
        self.steps = config.steps
        self.profile_dir = run_dir / PROFILE_DIR_NAME
        self.runtime = runtime
        self._next_at_step = next_at_step
        self._print_line = print_line
        self._torch_profiler: Any = None
        """torch's profiler while steps are traced; None before and after."""
        self._first_traced_step = 0

    def at_step(self, step: int) -> None:
        """Begin tracing before the first step of `profile.steps`, or end it after the last. Called before each step."""
        if self.steps:
            first_step, last_step = self.steps
            if self._torch_profiler is not None and step > last_step:
                self._end_trace(step - 1)
            if self._torch_profiler is None and step == first_step:
                self._begin_trace(step)
        self._next_at_step(step)

    def _begin_trace(self, step: int) -> None:
        """Start torch's profiler, with memory, and on a GPU its kernels. `step`: the first one that is traced."""
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if self.runtime.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._torch_profiler = profile(activities=activities, profile_memory=True, acc_events=True)
        self._first_traced_step = step
        self._torch_profiler.start()

    def _end_trace(self, last_step: int) -> None:
        """Stop tracing after `last_step`, and write this rank's trace and its summary into `profile/`.

        The summary is made from the written trace. A full disk is only reported: the run goes on.
        """
        torch_profiler = self._torch_profiler
        self._torch_profiler = None
        torch_profiler.stop()
        rank = self.runtime.rank
        trace_file = self.profile_dir / f"rank-{rank}.json.gz"
        try:
            self.profile_dir.mkdir(parents=True, exist_ok=True)
            torch_profiler.export_chrome_trace(str(trace_file))
            with gzip.open(trace_file, "rt", encoding="utf-8") as file:
                trace_summary = summarise_trace(json.load(file)["traceEvents"])
            summary = {
                "rank": rank,
                "device": str(self.runtime.device),
                "steps": [self._first_traced_step, last_step],
                **trace_summary,
            }
            write_text_atomic(self.profile_dir / f"rank-{rank}.summary.json", json_text(summary, indent=1) + "\n")
        except (OSError, ValueError) as error:  # the run goes on without its profile
            self._print_line(f"warning: {trace_file}: not written ({error}); free space")
            return
        self._print_line(
            f"profiled steps {self._first_traced_step} to {last_step}: {trace_file} (open it in ui.perfetto.dev)"
        )

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End tracing if the last traced step is the run's last one. After an error, nothing is written."""
        if self._torch_profiler is not None:
            if kind is None:
                self._end_trace(self.steps[1])
            else:
                self._torch_profiler.stop()
