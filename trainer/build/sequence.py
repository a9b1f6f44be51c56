"""Whether ranks can share rows of a run's models (`parallel.sequence`), and what a user should know of how they do.

`sequence_problems` needs the models' configurations alone, so a run is refused before its data is prepared. What the settings
rule out by themselves is refused earlier still (`trainer/config/sharding.py`).
"""

from __future__ import annotations

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
from trainer.objectives.layout_choice import why_pooled_rows_cannot_be_shared, why_rows_cannot_be_shared
from trainer.objectives.registry import objective_family

QUERY_HEADS = (
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "decoder_attention_heads",
    "swa_num_attention_heads",
)
"""Names under which configurations have the query heads of a layer: a number, or a list of one for each layer."""
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_n_heads")
UNEVEN = 1.1
"""The busiest rank's share of the heads, over the mean, from which on a run says so."""


@dataclass(frozen=True, slots=True)
class LayerHeads:
    """The attention heads of a model's layers."""

    query: int
    """Query heads; of layers that differ, the fewest."""
    key_value: int
    """Key-value heads, which groups of query heads share."""
    width: int
    """Elements of a head; where those of queries and of values differ, the mean of both."""

    def busiest_share(self, ranks: int) -> float:
        """Query heads of the busiest of `ranks` ranks, divided by the mean over them."""
        return -(-self.query // ranks) * ranks / self.query

    def all_to_all_elements(self, tokens: int, ranks: int) -> int:
        """Elements that the busiest rank sends to others in a forward pass of one layer, for a row of `tokens` tokens."""
        shares = head_shares(self.query, self.key_value, ranks)
        local_tokens = -(-tokens // ranks)
        own_key_heads = [end - first for first, end in shares.key_value]
        sent_by_rank = []
        for (first, end), key_heads in zip(shares.query, own_key_heads, strict=True):
            queries = local_tokens * (self.query - (end - first))
            keys_and_values = 2 * local_tokens * (sum(own_key_heads) - key_heads)
            results = (tokens - local_tokens) * (end - first)
            sent_by_rank.append((queries + keys_and_values + results) * self.width)
        return max(sent_by_rank)

    def counted_elements(self, tokens: float, ranks: int) -> float:
        """Elements of rank 0's four all-to-alls (queries, keys, values, results) in a forward pass of one layer, as counted.

        An all-to-all counts with the larger of what is sent and what is received, the rank's own part included. `tokens`: of the
        row that the `ranks` ranks share.
        """
        shares = head_shares(self.query, self.key_value, ranks)
        elements = 0.0
        # Two all-to-alls by query heads (queries and results), two by key-value heads (keys and values).
        for heads_by_rank in (shares.query, shares.key_value):
            first, end = heads_by_rank[0]
            own_heads = end - first
            all_heads = sum(share_end - share_first for share_first, share_end in heads_by_rank)
            slice_with_all_heads = tokens / ranks * all_heads
            row_with_own_heads = tokens * own_heads
            elements += 2 * max(slice_with_all_heads, row_with_own_heads) * self.width
        return elements


def heads_of(model_config: Any) -> LayerHeads | None:
    """The attention heads of a model, from its transformers configuration; None if that does not state any."""
    text = text_model_config(model_config)
    query = _fewest(text, QUERY_HEADS)
    if query is None:
        return None
    key_value = min(query, _fewest(text, KEY_VALUE_HEADS) or query)
    if query % key_value:  # the two numbers are of different layers
        key_value = query
    # If the layers differ, their largest head decides how much is exchanged at most.
    width = max(filter(None, layer_values(text, "head_dim")), default=getattr(text, "hidden_size", query) // query)
    # Latent attention: `head_dim` is only the rotated part of a query. Take the mean of the widths of queries and values.
    latent_names = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    latent_widths: list[Any] = [getattr(text, name, None) for name in latent_names]
    if all(isinstance(part, int) for part in latent_widths):
        width = sum(latent_widths) // 2
    return LayerHeads(query, key_value, int(width))


def _fewest(settings: Any, names: tuple[str, ...]) -> int | None:
    """The smallest number above 0 that `settings` has under any of these names, also in a list; None if there is none."""
    numbers: list[int] = []
    for name in names:
        for value in layer_values(settings, name):
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int) and number > 0:
                    numbers.append(number)
    return min(numbers, default=None)


def step_layout(config: RunConfig) -> Layout:
    """The layout of batches that the run's model is built for: `data.layout`, except for classifiers.

    Classifiers have a padded row for each document; if ranks share rows, these have no padding (`trainer/objectives/pooled.py`).
    Raises ConfigError if `data.layout=padding_free` is set for a classifier whose rows are not shared.
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


def sequence_problems(config: RunConfig) -> list[str]:
    """Why ranks cannot share rows of the run's model, or of its teacher, a line each; empty if they can.

    Reads only configurations. Tests it on a small copy of each model, which takes about a second, once a host.
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
    """Why ranks cannot share rows of one model, a line each; empty if they can. `setting`: names it, as `model.path=<path>`."""
    degree = config.parallel.sequence
    settings = load_model_config(model)
    heads = heads_of(settings)
    if heads is not None and degree > heads.query:
        return [
            f"parallel.sequence={degree}: {setting} has {heads.query} query heads in a layer, so that some rank would have none; "
            f"set parallel.sequence={heads.query} or less"
        ]
    family = objective_family(config.objective)
    if family.kind is ModelKind.classifier:
        problem = why_pooled_rows_cannot_be_shared(model, settings, family.name)
    else:
        half_on_gpu = str(config.run.device) != "cpu" and config.precision is not Precision.fp32
        problem = why_rows_cannot_be_shared(model, settings, half_on_gpu=half_on_gpu)
    if problem is None:
        return []
    return [
        f"parallel.sequence={degree}: ranks cannot share rows of {setting} ({settings.model_type}): {problem}; set "
        "parallel.sequence=1, or take a model of another architecture (docs/models.md lists those that can)"
    ]


def sequence_notes(config: RunConfig, model_config: Any, ranks_per_host: int, tokens: int) -> list[str]:
    """Notes for the user on how ranks share rows of up to `tokens` tokens, a sentence each: uneven heads, groups across hosts."""
    degree = config.parallel.sequence
    heads = heads_of(model_config)
    if degree == 1 or heads is None:
        return []
    notes = []
    busiest_over_mean = heads.busiest_share(degree)
    if busiest_over_mean >= UNEVEN:
        notes.append(
            f"{heads.query} query heads do not divide well by {degree}: the busiest rank has {busiest_over_mean:.2f} times "
            "the mean"
        )
    # Groups are neighbouring ranks, so all of them lie within hosts if the degree divides the ranks of a host.
    if ranks_per_host % degree:
        element_bytes = 4 if config.precision is Precision.fp32 else 2
        mib = heads.all_to_all_elements(tokens, degree) * element_bytes / 2**20
        notes.append(
            f"groups of {degree} ranks cross hosts of {ranks_per_host}: a rank sends up to {mib:,.0f} MiB a layer, in the "
            "forward pass and again in the backward pass"
        )
    return notes
