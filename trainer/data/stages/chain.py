"""Which steps a configuration asks for, in their order: checks, cleaning, filters, privacy, decontamination."""

from __future__ import annotations

from collections.abc import Callable

from trainer.data.config import CleaningConfig, DataConfig, FilterConfig, PrivacyMode
from trainer.data.document import Stage
from trainer.data.inputs import evaluation_documents
from trainer.data.stages.checks import Checks
from trainer.data.stages.cleaning import Cleaner
from trainer.data.stages.decontamination import Decontaminator, evaluation_texts
from trainer.data.stages.filters import Filters
from trainer.data.stages.privacy.stage import Privacy


def stages_of(config: DataConfig) -> Callable[[], list[Stage]]:
    """A function that makes the stages anew. Files that a stage needs are read here, once."""
    decontaminator = _decontaminator(config) if config.decontamination.paths is not None else None

    def make() -> list[Stage]:
        made: list[Stage] = [Checks(config.checks)]
        if config.cleaning != CleaningConfig():
            made.append(Cleaner(config.cleaning))
        if config.filters != FilterConfig():
            made.append(Filters(config.filters))
        if config.privacy.mode is not PrivacyMode.none:
            made.append(Privacy(config.privacy))
        if decontaminator is not None:
            made.append(decontaminator)
        return made

    return make


def _decontaminator(config: DataConfig) -> Decontaminator:
    """Built from the evaluation files; raises DataError for files that do not exist or hold a row that cannot be read."""
    settings = config.decontamination
    texts = (text for d in evaluation_documents(settings.paths, config) for text in evaluation_texts(d, settings.ngram))
    return Decontaminator.build(texts, settings)
