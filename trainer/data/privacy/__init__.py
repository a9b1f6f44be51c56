"""Personal data in training text: found by type, reported, redacted or pseudonymised."""

from trainer.data.privacy.engine import Finder, find
from trainer.data.privacy.findings import Findings
from trainer.data.privacy.rule import Finding
from trainer.data.privacy.settings import PrivacyConfig, PrivacyEngine, PrivacyMode, active_types, problems
from trainer.data.privacy.stage import Privacy, check

__all__ = [
    "Finder",
    "Finding",
    "Findings",
    "Privacy",
    "PrivacyConfig",
    "PrivacyEngine",
    "PrivacyMode",
    "active_types",
    "check",
    "find",
    "problems",
]
