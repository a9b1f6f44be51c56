"""TRL's `GRPOTrainer`: the same prompts, rewards, adapter, batch and learning rate."""

from __future__ import annotations

import runpy

from rounds import StepReports, options
from stretches import lora_settings


def main() -> None:
    """Train and report."""
    args = options(__doc__)
    reports = StepReports(args).install()
    import datasets
    import torch
    import transformers
    import trl
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    config = GRPOConfig(
        output_dir=str(args.out / "run"),
        per_device_train_batch_size=args.micro,
        gradient_accumulation_steps=args.answers // args.micro,
        num_generations=args.group,
        max_completion_length=args.new,
        max_steps=args.steps,
        learning_rate=args.lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        beta=0.0,
        loss_type="dapo",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        report_to=[],
        seed=args.seed,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        reward_funcs=runpy.run_path(str(args.inputs / "rewards.py"))[args.reward],
        args=config,
        train_dataset=datasets.load_dataset("json", data_files=str(args.inputs / "prompts.jsonl"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        peft_config=LoraConfig(**lora_settings()),
    )
    trainer.train()
    steps = [row for row in trainer.state.log_history if "reward" in row]
    lengths = [row["completions/mean_length"] for row in steps]
    version = f"trl {trl.__version__} on torch {torch.__version__}, transformers {transformers.__version__}"
    reports.finish([row["reward"] for row in steps], lengths, version)


if __name__ == "__main__":
    main()
