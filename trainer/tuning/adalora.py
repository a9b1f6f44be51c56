"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): adapters `B diag(E) A` whose ranks move to the layers that need them.

Two things happen around each optimizer step, on whole parameters and gradients, alike on every rank. Before clipping, the
gradient of the orthogonality penalty `weight * mean over all A and B of |A A^T - I|_F` (`|B^T B - I|_F`) is added to the
gradients: once a step, after they were reduced, so that it depends on no rank, micro-batch or accumulation. It is no sum
over tokens and no part of the reported loss; the gradient norm has it. After the update peft's own `RankAllocator` smooths
the importance of every entry, `|p * grad|`, and sets the least important entries of E to zero, ever more of them until
`target_rank` is left on average. Its steps count from 1, so that the last of them can be the one that settles the ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainer.tuning.adapter import PREFIX, Adapter
from trainer.tuning.config import AdaLoraConfig
from trainer.tuning.replica import ADAPTER


class AdaLora(Adapter):
    """Adapters of peft's AdaLoRA, and the allocation of their ranks."""

    config: AdaLoraConfig
    allocation: Allocation

    def apply(self, model: nn.Module) -> nn.Module:
        """As `Adapter.apply`; the allocation works on the model that is returned."""
        tuned: Any = super().apply(model)
        for name, parameter in tuned.named_parameters():
            if f".ranknum.{ADAPTER}" in name:  # a constant, which peft leaves trainable where it moves it to meta
                parameter.requires_grad_(False)
        self.allocation = Allocation(tuned.base_model, self.config)
        return tuned  # type: ignore[no-any-return]

    def settle_files(self, model: nn.Module, trained: dict[str, Tensor]) -> None:
        """Tell peft which ranks are left, so that it writes these alone; all where the run stopped in between."""
        model.peft_config[ADAPTER].rank_pattern = self.allocation.pattern_of(trained)  # type: ignore[index,union-attr]


class Allocation:
    """What is done around each optimizer step; see `strategies.base.OptimizerStepHooks`. No call communicates."""

    def __init__(self, tuner: Any, config: AdaLoraConfig) -> None:
        self.tuner, self.config = tuner, config
        """peft's AdaLoraModel, and the settings."""
        self.allocator, self.settings = tuner.rankallocator, tuner.peft_config[ADAPTER]
        self._masks: dict[str, Tensor] = {}
        """Which entries of each E are left, `[init_rank, 1]` float32 of zeros and ones, by name in the base model."""
        self._settled = False
        self._total = 0

    def begin(self, total_steps: int) -> None:
        """Lay out the budget over a run of `total_steps`. The two shares sum to less than 1: one step at least is between."""
        self._total = self.settings.total_step = total_steps
        self.settings.tinit = int(self.config.initial_share * total_steps)
        self.settings.tfinal = int(self.config.final_share * total_steps)

    def before_clip(self, scale: Tensor | None) -> None:
        """Add the penalty's gradient, times `scale` where the loss was; gradients of zero where a parameter has none."""
        matrices = [(n, p) for n, p in self._parameters() if "lora_A" in n or "lora_B" in n]
        weight = self.config.orth_reg_weight / max(1, len(matrices))
        for name, parameter in self._parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if weight > 0 and ("lora_A" in name or "lora_B" in name):
                with torch.enable_grad():
                    value = parameter.detach().requires_grad_()
                    (gradient,) = torch.autograd.grad(weight * _distance(value, rows="lora_A" in name), value)
                parameter.grad.add_(gradient if scale is None else gradient * scale)

    def after_update(self, step: int, *, finite: bool) -> None:
        """Update the importance from the gradients that were applied, and allocate. `step` counts from 1."""
        assert self._total > 0, "begin was not called"
        self._prepare()
        last = self._total - self.settings.tfinal
        if step > last and self._settled:
            for name, parameter in self._parameters():
                if name in self._masks:
                    parameter.masked_fill_(self._masks[name] == 0, 0.0)
            return
        if step < last and not finite:  # skipped: its gradients say nothing
            return
        if step >= last and not any(bool(each.any()) for each in self.allocator.exp_avg_ipt.values()):
            if not finite:  # nothing is known yet: the next step settles the ranks
                return
            self.allocator.update_ipt(self.tuner.model)
        self.settings.rank_pattern = None
        self.tuner.update_and_allocate(min(step, last))
        for name, kept in (self.settings.rank_pattern or {}).items():
            self._masks[name].copy_(torch.tensor(kept, dtype=torch.float32)[:, None])
        if step >= last:
            self._settled = True
            self._prepare()

    def state_of(self, name: str) -> dict[str, Tensor]:
        """What belongs to a parameter beside its moments, of its shape, live; `name` is its plain name."""
        self._prepare()
        key = name.removeprefix(PREFIX)
        if key not in self.allocator.exp_avg_ipt:
            return {}
        found = {"importance": self.allocator.exp_avg_ipt[key], "uncertainty": self.allocator.exp_avg_unc[key]}
        return {**found, "kept": self._masks[key]} if key in self._masks else found

    def restored(self) -> None:
        """The values of `state_of` were read from a checkpoint."""
        self._settled = sum(int(mask.sum()) for mask in self._masks.values()) <= self.allocator.target_bgt

    def pattern_of(self, trained: dict[str, Tensor]) -> dict[str, list[bool]] | None:
        """peft's rank pattern for gathered values; None where an entry that was to go is not zero (any more)."""
        self._prepare()
        kept = {name: mask.cpu() > 0 for name, mask in self._masks.items()}
        for name, mask in kept.items():
            if bool((trained[PREFIX + name][~mask] != 0).any()):
                return None
        if all(bool(mask.all()) for mask in kept.values()):
            return None
        return {name: mask.view(-1).tolist() for name, mask in kept.items()}

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters of A, E and B as they are now, by the names that peft's allocator uses."""
        return [(n, p) for n, p in self.tuner.model.named_parameters() if ".lora_" in n and f".{ADAPTER}" in n]

    def _prepare(self) -> None:
        """Zeros where peft would make them with the first step, so that what is saved is always the same."""
        for name, parameter in self._parameters():
            if name not in self.allocator.ipt:
                for table in (self.allocator.ipt, self.allocator.exp_avg_ipt, self.allocator.exp_avg_unc):
                    table[name] = torch.zeros_like(parameter)
            if "lora_E" in name and name not in self._masks:
                self._masks[name] = torch.ones_like(parameter)


def _distance(matrix: Tensor, *, rows: bool) -> Tensor:
    """How far the rows (columns) of a matrix are from orthonormal: the Frobenius norm, 0-d."""
    products = matrix @ matrix.T if rows else matrix.T @ matrix
    return torch.linalg.matrix_norm(products - torch.eye(len(products), dtype=products.dtype, device=products.device))
