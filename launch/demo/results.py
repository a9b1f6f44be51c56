"""What the demos share: the processes that they train in, and what they show of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def num_processes() -> int:
    """How many ranks a demo trains with: as many GPUs as divide a batch of eight, or two ranks on a CPU."""
    import torch

    num_devices = torch.cuda.device_count() or 2  # without a GPU: two ranks on the CPU
    return next(divisor for divisor in (8, 4, 2, 1) if divisor <= num_devices)


def run_dir_of(arguments: list[str]) -> Path:
    """The run directory of a `train` command. The last `run.dir=` counts, so that the user's overrides that of a demo."""
    directories = [argument.removeprefix("run.dir=") for argument in arguments if argument.startswith("run.dir=")]
    return Path(directories[-1])


def load_tokenizer(model: Path) -> Any:
    """The tokenizer of a model directory, without a look at a model hub."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model, local_files_only=True)


def held_out_evaluations(run_dir: Path, metric: str) -> list[dict[str, float]]:
    """The held-out metrics of each evaluation that has `metric`, in order, from the run's `metrics.jsonl`.

    [{"eval/loss": 2.1, "eval/perplexity": 8.2}, ...]
    """
    from trainer.reporting.results import read_metric_rows

    evaluation_rows = [row for row in read_metric_rows(run_dir) if metric in row]
    return [_held_out_metrics(row) for row in evaluation_rows]


def _held_out_metrics(row: dict[str, Any]) -> dict[str, float]:
    """The held-out metrics of a row, without its step and tokens."""
    return {name: metric for name, metric in row.items() if name.startswith("eval/")}


def greedy_answer(model: Any, tokenizer: Any, question: str, max_new_tokens: int) -> str:
    """Let the model answer a question greedily; returns the answer on one line, with three dots if it was cut off.

    `max_new_tokens`: the longest answer.
    """
    import torch

    prompt_ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    with torch.no_grad():
        output_ids = model.generate(
            input_ids=prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    answer_ids = output_ids[0, prompt_ids.shape[1] :]
    answer = " ".join(tokenizer.decode(answer_ids, skip_special_tokens=True).split())
    is_cut_off = len(answer_ids) == max_new_tokens and answer_ids[-1] != tokenizer.eos_token_id
    return f"{answer} ..." if is_cut_off else answer
