"""How documents lie in memory for a model, and which attention kernel it uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from strategies.errors import ConfigError
from trainer.data.config import Layout
from trainer.model.attention import VARLEN_ATTENTION
from trainer.model.config import Attention
from trainer.model.flex import FLEX_ATTENTION

KERNELS_BY_SETTING = {
    Attention.varlen: [VARLEN_ATTENTION],
    Attention.flex: [FLEX_ATTENTION],
    Attention.flash_attention_2: ["flash_attention_2"],
}
"""transformers' name of a kernel for documents in one row, by the setting that asks for it."""


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """How documents lie in a row, and what computes attention over them."""

    layout: Layout
    attention: str
    """transformers' name of the kernel."""
    notes: dict[str, str]
    """Substitutions made, and why."""
    sequence_problem: str | None = "its rows are padded"
    """Why several ranks cannot share a row of this model, in words that follow its name; None if they can."""


@dataclass(frozen=True, slots=True)
class KernelChoices:
    """Which kernels beside the built-in one can compute attention over documents in one row here."""

    flash_refusal: str | None
    """Why FlashAttention cannot; None if it can."""
    flex_refusal: str | None
    """Why flex attention cannot; None if it can."""
    prefers_flex: bool = False
    """Whether the model has what the built-in kernel computes slowly."""

    def kernels_in_order(self) -> list[str]:
        """The attention kernels to try, by transformers' names, the best first: ["flash_attention_2", "shardtune_varlen"].

        FlashAttention if it can run; then the built-in one and FlexAttention, which comes first with `prefers_flex`.
        """
        kernels = []
        if not self.flash_refusal:
            kernels.append("flash_attention_2")
        if self.flex_refusal:
            return [*kernels, VARLEN_ATTENTION]
        if self.prefers_flex:
            return [*kernels, FLEX_ATTENTION, VARLEN_ATTENTION]
        return [*kernels, VARLEN_ATTENTION, FLEX_ATTENTION]


def choose_attention_layout(
    attention_setting: Attention,
    layout: Layout,
    model_type: str,
    *,
    reason_for_own_rows: Callable[[str], str],
    needs_padding: bool,
    kernels: KernelChoices,
) -> AttentionLayout:
    """Choose how documents lie: padded, or one after another in a row (padding-free); and which kernel computes attention.

    `attention_setting`: the setting `model.attention`. `needs_padding`: the objective or tuning needs a row for each document.
    `reason_for_own_rows(kernel)`: why documents cannot lie in one row with that kernel; empty if they can. Cases, in order:
    - settings that exclude each other, or name a kernel that cannot run here: ConfigError.
    - padded rows are set or needed, or the kernel is for them (sdpa, eager): padded.
    - the first kernel that is proven for several documents in one row: padding-free.
    - none is: ConfigError if the settings ask for one row, since documents would be mixed; else padded, with a note.
    """
    if layout is Layout.padding_free and needs_padding:
        raise ConfigError(
            "data.layout=padding_free: this objective or tuning needs a row for each document; use data.layout=padded"
        )
    kernel_refusal = {Attention.flash_attention_2: kernels.flash_refusal, Attention.flex: kernels.flex_refusal}.get(
        attention_setting
    )
    if kernel_refusal is not None:
        raise ConfigError(f"model.attention={attention_setting}: {kernel_refusal}; use model.attention=auto")
    is_stock = attention_setting in (Attention.sdpa, Attention.eager)
    if layout is Layout.padding_free and is_stock:
        raise ConfigError(
            f"model.attention={attention_setting} with data.layout=padding_free: would let documents see each other; use "
            "model.attention=varlen or data.layout=padded"
        )
    if layout is Layout.padded or needs_padding or is_stock:
        notes = {}
        if layout is Layout.auto and not needs_padding:
            notes["data.layout"] = f"padded (attention={attention_setting})"
        return _padded(attention_setting, notes)
    reasons: dict[str, str] = {}  # why documents cannot lie in one row, by kernel
    for attention in KERNELS_BY_SETTING.get(attention_setting) or kernels.kernels_in_order():
        reasons[attention] = reason_for_own_rows(attention)
        if not reasons[attention]:
            return AttentionLayout(
                Layout.padding_free,
                attention,
                _note_on_chosen_kernel(attention_setting, attention, kernels.flash_refusal),
            )
    reason = reasons.get(VARLEN_ATTENTION) or next(iter(reasons.values()))
    setting = None
    if layout is Layout.padding_free:
        setting = "data.layout=padding_free"
    elif attention_setting in (Attention.varlen, Attention.flex):  # which are for rows of several documents alone
        setting = f"model.attention={attention_setting}"
    if setting is not None:
        raise ConfigError(
            f"{setting}: {model_type} is not proven to keep documents of one row apart ({reason}); use "
            "data.layout=padded and model.attention=auto"
        )
    return _padded(attention_setting, {"data.layout": f"padded ({model_type} is not proven padding-free: {reason})"})


def _note_on_chosen_kernel(attention_setting: Attention, attention: str, flash_refusal: str | None) -> dict[str, str]:
    """A note for the user on the kernel that `model.attention=auto` chose, by setting.

    Such as {"model.attention": "varlen (built in; not FlashAttention: ...)"}. Empty for FlashAttention, which needs no
    explanation, and if the user chose the kernel.
    """
    flash = flash_refusal or "not proven right here"
    note_by_kernel = {
        VARLEN_ATTENTION: f"varlen (built in; not FlashAttention: {flash})",
        FLEX_ATTENTION: f"flex (torch's, compiled when it is first called; not FlashAttention: {flash})",
    }
    if attention_setting is not Attention.auto or attention not in note_by_kernel:
        return {}
    return {"model.attention": note_by_kernel[attention]}


def _padded(attention_setting: Attention, notes: dict[str, str]) -> AttentionLayout:
    """The layout of padded rows, with transformers' own attention. Raises ConfigError if a kernel for packed rows is set."""
    if attention_setting in (Attention.varlen, Attention.flex):
        raise ConfigError(
            f"model.attention={attention_setting}: is for padding-free rows; use sdpa, eager or auto with padded ones"
        )
    stock = "sdpa" if attention_setting is Attention.auto else str(attention_setting)
    return AttentionLayout(Layout.padded, stock, notes)
