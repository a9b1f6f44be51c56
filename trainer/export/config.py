"""Settings of the export."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ExportType(StrEnum):
    """Stored type of a whole model; `auto` is that of the base checkpoint."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """What is written for others when training ends."""

    at_end: bool = True
    """Write `export/` in the run directory after training."""
    merge: bool = False
    """LoRA: fold the adapter into the base and write a whole model instead of an adapter."""
    dtype: ExportType = ExportType.auto
    """Stored type of a whole model: `float32`, `bfloat16`, `float16`, or `auto` (that of the base checkpoint)."""
    max_shard_gib: float = 5.0
    """Largest safetensors file in GiB."""
    verify: bool = False
    """Reload the export afresh and compare its logits with the trained model's; a drift fails the run."""
