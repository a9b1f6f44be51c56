"""shardtune's own preparation, as `shardtune prepare` runs it: `Preparation.open_or_prepare`, then the packing plan."""

from __future__ import annotations

from meter import Meter, arguments


def main() -> None:
    """Measure one preparation into a fresh cache."""
    args = arguments(__doc__)
    import numpy as np
    from transformers import AutoTokenizer

    from trainer.data.batches.mixing import best_fit_decreasing
    from trainer.data.config import DataConfig, DuplicatePolicy, DuplicatesConfig, PrivacyConfig, PrivacyMode
    from trainer.data.prepare import Preparation
    from trainer.objectives.sft import SftDataSpec

    off = DuplicatePolicy.none
    less = {"privacy": PrivacyConfig(mode=PrivacyMode.none), "duplicates": DuplicatesConfig(exact=off, normalized=off)}
    config = DataConfig(
        path=str(args.data),
        cache_dir=str(args.out),
        max_length=args.length,
        max_bad_share=1.0,  # what is cut to nothing is left out, as the others do
        packing=True,
        workers=args.processes,
        **(less if args.audit == "none" else {}),
    )
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    meter = Meter()
    with meter("all"):
        with meter("prepare"):
            prepared = Preparation(config, tokenizer, SftDataSpec(), seed=1).open_or_prepare()
        with meter("pack"):
            packs = best_fit_decreasing(prepared.train.lengths, args.length)
    made = {}
    if args.count:
        samples = (prepared.train.sample(index) for index in range(len(prepared.train)))
        tokens, supervised = np.sum([(len(s.input_ids), int(s.supervised.sum())) for s in samples], axis=0).tolist()
        made = {"samples": len(prepared.train), "rows": len(packs), "tokens": tokens, "supervised": supervised}
    meter.report(**made)


if __name__ == "__main__":
    main()
