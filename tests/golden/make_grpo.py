"""Records what TRL's GRPOTrainer computes of given answers, into grpo_vectors.json beside this file.

Run as `make_preference_vectors.py`: `PYTHONPATH=. python tests/golden/make_grpo.py` where trl (1.16.0 wrote the file) is
installed. The tests need no trl: they read the recorded numbers.

`use_bias_correction_kl` is on in TRL since 1.16.0 and was off before, so that every case says it. All of it is computed in
float64, so that no processor's rounding is in the numbers: TRL's own head rounds log-probabilities to float32, so they are
made of the model's logits here.
"""

import json
import math
import tempfile
from pathlib import Path

import torch

from tests.golden.make_preference_vectors import VOCABULARY, fill, fingerprints, model_config, padded

FILE = Path(__file__).with_name("grpo_vectors.json")
LONGEST = 9
"""`max_new_tokens`."""
NOW, OLD, REFERENCE = 0.0, 0.35, 0.7
"""Phases of `fill`: the policy, the one that wrote, and the one that the divergence is measured from."""
ADVANTAGES = [1.3, -0.4, -0.9, 0.7, -1.1, 0.2]
CASES = {
    # Where a round is one step, nobody computes the old log-probabilities: the ratio is 1.
    "dapo, one step": {"loss_type": "dapo", "old": False},
    "dapo": {"loss_type": "dapo"},
    "dapo with kl": {"loss_type": "dapo", "beta": 0.04},
    "grpo with kl": {"loss_type": "grpo", "beta": 0.04},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03},
    "higher bound": {"loss_type": "dapo", "epsilon_high": 0.28},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.5},
    "dual clip": {"loss_type": "dapo", "delta": 1.3},
    "corrected kl": {"loss_type": "dapo", "beta": 0.04, "use_bias_correction_kl": True},
    "temperature": {"loss_type": "dapo", "temperature": 0.7, "beta": 0.04},
}


def answers() -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) token ids, of two groups of three."""
    prompts = [[3, 9, 14, 5], [7, 30]]
    lengths = (4, 9, 1, 6, 2, 7)

    def tokens(number: int, length: int) -> list[int]:
        return [3 + (23 * number + 11 * k + k * k) % (VOCABULARY - 3) for k in range(length)]

    return [(prompts[number // 3], tokens(number, length)) for number, length in enumerate(lengths)]


def llama(phase: float):
    from transformers import LlamaForCausalLM

    return fill(LlamaForCausalLM(model_config()), phase).double()


def logps(phase: float, temperature: float) -> list[list[float]]:
    """Log-probabilities of each answer's tokens under the model of `phase`, in float64."""
    model = llama(phase)
    found = []
    with torch.no_grad():
        for prompt, answer in answers():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / temperature
            found.append(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0].tolist())
    return found


def _left_padded(rows: list[list[int]]) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[0] * (longest - len(row)) + row for row in rows])


def _padded_floats(rows: list[list[float]]) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [0.0] * (longest - len(row)) for row in rows], dtype=torch.float64)


def in_float64(model, input_ids, attention_mask, num_answer_tokens: int, *, temperature: float):
    """(log-probabilities, entropies, no loss of routers): what `_get_per_token_logps_and_entropies` returns, unrounded."""
    # Positions of a left-padded prompt do not begin at 0. With rotary embeddings only distances count.
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, -num_answer_tokens - 1 : -1]
    log_probabilities = (logits / temperature).log_softmax(-1)
    logps = log_probabilities.gather(2, input_ids[:, -num_answer_tokens:, None])[..., 0]
    return logps, torch.special.entr(log_probabilities.exp()).sum(-1).detach(), None


def record(case: dict, directory: str) -> dict:
    """Loss, metrics and gradients of one case."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from tests.helpers.tokenizers import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    case = {"beta": 0.0, "use_bias_correction_kl": False, **case}
    beta, has_old = case.pop("beta"), case.pop("old", True)
    temperature = case.get("temperature", 1.0)
    rows = answers()
    trainer = GRPOTrainer(
        model=llama(NOW),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            **case,
            beta=0.0,  # with another one, TRL looks for the reference on the hub by the model's name
            output_dir=directory,
            use_cpu=True,
            report_to="none",
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=len(rows),
            gradient_accumulation_steps=1,
            num_generations=3,
            max_completion_length=LONGEST,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}]),
        processing_class=tokenizer,
    )
    trainer.beta = beta
    trainer.current_gradient_accumulation_steps = 1
    trainer._get_per_token_logps_and_entropies = lambda model, ids, mask, number, **_: in_float64(
        model, ids, mask, number, temperature=temperature
    )
    prompts = [prompt for prompt, _ in rows]
    written = [answer for _, answer in rows]
    inputs = {
        "prompt_ids": _left_padded(prompts),
        "prompt_mask": _left_padded([[1] * len(prompt) for prompt in prompts]),
        "completion_ids": padded(written, 0),
        "completion_mask": padded([[1] * len(answer) for answer in written], 0),
        "advantages": torch.tensor(ADVANTAGES, dtype=torch.float64),
        "num_items_in_batch": torch.tensor(sum(map(len, written))),
    }
    if has_old:
        inputs["old_per_token_logps"] = _padded_floats(logps(OLD, temperature))
    if beta:
        inputs["ref_per_token_logps"] = _padded_floats(logps(REFERENCE, temperature))
    model = trainer.model
    model.train()
    loss = trainer._compute_loss(model, inputs)
    loss.backward()
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    wanted = ("kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")
    metrics = {name: metrics[name] for name in wanted if name in metrics}
    return {"loss": float(loss), "metrics": metrics, "gradients": fingerprints(model)}


def main() -> None:
    import trl

    found = {"trl": trl.__version__, "torch": torch.__version__, "cases": {}}
    with tempfile.TemporaryDirectory() as directory:
        for name, case in CASES.items():
            found["cases"][name] = record(case, directory)
    assert all(math.isfinite(case["loss"]) for case in found["cases"].values())
    FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
