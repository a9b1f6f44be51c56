"""Loss terms that a model adds over a whole step, for its routers and its logits; and the load of its experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from strategies.runtime import dist_sum
from trainer.losses.z_loss import squared_logsumexp
from trainer.model.balance import RouterLosses, logit_z_weight, losses_of
from trainer.model.config import ModelConfig, ModelKind
from trainer.model.routing import (
    ADDED_LOSS,
    EXPERT_TOKENS,
    RoutingRecord,
    balancing_biases,
    number_experts,
    record_hidden,
    record_logits,
    watching,
)
from trainer.objectives.causal import forward_pass, plain_model


@dataclass(frozen=True, slots=True)
class Routed:
    """What is asked of the routers, experts and logits of a model."""

    losses: RouterLosses
    experts: tuple[int, ...]
    """How many of them each layer has."""
    biases: int = 0
    """Biases that balance experts and stay as they were loaded."""
    logit_z: float = 0.0
    """Weight of the z-loss of the output's logits; 0: it is not added."""

    @property
    def adds(self) -> bool:
        """Whether anything is added to the loss."""
        return bool(self.losses or self.logit_z)

    def terms(
        self, model: nn.Module, compute: Callable[[], dict[str, Tensor]], batch: dict[str, Any]
    ) -> dict[str, Tensor]:
        """The objective's terms, which `compute` gives of `model`, and in training `ADDED_LOSS`, its parts, and `expert_tokens`.

        With a balancing loss and several ranks, all ranks must call where the step's choices are not yet known.
        """
        if not torch.is_grad_enabled():
            return compute()
        ids = batch["input_ids"]
        tokens = self._none(ids) if self.experts else None
        with watching(RoutingRecord(batch.get("attention_mask"), tokens)) as seen:
            found = compute()
        if tokens is not None:
            found[EXPERT_TOKENS] = tokens
        step_tokens = batch.get("step_tokens", ids.numel())
        if self.losses:
            found |= self.losses.terms(seen, self._choices(seen, batch), step_tokens)
        if self.logit_z:
            head: nn.Module = plain_model(model).get_output_embeddings()  # type: ignore[operator]
            hidden = [states.reshape(-1, states.shape[-1]) for states in seen.hidden]
            parts = [squared_logsumexp(head, rows, seen.kept(len(rows))) for rows in hidden]
            z = torch.stack(parts).sum() / float(step_tokens)
            found[ADDED_LOSS] = self.logit_z * z + found.get(ADDED_LOSS, 0.0)
            found["logits/z_loss"] = z.detach()
        return found

    def _none(self, ids: Tensor) -> Tensor:
        """No token of any expert, on the device of `ids`; below zero where a layer has fewer experts than another."""
        tokens = ids.new_zeros(len(self.experts), max(self.experts))
        for row, number in enumerate(self.experts):
            if number < tokens.shape[1]:
                tokens[row, number:] = -1
        return tokens

    def _choices(self, seen: RoutingRecord, batch: dict[str, Any]) -> Tensor | None:
        if not self.losses.balance:
            return None
        if "choices" in batch:
            return batch["choices"]
        own = self.losses.choices(seen)
        return dist_sum(own) if batch.get("ranks", 1) > 1 else own

    def choices(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What the routers choose for a micro-batch, and nothing else of it."""
        with watching(RoutingRecord(batch.get("attention_mask"), without_gradients=True)) as seen:
            forward_pass(model, batch)
        return {"choices": self.losses.choices(seen)}

    def said(self, accumulation: int) -> list[str]:
        """What the start of a run says of this."""
        lines = []
        if self.losses.balance:
            again = "; counted in a forward pass of its own, since a step has several micro-batches"
            lines.append(
                f"routers: balancing loss times {self.losses.balance:g}, over the tokens of a whole step"
                + (again if accumulation > 1 else "")
            )
        if self.losses.z:
            lines.append(f"routers: z-loss times {self.losses.z:g}, the mean over tokens and layers")
        if self.logit_z:
            lines.append(
                f"logits: z-loss times {self.logit_z:g}, the mean over tokens, as the model's configuration asks"
            )
        if self.biases:
            lines.append("routers: the biases that balance their experts stay as they were loaded")
        return lines


def routed(
    config: ModelConfig, settings: Any, plain: nn.Module, model: nn.Module, kind: ModelKind
) -> tuple[Routed | None, dict[str, str]]:
    """Prepare the tuned `model` to be seen, and what its configuration asks that is not done, by setting.

    None where there is nothing to see, and of encoder-decoder models. `settings`: transformers' configuration; `plain`: its
    model before tuning. Raises ConfigError where a word asks for what cannot be.
    """
    losses, routers, notes = losses_of(config, settings, plain, kind)
    if kind is ModelKind.encoder_decoder:
        return None, notes
    root = plain_model(model)
    if losses:
        record_logits(root, routers)
    logit_z = logit_z_weight(settings) if kind is ModelKind.causal else 0.0
    if logit_z and not root.way.fused:  # type: ignore[union-attr]
        notes["model.z_loss_coefficient"] = f"0 instead of {logit_z:g}: the model's own forward pass makes its logits"
        logit_z = 0.0
    if logit_z:
        record_hidden(root.get_decoder())  # type: ignore[operator]
    biases = balancing_biases(root)
    for name, parameter in root.named_parameters():
        if name in biases:
            parameter.requires_grad_(False)
    experts = number_experts(root)
    found = Routed(losses, experts, len(biases), logit_z)
    return found if found.adds or experts or biases else None, notes
