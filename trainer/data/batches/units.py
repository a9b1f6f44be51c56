"""What is drawn as one: a document, a pack or the sequences of one document; and the order in which they are drawn."""

from __future__ import annotations

import numpy as np

from trainer.data.batches.mixing import pack_by_source, quotas
from trainer.data.batches.order import GlobalOrder, MixedOrder, Order
from trainer.data.batches.pack import best_fit_decreasing
from trainer.data.config import DataConfig
from trainer.data.store.sequences import TokenDataset


def source_weights(config: DataConfig, names: list[str]) -> list[float | None]:
    """The weight of each source by name; where any has one, held-out inputs, which are never drawn, count as 0."""
    weights = {name: source.weight for name, source in config.sources.items()}
    mixed = any(weight is not None for weight in weights.values())
    return [weights.get(name, 0.0 if mixed else None) for name in names]


def build_order(
    config: DataConfig, train: TokenDataset, *, sequences_per_document: int, seed: int
) -> tuple[list[list[int]] | None, Order]:
    """The sequences that stay together (packs, pairs of answers; None: each alone), and the order in which units are drawn.

    Raises ConfigError and DataError for weights of sources that cannot be used.
    """
    sources = train.sources if train.sources is not None else np.zeros(len(train), np.int64)
    per, shuffle = sequences_per_document, config.shuffle
    weights = source_weights(config, train.source_names)
    mixed = any(weight is not None for weight in weights)
    packs: list[list[int]] | None = None
    if per > 1:
        packs, sources = np.arange(len(train)).reshape(-1, per).tolist(), sources[::per]
    elif config.packing and mixed:
        packs, sources = pack_by_source(train.lengths, sources, config.max_length)
    elif config.packing:
        packs = best_fit_decreasing(train.lengths, config.max_length)
    if not mixed:
        return packs, GlobalOrder(len(train) if packs is None else len(packs), seed=seed, shuffle=shuffle)
    unit_tokens = train.lengths if packs is None else np.array([train.lengths[pack].sum() for pack in packs])
    unit_documents = np.ones(len(train), np.int64) if packs is None else np.array([len(pack) // per for pack in packs])
    quota = quotas(
        np.bincount(sources, minlength=len(weights)),
        np.bincount(sources, unit_tokens, minlength=len(weights)).astype(np.int64),
        weights,
        config.mixing.over,
        config.mixing.epoch,
        documents=np.bincount(sources, unit_documents, minlength=len(weights)).astype(np.int64),
        names=train.source_names,
    )
    return packs, MixedOrder(sources, quota, seed=seed, shuffle=shuffle)
