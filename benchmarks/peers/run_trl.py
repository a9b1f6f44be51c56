"""TRL: what `SFTTrainer(packing=True, packing_strategy="bfd", assistant_only_loss=True)` does to a data set.

Measured are `load_dataset` and the trainer's own preparation (`SFTTrainer._prepare_dataset`: template with assistant
mask, tokens, labels, packs), which its constructor calls; a model of a few hundred weights stands in for the real one and
is left out of the figure, as is the rest of the constructor.
"""

from __future__ import annotations

from meter import Meter, arguments, count_labels, own_caches


def main() -> None:
    """Measure one preparation into fresh caches."""
    args = arguments(__doc__)
    own_caches(args.out)
    import datasets
    import transformers
    import trl
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    config = SFTConfig(
        output_dir=str(args.out / "run"),
        max_length=args.length,
        packing=True,
        packing_strategy="bfd",
        assistant_only_loss=True,
        dataset_num_proc=None if args.processes == 1 else args.processes,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    meter = Meter()
    with meter("load"):
        rows = datasets.load_dataset("json", data_files=str(args.data), split="train")
    SFTTrainer._prepare_dataset = meter.wrapped("prepare", SFTTrainer._prepare_dataset)
    trainer = SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
    for kind in ("cpu", "wall"):
        meter.found[f"all_{kind}"] = meter.found[f"load_{kind}"] + meter.found[f"prepare_{kind}"]
    made = {"samples": len(rows), **count_labels(trainer.train_dataset, "labels")} if args.count else {}
    meter.report(version=f"trl {trl.__version__}, transformers {transformers.__version__}", **made)


if __name__ == "__main__":
    main()
