"""axolotl's `train`, as `axolotl train` calls it; layout `packed` is its `sample_packing`.

Its LoRA kernels need CUDA and are switched off; telemetry is, too.
"""

from __future__ import annotations

import os
from typing import Any

from stretches import Stretches, options, plain_logits, remember_trainer


def settings(args: Any) -> dict[str, Any]:
    """The configuration, as its YAML would say it."""
    packed = args.layout == "packed"
    source = {
        "path": str(args.inputs / "train.jsonl"),
        "ds_type": "json",
        "type": "chat_template",
        "field_messages": "messages",
        "roles_to_train": ["assistant"],
        "train_on_eos": "turn",
    }
    wanted: dict[str, Any] = {
        "base_model": str(args.inputs / "model"),
        "datasets": [source],
        "chat_template": "tokenizer_default",
        "sequence_len": args.pack if packed else 2048,
        "sample_packing": packed,
        "sdp_attention": True,
        "dataset_prepared_path": str(args.out / "prepared"),
        "output_dir": str(args.out / "run"),
        "dataset_num_proc": 1,
        "micro_batch_size": 1 if packed else args.batch,
        "gradient_accumulation_steps": 1,
        "max_steps": args.total,
        "learning_rate": args.lr,
        "lr_scheduler": "constant",
        "optimizer": "adamw_torch_fused",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "shuffle_merged_datasets": False,
        "curriculum_sampling": True,
        "sample_packing_sequentially": True,
        "gradient_checkpointing": False,
        "bf16": args.precision == "bf16",
        "fp16": False,
        "tf32": False,
        "logging_steps": 10,
        "save_strategy": "no",
        "val_set_size": 0,
        "use_cpu": args.device == "cpu",
        "special_tokens": {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"},
    }
    if args.tuning == "lora":
        wanted |= {"adapter": "lora", "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "lora_target_linear": True}
        wanted |= {f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o")}
    return wanted


def main() -> None:
    """Train and report."""
    args = options(__doc__)
    os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
    watch = Stretches(args).install()
    import axolotl
    import datasets
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import train
    from axolotl.utils.dict import DictDefault

    datasets.disable_progress_bars()
    found = remember_trainer()
    config = load_cfg(DictDefault(settings(args)))
    train(cfg=config, dataset_meta=load_datasets(cfg=config))
    watch.finish(plain_logits(found[0].model), f"axolotl {axolotl.__version__}")


if __name__ == "__main__":
    main()
