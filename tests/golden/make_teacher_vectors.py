"""Records what TRL computes of rated answers and of a teacher, into teacher_vectors.json beside this file.

Run as `make_preference_vectors.py`: `PYTHONPATH=. python tests/golden/make_teacher_vectors.py` where trl (1.16.0 wrote
the file) is installed. The tests need no trl: they read the recorded numbers.

TRL multiplies a divergence with no power of the temperature, which is done here afterwards.
"""

import json
import math
import tempfile
from pathlib import Path

import torch

from tests.golden.make_preference_vectors import VOCABULARY, fill, fingerprints, model_config, padded

FILE = Path(__file__).with_name("teacher_vectors.json")
KTO = {  # `student` and `reference` are phases of `fill`; the second pair has a reference point above 0
    "kto": {"beta": 0.3, "student": 0.0, "reference": 0.4},
    "kto above": {"beta": 0.1, "student": 0.4, "reference": 0.0},
    "kto weighted": {
        "beta": 0.1,
        "desirable_weight": 0.8,
        "undesirable_weight": 1.5,
        "student": 0.4,
        "reference": 0.0,
    },
}
DISTILLATION = {
    "forward": {"divergence": "forward_kl"},
    "reverse": {"divergence": "reverse_kl", "temperature": 2.0},
    "jensen": {"divergence": "jensen_shannon", "interpolation": 0.3, "temperature": 1.5},
    "forward with sft": {"divergence": "forward_kl", "temperature": 2.0, "sft_weight": 0.4},
}
TEACHER = 1.1


def answers() -> list[tuple[list[int], list[int], bool]]:
    """(prompt, answer, whether it is desirable) token ids; no two prompts are the same."""
    lengths = [
        (3, 4),
        (5, 1),
        (2, 7),
        (4, 5),
        (9, 5),
        (6, 2),
    ]  # no prompt and other answer is longer than the longest row

    def tokens(number: int, place: int, length: int) -> list[int]:
        return [3 + (19 * number + 31 * place + 7 * k + k * k) % (VOCABULARY - 3) for k in range(length)]

    return [(tokens(n, 0, a), tokens(n, 1, b), n % 3 != 1) for n, (a, b) in enumerate(lengths)]


def sides(rows: list[tuple[list[int], list[int]]], prefix: str) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}input_ids": padded([p + a for p, a in rows], 0),
        f"{prefix}attention_mask": padded([[1] * len(p + a) for p, a in rows], 0),
        f"{prefix}completion_mask": padded([[0] * len(p) + [1] * len(a) for p, a in rows], 0),
    }


def llama(phase: float):
    from transformers import LlamaForCausalLM

    return fill(LlamaForCausalLM(model_config()), phase)


def kto(case: dict, directory: str) -> dict:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    from tests.helpers.tokenizers import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    settings = {key: value for key, value in case.items() if key not in ("student", "reference")}
    trainer = KTOTrainer(
        model=llama(case["student"]),
        ref_model=llama(case["reference"]),
        args=KTOConfig(
            **settings,
            output_dir=directory,
            use_cpu=True,
            report_to="none",
            bf16=False,
            gradient_checkpointing=False,
            train_sampling_strategy="sequential",
        ),
        train_dataset=Dataset.from_list([{"prompt": "a", "completion": "b", "label": v} for v in (True, False)]),
        processing_class=tokenizer,
    )
    rows = answers()
    others = [row[1] for row in rows]
    others = others[-1:] + others[:-1]  # as TRL's own preparation pairs the rows of a batch
    batch = sides([(p, a) for p, a, _ in rows], "")
    batch |= sides([(p, other) for (p, _, _), other in zip(rows, others, strict=True)], "KL_")
    batch["label"] = torch.tensor([verdict for _, _, verdict in rows])
    loss = trainer.compute_loss(trainer.model.loading, batch)
    loss.backward()
    found = {name: trainer._metrics["train"][name][0] for name in ("kl", "rewards/chosen", "rewards/rejected")}
    return {"loss": float(loss), **found, "gradients": fingerprints(trainer.model.loading)}


def distillation(case: dict) -> dict:
    from trl.experimental.gkd import GKDTrainer

    batch = sides([(p, a) for p, a, _ in answers()], "")
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)[:, 1:]
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    student, teacher = llama(0.0), llama(TEACHER)
    logits = student(**inputs).logits[:, :-1]
    with torch.no_grad():
        wanted = teacher(**inputs).logits[:, :-1]
    temperature = case.get("temperature", 1.0)
    # TRL weighs the teacher's side with beta, and swaps the ends: 0 is KL(teacher, student), 1 KL(student, teacher)
    beta = {"forward_kl": 0, "reverse_kl": 1}.get(case["divergence"], case.get("interpolation"))
    apart = GKDTrainer.generalized_jsd_loss(logits, wanted, labels, beta=beta, temperature=temperature)
    apart = apart * temperature**2
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss = apart + case.get("sft_weight", 0.0) * nll
    loss.backward()
    return {"loss": float(loss), "divergence": float(apart), "nll": float(nll), "gradients": fingerprints(student)}


def main() -> None:
    import trl

    found = {"trl": trl.__version__, "torch": torch.__version__, "cases": {}}
    with tempfile.TemporaryDirectory() as directory:
        found["cases"] |= {name: kto(case, directory) for name, case in KTO.items()}
    found["cases"] |= {name: distillation(case) for name, case in DISTILLATION.items()}
    assert all(math.isfinite(case["loss"]) for case in found["cases"].values())
    FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
