"""torchtune's single-device recipes, full and LoRA; layout `packed` is its own greedy packing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stretches import Stretches, options


def settings(args: Any) -> dict[str, Any]:
    """The recipe's configuration, as its YAML would say it."""
    shape = json.loads((args.inputs / "model" / "config.json").read_text(encoding="utf-8"))
    model: dict[str, Any] = {
        "_component_": f"torchtune.models.llama3.{'lora_' if args.tuning == 'lora' else ''}llama3",
        "vocab_size": shape["vocab_size"],
        "num_layers": shape["num_hidden_layers"],
        "num_heads": shape["num_attention_heads"],
        "num_kv_heads": shape["num_key_value_heads"],
        "embed_dim": shape["hidden_size"],
        "intermediate_dim": shape["intermediate_size"],
        "max_seq_len": 2048,
        "norm_eps": shape["rms_norm_eps"],
        "rope_base": 10_000,
    }
    if args.tuning == "lora":
        model["lora_attn_modules"] = ["q_proj", "k_proj", "v_proj", "output_proj"]
        model |= {"apply_lora_to_mlp": True, "lora_rank": 16, "lora_alpha": 32, "lora_dropout": 0.0}
    packed = args.layout == "packed"
    rows = {"path": str(args.inputs / "train_tokens.jsonl"), "count": args.total * args.batch, "length": args.pack}
    return {
        "output_dir": str(args.out / "run"),
        "model": model,
        "tokenizer": {"_component_": "torchtune_parts.Padding"},
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": str(args.inputs / "model"),
            "checkpoint_files": sorted(file.name for file in Path(args.inputs / "model").glob("*.safetensors")),
            "output_dir": str(args.out / "run"),
            "model_type": "LLAMA3",
        },
        "resume_from_checkpoint": False,
        "save_adapter_weights_only": True,
        "dataset": {"_component_": "torchtune_parts.documents", "packed": packed, **rows},
        "shuffle": False,
        "seed": 1,
        "batch_size": 1 if packed else args.batch,
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": args.lr, "weight_decay": 0.0, "fused": True},
        "lr_scheduler": {"_component_": "torchtune_parts.constant"},
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "optimizer_in_bwd": False,
        "epochs": 1,
        "max_steps_per_epoch": args.total,
        "gradient_accumulation_steps": 1,
        "clip_grad_norm": 1.0,
        "compile": False,
        "metric_logger": {"_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": str(args.out)},
        "log_every_n_steps": 10,
        "device": args.device,
        "dtype": args.precision,
        "enable_activation_checkpointing": False,
        "enable_activation_offloading": False,
    }


def recipe_class(tuning: str) -> Any:
    """The recipe, from its file: the directory it is in refuses to be imported."""
    import importlib.util

    import torchtune

    name = "lora_finetune_single_device" if tuning == "lora" else "full_finetune_single_device"
    file = Path(torchtune.__file__).parent.parent / "recipes" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kind = "LoRAFinetune" if tuning == "lora" else "FullFinetune"
    return getattr(module, f"{kind}RecipeSingleDevice")


def main() -> None:
    """Train and report."""
    args = options(__doc__)
    watch = Stretches(args).install()
    import torch
    import torchtune
    from omegaconf import OmegaConf

    config = OmegaConf.create(settings(args))
    recipe_of = recipe_class(args.tuning)
    recipe_of.save_checkpoint = lambda self, epoch: None  # its last act, after the last stretch
    recipe = recipe_of(cfg=config)
    recipe.setup(cfg=config)
    recipe.train()
    model = recipe._model.eval()

    def logits_of(ids: torch.Tensor) -> torch.Tensor:
        made = model(ids)
        return torch.cat(made, dim=1) if isinstance(made, list) else made

    watch.finish(logits_of, f"torchtune {torchtune.__version__}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
