"""axolotl: what `axolotl preprocess` does with `sample_packing`: template, mask and tokens, saved by `save_to_disk`.

Measured is `load_datasets`, which reads the file too. The packs themselves are drawn by its sampler when training
begins, so they are no part of the figure; lengths are.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from meter import Meter, arguments, count_labels, own_caches


def settings(data: Path, tokenizer: Path, out: Path, length: int, processes: int) -> dict[str, Any]:
    """The configuration, with the description of a small model beside a copy of the tokenizer."""
    base = out / "base"
    shutil.copytree(tokenizer, base)
    about = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "vocab_size": 32_000}
    sizes = {"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    (base / "config.json").write_text(json.dumps({**about, **sizes}), encoding="utf-8")
    source = {
        "path": str(data),
        "ds_type": "json",
        "type": "chat_template",
        "field_messages": "messages",
        "roles_to_train": ["assistant"],
        "train_on_eos": "turn",
    }
    return {
        "base_model": str(base),
        "datasets": [source],
        "chat_template": "tokenizer_default",
        "sequence_len": length,
        "sample_packing": True,
        "flash_attention": True,
        "dataset_prepared_path": str(out / "prepared"),
        "output_dir": str(out / "run"),
        "dataset_num_proc": processes,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
        "learning_rate": 1e-4,
        "special_tokens": {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"},
    }


def main() -> None:
    """Measure one preparation into fresh caches."""
    args = arguments(__doc__)
    own_caches(args.out)
    os.environ.update(AXOLOTL_DO_NOT_TRACK="1", AXOLOTL_IS_PREPROCESS="1")
    import axolotl
    import datasets
    import transformers
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.utils.dict import DictDefault

    datasets.disable_progress_bars()
    wanted = settings(args.data, args.tokenizer, args.out, args.length, args.processes)
    config = load_cfg(DictDefault(wanted), is_preprocess=True)
    config.is_preprocess = True
    meter = Meter()
    with meter("all"):
        found = load_datasets(cfg=config)
    made = {"samples": len(found.train_dataset), **count_labels(found.train_dataset, "labels")} if args.count else {}
    if made:
        made["rows"] = 0
    meter.report(version=f"axolotl {axolotl.__version__}, transformers {transformers.__version__}", **made)


if __name__ == "__main__":
    main()
