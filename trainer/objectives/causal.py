"""What objectives over next tokens share: the decoder runs on all tokens, the head on supervised positions only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strategies.sequence import sum_over_group
from trainer.losses.next_token import RowWeighting, computes_loss, logits_loss
from trainer.model import flex, rotary
from trainer.objectives.base import Reference

MODEL_INPUTS = (
    "input_ids",
    "position_ids",
    "attention_mask",
    "decoder_input_ids",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "document_bounds",
    "branches",
    "row_slices",
)
"""What of a batch the model itself is given."""


@dataclass(frozen=True, slots=True)
class ForwardPath:
    """How a batch goes through a causal model (`trainer/objectives/forward_path.py` proves which way is right for which)."""

    fused: bool
    """The decoder gives hidden states, of which the head itself makes the loss; else the model's own forward pass gives
    logits, at supervised positions only."""
    positions: bool
    """The model is told each token's position; else it counts them itself."""
    alone: bool = False
    """A batch must be one document: beside another, padded to one length, the model computes something else, or nothing."""


FUSED_PATH = ForwardPath(fused=True, positions=True)
HF_PATH = ForwardPath(fused=False, positions=False)
"""What transformers itself does with padded rows."""
FORWARD_PATHS = (
    FUSED_PATH,
    ForwardPath(fused=False, positions=True),
    HF_PATH,
    ForwardPath(fused=False, positions=False, alone=True),
)
"""Every way, the fastest first."""


def unwrap_adapter(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside an adapter wrapper; adapters stay in place."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


class TargetStates(NamedTuple):
    """What the loss is made of, at the N positions of a batch that have a target (the "rows" of losses)."""

    head: nn.Module
    """The output head, still to be called; an identity if the model's own forward pass gave logits."""
    hidden: Tensor
    """`[N, H]` hidden states for the head; or logits `[N, V]` for an identity."""
    targets: Tensor
    """int64 `[N]`: ids of the tokens to predict."""


def states_at_targets(model: nn.Module, batch: dict[str, Any]) -> TargetStates:
    """Run the model up to its output head; returns what the loss is made of, at the positions of the batch that have a target.

    The head itself is left to the caller, so that it can compute the loss without keeping the logits.
    """
    causal_lm = unwrap_adapter(model)
    # Set when the model was built, by what a test on a small copy has proven.
    path: ForwardPath = getattr(causal_lm, "forward_path", FUSED_PATH)
    inputs = {key: batch[key] for key in MODEL_INPUTS if key in batch}
    if not path.positions:  # the model counts positions itself
        inputs.pop("position_ids", None)
    supervised_positions = batch["target_rows"]
    # Where answers share their prompt, its last position has a target for each of them.
    targets = batch["row_targets"] if "row_targets" in batch else batch["targets"].view(-1)[supervised_positions]
    if not path.fused:
        return TargetStates(nn.Identity(), _logits_at(supervised_positions, causal_lm, inputs), targets)
    hidden = token_states(causal_lm.get_decoder(), inputs)  # type: ignore[operator]
    head: nn.Module = causal_lm.get_output_embeddings()  # type: ignore[operator]
    return TargetStates(head, hidden.reshape(-1, hidden.shape[-1])[supervised_positions], targets)


def token_states(decoder: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The hidden states of a model without its head, `[rows, T, width]`. `inputs`: those of `MODEL_INPUTS` that it is given."""
    with flex.masks_keep_documents_apart(inputs), rotary.frequencies_of_whole_row(decoder, inputs):
        states: Tensor = decoder(**inputs, use_cache=False).last_hidden_state
    return states


def run_for_hooks(model: nn.Module, batch: dict[str, Any]) -> None:
    """Run a batch only for what hooks record on the way, such as what routers choose.

    No loss is computed, nor, in most causal models, logits.
    """
    is_causal = hasattr(unwrap_adapter(model), "forward_path")
    if is_causal:
        # Without target rows the head has nothing to do.
        states_at_targets(model, {**batch, "target_rows": batch["target_rows"][:0]})
    elif "attention_mask" not in batch:  # a classifier on rows without padding: its head would need padded rows
        classifier: Any = unwrap_adapter(model)
        token_states(classifier.base_model, {key: batch[key] for key in MODEL_INPUTS if key in batch})
    else:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


def _logits_at(supervised_positions: Tensor, causal_lm: Any, inputs: dict[str, Any]) -> Tensor:
    """Compute logits `[N, V]` at N positions (int64 `[N]`, of the flattened batch) by the model's own forward pass.

    For models whose logits are more than a product of states and head. A hook on the head passes it these positions alone, which
    saves most of the logits' memory. Where the hook cannot tell which positions are which, all logits are made and those of the
    positions are taken.
    """
    head = causal_lm.get_output_embeddings()
    num_tokens = inputs["input_ids"].numel()

    def select(_head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The head's arguments with the hidden states of the supervised positions alone."""
        hidden, *more_args = args
        # Some models call the head with several predictions for each token, of which one is its logits.
        if hidden.numel() != num_tokens * hidden.shape[-1]:
            return args
        return (hidden.reshape(1, -1, hidden.shape[-1])[:, supervised_positions], *more_args)

    hook = None if head is None else head.register_forward_pre_hook(select)
    try:
        with flex.masks_keep_documents_apart(inputs), rotary.frequencies_of_whole_row(causal_lm, inputs):
            logits = causal_lm(**inputs, use_cache=False).logits
    finally:
        if hook is not None:
            hook.remove()
    logits = logits.reshape(-1, logits.shape[-1])
    return logits if len(logits) == len(supervised_positions) else logits[supervised_positions]


def row_weighting_of(batch: dict[str, Any], smoothing: float = 0.0) -> RowWeighting:
    """How supervised positions count in the loss: their weights and sources, if the batch has them, and label smoothing.

    A source is one of the data sets that are mixed, whose losses are reported apart. Evaluations measure the loss without
    smoothing, so `smoothing` applies only while gradients are made.
    """
    return RowWeighting(
        row_weights=batch.get("target_weights"),
        row_groups=batch.get("row_source"),
        num_groups=len(batch.get("source_names", ())),
        smoothing=smoothing if torch.is_grad_enabled() else 0.0,
    )


class NextTokenLosses(NamedTuple):
    """What `summed_loss` measures on a micro-batch: sums over its supervised positions, for `next_token_terms`."""

    loss: Tensor
    """Cross-entropy, 0-d. Only this one has a gradient."""
    correct: Tensor
    """Right argmaxes, 0-d; counted only in evaluation."""
    by_source: Tensor | None = None
    """`[sources]`: the loss of each source; None if the batch does not tell sources apart."""
    unsmoothed: Tensor | None = None
    """The loss without label smoothing, 0-d; None if labels are not smoothed."""

    @classmethod
    def of(cls, results: tuple[Tensor, ...], weighting: RowWeighting) -> NextTokenLosses:
        """Name the tensors that a loss head returned for `weighting`.

        They are in this order: loss, right argmaxes; the loss by source, if there are sources; the loss without smoothing, if
        labels are smoothed.
        """
        loss, correct, *extra_losses = results
        by_source = extra_losses.pop(0) if weighting.row_groups is not None else None
        unsmoothed = extra_losses.pop(0) if extra_losses else None
        return cls(loss, correct, by_source, unsmoothed)


def next_token_terms(batch: dict[str, Any], losses: NextTokenLosses) -> dict[str, Tensor]:
    """Name the sums of a next-token loss as the objective's terms:

    - `loss` and `accuracy`;
    - `loss/<source>` of each source, if the batch tells sources apart;
    - `nll`, the loss without smoothing, if labels are smoothed.
    """
    terms = {"loss": losses.loss, "accuracy": losses.correct.detach()}
    if losses.unsmoothed is not None:
        terms["nll"] = losses.unsmoothed.detach()
    if losses.by_source is not None:
        for name, source_loss in zip(batch["source_names"], losses.by_source.unbind(), strict=True):
            terms[f"loss/{name}"] = source_loss
    return terms


def summed_loss(model: nn.Module, batch: dict[str, Any], smoothing: float = 0.0) -> NextTokenLosses:
    """Run the model: cross-entropy summed over supervised positions, and the number of right argmaxes (in evaluations only).

    `target_weights` in the batch weigh each position in both. `smoothing`: share of each target that is spread over the
    vocabulary.
    """
    head, hidden, targets = states_at_targets(model, batch)
    weighting = row_weighting_of(batch, smoothing)
    if computes_loss(head):
        results = head(hidden, targets=targets, weighting=weighting)
    else:
        # An adapter on the head adds to its logits, so these must be made.
        results = logits_loss(head(hidden), targets, weighting)
    return NextTokenLosses.of(results, weighting)


def sequence_logps(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Compute how likely the model finds each sequence: (log-probability of its supervised tokens, their number), `[S]` float32.

    Sequences lie in the batch one after another; `batch["row_sequence"]` (int64 `[N]`) says to which one each supervised token
    belongs. Under sequence parallelism a sequence may lie on several ranks: each has the sum over all, so all ranks of the group
    must call, and only the first rank of the group may count it (`counted_here`).
    """
    head, hidden, targets = states_at_targets(model, batch)
    if computes_loss(head):  # it makes each token's loss without keeping logits
        nll = head(hidden, targets=targets, by_row=True)
    else:
        nll = F.cross_entropy(head(hidden).float(), targets, reduction="none")
    sequence_of_token = batch["row_sequence"]
    zeros = nll.new_zeros(batch["num_sequences"])
    logps = zeros.index_add(0, sequence_of_token, -nll)
    num_tokens = zeros.index_add(0, sequence_of_token, nll.new_ones(len(sequence_of_token)))
    row_slices = batch.get("row_slices")  # None if this rank has whole rows: then nothing is summed
    return sum_over_group(logps, row_slices), sum_over_group(num_tokens, row_slices)


def counted_here(batch: dict[str, Any]) -> float:
    """1.0 if this rank counts what all ranks of its group have computed alike, else 0.0.

    The step's sums go over all ranks. What belongs to a whole sequence, such as the loss of a pair, is the same on all ranks
    that share the row, so it counts on the first of them alone.
    """
    return float(batch.get("owner", 1.0))


def reference_logps(model: nn.Module, batch: dict[str, Any], reference: Reference | None) -> Tensor:
    """How likely the model before training finds each sequence: `sequence_logps` of it, `[S]` float32.

    Without a `reference` they were recorded before the first step and come with the batch. With one, they are computed here
    without dropout: `reference(model)` is a context in which the model is the one before training (its adapter is off).
    """
    if reference is None:
        return batch["reference_logps"]
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), reference(model):
            logps, _num_tokens = sequence_logps(model, batch)
            return logps
    finally:
        model.train(training)
