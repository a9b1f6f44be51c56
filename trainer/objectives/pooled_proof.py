"""Proves that a classifier may run on rows without padding, and that ranks may share these rows.

On a small random copy of the model's own configuration, `classifier_logits` of several documents in one row must be what
transformers' own classifier gives for each document alone in eager attention, with the same gradients. And slices of the row
must be the slices of the whole row (`trainer/model/sequence_proof.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer.data.config import Layout
from trainer.data.store.sequences import Sample
from trainer.model import rotary, sequence_proof
from trainer.model.architecture import set_dropout, text_model_config, transformers_class
from trainer.model.config import ModelKind
from trainer.model.shrink import SMALL_VOCABULARY_SIZE, NotShrinkable, num_lost_layer_kinds
from trainer.objectives.causal import MODEL_INPUTS, token_states
from trainer.objectives.forward_path import MAX_COPY_ELEMENTS, TOLERANCE, error_line, on_small_copy
from trainer.objectives.pooled import HEAD, PooledCollator, classifier_logits
from trainer.objectives.proof_cache import keep_proof, proof_file, read_proof

LENGTHS = (5, 23, 14)
OUTPUTS = 3
PADDING = 0


def pooling_problem(config: Any, build: Callable[[], nn.Module], attention: str) -> str | None:
    """Why ranks may not share rows of a classifier; None if they may. From this host's cache, else proven now.

    `config`: transformers' configuration. `build` makes its classifier on meta. `attention`: the kernel for documents in a row.
    """
    file = proof_file(config, attention=attention, subject="pooled classifier")
    stored = read_proof(file)
    if stored is not None and "problem" in stored:
        stored_problem: str | None = stored["problem"]
        return stored_problem
    rng_state = torch.random.get_rng_state()
    default_dtype = torch.get_default_dtype()
    try:
        torch.default_generator.manual_seed(0)
        problem = _prove_pooling(config, build(), attention)
    except Exception as error:  # noqa: BLE001 - an architecture may fail in any way. Not kept: the reason may pass
        return f"its small copy fails: {error_line(error)}"
    finally:
        torch.random.set_rng_state(rng_state)
        torch.set_default_dtype(default_dtype)
    keep_proof(file, {"problem": problem})
    return problem


def _prove_pooling(config: Any, plain: nn.Module, attention: str) -> str | None:
    """Why ranks may not share rows of a classifier, by the first small copy of it that can be run; None if they may.

    If no copy can be run, raises the error of the first. `plain`: the classifier on meta.
    """
    if not isinstance(getattr(plain, HEAD, None), nn.Module):
        return f"its classifier ({type(plain).__name__}) does not score the last token"
    return on_small_copy(
        config, plain, lambda small, dtype: _PoolingProof(config, plain, small, dtype).packing_problem(attention)
    )


class _PoolingProof:
    """A small random copy of a classifier, with some documents to compare it on."""

    def __init__(self, config: Any, plain: nn.Module, small: Any, dtype: torch.dtype) -> None:
        """`small`: a small copy of `config`, of which `plain` is the classifier on meta."""
        self.dtype = dtype
        self.auto = transformers_class(ModelKind.classifier, config)
        self.config = small
        set_dropout(small, 0.0)
        small.num_labels = OUTPUTS
        text_model_config(small).pad_token_id = PADDING
        with torch.device("meta"):
            copy_on_meta = self._build("eager")
        size = sum(parameter.numel() for parameter in copy_on_meta.parameters())
        if size > MAX_COPY_ELEMENTS:
            raise NotShrinkable(f"a small copy would have {size:,} elements")
        if lost := num_lost_layer_kinds(config, plain, small, copy_on_meta):
            raise NotShrinkable(f"a small copy lacks {lost} of its kinds of layers")
        vocabulary = min(text_model_config(small).vocab_size, SMALL_VOCABULARY_SIZE)
        generator = np.random.default_rng(0)
        self.samples = []
        for length in LENGTHS:
            ids = generator.integers(4, vocabulary, length).astype(np.int32)
            self.samples.append(Sample(ids, np.ones(length, dtype=bool)))
        # A document may end with the token that pads: the last but one is then kept.
        self.samples[1].input_ids[-1] = PADDING
        # Multiplied with the logits, they make a scalar for the backward pass in which each logit counts differently.
        self.random_logit_weights = torch.from_numpy(generator.standard_normal((len(LENGTHS), OUTPUTS)))

    def _build(self, attention: str) -> Any:
        options = {"attn_implementation": attention, "experts_implementation": "eager", "dtype": self.dtype}
        return self.auto.from_config(copy.deepcopy(self.config), **options)

    def packing_problem(self, attention: str) -> str | None:
        """Why documents may not share rows in this classifier, nor ranks a row; None if they may. Compared on a small copy.

        - Logits and gradients of several documents in one row must be those of transformers' own classifier on each document
          alone.
        - Slices of the row must give the states that the whole row gives.
        """
        stock = self._build("eager").eval()
        with torch.no_grad():
            # A parameter that starts at zero would have no effect, and an error in it would not show.
            for parameter in stock.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        model = self._build(attention).eval()
        model.load_state_dict(stock.state_dict())
        row = PooledCollator(Layout.padding_free, PADDING)(self.samples)
        return self._difference_from_stock(stock, model, row) or self._row_slicing_problem(stock.state_dict(), row)

    def _difference_from_stock(self, stock: nn.Module, model: nn.Module, row: dict[str, Any]) -> str | None:
        """How a row's logits or gradients differ from the stock classifier's on single documents; None if they do not."""
        expected = torch.cat([self._stock_logits(stock, sample) for sample in self.samples])
        logits = classifier_logits(model, row).to(expected.dtype)
        difference = float((logits - expected).detach().abs().max() / expected.detach().abs().max())
        if not difference <= TOLERANCE:  # a NaN is no agreement
            return f"its logits differ by {difference:.1e} between a row of several documents and each document alone"
        (expected.double() * self.random_logit_weights).sum().backward()
        (logits.double() * self.random_logit_weights).sum().backward()
        difference = _gradient_distance(stock, model)
        if not difference <= TOLERANCE:
            return (
                f"its gradients differ by {difference:.1e} between a row of several documents and each document alone"
            )
        return None

    @staticmethod
    def _stock_logits(stock: Any, sample: Sample) -> Tensor:
        """`[1, OUTPUTS]` of a document alone."""
        ids = torch.from_numpy(sample.input_ids.astype(np.int64))[None]
        logits: Tensor = stock(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
        return logits

    def _row_slicing_problem(self, weights: dict[str, Tensor], row: dict[str, Any]) -> str | None:
        """Why slices of the row are not the slices of the whole row; None if they are."""
        attention = sequence_proof.register()
        model = self._build(sequence_proof.NAME).eval()
        model.load_state_dict(weights)
        if problem := rotary.whole_row_problem(model):
            return problem
        inputs = {key: row[key] for key in MODEL_INPUTS if key in row}
        return sequence_proof.sequence_problem(lambda part: token_states(model.base_model, part)[0], inputs, attention)


def _gradient_distance(stock: nn.Module, model: nn.Module) -> float:
    """Norm of the difference of two models' gradients, over the norm of the stock model's; a missing gradient counts as zero."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    norms = []
    distances = []
    for name, parameter in stock.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found = gradients[name]
        norms.append(expected.norm())
        distances.append(expected.norm() if found is None else (found - expected).norm())
    return float(torch.stack(distances).norm() / torch.stack(norms).norm())
