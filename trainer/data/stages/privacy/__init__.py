"""Personal data in training text: found by type, reported, redacted or pseudonymised."""

from trainer.data.config import PrivacyConfig, PrivacyEngine, PrivacyMode
from trainer.data.stages.privacy.config import coverage, problems
from trainer.data.stages.privacy.engine import Finder
from trainer.data.stages.privacy.rule import Finding
from trainer.data.stages.privacy.stage import Findings, Privacy, check

__all__ = [
    "Finder",
    "Finding",
    "Findings",
    "Privacy",
    "PrivacyConfig",
    "PrivacyEngine",
    "PrivacyMode",
    "check",
    "coverage",
    "problems",
]
