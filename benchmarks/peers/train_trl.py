"""TRL's `SFTTrainer` on conversations, loss on the assistant's turns: padded, packed (`bfd`) or `padding_free`."""

from __future__ import annotations

from stretches import Stretches, base_dtype, lora_settings, options, plain_logits, world


def main() -> None:
    """Train and report."""
    args = options(__doc__)
    watch = Stretches(args).install()
    import datasets
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    packed = args.layout == "bfd"
    config = SFTConfig(
        output_dir=str(args.out / "run"),
        per_device_train_batch_size=1 if packed else args.batch,
        max_steps=args.total,
        learning_rate=args.lr,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        max_length=args.pack if packed else None,
        packing=packed,
        packing_strategy="bfd",
        padding_free=args.layout == "padding_free",
        assistant_only_loss=True,
        gradient_checkpointing=False,
        bf16=args.precision == "bf16",
        logging_steps=10,
        save_strategy="no",
        use_cpu=args.device == "cpu",
        ddp_backend="gloo" if args.device == "cpu" and world() > 1 else None,
        dataloader_pin_memory=args.device == "cuda",
        disable_tqdm=True,
        report_to=[],
    )
    adapter = None
    if args.tuning == "lora":
        from peft import LoraConfig

        adapter = LoraConfig(**lora_settings())
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.inputs / "model", dtype=base_dtype(args)),
        args=config,
        train_dataset=datasets.load_dataset("json", data_files=str(args.inputs / "train.jsonl"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(args.inputs / "generation"),
        peft_config=adapter,
    )
    trainer.train()
    watch.finish(plain_logits(trainer.model.loading), f"trl {trl.__version__}")


if __name__ == "__main__":
    main()
