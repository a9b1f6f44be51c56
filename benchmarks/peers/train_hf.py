"""The transformers Trainer with peft: padded batches, or `DataCollatorWithFlattening` (layout `flattening`)."""

from __future__ import annotations

from stretches import Stretches, base_dtype, choose_matmul, lora_settings, options, plain_logits, repeated, world


def main() -> None:
    """Train and report."""
    args = options(__doc__)
    watch = Stretches(args).install()
    import transformers
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        DataCollatorWithFlattening,
        Trainer,
        TrainingArguments,
    )

    choose_matmul(args)
    tokenizer = AutoTokenizer.from_pretrained(args.inputs / "plain")
    model = AutoModelForCausalLM.from_pretrained(args.inputs / "model", dtype=base_dtype(args))
    version = f"transformers {transformers.__version__}"
    if args.tuning == "lora":
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(**lora_settings()))
        version += f", peft {peft.__version__}"
    flat = args.layout == "flattening"
    settings = TrainingArguments(
        output_dir=str(args.out / "run"),
        per_device_train_batch_size=args.batch,
        max_steps=args.total,
        learning_rate=args.lr,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        bf16=args.precision == "bf16",
        logging_steps=10,
        save_strategy="no",
        use_cpu=args.device == "cpu",
        ddp_backend="gloo" if args.device == "cpu" and world() > 1 else None,
        dataloader_pin_memory=args.device == "cuda",
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
    )
    trainer = Trainer(
        model=model,
        args=settings,
        train_dataset=repeated(args),
        data_collator=DataCollatorWithFlattening() if flat else DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    watch.finish(plain_logits(model), version)


if __name__ == "__main__":
    main()
