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
from trainer.model.shrink import SMALL_VOCABULARY_SIZE, refuse_unfit_copy
from trainer.objectives.causal import MODEL_INPUTS, token_states
from trainer.objectives.forward_path import (
    FIRST_ORDINARY_ID,
    MAX_COPY_ELEMENTS,
    MAX_RELATIVE_DIFFERENCE,
    disturb_parameters,
    error_line,
    on_small_copy,
    reproducible_on_cpu,
)
from trainer.objectives.pooled import SCORE_HEAD, PooledCollator, classifier_logits
from trainer.objectives.proof_cache import keep_proof, proof_file, read_proof

DOCUMENT_LENGTHS = (5, 23, 14)
NUM_LABELS = 3
PADDING_ID = 0


def classifier_packing_problem(hf_config: Any, build: Callable[[], nn.Module], attention: str) -> str | None:
    """Why a classifier may not run on rows of several documents that ranks share; None if it may.

    Packing: documents lie one after another in a row without padding. From this host's cache, else tested now on a small copy.
    The result is cached, {"problem": None}, unless the copy failed.

    `build`: makes the classifier of `hf_config` on meta.
    `attention`: the kernel for documents in a row.
    """
    file = proof_file(hf_config, attention=attention, subject="pooled classifier")
    stored = read_proof(file)
    if stored is not None and "problem" in stored:
        stored_problem: str | None = stored["problem"]
        return stored_problem
    try:
        with reproducible_on_cpu():
            problem = _why_rows_cannot_be_packed(hf_config, build(), attention)
    except Exception as error:  # noqa: BLE001 - an architecture may fail in any way. Not kept: the reason may pass
        return f"its small copy fails: {error_line(error)}"
    keep_proof(file, {"problem": problem})
    return problem


def _why_rows_cannot_be_packed(hf_config: Any, meta_model: nn.Module, attention: str) -> str | None:
    """Why documents may not lie in one row of a classifier that ranks share; None if they may.

    Decided on the first small copy of `meta_model`, the classifier on meta, that can be run. If none can, raises the error of the
    first.
    """
    if not isinstance(getattr(meta_model, SCORE_HEAD, None), nn.Module):
        return f"its classifier ({type(meta_model).__name__}) does not score the last token"

    def problem_of_copy(small_config: Any, dtype: torch.dtype) -> str | None:
        return _PackingProof(hf_config, meta_model, small_config, dtype).packing_problem(attention)

    return on_small_copy(hf_config, meta_model, problem_of_copy)


class _PackingProof:
    """A small random copy of a classifier, with some documents to compare it on."""

    def __init__(self, hf_config: Any, meta_model: nn.Module, small_config: Any, dtype: torch.dtype) -> None:
        """Make the small copy's configuration, and documents to compare it on. Raises NotShrinkable if it would prove nothing.

        `small_config`: a small copy of `hf_config`, of which `meta_model` is the classifier on meta. `dtype`: in which it is
        compared.
        """
        self.dtype = dtype
        self.model_class = transformers_class(ModelKind.classifier, hf_config)
        self.small_config = small_config
        set_dropout(small_config, 0.0)
        small_config.num_labels = NUM_LABELS
        text_model_config(small_config).pad_token_id = PADDING_ID
        with torch.device("meta"):
            copy_on_meta = self._build("eager")
        refuse_unfit_copy(hf_config, meta_model, small_config, copy_on_meta, max_parameters=MAX_COPY_ELEMENTS)
        vocabulary = min(text_model_config(small_config).vocab_size, SMALL_VOCABULARY_SIZE)
        generator = np.random.default_rng(0)
        self.samples = []
        for length in DOCUMENT_LENGTHS:
            ids = generator.integers(FIRST_ORDINARY_ID, vocabulary, length).astype(np.int32)
            self.samples.append(Sample(ids, np.ones(length, dtype=bool)))
        # A document may end with the token that pads: the last but one is then kept.
        self.samples[1].input_ids[-1] = PADDING_ID
        # Multiplied with the logits, they make a scalar for the backward pass in which each logit counts differently.
        self.random_logit_weights = torch.from_numpy(generator.standard_normal((len(DOCUMENT_LENGTHS), NUM_LABELS)))

    def _build(self, attention: str) -> Any:
        options = {"attn_implementation": attention, "experts_implementation": "eager", "dtype": self.dtype}
        return self.model_class.from_config(copy.deepcopy(self.small_config), **options)

    def packing_problem(self, attention: str) -> str | None:
        """Why several documents may not share a row of this classifier, nor ranks a row; None if they may.

        - Logits and gradients of several documents in one row must be those of `hf_model`, transformers' own classifier in eager
          attention, on each document alone.
        - Slices of the row must give the states that the whole row gives. Each logit is made of one state, so states are enough.
        """
        hf_model = self._build("eager").eval()
        disturb_parameters(hf_model)
        model = self._build(attention).eval()
        model.load_state_dict(hf_model.state_dict())
        row = PooledCollator(Layout.padding_free, pad_token_id=PADDING_ID)(self.samples)
        return self._difference_from_hf(hf_model, model, row) or self._row_slicing_problem(hf_model.state_dict(), row)

    def _difference_from_hf(self, hf_model: nn.Module, model: nn.Module, row: dict[str, Any]) -> str | None:
        """How logits or gradients of `model` on a row of all documents differ from `hf_model`'s on each alone; None if not.

        `hf_model`: transformers' own classifier with the same weights. `row`: the batch with all documents. Leaves gradients in
        both models.
        """
        expected = torch.cat([self._expected_logits(hf_model, sample) for sample in self.samples])
        logits = classifier_logits(model, row).to(expected.dtype)
        difference = float((logits - expected).detach().abs().max() / expected.detach().abs().max())
        if not difference <= MAX_RELATIVE_DIFFERENCE:  # a NaN is no agreement
            return f"its logits differ by {difference:.1e} between a row of several documents and each document alone"
        (expected.double() * self.random_logit_weights).sum().backward()
        (logits.double() * self.random_logit_weights).sum().backward()
        difference = _gradient_distance(hf_model, model)
        if not difference <= MAX_RELATIVE_DIFFERENCE:
            return (
                f"its gradients differ by {difference:.1e} between a row of several documents and each document alone"
            )
        return None

    @staticmethod
    def _expected_logits(hf_model: Any, sample: Sample) -> Tensor:
        """Logits `[1, NUM_LABELS]` of a document alone."""
        ids = torch.from_numpy(sample.input_ids.astype(np.int64))[None]
        logits: Tensor = hf_model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
        return logits

    def _row_slicing_problem(self, weights: dict[str, Tensor], row: dict[str, Any]) -> str | None:
        """Why several ranks may not share a row: slices of it give other states than the whole row; None if they give the same.

        Attention is replaced by a stand-in in which each token sees itself alone. `weights`: of transformers' own model.
        """
        attention = sequence_proof.register_token_local_attention()
        model = self._build(sequence_proof.TOKEN_LOCAL_ATTENTION).eval()
        model.load_state_dict(weights)
        if problem := rotary.whole_row_problem(model):
            return problem
        inputs = {key: row[key] for key in MODEL_INPUTS if key in row}
        return sequence_proof.sequence_problem(lambda part: token_states(model.base_model, part)[0], inputs, attention)


def _gradient_distance(hf_model: nn.Module, model: nn.Module) -> float:
    """How far the gradients of `model` are from those of `hf_model`, transformers' own: a norm relative to the latter's.

    A missing gradient counts as zero.
    """
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    norms = []
    distances = []
    for name, parameter in hf_model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found = gradients[name]
        norms.append(expected.norm())
        distances.append(expected.norm() if found is None else (found - expected).norm())
    return float(torch.stack(distances).norm() / torch.stack(norms).norm())
