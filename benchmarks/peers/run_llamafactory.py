"""LLaMA-Factory: its `get_dataset` with `neat_packing`, as its `run_sft` calls it; reading the file is part of that.

Its own `chatml` template takes the place of the tokenizer's: the newline after an assistant's end token is learned there,
one supervised token an exchange more than elsewhere.
"""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any

from meter import Meter, arguments, count_labels, own_caches


def stand_in_for_torchaudio() -> None:
    """Where torchaudio cannot be loaded, give an empty module to LLaMA-Factory, which imports it for all data."""
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):
        module = types.ModuleType("torchaudio")
        module.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
        sys.modules["torchaudio"] = module


def settings(data: Path, tokenizer: Path, out: Path, length: int, processes: int) -> dict[str, Any]:
    """The training arguments, with the data set described beside them."""
    out.mkdir(parents=True, exist_ok=True)
    about = {
        "file_name": str(data),
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        },
    }
    (out / "dataset_info.json").write_text(json.dumps({"bench": about}), encoding="utf-8")
    return {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": str(tokenizer),
        "dataset": "bench",
        "dataset_dir": str(out),
        "template": "chatml",
        "cutoff_len": length,
        "packing": True,
        "neat_packing": True,
        "preprocessing_num_workers": None if processes == 1 else processes,
        "output_dir": str(out / "run"),
        "use_cpu": True,
        "report_to": "none",
    }


def main() -> None:
    """Measure one preparation into fresh caches."""
    args = arguments(__doc__)
    own_caches(args.out)
    stand_in_for_torchaudio()
    import datasets
    import transformers
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.extras.env import VERSION
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    datasets.disable_progress_bars()
    wanted = settings(args.data, args.tokenizer, args.out, args.length, args.processes)
    model_args, data_args, training_args, _, _ = get_train_args(wanted)
    loaded = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(loaded["tokenizer"], data_args)
    meter = Meter()
    with meter("all"):
        found = get_dataset(template, model_args, data_args, training_args, stage="sft", **loaded)
    made = count_labels(found["train_dataset"], "labels") if args.count else {}
    meter.report(version=f"llamafactory {VERSION}, transformers {transformers.__version__}", **made)


if __name__ == "__main__":
    main()
