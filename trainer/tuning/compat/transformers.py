"""What adapters need of transformers beside its public interface. Read in transformers 5.24.

tests/compat/test_transformers.py calls each of them. What models alone need stands in `trainer/model/compat.py`. transformers
is imported when a function is called, since composing a run must not import it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightRenaming


def block_class_names(model: nn.Module) -> set[str]:
    """Class names of a model's repeated blocks, the layers of its stacks; empty where the architecture names none.

    Uses `PreTrainedModel._no_split_modules`, which transformers keeps for its own placement on several devices. No public
    attribute says which classes are the blocks.
    """
    return set(getattr(model, "_no_split_modules", None) or ())


def grouped_product(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply rows by the matrix of their group (an expert, say): `rows [S, a]`, `weight [E, a, b]` -> `[S, b]`.

    `offsets [E]`: where each group's rows end. Uses `transformers.integrations.moe._grouped_mm`, the product of transformers'
    own experts, so that frozen and trained experts round alike. torch's public `grouped_mm` refuses some data types, alignments
    and GPUs; this function chooses another way there.
    """
    from transformers.integrations.moe import _grouped_mm

    return _grouped_mm(rows, weight, offsets)  # type: ignore[no-any-return]


def has_grouped_kernel(x: Tensor, weight: Tensor, offsets: Tensor) -> bool:
    """Whether torch's public `grouped_mm` takes these tensors, by `transformers.integrations.moe._can_use_grouped_mm`."""
    from transformers.integrations.moe import _can_use_grouped_mm

    return bool(_can_use_grouped_mm(x, weight, offsets))


def gated(experts: Any, gate_and_up: Tensor) -> Tensor:
    """What a module of experts makes of its gate and up projections: `[S, 2 * I]` becomes `[S, I]`.

    Calls `_apply_gate`, which transformers' `use_experts_implementation` gives each class of experts. Some models override
    it (GPT-OSS clamps), so that it cannot be written anew here.
    """
    return experts._apply_gate(gate_and_up)  # type: ignore[no-any-return]


def is_expert_parallel(experts: Any) -> bool:
    """Whether transformers split a module's experts over ranks; reads `_is_expert_parallel`, which no public name tells."""
    return bool(getattr(experts, "_is_expert_parallel", False))


def recompute_with_cache(decoder: nn.Module) -> None:
    """Let activation checkpointing recompute blocks that are called with a cache.

    Sets `_can_checkpoint_with_cache` of transformers' `GradientCheckpointingLayer`, which else drops the cache from a block
    that is recomputed. transformers has no argument for it. Right only for a cache that a second call does not change.
    """
    for block in decoder.modules():
        if hasattr(block, "_can_checkpoint_with_cache"):
            block._can_checkpoint_with_cache = True  # type: ignore[assignment]


def published_name(model: nn.Module, name: str) -> str:
    """The name that a parameter, or a layer, of the model has in published checkpoints of its architecture.

    transformers renames some parameters while it loads a checkpoint; this takes the renaming back. A name that is not renamed
    comes back as it is, and so does one whose parameter transformers makes of several stored tensors. `model`: without
    adapters.

    Reverses `get_model_conversion_mapping` by `apply_renamings` of `transformers.core_model_loading`. The public way is
    `save_pretrained`, which would write the whole model for one name.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, apply_renamings

    rules = get_model_conversion_mapping(cast("PreTrainedModel", model))
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    # Declared as any transform, but the reverse of a renaming is a renaming.
    backwards = cast("list[WeightRenaming]", [rule.reverse_transform() for rule in reversed(renamings)])
    return str(apply_renamings(name, backwards))
