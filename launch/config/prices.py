"""Price of a GPU per hour, from `conf/hardware`. Needs no torch."""

import re
from functools import cache
from typing import Any


@cache
def cards() -> dict[str, dict[str, Any]]:
    """The settings of each graphics card in `conf/hardware`, by the name of its file."""
    import yaml

    from launch.config.choices import CONF_DIR, HARDWARE_DIRECTORY

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    files = sorted((CONF_DIR / HARDWARE_DIRECTORY).glob("*.yaml"))
    return {file.stem: yaml.load(file.read_text(encoding="utf-8"), loader) for file in files}


def gpu_hour_price(device: str) -> float | None:
    """US dollars per hour for a card, by its driver's name ("NVIDIA H100 80GB HBM3"); None if conf/hardware has no price."""
    for card in cards().values():
        if card.get("name") == device:
            return card.get("price_per_hour")
    return None


def gpu_hour_price_of_kind(gpu_kind: str) -> float | None:
    """US dollars per hour for a card by a cluster's own name for it, such as the `h100` of SLURM's `gpu:h100:8`.

    None if the name fits no card of conf/hardware, or cards of several prices.
    """
    prices = {card.get("price_per_hour") for card in cards_of_gpu_kind(gpu_kind)}
    return prices.pop() if len(prices) == 1 else None


def cards_of_gpu_kind(gpu_kind: str) -> list[dict[str, Any]]:
    """The cards of `conf/hardware` that a cluster's own name may mean, such as the `h100` of SLURM's `gpu:h100:8`."""
    normalised_kind = re.sub(r"[^a-z0-9]", "", gpu_kind.lower())
    if not normalised_kind:
        return []
    return [card for name, card in cards().items() if name.replace("_", "").startswith(normalised_kind)]
