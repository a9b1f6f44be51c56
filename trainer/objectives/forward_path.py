"""Chooses the forward path of a batch through a causal model, and proves that it is right for this architecture.

Fast paths exist that not every architecture allows: documents one after another in a row without padding, and a loss
that the head itself computes, a chunk of rows at a time. Whether a model allows them is proven, not looked up in a
table. The proof takes a small random copy of the model's own configuration, with every kind of layer and documents
longer than its windows. On it, a path over several documents together must give the loss and the gradients that the
model gives as transformers has it, in eager attention, for each document alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strategies.hardware import gpu_of_device
from trainer.data.batches.collate import Collator, to_device
from trainer.data.config import Layout
from trainer.data.store.sequences import Sample
from trainer.losses.fuse import install_loss_head
from trainer.model import rotary, sequence_proof
from trainer.model.architecture import set_dropout, text_model_config, transformers_class
from trainer.model.compat import without_kernel_packages
from trainer.model.config import ModelKind
from trainer.model.kernels import kernel_versions
from trainer.model.shrink import SMALL_VOCABULARY_SIZE, NotShrinkable, refuse_unfit_copy, small_copies
from trainer.objectives.causal import FORWARD_PATHS, ForwardPath, states_at_targets, summed_loss, unwrap_adapter
from trainer.objectives.proof_cache import keep_proof, proof_file, read_proof

Result = TypeVar("Result")

MAX_RELATIVE_DIFFERENCE = 1e-5
"""Largest relative difference of losses, and of gradients by their norm. Computed in float64 if the model can."""
MAX_ROUNDING = 1e-4
"""Largest difference of gradients that is still accepted as rounding.

It is accepted only if transformers' own gradients in float32 are as far from its own in float64. Some models (xLSTM)
compute parts in float32 whatever they are told, and magnify what is rounded there."""
MAX_DIFFERENCE_IN_HALF = 0.1
"""The same for kernels that exist in half precision only. A mask that is ignored changes gradients by half and more."""
FIRST_ORDINARY_ID = 4
"""Ids below it are special in many models (padding, begin, end), so that random documents do not use them."""
MAX_COPY_ELEMENTS = 20_000_000
"""Most elements of a small copy. A larger one has sizes in its configuration that shrinking does not know by name."""


@dataclass(frozen=True, slots=True)
class ProvenPaths:
    """What was proven of an architecture with one attention kernel. Cached as JSON under these field names."""

    padding_free: ForwardPath | None = None
    """The path that is right for documents one after another in one row; None if none is proven."""
    padded: ForwardPath | None = None
    """The path that is right for one document a row; None if none is proven."""
    stock: str = "sdpa"
    """The attention with which `padded` was proven."""
    causal: bool = True
    """Whether no token sees what follows it."""
    random: bool = False
    """Whether training draws something at random beside dropout, as some routers draw experts."""
    sequence_problem: str | None = "nothing was proven of it"
    """Why a row may not be cut along the sequence over several ranks; None if it may (`trainer/model/sequence_proof.py`)."""
    tried: bool = True
    """Whether a small copy could be made and run at all. If not, nothing is known, and nothing is cached."""
    reason: str = ""
    """Why something is not proven."""

    def for_layout(self, layout: Layout) -> ForwardPath | None:
        """The path that is proven for a layout; None if none is."""
        return self.padding_free if layout is Layout.padding_free else self.padded


def proven_paths(hf_config: Any, build: Callable[[], nn.Module], attention: str, *, on_gpu: bool) -> ProvenPaths:
    """Which forward passes of an architecture are right: from this host's cache, else tested now, which takes about a second.

    A path (`ForwardPath`) is a way of running a batch: whether the output head computes the loss itself, and whether the model is
    told positions. It must give the loss and gradients of transformers' own model on a small copy.

    `hf_config`: transformers' configuration.
    `build`: makes its model on the meta device.
    `attention`: the kernel for documents in one row.
    `on_gpu`: whether rows without padding are tested in bfloat16 on this host's GPU, instead of on the CPU.
    """
    # Hosts with other cards may share the cache, and packages come and go. False: proven on a CPU, whatever card there is.
    gpu_and_versions = [repr(gpu_of_device(torch.device("cuda"))), kernel_versions()] if on_gpu else False
    file = proof_file(hf_config, attention=attention, gpu=gpu_and_versions)
    stored = read_proof(file)
    if stored is not None:
        try:
            return _paths_from_cache(stored)
        except (TypeError, KeyError):  # another version wrote it, with other fields: prove again
            pass
    paths = _prove_paths(hf_config, build, attention, on_gpu=on_gpu)
    if paths.tried:  # else the reason may pass, such as too little memory: try again next time
        keep_proof(file, asdict(paths))
    return paths


def _paths_from_cache(stored: dict[str, Any]) -> ProvenPaths:
    """Read back the proven paths that an earlier start has cached as JSON.

    Raises KeyError or TypeError for other fields than today's.
    """
    fields = dict(stored)
    for key in ("padding_free", "padded"):
        if fields[key] is not None:
            fields[key] = ForwardPath(**fields[key])
    return ProvenPaths(**fields)


def _prove_paths(hf_config: Any, build: Callable[[], nn.Module], attention: str, *, on_gpu: bool) -> ProvenPaths:
    """Find, on a small copy of the model, the forward paths that compute what transformers' own does.

    If no copy can be run, nothing is proven: the result has `tried=False` and the error as reasons, and nothing is raised.
    """
    try:
        with reproducible_on_cpu():
            return _first_runnable_proof(hf_config, build()).find_paths(attention, on_gpu=on_gpu)
    except NotShrinkable as error:
        return ProvenPaths(tried=False, reason=str(error), sequence_problem=str(error))
    except Exception as error:  # noqa: BLE001 - an architecture may fail in any way; what it cannot do is not proven
        reason = f"its small copy fails: {error_line(error)}"
        return ProvenPaths(tried=False, reason=reason, sequence_problem=reason)


@contextmanager
def reproducible_on_cpu() -> Iterator[None]:
    """A context in which torch draws the same numbers on the CPU each time, so that a proof does not depend on when it is made.

    Afterwards random state and default type are as before: the code of a model may change the type. The state of a GPU is left
    alone.
    """
    rng_state = torch.random.get_rng_state()
    default_dtype = torch.get_default_dtype()
    try:
        torch.default_generator.manual_seed(0)
        yield
    finally:
        torch.random.set_rng_state(rng_state)
        torch.set_default_dtype(default_dtype)


def _first_runnable_proof(hf_config: Any, meta_model: Any) -> _Proof:
    """A proof on the first small copy that can be run. If none can, raises the error of the first."""
    return on_small_copy(hf_config, meta_model, partial(_Proof, hf_config, meta_model))


def on_small_copy(hf_config: Any, meta_model: nn.Module, compute: Callable[[Any, torch.dtype], Result]) -> Result:
    """Try a test on small copies of a model: returns what `compute(small configuration, type)` gives where it first succeeds.

    Each copy is tried in float64, and in float32 if that fails, since the code of some models fixes a type. If all fail, raises
    the first error. `hf_config`: transformers' configuration. `meta_model`: its model on the meta device.
    """
    first_error: Exception | None = None
    # Packages of GPU kernels would be chosen if they can be imported, and fail on a CPU.
    with without_kernel_packages():
        for small_config in small_copies(hf_config, meta_model):
            for dtype in (torch.float64, torch.float32):
                try:
                    return compute(small_config, dtype)
                except NotShrinkable as error:  # another type would not help
                    first_error = first_error or error
                    break
                except Exception as error:  # noqa: BLE001 - an architecture may fail in any way
                    first_error = first_error or error
    raise first_error or NotShrinkable("it has no settings to make smaller")


def error_line(error: Exception) -> str:
    """The type of an error and the first line of its message, at most 120 characters of it."""
    message = str(error).strip() or "no message"
    first_line = message.splitlines()[0]
    return f"{type(error).__name__}: {first_line[:120]}"


@torch.no_grad()
def disturb_parameters(model: nn.Module) -> None:
    """Add small random numbers to all parameters.

    One that starts at zero, such as a bias, would have no effect, and an error in it would not show.
    """
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.02)


class _Proof:
    """A small random copy of transformers' own model, on which forward paths are compared with it."""

    def __init__(self, hf_config: Any, meta_model: Any, small_config: Any, dtype: torch.dtype) -> None:
        """Make the small copy, and compute on it what paths are compared with.

        `small_config`: a small copy of `hf_config`, of which `meta_model` is the model on meta. Raises NotShrinkable if it is too
        large, lacks a kind of layer, or computes no finite numbers.
        """
        self.dtype = dtype
        self.model_class = transformers_class(ModelKind.causal, hf_config)
        self.small_config = small_config
        set_dropout(self.small_config, 0.0)
        self.vocabulary = min(text_model_config(self.small_config).vocab_size, SMALL_VOCABULARY_SIZE)
        with torch.device("meta"):
            copy_on_meta = self._build("eager", torch.float32)
        refuse_unfit_copy(hf_config, meta_model, small_config, copy_on_meta, max_parameters=MAX_COPY_ELEMENTS)
        # transformers' own model, on which other paths are measured.
        hf_model = self._build("eager", dtype)
        disturb_parameters(hf_model)
        # Three documents of 5, 23 and 14 random tokens, of which 70 % are learned.
        generator = np.random.default_rng(0)
        self.documents = [
            Sample(
                generator.integers(FIRST_ORDINARY_ID, self.vocabulary, length).astype(np.int32),
                generator.random(length) < 0.7,
            )
            for length in (5, 23, 14)
        ]
        self.weights = {name: value.clone() for name, value in hf_model.state_dict().items()}
        self.is_causal = self._is_causal(hf_model.eval())
        self.is_random = self._differs_in_training_mode(hf_model)
        self.expected_loss, self.expected_gradients = self._loss_and_gradients(hf_model.eval())
        self._rounding: float | None = None

    def _build(self, attention: str, dtype: torch.dtype) -> Any:
        options = {"attn_implementation": attention, "experts_implementation": "eager", "dtype": dtype}
        return self.model_class.from_config(copy.deepcopy(self.small_config), **options)

    def _longest_document_ids(self) -> Tensor:
        """int64 `[1, 23]`: the document that is longer than the windows of the small copy."""
        longest = max(self.documents, key=lambda document: len(document.input_ids))
        return torch.from_numpy(longest.input_ids.astype(np.int64))[None]

    def _is_causal(self, hf_model: Any) -> bool:
        """Whether no token of the small copy sees what follows it, so that predicting the next token can teach something.

        Tested by changing the last token: the logits before it must stay the same. `hf_model`: transformers' own model in
        evaluation mode. Raises NotShrinkable if the logits are not finite.
        """
        ids = self._longest_document_ids()
        # Change the last token to the next id. Ids below FIRST_ORDINARY_ID are special, so the last id is followed by that one.
        changed_ids = ids.clone()
        next_offset = (changed_ids[0, -1] - FIRST_ORDINARY_ID + 1) % (self.vocabulary - FIRST_ORDINARY_ID)
        changed_ids[0, -1] = next_offset + FIRST_ORDINARY_ID
        with torch.no_grad():
            logits = hf_model(input_ids=ids, use_cache=False).logits[0, :-1]
            changed_logits = hf_model(input_ids=changed_ids, use_cache=False).logits[0, :-1]
        if not logits.isfinite().all():
            raise NotShrinkable("a small copy with random weights computes what is no number")
        return bool(torch.allclose(logits, changed_logits, rtol=MAX_RELATIVE_DIFFERENCE, atol=MAX_RELATIVE_DIFFERENCE))

    def _differs_in_training_mode(self, hf_model: Any) -> bool:
        """Whether the model draws at random in training although dropout is 0, as some routers do.

        Two passes in training mode are compared with one in evaluation. Takes `hf_model`, transformers' own, in evaluation mode,
        and leaves it in training mode.
        """
        ids = self._longest_document_ids()
        with torch.no_grad():
            eval_logits = hf_model(input_ids=ids, use_cache=False).logits
            hf_model.train()
            training_logits = [hf_model(input_ids=ids, use_cache=False).logits for _ in range(2)]
        tolerance = MAX_RELATIVE_DIFFERENCE
        return any(
            not torch.allclose(logits, eval_logits, rtol=tolerance, atol=tolerance) for logits in training_logits
        )

    def _loss_and_gradients(self, hf_model: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute what the tested paths must give: (the summed loss of the documents, its gradients by parameter).

        Each document has a pass of its own. `hf_model`: transformers' own model.
        """
        loss = torch.zeros((), dtype=torch.float64)
        for document in self.documents:
            ids = torch.from_numpy(document.input_ids.astype(np.int64))
            # -100: no target, which cross-entropy leaves out.
            targets = torch.where(torch.from_numpy(document.supervised[1:]), ids[1:], -100)
            logits = hf_model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            loss = loss + F.cross_entropy(logits.double(), targets, reduction="sum")
        loss.backward()
        return loss.detach(), _gradients_by_name(hf_model)

    def find_paths(self, attention: str, *, on_gpu: bool) -> ProvenPaths:
        """Find for both layouts of rows the fastest forward path that computes what transformers' own does.

        A path says whether the output head computes the loss, and whether the model is given positions. `attention`: the kernel
        for rows without padding. Padded ones have SDPA, or eager attention if SDPA is not right.
        """
        padding_free, reason = self._fastest_correct_path(Layout.padding_free, attention, on_gpu=on_gpu)
        for padded_attention in ("sdpa", "eager"):
            padded, padded_reason = self._fastest_correct_path(Layout.padded, padded_attention, on_gpu=False)
            if padded is not None:
                break
        return ProvenPaths(
            padding_free=padding_free,
            padded=padded,
            stock=padded_attention,
            causal=self.is_causal,
            random=self.is_random,
            sequence_problem=self._sequence_problem(padding_free, reason),
            reason=reason or padded_reason,
        )

    def _sequence_problem(self, path: ForwardPath | None, reason: str) -> str | None:
        """Why rows may not be cut along the sequence, so that several ranks share each; None if they may. Compared on the CPU.

        `path`: the one that is proven for documents in one row; None if none is, for the given `reason`. The states of a whole
        row are compared with those of its slices. If that fails on several documents in a row, it is done on a row with one
        document, whose reason tells a user more.
        """
        if path is None:
            return f"it is not proven padding-free ({reason})"
        row = Collator(Layout.padding_free, pad_token_id=0)(self.documents)
        length = row["input_ids"].numel()
        positions = torch.arange(length)[None]
        single_document = {"input_ids": row["input_ids"], "position_ids": positions, "max_length_q": length}
        with without_kernel_packages():
            try:
                return self._compare_slices(path, row)
            except Exception as error:  # noqa: BLE001 - an architecture may fail in any way; then it may not be cut
                failure = error_line(error).removeprefix(f"{sequence_proof.CannotBeCut.__name__}: ")
            # Recurrent layers have no code for several documents without packages for GPUs. On one document they run, and
            # show what a user needs to know: that tokens meet there.
            try:
                return self._compare_slices(path, single_document) or failure
            except Exception:  # noqa: BLE001 - the first failure is the reason
                return failure

    def _compare_slices(self, path: ForwardPath, row: dict[str, Any]) -> str | None:
        """Compare the states that the model computes on a whole row with those on slices of it; returns how they differ, or None.

        The small copy gets a stand-in for attention in which each token sees itself alone. If slices still give other states,
        something but attention lets tokens see each other, and ranks cannot share a row. `path`: how the row goes through the
        model.
        """
        attention = sequence_proof.register_token_local_attention()  # known to transformers as TOKEN_LOCAL_ATTENTION
        model = self._build(sequence_proof.TOKEN_LOCAL_ATTENTION, self.dtype)
        model.load_state_dict(self.weights)
        model.forward_path = path
        model.train(not self.is_random)  # random draws, such as dropout's, would make two runs differ
        if problem := rotary.whole_row_problem(model):  # frequencies that no slice could compute by itself
            return problem

        def hidden_states(inputs: dict[str, Any]) -> Tensor:
            num_tokens = inputs["input_ids"].numel()
            targets = torch.zeros(num_tokens, dtype=torch.int64)
            every_row = {"target_rows": torch.arange(num_tokens), "targets": targets}
            return states_at_targets(model, inputs | every_row).hidden

        return sequence_proof.sequence_problem(hidden_states, row, attention)

    def _fastest_correct_path(self, layout: Layout, attention: str, *, on_gpu: bool) -> tuple[ForwardPath | None, str]:
        """Find the fastest forward path with transformers' own loss and gradients: (path, ""), or (None, why there is none).

        It need agree in one type only, since the code of some models runs in one alone. Running out of GPU memory is raised: it
        proves nothing.
        """
        paths = list(FORWARD_PATHS)  # the fastest first
        if layout is Layout.padding_free:  # only positions tell the model where a document begins
            paths = [path for path in paths if path.positions]
        dtypes: tuple[torch.dtype, ...] = (self.dtype, torch.float32)
        if on_gpu:
            dtypes = (torch.bfloat16,)
        reasons = []
        for path in paths:
            for dtype in dtypes:
                try:
                    reason = self._difference_from_hf(layout, path, attention, dtype)
                except torch.OutOfMemoryError:  # others fill the GPU: that may pass and proves nothing
                    raise
                except Exception as error:  # noqa: BLE001 - an architecture may fail in any way; then the path is not right
                    reason = error_line(error)
                if not reason:
                    return path, ""
                reasons.append(reason)
        return None, reasons[0]

    def _difference_from_hf(self, layout: Layout, path: ForwardPath, attention: str, dtype: torch.dtype) -> str:
        """How a path's loss or gradients differ from transformers' own, as a sentence; empty if they do not.

        `layout`: of the documents in rows. In bfloat16 (on a GPU) packages with kernels are used as in a run; in other types,
        torch's own code.
        """
        if dtype is not torch.bfloat16:
            with without_kernel_packages():
                return self._compare_with_hf(layout, path, attention, dtype)
        return self._compare_with_hf(layout, path, attention, dtype)

    def _compare_with_hf(self, layout: Layout, path: ForwardPath, attention: str, dtype: torch.dtype) -> str:
        """Compare a path's loss and gradients with those of transformers' own model; returns a sentence on the difference, or "".

        Whatever kernels can be imported now are used. Gradients may differ more than the tolerance if transformers' own model
        rounds as much.
        """
        tolerance = MAX_DIFFERENCE_IN_HALF if dtype is torch.bfloat16 else MAX_RELATIVE_DIFFERENCE
        loss, gradients = self._loss_and_gradients_on_path(layout, path, attention, dtype)
        difference = abs(loss - float(self.expected_loss)) / float(self.expected_loss)
        if not difference <= tolerance:  # a NaN is no agreement
            return f"the loss differs by {difference:.1e} from that of the documents in separate rows"
        difference = self._gradient_distance(gradients)
        if difference <= tolerance or (difference <= MAX_ROUNDING and difference <= self._hf_rounding()):
            return ""
        return f"gradients differ by {difference:.1e} from those of the documents in separate rows"

    def _loss_and_gradients_on_path(
        self, layout: Layout, path: ForwardPath, attention: str, dtype: torch.dtype
    ) -> tuple[float, dict[str, Tensor]]:
        """Compute (the summed loss of all documents on a path, its gradients by parameter), to compare with transformers' own.

        In bfloat16 on the GPU, in other types on the CPU.
        """
        # Build the model on this path, with transformers' own weights.
        in_half = dtype is torch.bfloat16
        model = self._build(attention, dtype)
        model.load_state_dict(self.weights)
        model.forward_path = path
        if path.fused:  # the head computes the loss itself
            install_loss_head(model, self.small_config)
        model.train(not self.is_random)
        if in_half:
            model = model.to("cuda")
        # The loss and the gradients of all documents.
        batches = [self.documents]
        if path.alone:  # the model takes one document at a time
            batches = [[document] for document in self.documents]
        loss = torch.zeros((), dtype=torch.float64)
        for documents in batches:
            batch = Collator(layout, pad_token_id=0)(documents)
            if in_half:
                batch = to_device(batch, torch.device("cuda"))
            batch_loss = summed_loss(model, batch).loss
            batch_loss.backward()
            loss = loss + batch_loss.detach().cpu()
        return float(loss), _gradients_by_name(unwrap_adapter(model))

    def _gradient_distance(self, gradients: dict[str, Tensor]) -> float:
        """How far gradients are from those of transformers' own model: the norm of the difference, over the norm of the latter.

        A missing gradient counts as zero.
        """
        norms = []
        distances = []
        for name, expected in self.expected_gradients.items():
            norms.append(expected.norm())
            if name in gradients:
                distances.append((gradients[name].double().cpu() - expected).norm())
            else:
                distances.append(expected.norm())
        return float(torch.stack(distances).norm() / torch.stack(norms).norm())

    def _hf_rounding(self) -> float:
        """How far gradients of transformers' own model in float32 are from those in float64; 0 if it has no float64."""
        if self._rounding is None:
            self._rounding = 0.0
            if self.dtype is torch.float64:
                hf_model = self._build("eager", torch.float32)
                hf_model.load_state_dict(self.weights)
                self._rounding = self._gradient_distance(self._loss_and_gradients(hf_model.eval())[1])
        return self._rounding


def error_on_tokens_alone(meta_model: Any) -> str:
    """Why a model cannot be trained on texts alone: the error that it raises if it is given a row of tokens and nothing else.

    Empty if it accepts them. A decoder that reads another model's states does not, for example. `meta_model`: on the meta device.
    Only ValueError and TypeError count: others come from tensors that have no values on meta.
    """
    try:
        meta_model.train()(input_ids=torch.zeros(1, 23, dtype=torch.int64, device="meta"), use_cache=False)
    except (ValueError, TypeError) as error:
        return error_line(error).rstrip(".")
    except Exception:  # noqa: BLE001 - a model may look at values, which meta does not have
        return ""
    return ""


def _gradients_by_name(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of a model's parameters; a parameter without one is left out."""
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
