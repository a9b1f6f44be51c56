"""Writes a small copy of a model, with weights drawn so that faults show and roundings do not.

A copy keeps the numbers of heads and of experts and every kind of layer (`trainer/model/shrink.py`). Of the weights, none
is zero, since what is multiplied by zero has no gradient. A router sends each token to experts that are far ahead of the
others, since a token that is almost as fond of one expert as of another would go elsewhere by a rounding.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from strategies.errors import ConfigError
from strategies.parameters import meta_context
from trainer.model import attention, experts, flex
from trainer.model.architecture import (
    architecture,
    auto_class,
    describe_head,
    experts_per_token,
    set_dropout,
    text_settings,
)
from trainer.model.config import ModelConfig, ModelKind
from trainer.model.loading import load_model_config, weights_directory
from trainer.model.shrink import NotShrinkable, changed_sizes, kept_counts, lost_kinds, small_copies
from trainer.tuning.expert_parts import router_weights

MOST_ELEMENTS = 100_000_000
"""Most elements of a copy. A larger one has sizes in its configuration that shrinking does not know by name."""
TRIED_TOKENS = 11
"""Tokens of the pass that shows whether a copy runs."""
CALM = 0.3
"""Factor on the weights of a mixture of experts, so that what blocks add does not hide the kind of a token from a router."""
CLEAR = 8.0
"""Length of what an embedding says of its token's kind, beside about 1 that it says of the token."""
FONDNESS = 0.5
"""Factor on the scores of routers: at 1 the chosen experts would take so much that their router gets no gradient."""
MOST_TOKEN_KINDS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class SmallModel:
    """A small copy that was written."""

    directory: Path
    model_type: str
    changed: dict[str, tuple[Any, Any]]
    """(full, small) value of each setting that differs, by name."""
    kept: dict[str, int]
    """Numbers of heads and of experts that are the model's own."""
    elements: int
    """Of all parameters."""
    decided_routers: int
    """Router matrices whose choices no rounding changes."""

    def record(self) -> dict[str, Any]:
        """The copy as JSON values."""
        return {
            "model_type": self.model_type,
            "changed": {name: {"model": full, "copy": small} for name, (full, small) in self.changed.items()},
            "kept": self.kept,
            "elements": self.elements,
            "decided_routers": self.decided_routers,
        }


def write_small_model(
    config: ModelConfig, kind: ModelKind, directory: Path, *, outputs: int | None, seed: int = 0
) -> SmallModel:
    """Write a small copy of a model into `directory`, with weights drawn from `seed` in float32. No collective.

    `outputs`: size of a classification head. The random state of torch stays as it was. Raises ConfigError if the model is
    not there, or if none of its small copies can be built and run.
    """
    attention.register()
    flex.register()
    experts.register()
    settings = load_model_config(config)
    plain_settings = copy.deepcopy(settings)
    if kind is ModelKind.classifier:
        describe_head(plain_settings, outputs, 0, several=False)
    with meta_context():
        plain = architecture(kind, plain_settings, config, "eager", "sft")[0]
    rng_state = torch.random.get_rng_state()
    try:
        torch.default_generator.manual_seed(seed)
        model, decided_routers = _first_that_runs(config, kind, settings, plain)
    finally:
        torch.random.set_rng_state(rng_state)
    with _no_progress_bars():
        model.save_pretrained(directory)
    _write_tokenizer(text_settings(model.config).vocab_size, directory)
    if config.trust_remote_code:
        for file in weights_directory(config).glob("*.py"):
            shutil.copy(file, directory)
    return SmallModel(
        directory=directory,
        model_type=str(settings.model_type),
        changed=changed_sizes(settings, model.config),
        kept=kept_counts(settings, model.config),
        elements=sum(parameter.numel() for parameter in model.parameters()),
        decided_routers=decided_routers,
    )


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Within the block transformers draws none, which it would also do where nobody looks."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _write_tokenizer(rows: int, directory: Path) -> None:
    """Write a tokenizer with a word for each row of the embeddings: the model's own would have too many."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"word{number}": number for number in range(rows)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="word0")),
        unk_token="word0",
        pad_token="word0",
        bos_token="word1",
        eos_token="word2",
    )
    tokenizer.save_pretrained(directory)


def _first_that_runs(config: ModelConfig, kind: ModelKind, settings: Any, plain: Any) -> tuple[Any, int]:
    """(the first small copy that can be built and run, its decided routers). Raises ConfigError if there is none."""
    first_reason = ""
    try:
        for small in small_copies(settings, plain, keep_counts=True):
            try:
                return _built_and_run(config, kind, settings, plain, small)
            except Exception as error:  # noqa: BLE001 - an architecture may fail in any way; then the next copy is tried
                line = (str(error).strip() or "no message").splitlines()[0]
                first_reason = first_reason or f"{type(error).__name__}: {line[:160]}"
    except NotShrinkable as error:
        first_reason = str(error)
    raise ConfigError(
        f"model.path={config.path}: --verify runs on a small copy of the model, and none can be made of this "
        f"{settings.model_type} ({first_reason})"
    )


def _built_and_run(config: ModelConfig, kind: ModelKind, settings: Any, plain: Any, small: Any) -> tuple[Any, int]:
    """(the model of a small copy, its decided routers). Raises whatever keeps it from running."""
    small = copy.deepcopy(small)
    set_dropout(small, 0.0)
    if kind is ModelKind.classifier:
        describe_head(small, plain.config.num_labels, 0, several=False)
    model_class = auto_class(kind, small)
    options: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager"}
    options["trust_remote_code"] = config.trust_remote_code
    with meta_context():
        on_meta = model_class.from_config(copy.deepcopy(small), **options)
    elements = sum(parameter.numel() for parameter in on_meta.parameters())
    if elements > MOST_ELEMENTS:
        raise NotShrinkable(f"a small copy would have {elements:,} elements")
    if lost := lost_kinds(settings, plain, small, on_meta):
        raise NotShrinkable(f"a small copy lacks {lost} of its kinds of layers")
    model = model_class.from_config(small, dtype=torch.float32, **options).eval()
    decided_routers = _draw_weights(model)
    ids = torch.arange(TRIED_TOKENS)[None] % text_settings(small).vocab_size
    inputs = {"input_ids": ids, "use_cache": False}
    if kind is ModelKind.encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        logits = model(**inputs).logits
    if not logits.isfinite().all():
        raise NotShrinkable("a small copy with random weights computes what is no number")
    return model, decided_routers


@torch.no_grad()
def _draw_weights(model: Any) -> int:
    """Draw matrices and disturb vectors; how many routers were made decided."""
    names = router_weights(model)
    scale = CALM if names else 1.0
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, scale / math.sqrt(parameter.shape[-1]))
        else:
            parameter.add_(torch.randn_like(parameter) * 0.02)
    embeddings = model.get_input_embeddings()
    matrices = [matrix for matrix in map(model.get_parameter, names) if matrix.dim() == 2]
    width = embeddings.weight.shape[-1]
    matrices = [matrix for matrix in matrices if matrix.shape[1] == width]
    if matrices:
        _decide(embeddings, matrices, experts_per_token(model.config))
    return len(matrices)


def _decide(embeddings: nn.Embedding, matrices: list[Tensor], experts_per_token: int) -> None:
    """Give each token a kind, and each kind its own experts, of which a router is much fonder than of the others.

    A kind is a direction of the hidden states, which the residual stream carries to each router.
    """
    most_experts = max(matrix.shape[0] for matrix in matrices)
    rows, width = embeddings.weight.shape
    kinds = min(MOST_TOKEN_KINDS, width // 2, max(2, math.ceil(most_experts / experts_per_token)))
    directions = torch.linalg.qr(torch.randn(width, kinds))[0].T
    embeddings.weight.add_(CLEAR * directions[torch.arange(rows) % kinds])
    for matrix in matrices:
        matrix.zero_()
        for kind, chosen in enumerate(_experts_of_kinds(kinds, matrix.shape[0], experts_per_token)):
            for place, expert in enumerate(chosen):
                # Unlike weights within a kind, so that the router has a gradient where weights are made to add up to 1.
                matrix[expert] += FONDNESS * (1 + place / (4 * experts_per_token)) * directions[kind]
        matrix.add_(torch.randn_like(matrix) * 1e-3)


def _experts_of_kinds(kinds: int, num_experts: int, experts_per_token: int) -> Iterator[list[int]]:
    """The experts of each kind of token: neighbours, since some routers choose within groups of experts first."""
    for kind in range(kinds):
        first = kind * experts_per_token
        yield [(first + place) % num_experts for place in range(min(experts_per_token, num_experts))]
