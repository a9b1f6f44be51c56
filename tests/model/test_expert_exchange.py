"""What a rank keeps of the rows that others send to its experts: bounded, whoever the router prefers."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from strategies.expert_counts import LayerRowCounts
from strategies.expert_share import ExpertShare
from tests.models.tiny import tiny_config
from trainer.model import expert_exchange
from trainer.tuning.expert_parts import expert_modules_by_name

SENT = 64
"""Rows that the rank sends."""


class Flooded:
    """Counts of a rank that gets `received` rows, all for its first expert."""

    def __init__(self, received: int) -> None:
        self.received = received

    def row_counts(self, chosen, rows):
        by_expert = torch.zeros(2, len(chosen) // 2, dtype=torch.int64)
        by_expert[1, 0] = self.received
        return LayerRowCounts([0, rows], [0, self.received], by_expert)


class Echo:
    """An exchange in which the rows of this rank come back, as often as is asked."""

    @staticmethod
    def apply(flat, sent, received, group):
        return flat.repeat(-(-sum(received) // len(flat)))[: sum(received)]


@pytest.fixture(scope="module")
def experts():
    """One layer whose experts make four times as many numbers of a row as it has."""
    settings = tiny_config("mixtral")
    settings.intermediate_size = 4 * settings.hidden_size
    model = AutoModelForCausalLM.from_config(settings, experts_implementation="grouped_mm", dtype="float32")
    return next(iter(expert_modules_by_name(model).values()))


def kept_and_gradient(experts, received, monkeypatch):
    """(bytes that a forward pass keeps for the backward pass, the gradient of the experts' first weight)."""
    monkeypatch.setattr(expert_exchange, "AllToAll", Echo)
    monkeypatch.setattr(expert_exchange, "MIN_CHUNK_ROWS", 1)
    share = ExpertShare(2, 0, None, Flooded(received))
    module = expert_exchange.OwnExperts(experts, 2 * experts.num_experts)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(SENT, experts.down_proj.shape[1], generator=generator, requires_grad=True)
    chosen = torch.zeros(SENT, 1, dtype=torch.int64)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    experts.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = expert_exchange.expert_parallel_forward(module, share, hidden, chosen, torch.ones(SENT, 1), None)
    output.sum().backward()
    return sum(kept.values()), next(iter(experts.parameters())).grad.clone()


def test_what_experts_make_is_kept_for_twice_the_rows_that_are_sent_and_no_more(experts, monkeypatch):
    kept_at_most, _ = kept_and_gradient(experts, 2 * SENT, monkeypatch)
    row_bytes = 4 * experts.down_proj.shape[1]
    for received in (3 * SENT, 8 * SENT):
        kept, gradient = kept_and_gradient(experts, received, monkeypatch)
        assert kept < kept_at_most + 3 * received * row_bytes  # what arrives and what goes back lie there in any case
        monkeypatch.setattr(expert_exchange, "MAX_KEPT_RATIO", 100)
        kept_whole, gradient_of_whole = kept_and_gradient(experts, received, monkeypatch)
        monkeypatch.setattr(expert_exchange, "MAX_KEPT_RATIO", 2)
        assert kept_whole > kept + received * row_bytes, "nothing would be kept anyway"
        torch.testing.assert_close(gradient, gradient_of_whole, rtol=1e-4, atol=1e-5)
