"""Writes a small copy of a model, with random weights by which faults show in gradients and rounding errors do not.

A copy keeps the numbers of heads and of experts and every kind of layer (`trainer/model/shrink.py`). No weight is zero, since
a value that is multiplied by zero gets no gradient. The scores of the experts that a router chooses for a token are far above
those of the others, since of two nearly equal scores a rounding error could change the choice.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from strategies.errors import ConfigError
from strategies.parameters import meta_context
from trainer.model import attention, experts, flex
from trainer.model.architecture import (
    build_plain_model,
    experts_per_token,
    set_dropout,
    set_head_settings,
    text_model_config,
    transformers_class,
)
from trainer.model.config import ModelConfig, ModelKind
from trainer.model.loading import find_weights_directory, load_model_config
from trainer.model.shrink import NotShrinkable, changed_sizes, kept_counts, refuse_unfit_copy, small_copies
from trainer.tuning.expert_parts import router_weight_names

MAX_PARAMETERS = 100_000_000
"""Most elements of a copy. A larger one has sizes in its configuration that shrinking does not know by name."""
NUM_TRIED_TOKENS = 11
"""Tokens of the pass that shows whether a copy runs."""
MIXTURE_WEIGHT_FACTOR = 0.3
"""Factor on the weights of a mixture of experts, so that the outputs of blocks do not hide the kind of a token from a router."""
TOKEN_KIND_LENGTH = 8.0
"""Length of the part of an embedding that encodes the token's kind; the part of the token itself has a length of about 1."""
ROUTER_SCALE = 0.5
"""Factor on the weights of routers. At 1, softmax would give the chosen experts so much that the router gets no gradient."""
MAX_TOKEN_KINDS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class SmallModel:
    """A small copy that was written."""

    directory: Path
    model_type: str
    changed: dict[str, tuple[Any, Any]]
    """(full, small) value of each setting that differs, by name."""
    kept: dict[str, int]
    """Numbers of heads and of experts that are the model's own."""
    num_parameters: int
    num_decided_routers: int
    """Decided routers: matrices with weights by which no rounding error changes a choice."""

    def record(self) -> dict[str, Any]:
        """The copy as JSON values."""
        return {
            "model_type": self.model_type,
            "changed": {name: {"model": full, "copy": small} for name, (full, small) in self.changed.items()},
            "kept": self.kept,
            "elements": self.num_parameters,
            "decided_routers": self.num_decided_routers,
        }


def write_small_model(
    config: ModelConfig, kind: ModelKind, directory: Path, *, num_outputs: int | None, seed: int = 0
) -> SmallModel:
    """Write a small copy of a model into `directory`, with weights drawn from `seed` in float32: a verification trains it.

    No collective. The copy has every kind of layer, and as a rule the model's numbers of heads and experts, by which ranks
    divide the work. `kind`: what the model is loaded as. `num_outputs`: size of a classification head; None for other kinds. The
    random state of torch stays as it was.

    Raises ConfigError if the model is not there, or if none of its small copies can be built and run.
    """
    # transformers must know our functions, which a configuration may name.
    attention.register()
    flex.register()
    experts.register()
    hf_config = load_model_config(config)
    full_model = _full_model_on_meta(config, kind, hf_config, num_outputs)
    with _drawing_from_seed(seed):
        model, num_decided_routers = _first_copy_that_runs(config, kind, hf_config, full_model)
    _write_model_and_tokenizer(model, config, directory)
    return SmallModel(
        directory=directory,
        model_type=str(hf_config.model_type),
        changed=changed_sizes(hf_config, model.config),
        kept=kept_counts(hf_config, model.config),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_decided_routers=num_decided_routers,
    )


def _full_model_on_meta(config: ModelConfig, kind: ModelKind, hf_config: Any, num_outputs: int | None) -> Any:
    """Build the full model on the meta device, from transformers' configuration `hf_config`, which stays as it is.

    `num_outputs`: size of the head of a classifier.
    """
    full_config = copy.deepcopy(hf_config)
    if kind is ModelKind.classifier:
        set_head_settings(full_config, num_outputs, pad_token_id=0, multi_label=False)
    with meta_context():
        full_model, _ = build_plain_model(kind, full_config, config, attention="eager", objective="sft")
    return full_model


def _write_model_and_tokenizer(model: Any, config: ModelConfig, directory: Path) -> None:
    """Write a small copy into `directory`, with a tokenizer of its size and the code that the full model comes with."""
    with _no_progress_bars():
        model.save_pretrained(directory)
    _write_tokenizer(text_model_config(model.config).vocab_size, directory)
    if config.trust_remote_code:
        for file in find_weights_directory(config).glob("*.py"):
            shutil.copy(file, directory)


@contextmanager
def _drawing_from_seed(seed: int) -> Iterator[None]:
    """A context in which torch draws from `seed` on the CPU; afterwards its random state is what it was before."""
    rng_state = torch.random.get_rng_state()
    try:
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        torch.random.set_rng_state(rng_state)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Within it, transformers draws no progress bars, which it would also write to files."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _write_tokenizer(vocabulary_size: int, directory: Path) -> None:
    """Write a tokenizer of made-up words for a small copy, with a token for each of its embeddings; the model's own has more."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"word{number}": number for number in range(vocabulary_size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="word0")),
        unk_token="word0",
        pad_token="word0",
        bos_token="word1",
        eos_token="word2",
    )
    tokenizer.save_pretrained(directory)


class _SmallCopy(NamedTuple):
    """A small copy in memory, with random weights."""

    model: Any
    num_decided_routers: int
    """Routers whose choices no rounding error changes."""


def _first_copy_that_runs(config: ModelConfig, kind: ModelKind, hf_config: Any, full_model: Any) -> _SmallCopy:
    """Find the first small copy of a model that can be built and run, with its random weights.

    `hf_config`, `full_model`: configuration and architecture of the full model. Copies that keep its numbers of heads and
    experts are tried first. Raises ConfigError if no copy runs.
    """
    first_reason = ""
    try:
        # The first copies have all heads and experts of the full model.
        for small_config in small_copies(hf_config, full_model, keep_counts=True):
            try:
                return _build_small_copy(config, kind, hf_config, full_model, small_config)
            except Exception as error:  # noqa: BLE001 - an architecture may fail in any way; then the next copy is tried
                first_line = (str(error).strip() or "no message").splitlines()[0]
                first_reason = first_reason or f"{type(error).__name__}: {first_line[:160]}"
    except NotShrinkable as error:
        first_reason = str(error)
    raise ConfigError(
        f"model.path={config.path}: --verify runs on a small copy of the model, and none can be made of this "
        f"{hf_config.model_type} ({first_reason})"
    )


def _build_small_copy(
    config: ModelConfig, kind: ModelKind, hf_config: Any, full_model: Any, small_config: Any
) -> _SmallCopy:
    """Build the model of the configuration `small_config`, give it random weights, and run it once, to see that it works.

    `hf_config`, `full_model`: configuration and architecture of the full model. Raises NotShrinkable if the copy is too large,
    lacks a kind of layer, or computes numbers that are not finite, and any error of building and running it.
    """
    small_config = copy.deepcopy(small_config)
    set_dropout(small_config, 0.0)
    if kind is ModelKind.classifier:
        set_head_settings(small_config, full_model.config.num_labels, pad_token_id=0, multi_label=False)
    model_class = transformers_class(kind, small_config)
    options: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager"}
    options["trust_remote_code"] = config.trust_remote_code
    # On meta first: is it small enough, and does it have every kind of layer?
    with meta_context():
        on_meta = model_class.from_config(copy.deepcopy(small_config), **options)
    refuse_unfit_copy(hf_config, full_model, small_config, on_meta, max_parameters=MAX_PARAMETERS)
    # Then with weights: does a forward pass give finite numbers?
    model = model_class.from_config(small_config, dtype=torch.float32, **options).eval()
    num_decided_routers = _randomise_weights(model)
    ids = torch.arange(NUM_TRIED_TOKENS)[None] % text_model_config(small_config).vocab_size
    inputs = {"input_ids": ids, "use_cache": False}
    if kind is ModelKind.encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        logits = model(**inputs).logits
    if not logits.isfinite().all():
        raise NotShrinkable("a small copy with random weights computes what is no number")
    return _SmallCopy(model, num_decided_routers)


@torch.no_grad()
def _randomise_weights(model: Any) -> int:
    """Draw random weights in place, by which every parameter gets a gradient: new matrices, noise on norms and biases.

    Returns how many routers are decided: changed so that no rounding error changes which experts they choose.
    """
    router_names = router_weight_names(model)
    # Smaller in a mixture of experts, where the outputs of blocks would hide from a router what kind of token it sees.
    scale = MIXTURE_WEIGHT_FACTOR if router_names else 1.0
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, scale / math.sqrt(parameter.shape[-1]))
        else:
            parameter.add_(torch.randn_like(parameter) * 0.02)
    embeddings = model.get_input_embeddings()
    width = embeddings.weight.shape[-1]
    # Matrices [experts, width], which read the hidden states themselves.
    router_matrices = []
    for matrix in map(model.get_parameter, router_names):
        if matrix.dim() == 2 and matrix.shape[1] == width:
            router_matrices.append(matrix)
    if router_matrices:
        _make_router_choices_clear(embeddings, router_matrices, experts_per_token(model.config))
    return len(router_matrices)


def _make_router_choices_clear(embeddings: nn.Embedding, router_matrices: list[Tensor], experts_per_token: int) -> None:
    """Change embeddings and routers in place so that no rounding error changes which experts a router chooses for a token.

    In a small random model, the best two scores of a token may be nearly equal. So each token gets a kind, and each kind has its
    own experts, whose router scores are far above those of the others. The kind of a token is a direction that is added to its
    embedding, and which the residual stream carries to each router. Must be called without gradients.
    """
    most_experts = max(matrix.shape[0] for matrix in router_matrices)
    vocabulary_size, width = embeddings.weight.shape
    # Half of the dimensions at most, so that the others still tell tokens of one kind apart.
    max_kinds = min(MAX_TOKEN_KINDS, width // 2)
    num_kinds = min(max_kinds, max(2, math.ceil(most_experts / experts_per_token)))
    orthogonal_columns, _ = torch.linalg.qr(torch.randn(width, num_kinds))
    directions = orthogonal_columns.T  # [kinds, width]
    embeddings.weight.add_(TOKEN_KIND_LENGTH * directions[torch.arange(vocabulary_size) % num_kinds])
    for matrix in router_matrices:
        matrix.zero_()
        for kind, experts_of_kind in enumerate(_experts_by_kind(num_kinds, matrix.shape[0], experts_per_token)):
            for index, expert in enumerate(experts_of_kind):
                # Different scores within a kind: of equal ones, normalised to a sum of 1, the router would get no gradient.
                score = ROUTER_SCALE * (1 + index / (4 * experts_per_token))
                matrix[expert] += score * directions[kind]
        matrix.add_(torch.randn_like(matrix) * 1e-3)


def _experts_by_kind(num_kinds: int, num_experts: int, experts_per_token: int) -> Iterator[list[int]]:
    """The experts of each kind of token: neighbours, since some routers choose a group of experts first."""
    for kind in range(num_kinds):
        first = kind * experts_per_token
        yield [(first + offset) % num_experts for offset in range(min(experts_per_token, num_experts))]
