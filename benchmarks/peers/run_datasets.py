"""Plain `datasets.map`: the template with its assistant mask over batches of 1,000 conversations. Nothing is packed.

This is the shortest correct loop a person would write with `datasets` and `transformers` alone; that it makes no packs is
in its favour.
"""

from __future__ import annotations

from typing import Any

from meter import Meter, arguments, count_labels, own_caches


def main() -> None:
    """Measure one preparation into fresh caches."""
    args = arguments(__doc__)
    own_caches(args.out)
    import datasets
    import transformers
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        made = tokenizer.apply_chat_template(
            batch["messages"],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            truncation=True,
            max_length=args.length,
        )
        labels = [
            [token if learned else -100 for token, learned in zip(ids, mask, strict=True)]
            for ids, mask in zip(made["input_ids"], made["assistant_masks"], strict=True)
        ]
        return {"input_ids": made["input_ids"], "labels": labels}

    meter = Meter()
    with meter("all"):
        with meter("load"):
            rows = datasets.load_dataset("json", data_files=str(args.data), split="train")
        with meter("prepare"):
            processes = None if args.processes == 1 else args.processes
            done = rows.map(encode, batched=True, num_proc=processes, remove_columns=rows.column_names)
    made = {"samples": len(rows), **count_labels(done, "labels")} if args.count else {}
    if made:
        made["rows"] = 0
    meter.report(version=f"datasets {datasets.__version__}, transformers {transformers.__version__}", **made)


if __name__ == "__main__":
    main()
