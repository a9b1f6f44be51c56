"""Verifies an export: loads it by plain transformers and peft, and compares its logits with the engine's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from strategies import exit_codes
from strategies.errors import ShardtuneError
from strategies.runtime import Runtime
from trainer.data.config import Layout
from trainer.export.load import load_export
from trainer.export.routing_choices import RoutingRecorder, RoutingReplay
from trainer.export.tensors import stored_dtype
from trainer.model import flex
from trainer.model.compat import without_kernel_packages
from trainer.objectives.causal import MODEL_INPUTS, unwrap_adapter

if TYPE_CHECKING:
    from strategies.base import Engine
    from trainer.model.weights import BaseWeights
    from trainer.step import BuiltModel

TOLERANCE_BY_DTYPE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of a logit that is allowed, relative to the largest logit, by the coarsest dtype that took part.

About six rounding steps of that type, since both sides round in every layer. That of float32 is larger, because sums may be
taken in another order.
"""
MAX_LISTED_DIFFERENCES = 5
"""Tensors, and rows of each, that an error lists."""
PROBE_SENTENCE = "The export of a model must compute exactly what was trained: question 17, answer 42."


class DriftError(ShardtuneError):
    """The reloaded export does not compute what was trained."""

    exit_code = exit_codes.FAILED


@dataclass(frozen=True, slots=True)
class Verification:
    """How far the logits of an export are from those of the trained model."""

    max_abs_difference: float
    largest_logit: float
    argmax_agreement: float
    """Share of positions whose most likely token is the same, 0 to 1."""
    tolerance: float
    """Largest `max_abs_difference / largest_logit` allowed."""
    num_replayed_choices: int = 0
    """Choices of experts or keys that differed by rounding alone, and were replaced by training's for the comparison."""

    @property
    def is_close(self) -> bool:
        """Whether the difference is allowed; a NaN is not."""
        return self.max_abs_difference <= self.tolerance * self.largest_logit

    def __str__(self) -> str:
        """The comparison in one sentence, for the screen and for errors."""
        routing_note = ""
        if self.num_replayed_choices:
            routing_note = (
                f"; with the experts that training chose, {self.num_replayed_choices} of which rounding would change"
            )
        return (
            f"logits differ by at most {self.max_abs_difference:.2e} (largest logit {self.largest_logit:.1f}, allowed "
            f"{self.tolerance:.0e} of it), argmax agrees at {self.argmax_agreement:.1%} of positions{routing_note}"
        )


def probe_ids(tokenizer: Any) -> list[int]:
    """Token ids of the probe, on which an export is compared with the trained model: a fixed sentence, and the last token.

    The last token of the vocabulary may be one that was added.
    """
    ids = tokenizer(PROBE_SENTENCE, add_special_tokens=False)["input_ids"]
    last_token_id = len(tokenizer) - 1
    return [*ids, last_token_id]


def shift_right(target_ids: Tensor, start_id: int) -> Tensor:
    """The decoder's input of an encoder-decoder model for the targets `[S, T]`: `start_id`, then all ids but the last."""
    return torch.cat([torch.full_like(target_ids[:, :1], start_id), target_ids[:, :-1]], dim=1)


class _LogitsObjective:
    """Takes the place of the run's objective for one forward pass: returns the model's logits instead of a loss."""

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        inputs = {key: batch[key] for key in MODEL_INPUTS if key in batch}
        with flex.masks_keep_documents_apart(inputs):
            return {"logits": unwrap_adapter(model)(**inputs, **_no_cache_arguments(model)).logits}


def _no_cache_arguments(model: Any) -> dict[str, bool]:
    """Arguments with which a model computes without a KV cache, as in training; {} if it never has one.

    {"use_cache": False}, because transformers 5.24 cannot tell how far a cache has come in which no layer is attention, and
    layers that are called more than once would see their own keys twice.
    """
    model_without_adapter: Any = unwrap_adapter(model)
    has_cache = getattr(model_without_adapter.config.get_text_config(), "use_cache", None) is not None
    return {"use_cache": False} if has_cache else {}


def reference_logits(engine: Engine, built: BuiltModel, token_ids: list[int], runtime: Runtime) -> Tensor | None:
    """Logits of the trained model on the probe, with which an export is compared: `[T, V]`, or `[1, labels]` for classifiers.

    On the CPU; None on other ranks than 0. All ranks must call. Meanwhile the model's objective is replaced by one that
    returns logits.
    """
    batch = _batch_of_one_document(built, torch.tensor([token_ids], device=runtime.device))
    with engine.inference() as module, _returning_logits(module) as step_module:
        # The model is called through the root module's own forward: only there are its parameters gathered.
        logits = step_module(batch)["logits"]
    if not runtime.is_main:
        return None
    return logits.reshape(-1, logits.shape[-1]).cpu()


@contextmanager
def _returning_logits(step_module: Any) -> Iterator[Any]:
    """A context in which a step module returns logits instead of the terms of its objective."""
    objective = step_module.objective
    step_module.objective = _LogitsObjective()
    try:
        yield step_module
    finally:
        step_module.objective = objective


def _batch_of_one_document(built: BuiltModel, ids: Tensor) -> dict[str, Any]:
    """The probe's token ids `[1, T]` as a batch of training without targets: the model then computes as in training.

    - an encoder-decoder model: the decoder gets the same tokens, shifted;
    - padded layout: an attention mask of ones;
    - packed layout: positions, and the bounds of the one document, which attention over documents of different lengths takes.
    """
    batch: dict[str, Any] = {"input_ids": ids}
    if built.encoder_decoder is not None:
        batch["decoder_input_ids"] = shift_right(ids, built.encoder_decoder.decoder_start)
    if built.layout is Layout.padded:
        batch["attention_mask"] = torch.ones_like(ids)
    else:
        length = ids.shape[1]
        bounds = torch.tensor([0, length], dtype=torch.int32, device=ids.device)
        batch |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "document_bounds": [0, length]}
        batch |= {"max_length_q": length, "max_length_k": length}
        batch["position_ids"] = torch.arange(length, device=ids.device)[None]
    return batch


def verify_export(
    directory: Path,
    *,
    base_path: str | None = None,
    token_ids: list[int],
    reference: Tensor,
    decoder_start: int | None = None,
    quantised_base: BaseWeights | None = None,
    training_choices: RoutingRecorder | None = None,
) -> Verification:
    """Load an export as users would, and check that it computes what was trained: its logits against `reference [T, V]`.

    They may differ by `TOLERANCE_BY_DTYPE` of the coarsest type among the reference and the stored tensors. Half precision can
    change which experts a router takes: then an export that differs is compared once more with the experts that the trained
    model chose (`training_choices`).

    `base_path`, `quantised_base`: the adapter's base, as `load_export` takes it. `token_ids`: of the probe. `decoder_start`:
    the first token of an encoder-decoder's decoder; None for other models. Raises DriftError if shapes or logits differ.
    """
    model = load_export(directory, base_path, quantised_base)
    tolerance = max(TOLERANCE_BY_DTYPE[reference.dtype], TOLERANCE_BY_DTYPE[stored_dtype(Path(directory))])
    reference = reference.float()
    logits = _export_logits(model, token_ids, decoder_start)
    if logits.shape != reference.shape:
        raise DriftError(
            f"{directory}: computes logits of shape {tuple(logits.shape)}, training {tuple(reference.shape)}"
        )
    verification = _compare_logits(logits, reference, tolerance)
    is_half_precision = tolerance > TOLERANCE_BY_DTYPE[torch.float32]
    has_routers = training_choices is not None and bool(training_choices.indices_by_call)
    if not verification.is_close and has_routers and is_half_precision:
        assert training_choices is not None
        # Compare again with training's experts. The first comparison stays if the calls do not match, or nothing was replaced.
        with RoutingReplay(training_choices) as replay:
            logits = _export_logits(model, token_ids, decoder_start)
        if replay.calls_match and replay.num_replaced:
            verification = replace(
                _compare_logits(logits, reference, tolerance), num_replayed_choices=replay.num_replaced
            )
    if not verification.is_close:
        cause = _loading_differences(directory, model)
        raise DriftError(f"{directory}: the export does not compute what was trained: {verification}{cause}")
    return verification


def _export_logits(model: Any, token_ids: list[int], decoder_start: int | None) -> Tensor:
    """Logits of a loaded export on the T tokens of the probe, float32 `[T, V]`, or `[1, labels]` of a classifier.

    `decoder_start`: the decoder's first token; None for a model that is no encoder-decoder.
    """
    ids = torch.tensor([token_ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if decoder_start is not None:
        inputs["decoder_input_ids"] = shift_right(ids, decoder_start)
    with torch.no_grad(), without_kernel_packages():
        logits = model(**inputs, **_no_cache_arguments(model)).logits
    is_classifier = logits.dim() == 2
    if not is_classifier:
        # An adapter's virtual tokens come before those of the probe, and have logits too.
        logits = logits[:, -len(token_ids) :]
    return logits.reshape(-1, logits.shape[-1]).float()


def _compare_logits(logits: Tensor, reference: Tensor, tolerance: float) -> Verification:
    """Compare float32 logits of the same shape `[T, V]`. `tolerance`: relative to the largest logit of `reference`."""
    same_argmax = logits.argmax(-1) == reference.argmax(-1)
    return Verification(
        max_abs_difference=float((logits - reference).abs().max()),
        largest_logit=float(reference.abs().max()),
        argmax_agreement=float(same_argmax.float().mean()),
        tolerance=tolerance,
    )


def _loading_differences(directory: Path, model: Any) -> str:
    """Find out why an export computes something else: which tensors are loaded with other values than are stored.

    A text to append to the error, with their rows: "; loaded otherwise than stored: lm_head.weight (rows 0, 7)". Empty for an
    adapter, and if nothing differs. Tensors that are stored under no name, or in another shape, are not compared.
    """
    from trainer.model.weights import PretrainedWeights

    if (directory / "adapter_config.json").exists():
        return ""
    differing_tensors = []
    with closing(PretrainedWeights(directory, model)) as stored_weights:
        for name, parameter in model.named_parameters():
            if stored_weights.name_in_checkpoint(name) is None or stored_weights.shape(name) != tuple(parameter.shape):
                continue
            differs = stored_weights.full_tensor(name).to(parameter.dtype) != parameter.detach()
            # Rows in which any element differs; a vector has rows of one element.
            rows = differs.reshape(len(parameter), -1).any(1).nonzero()[:, 0].tolist()
            if rows:
                row_list = ", ".join(map(str, rows[:MAX_LISTED_DIFFERENCES]))
                if len(rows) > MAX_LISTED_DIFFERENCES:
                    row_list += f" and {len(rows) - MAX_LISTED_DIFFERENCES} more"
                differing_tensors.append(f"{name} (rows {row_list})")
    if not differing_tensors:
        return ""
    return f"; loaded otherwise than stored: {', '.join(differing_tensors[:MAX_LISTED_DIFFERENCES])}"


@dataclass(frozen=True, slots=True)
class ProbeReference:
    """Logits of the trained model on the probe, a fixed sentence, to compare an export with."""

    token_ids: list[int]
    logits: Tensor | None
    """`[T, V]`, or `[1, labels]` of a classifier, on the CPU; None on ranks other than 0."""
    routing_choices: RoutingRecorder
    """The experts and keys that the trained model chose."""


def compute_probe_reference(engine: Engine, built: BuiltModel, tokenizer: Any, runtime: Runtime) -> ProbeReference:
    """Compute the trained model's logits on the probe, a fixed sentence, before it is exported. All ranks must call.

    Also records which experts it chose. The engine is not needed afterwards.
    """
    token_ids = probe_ids(tokenizer)
    with RoutingRecorder() as choices:
        logits = reference_logits(engine, built, token_ids, runtime)
    return ProbeReference(token_ids=token_ids, logits=logits, routing_choices=choices)


def verify_against_reference(
    reference: ProbeReference, built: BuiltModel, directory: Path, base_path: str, *, adapter: bool
) -> None:
    """Check an export that was just written against what the trained model computes, and print the result; on rank 0 only.

    `reference`: of `compute_probe_reference`. `built`: the model that was trained. `base_path`: its base. `adapter`: whether
    the export is an adapter. Raises DriftError if they differ; transformers and peft have error types of their own for files
    that they cannot load.
    """
    assert reference.logits is not None, "rank 0 has them"
    decoder_start = built.encoder_decoder.decoder_start if built.encoder_decoder else None
    # An adapter of a quantised base is compared on the base's values as they were in training.
    quantised_base = None
    if adapter and built.quantised_shapes:
        quantised_base = built.base_weights(Path(base_path))
    verification = verify_export(
        directory,
        base_path=base_path,
        token_ids=reference.token_ids,
        reference=reference.logits,
        decoder_start=decoder_start,
        quantised_base=quantised_base,
        training_choices=reference.routing_choices,
    )
    print(f"export verified: {verification}", flush=True)
