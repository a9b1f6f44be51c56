"""The privacy stage of preparation: finds personal data in a document's texts and does what the mode says.

Only texts are looked into and changed: roles, labels, file names and any other columns are not.
"""

from __future__ import annotations

import os

from strategies.errors import DataError
from trainer.data.document import Document, Tally
from trainer.data.stages.privacy.config import PrivacyConfig, PrivacyMode
from trainer.data.stages.privacy.engine import Finder, Finding
from trainer.data.stages.privacy.findings import Findings
from trainer.data.stages.privacy.pseudonym import mask, pseudonym


class Privacy:
    """Report, redact, pseudonymise, drop or fail. Built from its settings in every worker process.

    Raises ConfigError where the settings cannot be used (also: no key for pseudonyms). `findings` adds up what was seen.
    """

    name = "privacy"

    def __init__(self, config: PrivacyConfig) -> None:
        self.config = config
        self.findings = Findings()
        self._finder = None if config.mode == PrivacyMode.none else Finder(config)
        self._key = os.environ.get(config.key_env, "").encode()

    def __call__(self, document: Document, tally: Tally) -> Document | None:
        """The document, its texts perhaps changed; None where mode=drop dropped it. For mode=fail see `check`."""
        if self._finder is None or self._past_sample(document.source):
            return document
        texts = document.texts()
        found = dict(zip(texts, self._finder.find_all(texts), strict=True))
        seen = [(f.type, mask(f.type, text[f.start : f.end])) for text in texts for f in found[text]]
        self.findings.add(document.source, document.where, seen)
        if not seen:
            return document
        if self.config.mode == PrivacyMode.drop:
            tally.drop(self.name, seen[0][0], document.where)
            return None
        for type_, shown in seen:
            tally.note(self.name, type_, f"{document.where} {shown}")
        if self.config.mode in (PrivacyMode.redact, PrivacyMode.pseudonymise):
            document.map_texts(lambda text: self._rewrite(text, found[text]))
        return document

    def _past_sample(self, source: str) -> bool:
        limit = self.config.scan_documents
        return self.config.mode == PrivacyMode.report and 0 < limit <= self.findings.scanned[source]

    def _rewrite(self, text: str, found: list[Finding]) -> str:
        """The text with every finding replaced by its placeholder."""
        parts, end = [], 0
        for finding in found:
            parts += [text[end : finding.start], self._placeholder(finding.type, text[finding.start : finding.end])]
            end = finding.end
        return "".join([*parts, text[end:]])

    def _placeholder(self, type_: str, value: str) -> str:
        if self.config.mode == PrivacyMode.pseudonymise:
            return pseudonym(type_, value, self._key, self.config.regions)
        return f"[{type_}]"


def check(findings: Findings, config: PrivacyConfig) -> None:
    """Raise DataError where mode=fail and more was found than allowed; call it once on the findings of all workers."""
    if config.mode != PrivacyMode.fail or findings.total() <= config.max_findings:
        return
    lines = [
        f"  {type_}: {count} in {findings.documents_by_type[type_]} documents, first at {findings.examples[type_][0]}"
        for type_, count in findings.counts.most_common()
    ]
    raise DataError(
        f"{findings.total()} pieces of personal data found, at most {config.max_findings} allowed "
        f"(data.privacy.max_findings):\n" + "\n".join(lines) + "\nset data.privacy.mode=redact, pseudonymise or drop, "
        "name what is no personal data in data.privacy.allow, or raise data.privacy.max_findings"
    )
