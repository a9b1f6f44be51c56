"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): adapters `B diag(E) A` whose ranks move to the layers that need them.

Two things happen around each optimizer step, on whole parameters and gradients, alike on every rank. Before clipping, the
gradient of the orthogonality penalty `weight * mean over all A and B of |A A^T - I|_F` (`|B^T B - I|_F`) is added to the
gradients: once a step, after they were reduced, so that it depends on no rank, micro-batch or accumulation. It is no sum
over tokens and no part of the reported loss; the gradient norm has it. After the update peft's own `RankAllocator` smooths
the importance of every entry, `|p * grad|`, and sets the least important entries of E to zero, ever more of them until
`target_rank` is left on average. Its steps count from 1, so that the last of them can be the one that settles the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trainer.tuning.adapter import PEFT_PREFIX, Adapter
from trainer.tuning.config import AdaLoraConfig
from trainer.tuning.replica import ADAPTER


class AdaLora(Adapter):
    """Adapters of peft's AdaLoRA, and the allocation of their ranks."""

    config: AdaLoraConfig
    allocation: RankAllocation

    def apply(self, model: nn.Module) -> nn.Module:
        """As `Adapter.apply`. Also makes the allocation of ranks for the model that is returned."""
        peft_model: Any = super().apply(model)
        for name, parameter in peft_model.named_parameters():
            if f".ranknum.{ADAPTER}" in name:  # a constant, which peft leaves trainable where it moves it to meta
                parameter.requires_grad_(False)
        self.allocation = RankAllocation(peft_model.base_model, self.config)
        return peft_model  # type: ignore[no-any-return]

    def update_peft_settings(
        self, model: nn.Module, trained: dict[str, Tensor], saved_state: Callable[[str, str], Tensor]
    ) -> None:
        """Tell peft which ranks are left, so that it writes only these. If the run stopped before they settled, it writes all."""
        self.allocation.restore_masks(saved_state)
        model.peft_config[ADAPTER].rank_pattern = self.allocation.rank_pattern_of(trained)  # type: ignore[index,union-attr]


class RankAllocation:
    """The work of AdaLoRA around each optimizer step; see `strategies.base.OptimizerStepHooks`. No call communicates."""

    def __init__(self, tuner: Any, config: AdaLoraConfig) -> None:
        """`tuner`: peft's AdaLoraModel, whose allocator keeps the importance of ranks. `config`: the user's settings."""
        self.tuner = tuner
        self.config = config
        self.allocator = tuner.rankallocator
        self.settings = tuner.peft_config[ADAPTER]
        self._masks: dict[str, Tensor] = {}
        """Which entries of each E are kept (1) and which are pruned (0): `[init_rank, 1]` float32, by name in the base model."""
        self._ranks_are_final = False
        """Whether the last allocation was made: later steps prune no further rank. `after_restore` finds it again."""
        self._total_steps = 0
        """Optimizer steps of the run; 0 before `begin`."""

    def begin(self, total_steps: int) -> None:
        """Set AdaLoRA's phases for a run of `total_steps`: `tinit` steps before the first pruning, and `tfinal` after the last.

        The two shares sum to less than 1, so at least one step lies between.
        """
        self._total_steps = self.settings.total_step = total_steps
        self.settings.tinit = int(self.config.initial_share * total_steps)
        self.settings.tfinal = int(self.config.final_share * total_steps)

    def before_clip(self, loss_scale: Tensor | None) -> None:
        """Add the gradient of AdaLoRA's orthogonality penalty to the gradients of A and B; called before gradients are clipped.

        `loss_scale`: of fp16, by which all gradients are multiplied at this time; None without. E has no penalty: it is a
        diagonal. A parameter without a gradient gets one of zeros first, since peft's allocator reads them all.
        """
        parameters = self._adapter_parameters()
        num_matrices = sum(_is_matrix(name) for name, _ in parameters)
        weight = self.config.orth_reg_weight / max(1, num_matrices)  # the penalty is a mean over all A and B
        for name, parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if weight <= 0 or not _is_matrix(name):
                continue
            # Engines call this without gradients, and the penalty is not a part of the model's own graph.
            with torch.enable_grad():
                matrix = parameter.detach().requires_grad_()
                penalty = weight * _orthogonality_error(matrix, rows="lora_A" in name)
                (gradient,) = torch.autograd.grad(penalty, matrix)
            if loss_scale is not None:
                gradient = gradient * loss_scale
            parameter.grad.add_(gradient)

    def after_update(self, step: int, *, is_applied: bool) -> None:
        """After each optimizer step: update how important each rank of an adapter is, and prune the least important ones.

        Importance comes from the gradients that were just applied. `step` counts from 1. `is_applied`: whether the optimizer
        took the step; it skips one whose gradients are not finite. The last allocation, `tfinal` steps before the end, makes
        the ranks final. Cases, in order:
        - after the last allocation, the ranks are final: set pruned entries back to zero.
        - before the last allocation, the step was skipped: nothing.
        - the last allocation is due, no step has measured importance, and this one was skipped too: wait for the next.
        - else: update importance and prune ranks; from the last allocation on, the ranks are final.
        """
        assert self._total_steps > 0, "begin was not called"
        self._create_missing_state()  # before the first allocation, which would make only a part of it
        last_allocation = self._total_steps - self.settings.tfinal
        if step > last_allocation and self._ranks_are_final:
            # The optimizer may have moved pruned entries of E.
            for name, parameter in self._adapter_parameters():
                if name in self._masks:
                    parameter.masked_fill_(self._masks[name] == 0, 0.0)
            return
        if step < last_allocation and not is_applied:  # the step was skipped, and its gradients are worth nothing
            return

        # `_has_importance` waits for the device, so it is called only when the ranks have to become final.
        if step >= last_allocation and not self._has_importance():
            # No step has measured importance yet (all were skipped), and without it every entry would tie.
            if not is_applied:  # the next step has to make the ranks final
                return
            self.allocator.update_ipt(self.tuner.model)

        self._update_importance_and_prune(min(step, last_allocation))
        if step >= last_allocation:
            self._ranks_are_final = True
            self._create_missing_state()  # peft drops its own with the last allocation; checkpoints have the same tensors still

    def _update_importance_and_prune(self, step: int) -> None:
        """Let peft's allocator update the importance of ranks and prune those that `step` is to prune; keeps the masks."""
        # peft leaves `rank_pattern` at None if this step prunes no rank; else it is {name: [True, False, ...]}, by rank.
        self.settings.rank_pattern = None
        self.tuner.update_and_allocate(step)
        for name, kept_ranks in (self.settings.rank_pattern or {}).items():
            self._masks[name].copy_(torch.tensor(kept_ranks, dtype=torch.float32)[:, None])

    def state_of(self, name: str) -> dict[str, Tensor]:
        """What checkpoints hold of a parameter for the allocation, beside the optimizer's state: live tensors of its shape.

        `name`: the parameter's plain name; {} for one that is no adapter's. `importance` and `uncertainty` are peft's running
        means of the importance of each entry and of its changes. `kept` is the mask of E (1 kept, 0 pruned), by which a resumed
        run prunes the same entries.
        """
        self._create_missing_state()
        key = name.removeprefix(PEFT_PREFIX)
        if key not in self.allocator.exp_avg_ipt:
            return {}
        state = {"importance": self.allocator.exp_avg_ipt[key], "uncertainty": self.allocator.exp_avg_unc[key]}
        if key in self._masks:
            state["kept"] = self._masks[key]
        return state

    def after_restore(self) -> None:
        """Called after a checkpoint filled the tensors of `state_of`: the ranks are final if no more are left than the target."""
        num_kept_ranks = sum(int(mask.sum()) for mask in self._masks.values())
        self._ranks_are_final = num_kept_ranks <= self.allocator.target_bgt

    def restore_masks(self, saved_state: Callable[[str, str], Tensor]) -> None:
        """Set the masks of kept ranks from a checkpoint, for a model on meta that is exported.

        `saved_state(name, key)`: what the checkpoint keeps under `key` for the parameter `name`.
        """
        for name, _ in self._adapter_parameters():
            if "lora_E" in name:
                self._masks[name] = saved_state(PEFT_PREFIX + name, "kept")

    def rank_pattern_of(self, trained: dict[str, Tensor]) -> dict[str, list[bool]] | None:
        """Which ranks of each adapter are kept, as peft's files say it (`rank_pattern`): {"h.0.attn.lora_E": [True, False]}.

        AdaLoRA writes an update as B E A with a diagonal E, and prunes a rank by setting its entry of E to zero. None, so that
        all ranks are written, if no rank is pruned, or if a pruned entry is not zero. `trained`: gathered values by plain name.
        """
        self._create_missing_state()
        kept_ranks = {name: mask.cpu() > 0 for name, mask in self._masks.items()}  # bool [init_rank, 1]
        for name, is_kept in kept_ranks.items():
            if bool((trained[PEFT_PREFIX + name][~is_kept] != 0).any()):
                return None
        if all(bool(is_kept.all()) for is_kept in kept_ranks.values()):
            return None
        return {name: is_kept.view(-1).tolist() for name, is_kept in kept_ranks.items()}

    def _has_importance(self) -> bool:
        """Whether any step has measured the importance of entries. Waits for the device."""
        return any(bool(importance.any()) for importance in self.allocator.exp_avg_ipt.values())

    def _adapter_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The current parameters A, E and B, by the names that peft's allocator uses."""
        parameters = []
        for name, parameter in self.tuner.model.named_parameters():
            if ".lora_" in name and f".{ADAPTER}" in name:
                parameters.append((name, parameter))
        return parameters

    def _create_missing_state(self) -> None:
        """Make the state that peft would make in its first step, as zeros, so that checkpoints always have the same tensors."""
        allocator = self.allocator
        for name, parameter in self._adapter_parameters():
            if name not in allocator.ipt:
                for state_by_name in (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc):
                    state_by_name[name] = torch.zeros_like(parameter)
            if "lora_E" in name and name not in self._masks:
                self._masks[name] = torch.ones_like(parameter)


def _is_matrix(name: str) -> bool:
    """Whether a parameter is a matrix A or B, whose orthogonality is penalised; E is a diagonal."""
    return "lora_A" in name or "lora_B" in name


def _orthogonality_error(matrix: Tensor, *, rows: bool) -> Tensor:
    """How far the rows of a matrix (or columns, if not `rows`) are from orthonormal: the Frobenius norm of M M^T - I, 0-d."""
    products = matrix @ matrix.T if rows else matrix.T @ matrix
    identity = torch.eye(len(products), dtype=products.dtype, device=products.device)
    return torch.linalg.matrix_norm(products - identity)
