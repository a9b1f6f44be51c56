"""Compute of a training from its record: operations, device hours, energy. Estimates say how they were made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.reporting.documents.questions import number

THIRD = 1 / 3
GENERAL_PURPOSE, SYSTEMIC = 1e23, 1e25
"""FLOP from which the Commission's guidelines presume a general-purpose model, and the AI Act systemic risk."""


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


def compute(run: Mapping[str, Any], answers: Mapping[str, Any], tokens: int | None) -> Compute:
    """Out of `run.json` and answers; `tokens` are those of the weights, all ranks together."""
    each, world = run.get("flops_per_token"), run.get("world_size")
    speed = ((run.get("outcome") or {}).get("speed") or {}).get("tokens_per_s")
    flop = each * tokens if each and tokens else None
    hours = tokens / speed / 3600 * world if tokens and speed and world else None
    watts, base = number(answers.get("device_watts")), number(answers.get("base_flop"))
    kwh, by = None, None
    if metered := run.get("energy"):
        kwh = metered["kwh"]
        by = (
            f"an estimate by {metered['by']}, of {metered['hosts']} host(s) with CPU, memory and GPUs while they trained; "
            f"{metered['kg_co2e']:.3g} kg CO2e with the electricity of {metered['country']}"
        )
    elif hours and watts:
        kwh, by = hours * watts / 1000, f"an estimate: device hours times {watts:g} W"
    return Compute(
        tokens=tokens,
        flop=flop,
        devices=world,
        device_hours=hours,
        kwh=kwh,
        energy=by,
        parameters=run.get("base_parameters"),
        base_flop=base,
        share=flop / base if flop and base else None,
    )
