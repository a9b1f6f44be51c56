"""Personal data in training text: found by type, reported, redacted or pseudonymised."""

from trainer.data.stages.privacy.config import PrivacyConfig, PrivacyEngine, PrivacyMode, active_types, problems
from trainer.data.stages.privacy.engine import Finder, find
from trainer.data.stages.privacy.findings import Findings
from trainer.data.stages.privacy.rule import Finding
from trainer.data.stages.privacy.stage import Privacy, check

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
