"""Whether ranks can share rows of a run's models (`parallel.sequence`), and what a user should know of how they do.

`sequence_parallel_problems` needs the models' configurations alone, so a run is refused before its data is prepared. What the
settings rule out by themselves is refused earlier still (`trainer/config/sharding.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from strategies.base import Precision
from strategies.errors import ConfigError
from trainer.config.run import RunConfig
from trainer.data.config import Layout
from trainer.model.architecture import text_model_config
from trainer.model.config import ModelConfig, ModelKind
from trainer.model.layer_settings import layer_values
from trainer.model.loading import load_model_config
from trainer.model.sequence_attention import head_shares
from trainer.objectives.frozen_model import teacher_model
from trainer.objectives.layout_choice import why_causal_rows_cannot_be_shared, why_classifier_rows_cannot_be_shared
from trainer.objectives.registry import objective_family

QUERY_HEAD_SETTINGS = (
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "decoder_attention_heads",
    "swa_num_attention_heads",
)
"""Names under which configurations have the query heads of a layer: a number, or a list of one for each layer."""
KEY_VALUE_HEAD_SETTINGS = ("num_key_value_heads", "num_kv_heads", "kv_n_heads")
NOTABLE_UNEVENNESS = 1.1
"""If the busiest rank has at least so many times the mean number of heads, the run says so."""


@dataclass(frozen=True, slots=True)
class LayerHeads:
    """The attention heads of a model's layers."""

    num_query_heads: int
    """Of layers that differ, the fewest."""
    num_key_value_heads: int
    """Each is shared by a group of query heads."""
    head_dim: int
    """Elements of a head; if those of queries and of values differ, the mean of both."""

    def head_imbalance(self, ranks: int) -> float:
        """Query heads of the busiest of `ranks` ranks, divided by the mean over them: 6 heads on 4 ranks give 2 / 1.5 = 1.33."""
        heads_of_busiest = math.ceil(self.num_query_heads / ranks)
        return heads_of_busiest * ranks / self.num_query_heads

    def max_all_to_all_elements(self, tokens: int, ranks: int) -> int:
        """Elements that the busiest of `ranks` ranks sends to others in a forward pass of one layer.

        `tokens`: of the row that the ranks share. Before attention a rank sends its slice of all heads that it does not attend
        with; after it, its heads of all other slices.
        """
        shares = head_shares(self.num_query_heads, self.num_key_value_heads, ranks)
        slice_tokens = math.ceil(tokens / ranks)
        key_heads_by_rank = [end - first for first, end in shares.key_value_heads]
        sent_by_rank = []
        for (first, end), own_key_heads in zip(shares.query_heads, key_heads_by_rank, strict=True):
            own_query_heads = end - first
            queries = slice_tokens * (self.num_query_heads - own_query_heads)
            # Keys and values: 2. Two ranks that use the same key-value head each get a copy, so that copies are summed, not
            # heads.
            keys_and_values = 2 * slice_tokens * (sum(key_heads_by_rank) - own_key_heads)
            results = (tokens - slice_tokens) * own_query_heads
            sent_by_rank.append((queries + keys_and_values + results) * self.head_dim)
        return max(sent_by_rank)

    def all_to_all_elements_counted_on_rank_0(self, tokens: float, ranks: int) -> float:
        """Elements of rank 0's four all-to-alls (queries, keys, values, results) in a layer's forward pass, as counted.

        An estimate to be compared with the counters of a step (`strategies/communication_counters.py`). They count an
        all-to-all with the larger of what is sent and what is received, the rank's own part included. `tokens`: of the row that
        the `ranks` ranks share.
        """
        shares = head_shares(self.num_query_heads, self.num_key_value_heads, ranks)
        elements = 0.0
        # Two all-to-alls by query heads (queries and results), two by key-value heads (keys and values).
        for heads_by_rank in (shares.query_heads, shares.key_value_heads):
            first, end = heads_by_rank[0]
            own_heads = end - first
            all_heads = sum(share_end - share_first for share_first, share_end in heads_by_rank)
            slice_with_all_heads = tokens / ranks * all_heads
            row_with_own_heads = tokens * own_heads
            elements += 2 * max(slice_with_all_heads, row_with_own_heads) * self.head_dim
        return elements


def attention_heads_of(hf_config: Any) -> LayerHeads | None:
    """How many attention heads a model's layers have, from its transformers configuration; None if that does not state any.

    If layers differ: the fewest heads, which say over how many ranks they can be divided, and the widest, which say how much is
    exchanged at most.
    """
    text = text_model_config(hf_config)
    query = _smallest_setting(text, QUERY_HEAD_SETTINGS)
    if query is None:
        return None
    key_value = min(query, _smallest_setting(text, KEY_VALUE_HEAD_SETTINGS) or query)
    if query % key_value:  # the two numbers are of different layers
        key_value = query
    # Without `head_dim`, a head is the model's width over the number of heads.
    width = max(filter(None, layer_values(text, "head_dim")), default=getattr(text, "hidden_size", query) // query)
    # Latent attention: `head_dim` is only the rotated part of a query, which is as wide as the first two of these together.
    latent_names = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    latent_widths: list[Any] = [getattr(text, name, None) for name in latent_names]
    if all(isinstance(part, int) for part in latent_widths):
        width = sum(latent_widths) // 2  # the mean of queries and values
    return LayerHeads(num_query_heads=query, num_key_value_heads=key_value, head_dim=int(width))


def _smallest_setting(settings: Any, names: tuple[str, ...]) -> int | None:
    """The smallest number above 0 that a configuration has under any of these names; None if there is none.

    A setting may be a number, a list of one for each layer, or differ by layer in another way.
    """
    numbers: list[int] = []
    for name in names:
        for value in layer_values(settings, name):
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int) and number > 0:
                    numbers.append(number)
    return min(numbers, default=None)


def step_layout(config: RunConfig) -> Layout:
    """The layout of batches that the run's model is built for: padded rows, or documents one after another (padding-free).

    That is `data.layout`, except for classifiers: they have a padded row for each document, and padding-free rows only if ranks
    share them. Raises ConfigError if `data.layout=padding_free` is set for a classifier whose rows are not shared.
    """
    if objective_family(config.objective).kind is not ModelKind.classifier:
        return config.data.layout
    if config.parallel.sequence > 1:
        return Layout.padding_free
    if config.data.layout is Layout.padding_free:
        raise ConfigError(
            f"data.layout=padding_free: objective={config.objective.name} needs a row for each document; use data.layout=padded"
        )
    return config.data.layout


def sequence_parallel_problems(config: RunConfig) -> list[str]:
    """Why ranks cannot share rows of the run's model, or of its teacher, one line for each problem; empty if they can.

    Called before data is prepared. Reads only the configurations of the models, of which it builds and tests a small copy:
    about a second, once a host.
    """
    if config.parallel.sequence == 1:
        return []
    models = {"model.path": config.model}
    teacher = teacher_model(config.model, config.objective)
    if teacher is not None:
        models["objective.teacher.path"] = teacher
    problems = []
    for key, model in models.items():
        problems += _model_problems(config, f"{key}={model.path}", model)
    return problems


def _model_problems(config: RunConfig, setting: str, model: ModelConfig) -> list[str]:
    """Why ranks cannot share rows of one model (sequence parallelism): a list of one line; empty if they can.

    `setting`: names the model in the line, as `model.path=<path>`.
    """
    degree = config.parallel.sequence
    hf_config = load_model_config(model)
    heads = attention_heads_of(hf_config)
    if heads is not None and degree > heads.num_query_heads:
        return [
            f"parallel.sequence={degree}: {setting} has {heads.num_query_heads} query heads in a layer, "
            "so that some rank would have none; "
            f"set parallel.sequence={heads.num_query_heads} or less"
        ]
    family = objective_family(config.objective)
    if family.kind is ModelKind.classifier:
        problem = why_classifier_rows_cannot_be_shared(model, hf_config, family.name)
    else:
        half_on_gpu = str(config.run.device) != "cpu" and config.precision is not Precision.fp32
        problem = why_causal_rows_cannot_be_shared(model, hf_config, half_on_gpu=half_on_gpu)
    if problem is None:
        return []
    return [
        f"parallel.sequence={degree}: ranks cannot share rows of {setting} ({hf_config.model_type}): {problem}; set "
        "parallel.sequence=1, or take a model of another architecture (docs/models.md lists those that can)"
    ]


def sequence_parallel_notes(
    degree: int, hf_config: Any, precision: Precision, *, ranks_per_host: int, tokens: int
) -> list[str]:
    """Notes for the user on how ranks share rows of up to `tokens` tokens, a sentence each: uneven heads, groups across hosts.

    Such as "6 query heads do not divide well by 4: the busiest rank has 1.33 times the mean". Empty without sequence
    parallelism. `ranks_per_host`: of the run.
    """
    heads = attention_heads_of(hf_config)
    if degree == 1 or heads is None:
        return []
    notes = []
    imbalance = heads.head_imbalance(degree)
    if imbalance >= NOTABLE_UNEVENNESS:
        notes.append(
            f"{heads.num_query_heads} query heads do not divide well by {degree}: the busiest rank has "
            f"{imbalance:.2f} times "
            "the mean"
        )
    # Groups are neighbouring ranks, so all of them lie within hosts if the degree divides the ranks of a host.
    if ranks_per_host % degree:
        element_bytes = 4 if precision is Precision.fp32 else 2
        mib = heads.max_all_to_all_elements(tokens, degree) * element_bytes / 2**20
        notes.append(
            f"groups of {degree} ranks cross hosts of {ranks_per_host}: a rank sends up to {mib:,.0f} MiB a layer, in the "
            "forward pass and again in the backward pass"
        )
    return notes
