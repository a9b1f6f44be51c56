"""Which modules an adapter must leave alone, although they are linear layers."""

from __future__ import annotations

import re

from torch import nn


def left_alone(model: nn.Module, *, every_linear: bool) -> str | None:
    """A regular expression of the names of modules that get no adapter; None where there are none.

    Towers for images and sound, which texts give no gradient. With `every_linear` also layers that compute more than a
    product (routers that return a choice), and all but the input projection of a state-space mixer: its fused kernels
    take the other weights past an adapter.
    """
    names = [rf"{re.escape(name)}(\..*)?" for name in getattr(model, "beside_text", ())]
    if every_linear:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        for owner_name, owner in model.named_modules():
            mixer = hasattr(owner, "A_log") and hasattr(owner, "D")
            for name, child in owner.named_children():
                if child is head or not isinstance(child, nn.Linear):
                    continue
                if type(child).forward is not nn.Linear.forward or (mixer and name != "in_proj"):
                    names.append(
                        re.sub(r"\\\.\d+(?=\\\.|$)", r"\\.\\d+", re.escape(f"{owner_name}.{name}".lstrip(".")))
                    )
    return "|".join(dict.fromkeys(names)) or None
