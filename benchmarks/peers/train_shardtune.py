"""shardtune through its own entry, `python -m launch.main train`, with evaluation, logging and checkpoints on."""

from __future__ import annotations

import runpy
import sys
from typing import Any

from stretches import Stretches, options, plain_logits


def words(args: Any) -> list[str]:
    """What a user would type for this work."""
    every = (args.warm + args.steps * args.rounds) // 2 + 1
    packed = args.layout == "packed"
    batch = args.packs if packed else args.batch
    return [
        "train",
        f"model.path={args.inputs / 'model'}",
        f"data.path={args.inputs / 'train.jsonl'}",
        f"data.eval_path={args.inputs / 'eval.jsonl'}",
        f"data.cache_dir={args.out / 'cache'}",
        "data.shuffle=false",
        f"data.max_length={args.pack if packed else args.longest}",
        f"data.packing={str(packed).lower()}",
        f"batch.global={batch}",
        f"batch.micro={batch}",
        f"budget.steps={args.total}",
        f"tuning={args.tuning}",
        f"precision={args.precision}",
        f"optim.lr={args.lr}",
        "schedule=constant",
        "schedule.warmup_share=0",
        f"evaluation.every_steps={every}",
        f"checkpoint.every_steps={every}",
        "checkpoint.background=false",  # measured apart, as a whole
        "logging.wandb=disabled",
        "run.threads=1",
        f"run.device={args.device}",
        f"run.dir={args.out / 'run'}",
    ]


def main() -> None:
    """Train and report."""
    args = options(__doc__)
    watch = Stretches(args).install()
    from trainer.loop import Trainer

    # The evaluation and the checkpoint that fall into a stretch are work that peers do not do: reported apart.
    Trainer._evaluate = watch.apart(Trainer._evaluate)  # type: ignore[method-assign]
    Trainer._save_checkpoint = watch.apart(Trainer._save_checkpoint)  # type: ignore[method-assign]
    sys.argv = ["shardtune", *words(args)]
    try:
        runpy.run_module("launch.main", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
    import torch
    import transformers

    export = args.out / "run" / "export"
    if args.tuning == "lora":
        from peft import PeftModel

        base = transformers.AutoModelForCausalLM.from_pretrained(args.inputs / "model", dtype=torch.float32)
        model = PeftModel.from_pretrained(base, export)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    version = f"shardtune on torch {torch.__version__}, transformers {transformers.__version__}"
    watch.finish(plain_logits(model.to(args.device)), version)


if __name__ == "__main__":
    main()
