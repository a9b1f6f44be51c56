"""LLaMA-Factory's `run_exp`, as `llamafactory-cli train` calls it; layout `neat` is its `neat_packing`.

Its own `chatml` template learns the newline after an assistant's end token, one supervised token an exchange more than
elsewhere.
"""

from __future__ import annotations

from typing import Any

from run_llamafactory import settings, stand_in_for_torchaudio
from stretches import Stretches, options, plain_logits, remember_trainer


def main() -> None:
    """Train and report."""
    args = options(__doc__)
    watch = Stretches(args).install()
    stand_in_for_torchaudio()
    import datasets
    from llamafactory.extras.env import VERSION
    from llamafactory.train.tuner import run_exp

    datasets.disable_progress_bars()
    neat = args.layout == "neat"
    found = remember_trainer()
    wanted: dict[str, Any] = settings(args.inputs / "train.jsonl", args.inputs / "model", args.out, args.pack, 1)
    wanted |= {
        "cutoff_len": args.pack if neat else 2048,
        "packing": neat,
        "neat_packing": neat,
        "per_device_train_batch_size": 1 if neat else args.batch,
        "max_steps": args.total,
        "learning_rate": args.lr,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "disable_shuffling": True,
        "disable_gradient_checkpointing": True,
        "finetuning_type": args.tuning,
        "bf16": args.precision == "bf16",
        "flash_attn": "sdpa",
        "logging_steps": 10,
        "save_strategy": "no",
        "overwrite_output_dir": True,
        "disable_tqdm": True,
    }
    if args.tuning == "lora":
        wanted |= {"lora_rank": 16, "lora_alpha": 32, "lora_dropout": 0.0, "lora_target": "all"}
    run_exp(wanted)
    watch.finish(plain_logits(found[0].model), f"llamafactory {VERSION}")


if __name__ == "__main__":
    main()
