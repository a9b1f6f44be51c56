"""Records what TRL computes on a small batch of pairs, into preference_vectors.json beside this file.

Run from the repository's root where trl (1.16.0 wrote the file) is installed beside the project's own dependencies:
`PYTHONPATH=. python tests/golden/make_preference_vectors.py`. The tests need no trl: they read the recorded numbers.

ORPO and the share of plain fine-tuning take the mean over one answer's tokens here and over a batch's in TRL, and TRL's
ORPO includes the prompt there: the first is put together from TRL's own log-probabilities and odds ratio, and pairs are
given to TRL one at a time. All of it is computed in float64, so that no processor's rounding is in the numbers.
"""

import json
import math
import tempfile
from pathlib import Path

import torch
from torch import nn

FILE = Path(__file__).with_name("preference_vectors.json")
VOCABULARY = 64
CASES = {
    "dpo": {"objective": "dpo", "beta": 0.3},
    "dpo hinge": {"objective": "dpo", "beta": 0.3, "loss_type": "hinge"},
    "dpo ipo": {"objective": "dpo", "beta": 0.3, "loss_type": "ipo"},
    "dpo smoothed": {"objective": "dpo", "beta": 0.3, "label_smoothing": 0.2},
    "dpo with sft": {"objective": "dpo", "beta": 0.3, "sft_weight": 0.5},
    "orpo": {"objective": "orpo", "beta": 0.25},
    "simpo": {"objective": "simpo", "beta": 2.0, "gamma": 1.2},
    "simpo smoothed with sft": {
        "objective": "simpo",
        "beta": 2.0,
        "gamma": 1.2,
        "label_smoothing": 0.1,
        "sft_weight": 0.5,
    },
    "reward": {"objective": "reward", "centre": 0.01},
}


def model_config():
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        num_labels=1,
    )


def fill(model: nn.Module, phase: float) -> nn.Module:
    """Values that depend on no random generator."""
    with torch.no_grad():
        for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
            wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * 0.7 + 3.1 * number + phase)
            scale, offset = (0.4, 0.0) if parameter.dim() > 1 else (0.1, 1.0)
            parameter.copy_((offset + scale * wave).view_as(parameter))
    return model


def pairs() -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, chosen, rejected) token ids."""
    lengths = [(3, 4, 6), (5, 1, 2), (2, 7, 3), (4, 5, 5)]

    def tokens(number: int, place: int, length: int) -> list[int]:
        return [3 + (17 * number + 29 * place + 7 * k + k * k) % (VOCABULARY - 3) for k in range(length)]

    return [tuple(tokens(n, place, length) for place, length in enumerate(row)) for n, row in enumerate(lengths)]


def fingerprints(model: nn.Module) -> dict[str, list[float]]:
    """Of each gradient its norm and its product with a fixed wave, which no other gradient is likely to share."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            flat = parameter.grad.double().view(-1)
            wave = torch.cos(torch.arange(flat.numel(), dtype=torch.float64) * 0.37)
            found[name] = [float(flat.norm()), float(flat @ wave)]
    return found


def padded(rows: list[list[int]], filler: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])


def trl_batch(chosen_pairs) -> dict[str, torch.Tensor]:
    """A batch of TRL's DPOTrainer and RewardTrainer: chosen rows, then rejected ones."""
    rows = [p + c for p, c, _ in chosen_pairs] + [p + r for p, _, r in chosen_pairs]
    learned = [[0] * len(p) + [1] * len(c) for p, c, _ in chosen_pairs]
    learned += [[0] * len(p) + [1] * len(r) for p, _, r in chosen_pairs]
    masks = [[1] * len(row) for row in rows]
    return {"input_ids": padded(rows, 0), "attention_mask": padded(masks, 0), "completion_mask": padded(learned, 0)}


def cpo_batch(chosen_pairs) -> dict[str, torch.Tensor]:
    """A batch of TRL's CPOTrainer and ORPOTrainer."""
    batch = {}
    for name, place in (("chosen", 1), ("rejected", 2)):
        rows = [pair[0] + pair[place] for pair in chosen_pairs]
        batch[f"{name}_input_ids"] = padded(rows, 0)
        batch[f"{name}_attention_mask"] = padded([[1] * len(row) for row in rows], 0)
        batch[f"{name}_labels"] = padded([[-100] * len(p[0]) + p[place] for p in chosen_pairs], -100)
    return batch


class Recorder:
    """TRL's trainers around the two models."""

    def __init__(self, directory: str) -> None:
        from datasets import Dataset

        from tests.helpers.tokenizers import tiny_tokenizer

        self.tokenizer = tiny_tokenizer()
        self.tokenizer.pad_token = self.tokenizer.eos_token
        self.rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
        self.common = {"output_dir": directory, "use_cpu": True, "report_to": "none", "bf16": False}

    def model(self, phase: float):
        from transformers import LlamaForCausalLM

        return fill(LlamaForCausalLM(model_config()), phase).double()

    def dpo(self, case: dict):
        """Pairs one at a time: then `aot` with smoothing is conservative DPO, and `sft` the mean over one answer."""
        from trl import DPOConfig, DPOTrainer

        losses, weights = [case.get("loss_type", "sigmoid")], [1.0]
        if "label_smoothing" in case:
            losses = ["aot"]
        if "sft_weight" in case:
            losses, weights = [*losses, "sft"], [1.0, case["sft_weight"]]
        settings = {"loss_type": losses, "loss_weights": weights, "beta": case["beta"]}
        settings["label_smoothing"] = case.get("label_smoothing", 0.0)
        trainer = DPOTrainer(
            model=self.model(0.0),
            ref_model=self.model(0.4),
            args=DPOConfig(**settings, gradient_checkpointing=False, **self.common),
            train_dataset=self.rows,
            processing_class=self.tokenizer,
        )
        losses = [trainer.compute_loss(trainer.model, trl_batch([pair])) for pair in pairs()]
        metrics = trainer._metrics["train"]
        return trainer.model, torch.stack(losses).mean(), metrics["rewards/chosen"], metrics["rewards/rejected"]

    def simpo(self, case: dict):
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        settings = {"loss_type": "simpo", "beta": case["beta"], "simpo_gamma": case["gamma"]}
        settings |= {"label_smoothing": case.get("label_smoothing", 0.0), "cpo_alpha": case.get("sft_weight", 0.0)}
        trainer = CPOTrainer(
            model=self.model(0.0),
            args=CPOConfig(**settings, gradient_checkpointing=False, **self.common),
            train_dataset=self.rows,
            processing_class=self.tokenizer,
        )
        found = [trainer.get_batch_loss_metrics(trainer.model, cpo_batch([pair])) for pair in pairs()]
        rewards = [[metrics[f"rewards/{name}"] for _, metrics in found] for name in ("chosen", "rejected")]
        return trainer.model, torch.stack([loss for loss, _ in found]).mean(), *rewards

    def orpo(self, case: dict):
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        trainer = ORPOTrainer(
            model=self.model(0.0),
            args=ORPOConfig(beta=case["beta"], gradient_checkpointing=False, **self.common),
            train_dataset=self.rows,
            processing_class=self.tokenizer,
        )
        chosen, rejected = trainer.concatenated_forward(trainer.model, cpo_batch(pairs()))[:2]
        ratio, chosen_rewards, rejected_rewards, *_ = trainer.odds_ratio_loss(chosen, rejected)
        return trainer.model, (-chosen - ratio).mean(), chosen_rewards.tolist(), rejected_rewards.tolist()

    def reward(self, case: dict):
        from transformers import LlamaForSequenceClassification
        from trl import RewardConfig, RewardTrainer

        trainer = RewardTrainer(
            model=fill(LlamaForSequenceClassification(model_config()), 0.0).double(),
            args=RewardConfig(center_rewards_coefficient=case["centre"], gradient_checkpointing=False, **self.common),
            train_dataset=self.rows,
            processing_class=self.tokenizer,
        )
        batch = trl_batch(pairs())
        del batch["completion_mask"]
        trainer.model.config.pad_token_id = 0
        loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        chosen, rejected = outputs.logits.view(2, -1).tolist()
        return trainer.model, loss, chosen, rejected


def main() -> None:
    import trl

    found = {"trl": trl.__version__, "torch": torch.__version__, "cases": {}}
    with tempfile.TemporaryDirectory() as directory:
        recorder = Recorder(directory)
        for name, case in CASES.items():
            model, loss, chosen, rejected = getattr(recorder, case["objective"])(case)
            loss.backward()
            assert math.isfinite(float(loss)) and len(chosen) == len(pairs())
            gradients = fingerprints(model)
            found["cases"][name] = {"loss": float(loss), "chosen": chosen, "rejected": rejected, "gradients": gradients}
    FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
