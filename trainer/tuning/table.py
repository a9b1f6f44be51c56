"""What each tuning method can do, as data: read when a run is composed, and printed as docs/methods.md."""

from __future__ import annotations

from dataclasses import dataclass, field

from trainer.tuning.base import TuningConfig
from trainer.tuning.settings import PeftConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One row: what a method is and what it cannot be combined with."""

    title: str
    adapter: bool = True
    """Whether the export is an adapter beside an unchanged base, else a whole model."""
    reads_base: bool = False
    """Whether initial values depend on the base weights."""
    no_merge: str = ""
    """Why the adapter cannot be folded into the base; empty where it can."""
    refused: dict[str, str] = field(default_factory=dict)
    """What it does not work with (a strategy, or a word of `PROPERTIES`), and why."""


METHODS: dict[str, Method] = {
    n: Method(title=n, adapter=n not in ("full", "freeze"), reads_base=n == "ln")
    for n in ("full", "freeze", "lora", "ia3", "vera", "loha", "lokr", "oft", "boft", "ln")
}
TYPES: dict[str, Method] = {}


def method_of(config: TuningConfig) -> Method:
    """The row of a method."""
    return TYPES.get(str(config.type), Method(title="x")) if isinstance(config, PeftConfig) else METHODS[config.name]


def rewrites_base(init: str) -> bool:
    """Whether a start of LoRA takes its part off the base weight."""
    return init.startswith("pissa") or init == "olora"
