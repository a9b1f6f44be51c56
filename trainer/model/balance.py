"""What a model adds to its loss: for its routers, balance of experts and a z-loss, and a z-loss for the output's logits.

Balance, as transformers computes it for the class (Fedus et al. 2021, arXiv:2101.03961): with f the share of the step's
tokens that rank an expert among their first k, and P the mean of its probability, `experts * sum(f * P)`, over all layers
together. f and P are taken over the whole global batch: P is a sum over tokens, and f, which has no gradient, is known
before the first backward pass. z-loss: the mean over tokens and layers of the squared logsumexp of the router's
logits (Zoph et al. 2022, arXiv:2202.08906). The same of the output's logits, over tokens, is what Bamba's class adds.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from strategies.errors import ConfigError
from trainer.model.architecture import text_settings
from trainer.model.config import ModelConfig, ModelKind
from trainer.model.routing import ADDED_LOSS, RoutingRecord, balancing_biases, recorded_routers

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
"""What classes and configurations call the weight of the balancing loss."""
FUNCTION = "load_balancing_loss_func"
"""What modules of transformers call their balancing loss."""


@dataclass(frozen=True, slots=True)
class RouterLosses:
    """What is added to the loss of a step for its routers."""

    balance: float = 0.0
    """Weight of the balancing loss; 0: it is not added."""
    top_k: int = 1
    """Experts a token is counted for."""
    z: float = 0.0
    """Weight of the z-loss; 0: it is not added."""

    def __bool__(self) -> bool:
        return bool(self.balance or self.z)

    def choices(self, seen: RoutingRecord) -> Tensor:
        """int64 `[experts]`: for how many tokens an expert is among the first, over all layers of the pass."""
        total = torch.zeros(seen.logits[0].shape[-1], dtype=torch.int64, device=seen.logits[0].device)
        with torch.no_grad():
            for logits in seen.logits:
                first = logits.softmax(-1).topk(self.top_k, dim=-1).indices
                kept = seen.kept(len(first))
                ones = torch.ones_like(first) if kept is None else kept.long()[:, None].expand_as(first)
                total.scatter_add_(0, first.reshape(-1), ones.reshape(-1))
        return total

    def terms(self, seen: RoutingRecord, choices: Tensor | None, tokens: int) -> dict[str, Tensor]:
        """What the pass adds to the step's loss, `ADDED_LOSS` (with the gradient), and to its parts without their weights.

        `choices [experts]` are those of the whole step, which has `tokens`; None where there is no balancing loss.
        """
        rows = float(tokens * len(seen.logits))
        found: dict[str, Tensor] = {}
        total = seen.logits[0].new_zeros((), dtype=torch.float32)
        kept = [seen.kept(len(logits)) for logits in seen.logits]
        if choices is not None:
            shares = (choices.double() / rows).float()
            parts = [_summed(logits.float().softmax(-1), k) for logits, k in zip(seen.logits, kept, strict=True)]
            balance = len(shares) * (shares * torch.stack(parts).sum(0)).sum() / rows
            total, found["router/balance_loss"] = total + self.balance * balance, balance.detach()
        if self.z:
            parts = [
                _summed(logits.float().logsumexp(-1).square(), k) for logits, k in zip(seen.logits, kept, strict=True)
            ]
            z = torch.stack(parts).sum() / rows
            total, found["router/z_loss"] = total + self.z * z, z.detach()
        return {ADDED_LOSS: total, **found}


def _summed(values: Tensor, kept: Tensor | None) -> Tensor:
    """The sum over positions that are tokens."""
    if kept is not None:
        values = values * (kept if values.dim() == 1 else kept[:, None])
    return values.sum(0)


def losses_of(
    config: ModelConfig, settings: Any, plain: nn.Module, kind: ModelKind
) -> tuple[RouterLosses, dict[str, int], dict[str, str]]:
    """The losses that a run adds, the routers that they are made of, and what was not done that the model's config asks.

    `settings`: transformers' configuration; `plain`: its model. Raises ConfigError where a word asks for what cannot be.
    """
    text, words = text_settings(settings), (config.router_aux_loss, config.router_z_loss)
    notes: dict[str, str] = {}
    asked = bool(getattr(settings, "output_router_logits", False) or getattr(text, "output_router_logits", False))
    if not asked and not any(words):
        return RouterLosses(), {}, notes
    routers = recorded_routers(plain) if kind is not ModelKind.encoder_decoder else {}
    if not routers:
        lacking = f"a {settings.model_type} has no router whose logits transformers records"
        if kind is ModelKind.encoder_decoder:
            lacking = f"routers are balanced in causal models and classifiers, and a {settings.model_type} is an encoder-decoder"
        _refuse(config, lacking)
        if config.router_aux_loss is None:
            notes["model.router_aux_loss"] = f"0, although the model's configuration asks for it: {lacking}"
        return RouterLosses(), {}, notes
    weight, top_k = config.router_aux_loss, 1
    if weight is None:
        weight = float(_first(plain, text, COEFFICIENTS) or 0.0) if asked else 0.0
    if weight:
        top_k = int(_first(plain, text, ("num_experts_per_tok",)) or 1)
        if (reason := _unusual(plain, top_k)) is not None:
            biased = " (it is balanced by a bias, which stays as it was loaded)" if balancing_biases(plain) else ""
            if config.router_aux_loss:
                raise ConfigError(
                    f"model.router_aux_loss={weight:g}: a {settings.model_type} has {reason}{biased}; set "
                    "model.router_aux_loss=0"
                )
            notes["model.router_aux_loss"] = f"0: a {settings.model_type} has {reason}{biased}"
            weight = 0.0
    return RouterLosses(weight, top_k, config.router_z_loss), routers, notes


def _first(plain: nn.Module, text: Any, names: tuple[str, ...]) -> Any:
    """The first of these that the model or its configuration has."""
    values = (getattr(owner, name, None) for owner in (plain, text) for name in names)
    return next((value for value in values if value is not None), None)


def _refuse(config: ModelConfig, reason: str) -> None:
    for word, value in (("router_aux_loss", config.router_aux_loss), ("router_z_loss", config.router_z_loss)):
        if value:
            raise ConfigError(f"model.{word}={value:g}: {reason}; leave it out")


def logit_z_weight(settings: Any) -> float:
    """Weight of the z-loss of the output's logits, where the model's class adds one (Bamba's); else 0."""
    return float(getattr(text_settings(settings), "z_loss_coefficient", None) or 0.0)


def _unusual(plain: nn.Module, top_k: int) -> str | None:
    """Why the class's balancing loss is not the one computed here, found by trial on a few logits; None where it is."""
    function = getattr(sys.modules[type(plain).__module__], FUNCTION, None)
    if function is None:
        return "no balancing loss in transformers"
    draw = torch.Generator().manual_seed(0)
    experts = top_k + 3
    logits = [torch.randn(6, experts, generator=draw) for _ in range(2)]
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    seen = RoutingRecord(mask, logits=logits)
    ours = RouterLosses(balance=1.0, top_k=top_k)
    expected = ours.terms(seen, ours.choices(seen), int(mask.sum()))[ADDED_LOSS]
    try:
        found = function(tuple(logits), experts, top_k, mask)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return "a balancing loss of its own in transformers, which is not computed here"
    same = torch.is_tensor(found) and torch.allclose(found.float(), expected, rtol=1e-5)
    return None if same else "a balancing loss of its own in transformers, which is not computed here"
