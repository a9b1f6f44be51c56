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
    """The compute that tuning took and that of the base model; None for what the run did not record and nobody answered."""

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
        if not self.flop or not self.parameters:
            return None
        return self.flop / THIRD / (6 * self.parameters)


def compute(run: RunRecord, answers: Mapping[str, Any], tokens: int | None) -> Compute:
    """What the training took, from the run's record and its owner's answers.

    `answers`: the owner's, by question; two are read, `base_flop` (FLOP of the base's training) and `device_watts`. `tokens`: on
    which the weights were trained, all ranks together; None if that is not known.
    """
    devices = run.world_size or None
    tokens_per_s = None
    if run.outcome is not None:
        tokens_per_s = run.outcome.speed.get("tokens_per_s")  # of all ranks together, median
    flop = None
    if run.flops_per_token and tokens:
        flop = run.flops_per_token * tokens
    device_hours = None
    if tokens and tokens_per_s and devices:
        device_hours = tokens / tokens_per_s / 3600 * devices
    base_flop = number(answers.get("base_flop"))
    share = None
    if flop and base_flop:
        share = flop / base_flop

    # Energy: what was measured is better than an estimate from the watts of a device.
    device_watts = number(answers.get("device_watts"))
    kwh = None
    energy = None
    measured = run.energy  # such as {"kwh": 1.2, "kg_co2e": 0.4, "by": "codecarbon", "hosts": 2, "country": "DEU"}
    if measured:
        kwh = measured["kwh"]
        energy = (
            f"an estimate by {measured['by']}, of {measured['hosts']} host(s) with CPU, memory and GPUs while they trained; "
            f"{measured['kg_co2e']:.3g} kg CO2e with the electricity of {measured['country']}"
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
        share=share,
    )
