"""A row of the embeddings that transformers sets to zero as it loads: not trained, and named where an export drifts."""

import pytest
import torch
import transformers

from tests.helpers.tokenizers import tiny_tokenizer
from tests.models import tiny
from trainer.data.config import Layout
from trainer.export.verify import DriftError, verify_export
from trainer.losses.fuse import install_loss_head
from trainer.model.frozen_rows import always_zero_rows, zeroed_row
from trainer.model.layout import AttentionLayout


def test_frozen_embedding_rows_are_known_and_reported():
    youtu, bert = tiny.tiny_model("youtu"), tiny.tiny_model("bert")
    assert bert.get_input_embeddings().padding_idx is not None  # which is loaded as it is stored
    assert (zeroed_row(youtu), zeroed_row(bert), zeroed_row(tiny.tiny_model("llama"))) == (2, None, None)
    arranged = AttentionLayout(Layout.padded, "sdpa", {})
    assert always_zero_rows(youtu, arranged) == {"model.embed_tokens.weight": 2}
    assert "row 2 of model.embed_tokens (padding) stays zero" in arranged.notes["model.embeddings"]


@pytest.mark.parametrize("by_row", [False, True])
def test_frozen_embedding_row_gets_no_gradient_and_the_others_do(by_row):
    model = tiny.tiny_model("youtu")
    weight = model.get_input_embeddings().weight
    hidden, targets = torch.randn(7, weight.shape[1], generator=torch.Generator().manual_seed(3)), torch.arange(7) + 20
    found = {}
    for still in (None, 2):
        install_loss_head(model, model.config, frozen_row=still)
        head, weight.grad = model.get_output_embeddings(), None
        result = head(hidden, targets=targets, by_row=True).sum() if by_row else head(hidden, targets=targets)[0]
        result.backward()
        found[still] = weight.grad.clone()
        model.set_output_embeddings(torch.nn.Linear(*reversed(weight.shape), bias=False))
        model.get_output_embeddings().weight = weight
    assert found[None][2].any() and not found[2][2].any()
    found[None][2] = 0
    assert torch.equal(found[None], found[2])


def test_frozen_embedding_rows_are_named_when_an_export_loads_otherwise(tmp_path):
    model = tiny.tiny_model("youtu")
    with torch.no_grad():
        model.get_input_embeddings().weight[2] += 5.0
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    ids = [5, 2, 30, 9]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    with pytest.raises(DriftError, match=r"loaded otherwise than stored: model.embed_tokens.weight \(rows 2\)$"):
        verify_export(tmp_path, token_ids=ids, reference=logits)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        right = plain(input_ids=torch.tensor([ids])).logits[0]
    assert verify_export(tmp_path, token_ids=ids, reference=right).max_abs_difference < 1e-4
