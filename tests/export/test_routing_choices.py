"""An export in half precision is compared with each token at the experts that training had it at, and still found out."""

import pytest
import torch

from tests.helpers.tokenizers import tiny_tokenizer
from tests.models import tiny
from trainer.export.load import load_export
from trainer.export.routing_choices import RoutingRecorder, RoutingReplay
from trainer.export.verify import DriftError, probe_ids, verify_export

IDS = probe_ids(tiny_tokenizer())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(the model, its logits, what it chose, its directory in bfloat16): two experts nearly tied, as rounding has them."""
    model = tiny.tiny_model("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            gate = layer.mlp.gate.weight
            gate[1] = gate[0] + 1e-4 * torch.randn_like(gate[0])
    directory = tmp_path_factory.mktemp("mixtral")
    with torch.no_grad(), RoutingRecorder() as choices:
        logits = model(torch.tensor([IDS])).logits[0]
    tiny_tokenizer().save_pretrained(directory)
    model.to(torch.bfloat16).save_pretrained(directory)
    return model, logits, choices, directory


def test_routing_choices_of_nearly_tied_experts_are_kept_in_verification(trained):
    _, logits, choices, directory = trained
    with pytest.raises(DriftError, match="does not compute what was trained"):
        verify_export(directory, token_ids=IDS, reference=logits)
    found = verify_export(directory, token_ids=IDS, reference=logits, training_choices=choices)
    assert found.num_replayed_choices > 0 and f"{found.num_replayed_choices} of which rounding would change" in str(
        found
    )


def test_routing_choices_do_not_hide_swapped_experts(trained, tmp_path):
    _, logits, choices, directory = trained
    broken = load_export(directory).to(torch.bfloat16)
    with torch.no_grad():
        down = broken.model.layers[1].mlp.experts.down_proj
        down[[2, 3]] = down[[3, 2]]
    broken.save_pretrained(tmp_path)
    with pytest.raises(DriftError, match="does not compute what was trained"):
        verify_export(tmp_path, token_ids=IDS, reference=logits, training_choices=choices)


def test_routing_choices_of_another_sequence_are_not_applied():
    with RoutingRecorder() as choices:
        torch.arange(6.0).view(2, 3).topk(2)
    with RoutingReplay(choices) as kept:
        values, indices = torch.topk(torch.tensor([[5.0, 1.0, 0.0], [0.0, 1.0, 2.0]]), 2)
        assert indices.tolist() == [[2, 1], [2, 1]] and values.tolist() == [[0.0, 1.0], [2.0, 1.0]]
        assert (kept.calls_match, kept.num_replaced) == (True, 2)
        assert torch.topk(torch.tensor([3.0, 4.0]), 1).indices.item() == 1
    assert not kept.calls_match
