"""Adapter directories as plain peft writes them, with values away from their start."""

from pathlib import Path
from typing import Any

import torch


def plain_adapter(base: Path, path: Path, class_name: str = "LoraConfig", seed: int = 0, **options: Any) -> Path:
    """Save an adapter of peft's `class_name` for the model in `base` under `path`; made once."""
    import peft
    from transformers import AutoModelForCausalLM

    if (path / "adapter_config.json").exists():
        return path
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        getattr(peft, class_name)(**{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}),
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.save_pretrained(str(path), save_embedding_layers=False)
    return path
