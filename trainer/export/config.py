"""Settings of the export."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from strategies.settings import DESCRIBES, Reach, number, setting
from trainer.tuning.base import LoraConfig, TuningConfig


class ExportType(StrEnum):
    """Stored type of a whole model; `auto` is that of the base checkpoint."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class ExportedCheckpoint(StrEnum):
    """`auto` takes the best checkpoint if the run ended with a worse one, or was stopped by patience; else the last."""

    auto = "auto"
    best = "best"
    last = "last"


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """What is written for others when training ends."""

    at_end: bool = setting(True, reach=DESCRIBES)
    """Write `export/` into the run directory after training. In a pipeline, the `export` job writes it."""
    checkpoint: ExportedCheckpoint = setting(ExportedCheckpoint.auto, reach=DESCRIBES)
    """Checkpoint that is exported, chatted with, served and evaluated at the end of the run: `last`; `best` by the watched
    metric; or `auto`: the best one if the last one is worse or the run was stopped early, else the last."""
    merge: bool | None = setting(None, reach=DESCRIBES)
    """Merge the adapter into the base model and write a whole model. null: only if experts or routers are adapted."""
    dtype: ExportType = setting(ExportType.auto, reach=DESCRIBES)
    """Stored type of the weights of a whole model: `float32`, `bfloat16`, `float16`, or `auto` (that of the base
    checkpoint)."""
    max_shard_gib: float = number(5.0, above=0, advice="5 as a rule")
    """Largest size of a safetensors file, in GiB."""
    papers: list[str] = setting(default_factory=list, reach=DESCRIBES)
    """Compliance documents that are written to `papers/`, beside the model card: datasheet, annex_xi, annex_xii,
    training_summary, processing (docs/papers.md)."""
    answers: str | None = setting(None, reach=Reach.file)
    """YAML file with the answers that only the model's owner can give for these documents, by question. Missing answers are
    marked as open."""
    verify: bool = setting(False, reach=DESCRIBES)
    """Load the export again and compare its logits with those of the trained model. If they differ, the export fails. Needs the
    whole model in memory."""


def set_default_merge(export: ExportConfig, tuning: TuningConfig) -> dict[str, str]:
    """Decide `export.merge` if the user left it open (`null`): True if experts or a router are adapted, else False.

    Returns {"export.merge": "null -> true (reason)"} for the notes at the start if it chose True, else {}.
    """
    if export.merge is not None:
        return {}
    export.merge = isinstance(tuning, LoraConfig) and (tuning.experts or tuning.router)
    if not export.merge:
        return {}
    reason = "serving engines leave out or reject adapters of experts and routers; false exports the adapter"
    return {"export.merge": f"null -> true ({reason})"}
