"""Compute of a training from its record: operations, device hours, energy. Estimates say how they were made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.reporting.documents.questions import number
from trainer.reporting.run_record import RunRecord

THIRD = 1 / 3
GENERAL_PURPOSE = 1e23
"""FLOP from which the Commission's guidelines presume a general-purpose model."""
SYSTEMIC = 1e25
"""FLOP from which the AI Act presumes systemic risk."""


@dataclass(frozen=True, slots=True)
class Compute:
    """None where the run did not record it, or nobody answered."""

    tokens: int | None
    flop: float | None
    """Matrix products of the training steps, forward and backward, by formula; evaluations are not in it."""
    devices: int | None
    device_hours: float | None
    """Tokens over the median speed, times the devices: without start, evaluations and saves."""
    kwh: float | None
    """What the hosts measured while they trained; else device hours times the watts that were answered."""
    energy: str | None
    """How that is known."""
    parameters: int | None
    """Of the base, without what the tuning method added."""
    base_flop: float | None
    share: float | None
    """Of the base's compute that tuning used."""

    @property
    def beyond(self) -> bool | None:
        """Whether the share is more than one third; None where it is not known."""
        return None if self.share is None else self.share > THIRD

    @property
    def base_tokens_at_third(self) -> float | None:
        """Tokens on which the base would have been trained if tuning took exactly a third of its 6 x parameters x tokens."""
        return self.flop / THIRD / (6 * self.parameters) if self.flop and self.parameters else None


def compute(run: RunRecord, answers: Mapping[str, Any], tokens: int | None) -> Compute:
    """What the training took, from its record and its owner's answers; `tokens` are those of the weights, of all ranks."""
    devices = run.world_size or None
    tokens_per_s = run.outcome.speed.get("tokens_per_s") if run.outcome is not None else None
    flop = run.flops_per_token * tokens if run.flops_per_token and tokens else None
    device_hours = tokens / tokens_per_s / 3600 * devices if tokens and tokens_per_s and devices else None
    device_watts = number(answers.get("device_watts"))
    base_flop = number(answers.get("base_flop"))
    kwh = None
    energy = None
    if metered := run.energy:
        kwh = metered["kwh"]
        energy = (
            f"an estimate by {metered['by']}, of {metered['hosts']} host(s) with CPU, memory and GPUs while they trained; "
            f"{metered['kg_co2e']:.3g} kg CO2e with the electricity of {metered['country']}"
        )
    elif device_hours and device_watts:
        kwh = device_hours * device_watts / 1000
        energy = f"an estimate: device hours times {device_watts:g} W"
    return Compute(
        tokens=tokens,
        flop=flop,
        devices=devices,
        device_hours=device_hours,
        kwh=kwh,
        energy=energy,
        parameters=run.base_parameters or None,
        base_flop=base_flop,
        share=flop / base_flop if flop and base_flop else None,
    )
