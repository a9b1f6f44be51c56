"""How documents lie in memory for a model, and which attention kernel it uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from strategies.errors import ConfigError
from trainer.data.config import Layout
from trainer.model.attention import NAME
from trainer.model.config import Attention, ModelConfig
from trainer.model.flex import NAME as FLEX

ASKED = {
    Attention.varlen: [NAME],
    Attention.flex: [FLEX],
    Attention.flash_attention_2: ["flash_attention_2"],
}
"""transformers' name of a kernel for documents in one row, by the setting that asks for it."""


@dataclass(frozen=True, slots=True)
class Arrangement:
    """How documents lie in a row, and what computes attention over them."""

    layout: Layout
    attention: str
    """transformers' name of the kernel."""
    notes: dict[str, str]
    """Substitutions made, and why."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """What else than the built-in kernel could compute attention over documents in one row here."""

    no_flash: str | None
    """Why FlashAttention cannot; None where it can."""
    no_flex: str | None
    """Why flex attention cannot; None where it can."""
    flex_first: bool = False
    """Whether the model has what the built-in kernel computes slowly."""

    def in_order(self) -> list[str]:
        """The kernels to try, by transformers' names, the best first."""
        flash = [] if self.no_flash else ["flash_attention_2"]
        flex = [] if self.no_flex else [FLEX]
        return [*flash, *flex, NAME] if self.flex_first else [*flash, NAME, *flex]


def resolve_layout(
    model: ModelConfig,
    layout: Layout,
    model_type: str,
    *,
    unproven: Callable[[str], str],
    needs_padding: bool,
    kernels: Kernels,
) -> Arrangement:
    """The arrangement of a run. `unproven(attention)`: why documents cannot lie in one row there; empty where they can.

    Raises ConfigError for a combination that would silently mix documents.
    """
    if layout is Layout.padding_free and needs_padding:
        raise ConfigError(
            "data.layout=padding_free: this objective or tuning needs a row for each document; use data.layout=padded"
        )
    missing = {Attention.flash_attention_2: kernels.no_flash, Attention.flex: kernels.no_flex}.get(model.attention)
    if missing is not None:
        raise ConfigError(f"model.attention={model.attention}: {missing}; use model.attention=auto")
    stock = model.attention in (Attention.sdpa, Attention.eager)
    if layout is Layout.padding_free and stock:
        raise ConfigError(
            f"model.attention={model.attention} with data.layout=padding_free: would let documents see each other; use "
            "model.attention=varlen or data.layout=padded"
        )
    if layout is Layout.padded or needs_padding or stock:
        noted = layout is Layout.auto and not needs_padding
        return _padded(model, {"data.layout": f"padded (attention={model.attention})"} if noted else {})
    reasons: dict[str, str] = {}
    for attention in ASKED.get(model.attention) or kernels.in_order():
        reasons[attention] = unproven(attention)
        if not reasons[attention]:
            return Arrangement(Layout.padding_free, attention, _noted(model, attention, kernels))
    reason = reasons.get(NAME) or next(iter(reasons.values()))
    asked = model.attention in (Attention.varlen, Attention.flex)
    if layout is Layout.padding_free or asked:
        word = "data.layout=padding_free" if layout is Layout.padding_free else f"model.attention={model.attention}"
        raise ConfigError(
            f"{word}: {model_type} is not proven to keep documents of one row apart ({reason}); use "
            "data.layout=padded and model.attention=auto"
        )
    return _padded(model, {"data.layout": f"padded ({model_type} is not proven padding-free: {reason})"})


def _noted(model: ModelConfig, attention: str, kernels: Kernels) -> dict[str, str]:
    """What to say of a kernel that `auto` chose."""
    flash = kernels.no_flash or "not proven right here"
    said = {
        NAME: f"varlen (built in; not FlashAttention: {flash})",
        FLEX: f"flex (torch's, compiled when it is first called; not FlashAttention: {flash})",
    }
    return {"model.attention": said[attention]} if model.attention is Attention.auto and attention in said else {}


def _padded(model: ModelConfig, notes: dict[str, str]) -> Arrangement:
    if model.attention in (Attention.varlen, Attention.flex):
        raise ConfigError(
            f"model.attention={model.attention}: is for padding-free rows; use sdpa, eager or auto with padded ones"
        )
    stock = "sdpa" if model.attention is Attention.auto else str(model.attention)
    return Arrangement(Layout.padded, stock, notes)
