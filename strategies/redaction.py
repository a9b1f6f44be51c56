"""Secrets in texts that are shown, written or sent: what looks like one, or is one of this process's environment."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

HIDDEN = "[secret]"
KINDS = {
    "a token of Hugging Face": r"\bhf_[A-Za-z0-9]{20,}",
    "a token of GitHub": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})",
    "a token of GitLab": r"\bglpat-[\w-]{20,}",
    "a key of a model's service": r"\bsk-[A-Za-z0-9][\w-]{19,}",
    "a key of W&B": r"\bwandb_v1_\w{20,}",
    "a key of AWS": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a key of Google": r"\bAIza[\w-]{35}",
    "a token of Slack": r"\bxox[abeprs]-[\w-]{10,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a bearer token": r"(?<=[Bb]earer )[\w.~+/-]{16,}=*",
    "a password in an address": r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)",
    "a signature in an address": r"(?i)(?<=[?&])(?:(?:access_?|auth_?)?token|api_?key|sig|signature|x-(?:amz|goog)-"
    r"(?:signature|security-token|credential))=[^&\s'\"]+",
}
"""What a text is searched for."""
OF_SECRETS = re.compile(r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|APIKEY|KEY|CREDENTIALS)$")
"""Names of environment variables whose values are taken for secrets."""
SHORTEST = 8
"""Characters below which a variable's value is no secret: it would be found in words that are none."""

_PATTERNS = {kind: re.compile(pattern) for kind, pattern in KINDS.items()}


def secret_in(text: str) -> str | None:
    """What kind of secret a text holds, in words; None where none was found."""
    named = next((f"the value of the environment variable {name}" for name, value in _own() if value in text), None)
    return named or next((kind for kind, pattern in _PATTERNS.items() if pattern.search(text)), None)


def redacted(text: str) -> str:
    """The text with `[secret]` in the place of each secret."""
    for _, value in _own():
        text = text.replace(value, HIDDEN)
    for pattern in _PATTERNS.values():
        text = pattern.sub(HIDDEN, text)
    return text


def _own() -> Iterator[tuple[str, str]]:
    """(name, value) of the environment's secrets, the longest first, so that none is left of which another is a part."""
    found = [(name, value) for name, value in os.environ.items() if OF_SECRETS.search(name) and len(value) >= SHORTEST]
    yield from sorted(found, key=lambda one: -len(one[1]))
