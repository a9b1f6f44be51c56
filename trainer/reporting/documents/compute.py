"""Compute of a training from its record: operations, device hours, energy. Estimates say how they were made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.reporting.documents.questions import positive_number_or_none
from trainer.reporting.run_record import RunRecord

ONE_THIRD = 1 / 3
GENERAL_PURPOSE_FLOP = 1e23
"""FLOP from which the Commission's guidelines presume a general-purpose model."""
SYSTEMIC_RISK_FLOP = 1e25
"""FLOP from which the AI Act presumes systemic risk."""


@dataclass(frozen=True, slots=True)
class TrainingCompute:
    """Compute of tuning and of the base model's training; None for what the run did not record and nobody answered."""

    tokens: int | None
    """Tokens that the weights were trained on, all ranks together."""
    flop: float | None
    """Matrix products of the training steps, forward and backward, by formula; evaluations are not in it."""
    num_devices: int | None
    device_hours: float | None
    """Tokens over the median speed, times the devices: without start, evaluations and saves."""
    kwh: float | None
    """What the hosts measured while they trained; else device hours times the watts that were answered."""
    energy_source: str | None
    """How `kwh` was measured or estimated, as a sentence."""
    parameters: int | None
    """Number of parameters of the base model, without what the tuning method added."""
    base_flop: float | None
    """Of the training of the base model, as the owner answered."""
    share_of_base: float | None
    """FLOP of tuning over those of the base's training."""

    @property
    def exceeds_third_of_base(self) -> bool | None:
        """Whether tuning took more than a third of the base's compute; None if that is not known."""
        return None if self.share_of_base is None else self.share_of_base > ONE_THIRD

    @property
    def base_tokens_at_third(self) -> float | None:
        """Tokens on which the base would have been trained if tuning took exactly a third of its 6 x parameters x tokens."""
        if not self.flop or not self.parameters:
            return None
        return self.flop / ONE_THIRD / (6 * self.parameters)


def training_compute(run: RunRecord, answers: Mapping[str, Any], tokens: int | None) -> TrainingCompute:
    """Work out the compute and energy of a training, which documents such as the AI Act's ask for, as far as they are known.

    `answers`: the owner's, by question; two are read, `base_flop` (FLOP of the base's training) and `device_watts`. `tokens`:
    that the weights were trained on, all ranks together; None if that is not known.
    """
    num_devices = run.world_size or None
    tokens_per_s = None
    if run.outcome is not None:
        tokens_per_s = run.outcome.speed.get("tokens_per_s")  # of all ranks together, median
    flop = None
    if run.flops_per_token and tokens:
        flop = run.flops_per_token * tokens
    device_hours = None
    if tokens and tokens_per_s and num_devices:
        device_hours = tokens / tokens_per_s / 3600 * num_devices
    base_flop = positive_number_or_none(answers.get("base_flop"))
    share_of_base = None
    if flop and base_flop:
        share_of_base = flop / base_flop

    # Energy: what was measured is better than an estimate from the watts of a device.
    device_watts = positive_number_or_none(answers.get("device_watts"))
    kwh = None
    energy_source = None
    measured = run.energy  # such as {"kwh": 1.2, "kg_co2e": 0.4, "by": "codecarbon", "hosts": 2, "country": "DEU"}
    if measured:
        kwh = measured["kwh"]
        energy_source = (
            f"an estimate by {measured['by']}, of {measured['hosts']} host(s) with CPU, memory and GPUs while they trained; "
            f"{measured['kg_co2e']:.3g} kg CO2e with the electricity of {measured['country']}"
        )
    elif device_hours and device_watts:
        kwh = device_hours * device_watts / 1000
        energy_source = f"an estimate: device hours times {device_watts:g} W"
    return TrainingCompute(
        tokens=tokens,
        flop=flop,
        num_devices=num_devices,
        device_hours=device_hours,
        kwh=kwh,
        energy_source=energy_source,
        parameters=run.base_parameters or None,
        base_flop=base_flop,
        share_of_base=share_of_base,
    )
