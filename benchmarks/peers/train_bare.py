"""The bare loop of `benchmarks/training/bare.py`, measured; with torch's own choice of a library, or with oneDNN."""

from __future__ import annotations

import sys
from pathlib import Path

from stretches import Stretches, choose_matmul, options, repeated


def main() -> None:
    """Train and report."""
    args = options(__doc__)
    watch = Stretches(args).install()
    import torch
    import transformers

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "training"))
    import bare

    choose_matmul(args)
    model = bare.build(args.inputs / "model", args.tuning, args.precision, args.device)
    rows = repeated(args)
    steps = [rows[start : start + args.batch] for start in range(0, len(rows), args.batch)]
    bare.train(model, steps, lr=args.lr, precision=args.precision, device=args.device)

    def logits_of(ids: torch.Tensor) -> torch.Tensor:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        places = torch.arange(ids.shape[1], device=ids.device)[None]
        made = inner.model(input_ids=ids, position_ids=places, bounds=[0, ids.shape[1]], use_cache=False)
        return inner.lm_head(made.last_hidden_state)

    model.eval()
    watch.finish(logits_of, f"torch {torch.__version__}, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
