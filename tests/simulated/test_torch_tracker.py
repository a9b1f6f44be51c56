"""Live bytes as torch's own tracker counts them, where it can follow: FSDP2 without accumulation, from the second step on."""

import pytest
import torch
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

from tests.helpers.building import model_dir
from tests.helpers.covering import EVERYTHING
from tests.simulated.cases import Case, simulated
from trainer.monitors.anomalies import WATCHED_METRICS
from trainer.monitors.guard_config import GuardsConfig
from trainer.planner import memory_tracker, simulate

WINDOW = GuardsConfig().window * len(WATCHED_METRICS) * 8
"""Bytes of what the guards compare a step with, in float64."""
FEW = WINDOW + 64
"""Bytes at most that live beside what torch's tracker is told of: that, a frequency table, a sum of losses, some numbers."""


class Followed(simulate.RecordedEngine):
    """Also counted by torch's tracker, in the second step; in the first it counts what is asked about shapes alone."""

    peak = kept = steps = 0

    def begin_step(self):
        self.steps += 1
        if self.steps == 2:
            self.tracker = FSDPMemTracker(self.step_module, self.engine.optimizer)
            self.tracker.__enter__()
        super().begin_step()

    def set_phase(self, phase, model_part="before"):
        if phase == "between" and self.steps == 2:
            self.tracker.__exit__(None, None, None)
            Followed.peak = self.tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
        if (phase, model_part) == ("forward", "head") and self.steps == 2:  # where the step's peak will be
            told = {storage._cdata for storage in self.tracker._WINFO}
            Followed.kept = sum(held.num_bytes for key, held in self.recorder._live.items() if key not in told)
        super().set_phase(phase, model_part)


@pytest.mark.parametrize(
    ("tuning", "checkpointing"), [("full", "full"), ("lora", "selective"), *([("full", "none")] if EVERYTHING else [])]
)
def test_peak_is_that_of_torchs_tracker(tmp_path, monkeypatch, tuning, checkpointing):
    """Both watch the same step of one rank of 8, to the byte: torch's does not round what lies on a CPU."""
    monkeypatch.setattr(memory_tracker, "ALLOCATION_GRAIN", 1)
    monkeypatch.setattr(simulate, "RecordedEngine", Followed)
    case = Case("fsdp2", tuning, "bf16", checkpointing)
    # Once: torch's tracker leaves something behind, so that a step after it would hold more.
    found = simulated(case, model_dir(tmp_path), 8, 7, device=torch.device("cpu"), repeat=0)
    assert (found.phase_and_peak[0].name, found.phase_and_peak[0].model_part) == ("forward", "head")
    assert Followed.kept < FEW
    assert found.phase_and_peak[1].total_bytes == Followed.peak + Followed.kept
