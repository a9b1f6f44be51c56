"""Loss terms that a model adds over a whole step, for its routers and its logits; and the load of its experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from strategies.runtime import sum_over_ranks
from trainer.losses.z_loss import sum_of_squared_logsumexp
from trainer.model.balance import RouterLosses, logit_z_weight, router_losses_of_run
from trainer.model.config import ModelConfig, ModelKind
from trainer.model.routing import (
    ADDED_LOSS,
    EXPERT_TOKENS,
    RoutingRecord,
    balancing_biases,
    enable_token_counts,
    hook_decoder_output,
    hook_router_logits,
    recording_routing,
)
from trainer.objectives.causal import run_for_hooks, unwrap_adapter


@dataclass(frozen=True, slots=True)
class AddedLosses:
    """The losses that a model adds to its objective's, for its routers and its logits, and how it counts its experts' tokens."""

    router_losses: RouterLosses
    experts_by_layer: tuple[int, ...]
    """Number of experts of each layer that has some."""
    num_frozen_biases: int = 0
    """Number of biases that balance experts; they are frozen."""
    logit_z_coefficient: float = 0.0
    """Weight of the z-loss of the output's logits; 0 leaves it out."""

    @property
    def changes_loss(self) -> bool:
        """Whether anything is added to the loss."""
        return bool(self.router_losses or self.logit_z_coefficient)

    def with_added_terms(
        self, model: nn.Module, compute_objective: Callable[[], dict[str, Tensor]], batch: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Compute the terms of a micro-batch: those of the objective, and those that a model with routers adds.

        All ranks must call.

        `compute_objective`: runs the model's forward pass and returns the objective's terms. Without gradients, they are all. In
        training, hooks record router logits, hidden states and chosen experts while it runs, and these terms are added:

        - `EXPERT_TOKENS`: how many tokens chose each expert, `[layers, experts]`, if the model has experts;
        - `ADDED_LOSS`: what is added to the objective's loss, if a router loss or the z-loss of the logits has a weight;
        - the router losses and `logits/z_loss`, each without its weight, for the metrics.

        With a balancing loss, ranks sum the choices of experts here, unless the batch has those of the whole step already.
        """
        if not torch.is_grad_enabled():
            return compute_objective()
        token_ids = batch["input_ids"]
        expert_tokens = self._empty_expert_tokens(token_ids) if self.experts_by_layer else None
        with recording_routing(RoutingRecord(_token_mask(batch), expert_tokens)) as record:
            terms = compute_objective()
        if expert_tokens is not None:
            terms[EXPERT_TOKENS] = expert_tokens  # the hooks have counted into it
        # A batch outside the training loop has no count of the whole step: its own tokens stand for it.
        step_tokens = batch.get("step_tokens", token_ids.numel())
        if self.router_losses:
            tokens_by_expert = self._step_tokens_by_expert(record, batch)
            terms |= self.router_losses.terms(record, tokens_by_expert, step_tokens)  # `ADDED_LOSS` among them
        if self.logit_z_coefficient:
            z_loss = _logit_z_loss(model, record, step_tokens)
            terms[ADDED_LOSS] = self.logit_z_coefficient * z_loss + terms.get(ADDED_LOSS, 0.0)
            terms["logits/z_loss"] = z_loss.detach()
        return terms

    def _empty_expert_tokens(self, ids: Tensor) -> Tensor:
        """Counters [layers, experts] of zero, on the device of `ids`; -1 where a layer has fewer experts than another."""
        expert_tokens = ids.new_zeros(len(self.experts_by_layer), max(self.experts_by_layer))
        for layer, number in enumerate(self.experts_by_layer):
            if number < expert_tokens.shape[1]:
                expert_tokens[layer, number:] = -1
        return expert_tokens

    def _step_tokens_by_expert(self, record: RoutingRecord, batch: dict[str, Any]) -> Tensor | None:
        """How many tokens of the whole step chose each expert, int64 [experts], for the balancing loss; None without that loss.

        With one micro-batch, the counts of this forward pass (`record`) are summed over ranks. With several, they were counted
        before the step, in `batch["tokens_by_expert"]`. All ranks must call.
        """
        if not self.router_losses.balance_weight:
            return None
        if "tokens_by_expert" in batch:  # counted before, over all micro-batches
            return batch["tokens_by_expert"]
        local_counts = self.router_losses.tokens_by_expert(record)
        if batch.get("ranks", 1) > 1:
            return sum_over_ranks(local_counts)
        return local_counts

    def count_tokens_by_expert(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """How many tokens of a micro-batch chose each expert, {"tokens_by_expert": int64 [experts]}.

        Runs a forward pass for it, without gradients and without a loss.
        """
        with recording_routing(RoutingRecord(_token_mask(batch), without_gradients=True)) as record:
            run_for_hooks(model, batch)
        return {"tokens_by_expert": self.router_losses.tokens_by_expert(record)}

    def start_lines(self, accumulation: int) -> list[str]:
        """Lines for the start screen: what is added to the loss for routers and logits, and which biases are frozen.

        `accumulation`: micro-batches of a step.
        """
        lines = []
        if self.router_losses.balance_weight:
            extra_pass = ""
            if accumulation > 1:
                extra_pass = "; counted in a forward pass of its own, since a step has several micro-batches"
            lines.append(
                f"routers: balancing loss times {self.router_losses.balance_weight:g}, over the tokens of a whole "
                f"step{extra_pass}"
            )
        if self.router_losses.z_weight:
            lines.append(f"routers: z-loss times {self.router_losses.z_weight:g}, the mean over tokens and layers")
        if self.logit_z_coefficient:
            lines.append(
                f"logits: z-loss times {self.logit_z_coefficient:g}, the mean over tokens, as the model's configuration asks"
            )
        if self.num_frozen_biases:
            lines.append("routers: the biases that balance their experts stay as they were loaded")
        return lines


def _logit_z_loss(model: nn.Module, record: RoutingRecord, step_tokens: float) -> Tensor:
    """Compute a micro-batch's part of the z-loss, which keeps the output's logits small: the step's mean of log(Z)^2.

    Z is the sum of a token's exponentiated logits. The head computes the logits anew from the recorded hidden states.
    """
    head: nn.Module = unwrap_adapter(model).get_output_embeddings()  # type: ignore[operator]
    sums = []
    for hidden in record.hidden:
        rows = hidden.reshape(-1, hidden.shape[-1])  # [tokens, width]
        sums.append(sum_of_squared_logsumexp(head, rows, record.token_mask(len(rows))))
    return torch.stack(sums).sum() / float(step_tokens)


def _token_mask(batch: dict[str, Any]) -> Tensor | None:
    """Which positions of a batch are tokens of documents; None if all are. Routers count no others."""
    mask: Tensor | None = batch.get("attention_mask", batch.get("is_token"))
    return mask


def install_added_losses(
    config: ModelConfig, hf_config: Any, untuned_model: nn.Module, model: nn.Module, kind: ModelKind
) -> tuple[AddedLosses | None, dict[str, str]]:
    """Prepare a tuned model for the losses that it adds (for routers and logits): hooks record what they need, biases are frozen.

    Frozen are the biases that balance experts, since no gradient changes them.

    `hf_config`: transformers' configuration.
    `untuned_model`: the model without what the tuning method wraps around its modules.

    Returns (the added losses, notes). The first is None for an encoder-decoder model, which gets neither hooks nor frozen biases,
    and for a model without experts to which nothing is added. Notes, by setting, say what the configuration asks for and does not
    get. Raises ConfigError for settings that the model cannot follow.
    """
    router_losses, output_index_by_router, notes = router_losses_of_run(config, hf_config, untuned_model, kind)
    if kind is ModelKind.encoder_decoder:
        return None, notes
    base_model = unwrap_adapter(model)
    if router_losses:
        hook_router_logits(base_model, output_index_by_router)
    logit_z_coefficient = 0.0
    if kind is ModelKind.causal:
        logit_z_coefficient = _install_logit_z_loss(base_model, logit_z_weight(hf_config), notes)
    added = AddedLosses(
        router_losses=router_losses,
        experts_by_layer=enable_token_counts(base_model),
        num_frozen_biases=_freeze_balancing_biases(base_model),
        logit_z_coefficient=logit_z_coefficient,
    )
    if added.changes_loss or added.experts_by_layer or added.num_frozen_biases:
        return added, notes
    return None, notes


def _install_logit_z_loss(causal_lm: Any, weight: float, notes: dict[str, str]) -> float:
    """Add a hook that records what the z-loss of the logits needs; returns the weight that it gets, 0 for none.

    The loss keeps logits small. It makes them from hidden states, which a model whose own forward pass makes the logits does not
    give: then the weight is 0, and a note says so.
    """
    if not weight:
        return 0.0
    if not causal_lm.forward_path.fused:
        notes["model.z_loss_coefficient"] = f"0 instead of {weight:g}: the model's own forward pass makes its logits"
        return 0.0
    hook_decoder_output(causal_lm.get_decoder())
    return weight


def _freeze_balancing_biases(base_model: nn.Module) -> int:
    """Freeze the biases that balance experts, which no gradient changes; returns how many there are."""
    bias_names = balancing_biases(base_model)
    for name, parameter in base_model.named_parameters():
        if name in bias_names:
            parameter.requires_grad_(False)
    return len(bias_names)
