"""Whether FlashAttention can be used: the package, the GPU, and the sizes of the model's heads."""

from __future__ import annotations

from typing import Any

from strategies.extras import install_command
from strategies.hardware import MAX_FLASH_HEAD_SIZE, Gpu
from trainer.model.layer_settings import layer_values

HEAD_SIZE_SETTINGS = ("head_dim", "global_head_dim", "v_head_dim", "qk_head_dim")
"""Names under which configurations have sizes of heads."""


def head_sizes(hf_config: Any) -> list[int]:
    """The sizes of attention heads that a transformers config states, ascending, such as `[64, 128]`; empty without any.

    A kernel must have each of them. Without a setting for it, the size is the hidden size over the number of heads.
    """
    text = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
    sizes: set[Any] = set()
    for name in HEAD_SIZE_SETTINGS:
        sizes.update(layer_values(text, name))
    # Latent attention (DeepSeek): a query head is these two parts side by side.
    latent_parts = [getattr(text, name, None) for name in ("qk_nope_head_dim", "qk_rope_head_dim")]
    if all(isinstance(part, int) for part in latent_parts):
        sizes.add(sum(part for part in latent_parts if part))
    if not sizes - {None}:
        width = getattr(text, "hidden_size", None)
        heads = getattr(text, "num_attention_heads", None)
        if isinstance(width, int) and isinstance(heads, int) and heads:
            sizes.add(width // heads)
    return sorted(size for size in sizes if isinstance(size, int) and size > 0)


def why_not_flash(hf_config: Any, gpu: Gpu | None, *, half_precision: bool, dropout: float = 0.0) -> str | None:
    """Why FlashAttention 2 cannot compute this model's attention on this GPU, as part of a sentence; None if it can.

    Checked in order: the GPU and the precision, the sizes of heads, the backward pass, the installed package. `half_precision`:
    whether the run computes in bf16 or fp16. `dropout`: of attention. transformers checks the package, since FlashAttention 4
    has the same import name.
    """
    if gpu is None or not half_precision:
        return "it needs a GPU and precision=bf16 or fp16"
    if not gpu.has_flash:
        return f"it is not built for {gpu.name}"
    sizes = head_sizes(hf_config)
    unsupported = [size for size in sizes if size > MAX_FLASH_HEAD_SIZE or size % 8]
    if unsupported:
        return f"heads of {unsupported[-1]} are none of the sizes it has: multiples of 8 up to {MAX_FLASH_HEAD_SIZE}"
    # A range of sizes; None if the backward pass has all, and then no size lies in (0, 0).
    smallest, largest = gpu.unsupported_flash_head_sizes(dropout) or (0, 0)
    without_backward = [size for size in sizes if smallest <= size <= largest]
    if without_backward:
        with_dropout = " with dropout" if dropout else ""
        return f"its backward pass has no heads of {without_backward[-1]} on {gpu.name}{with_dropout}"
    from transformers.utils import is_flash_attn_2_available

    if not is_flash_attn_2_available():
        return f"FlashAttention 2 is not installed (flash-attn 2.3.3 or later: {install_command('gpu')})"
    return None
