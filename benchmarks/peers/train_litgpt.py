"""LitGPT's `finetune.full` and `finetune.lora`: padded batches; it does not clip gradients, and its rate decays.

The decay is replaced by a constant rate, so that the losses can be compared; that costs nothing.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from stretches import Stretches, documents, options, repeated


def checkpoint(args: Any) -> Path:
    """The model in LitGPT's own format, by its own conversion."""
    import torch
    from litgpt.config import Config
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.utils import save_config
    from safetensors.torch import load_file

    shape = json.loads((args.inputs / "model" / "config.json").read_text(encoding="utf-8"))
    config = Config(
        name="bench",
        hf_config={},
        block_size=2048,
        vocab_size=shape["vocab_size"],
        padded_vocab_size=shape["vocab_size"],
        n_layer=shape["num_hidden_layers"],
        n_head=shape["num_attention_heads"],
        n_query_groups=shape["num_key_value_heads"],
        n_embd=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=shape["rms_norm_eps"],
        mlp_class_name="LLaMAMLP",
        rope_base=10_000,
    )
    directory = args.out / "litgpt"
    directory.mkdir(parents=True)
    weights: dict[str, torch.Tensor] = {}
    for file in sorted((args.inputs / "model").glob("*.safetensors")):
        copy_weights_hf_llama(config, {}, weights, load_file(file))
    torch.save(weights, directory / "lit_model.pth")
    save_config(config, directory)
    for file in (args.inputs / "plain").iterdir():
        shutil.copy(file, directory / file.name)
    return directory


def data_module(args: Any) -> Any:
    """The documents as one of LitGPT's data modules."""
    import torch
    from litgpt.data import DataModule, get_sft_collate_fn
    from torch.utils.data import DataLoader

    def rows(found: list[dict[str, list[int]]]) -> list[dict[str, Any]]:
        counted = [(row, {"raw": len(row["labels"]), "raw_plus_prompt_template": len(row["labels"])}) for row in found]
        return [{**{k: torch.tensor(v) for k, v in row.items()}, "token_counts": counts} for row, counts in counted]

    class Documents(DataModule):
        prompt_style = None

        def connect(
            self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None, **_: Any
        ) -> None:
            self.batch = batch_size

        def train_dataloader(self) -> DataLoader:
            made = rows(repeated(args))
            return DataLoader(made, batch_size=self.batch, collate_fn=get_sft_collate_fn(pad_id=0), shuffle=False)

        def val_dataloader(self) -> DataLoader:
            return DataLoader(rows(documents(args)[:2]), batch_size=1, collate_fn=get_sft_collate_fn(pad_id=0))

    return Documents()


def main() -> None:
    """Train and report."""
    args = options(__doc__)
    watch = Stretches(args).install()
    from importlib.metadata import version

    import torch
    from litgpt.args import EvalArgs, TrainArgs

    if args.tuning == "lora":
        from litgpt.finetune import lora as recipe

        names = ("query", "key", "value", "projection", "mlp")
        more: dict[str, Any] = {f"lora_{name}": True for name in names}
        more |= {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "lora_head": False}
    else:
        from litgpt.finetune import full as recipe

        more = {}
    kept: list[Any] = []
    plain_fit = recipe.fit

    def fit(*positional: Any, **named: Any) -> Any:
        kept.append(named["model"] if "model" in named else named["state"]["model"])
        return plain_fit(*positional, **named)

    recipe.fit = fit
    recipe.get_lr_scheduler = lambda optimizer, **_: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    recipe.save_hyperparameters = lambda *_: None  # would parse this script's command line
    recipe.save_prompt_style = lambda *_: None
    recipe.merge_lora = lambda **_: None
    recipe.setup(
        checkpoint_dir=checkpoint(args),
        out_dir=args.out / "run",
        precision="32-true" if args.precision == "fp32" else "bf16-mixed",
        devices=1,
        data=data_module(args),
        train=TrainArgs(
            save_interval=None,
            log_interval=10,
            global_batch_size=args.batch,
            micro_batch_size=args.batch,
            lr_warmup_steps=1,
            epochs=100,
            max_steps=args.total,
        ),
        eval=EvalArgs(
            interval=100_000, max_new_tokens=1, max_iters=1, initial_validation=False, final_validation=False
        ),
        optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": args.lr, "weight_decay": 0.0, "fused": True}},
        **more,
    )
    model = kept[0].eval()
    watch.finish(lambda ids: model(ids), f"litgpt {version('litgpt')}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
