"""Removes secrets from texts that are shown, written or sent: known patterns, and values of the environment."""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

HIDDEN_PLACEHOLDER = "[secret]"
SECRET_PATTERN_BY_KIND = {
    "a token of Hugging Face": r"\bhf_[A-Za-z0-9]{20,}",
    "a token of GitHub": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})",
    "a token of GitLab": r"\bglpat-[\w-]{20,}",
    "a key of a model's service": r"\bsk-[A-Za-z0-9][\w-]{19,}",
    "a key of W&B": r"\bwandb_v1_\w{20,}|(?i:\bwandb(?:[\w.-]*(?:key|token)[\"']?\s*[=:]\s*[\"']?|\s+login\s+)|\bpassword\s+)"
    r"(?P<hex>[0-9a-f]{40})\b",
    "a key of AWS": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a key of Google": r"\bAIza[\w-]{35}",
    "a token of Slack": r"\bxox[abeprs]-[\w-]{10,}",
    "a webhook": r"(?i:\b(?:hooks\.slack(?:-gov)?\.com|discord(?:app)?\.com/api/webhooks|[\w.-]*webhook\.office\.com)/)"
    r"(?P<path>[\w/@.-]{16,})",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a bearer token": r"(?<=[Bb]earer )[\w.~+/-]{16,}=*",
    "a name and password in base64": r"\b[Bb]asic (?P<base64>[A-Za-z0-9+/]{8,}={0,2})",
    "a JSON web token": r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*",
    "a password in an address": r"(?<=://)[^/\s:@]*:[^/\s'\"]+(?=@)",
    "a signature in an address": r"(?i)(?<=[?&])(?:(?:access_?|auth_?)?token|api_?key|sig|signature|x-(?:amz|goog)-"
    r"(?:signature|security-token|credential))=[^&\s'\"]+",
    "a password": r"(?i)(?<![a-z0-9])(?:[a-z0-9]+_)*(?:password|passwd|passphrase|(?<=_)pwd|(?<=[;\s])pwd)="
    r"(?P<password>\"[^\"]{4,}\"|'[^']{4,}'|(?![$<{\[/~(]|(?:none|null|true|false)\b)[^\s'\";,&)]{4,})",
    "a password in a variable": r"(?i)(?<![a-z0-9])(?:(?:[a-z0-9]+_)*(?:(?<=_)|(?<![^;\s]))pass|sshpass|pgpassword)="
    r"(?P<word>\"[^\"$]{8,}\"|'[^'$]{8,}'|(?![$<{\[/~(]|[a-z_.]+\(|\d+(?:[\s'\";,&)]|$))[^\s'\";,&)]{8,})",
    "a key of a connection": r"(?i)\b(?:account|sharedaccess|shared_access|access|secret)key=(?P<key>[^\s;'\"&]{12,})",
}
"""Patterns by the kind of secret. The secret is the named group of a pattern, or the whole match if it has none."""
SECRET_WORDS = "TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|API_?KEY|AUTHTOKEN|CREDENTIALS?"
"""Words that mark a variable's value as secret wherever they stand in its name, as in HF_TOKEN_READ and API_KEY_1."""
SECRET_ENDINGS = "KEY|PASS|PAT|DSN|AUTH|WEBHOOK(?:_UR[LI])?|(?:DATABASE|DB)_UR[LI]|CONN(?:ECTION)?_?STR(?:ING)?"
"""Words that do so only at the end of a name."""
SECRET_NAMES = "PGPASSWORD|SSHPASS"
"""Names of variables of programs, in which such a word runs together with another."""
DESCRIBING_ENDINGS = (
    "FILE|PATH|DIR|TYPE|NAME|LIMIT|COUNT|TTL|EXPIR[A-Z]*|LENGTH|SOCK|ID|HEADER|ENDPOINT|SERVER|UR[LI]|METHOD|MODE"
)
"""Last words of names whose variable only describes a secret (its path, its type, its lifetime)."""
SECRET_NAME_REGEX = re.compile(
    rf"(?:^|_)(?:(?:{SECRET_WORDS})(?!\w*_(?:{DESCRIBING_ENDINGS})$)(?:_\w+|\d*)|(?:{SECRET_ENDINGS})(?:_?\d+)?)$|_PWD(?:_?\d+)?$|^(?:{SECRET_NAMES})$",
    re.IGNORECASE,
)
"""Names of environment variables whose values are treated as secrets. PWD and OLDPWD are not: they are directories."""
SERVICE_KEY_NAME_REGEX = re.compile(
    rf"(?:^|_)(?:{SECRET_WORDS}|(?:ACCESS|PRIVATE|SECRET)_KEY)(?:$|_|\d)", re.IGNORECASE
)
"""Names whose value is a secret even if it looks like a commit: W&B's keys had 40 hexadecimal digits too."""
COMMIT_HASH_REGEX = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
"""Values that look like the hash of a git commit (SHA-1 or SHA-256). W&B's keys had 40 hexadecimal digits too."""
MIN_SECRET_LENGTH = 8
"""A variable with a shorter value is not treated as a secret: the value would be found inside ordinary words."""

_REGEX_BY_KIND = {kind: re.compile(pattern) for kind, pattern in SECRET_PATTERN_BY_KIND.items()}


def kind_of_secret_in(text: str) -> str | None:
    """Say which kind of secret a text holds, such as `a token of Hugging Face`, for a message; None if it holds none."""
    for name, value in _secrets_of_environment():
        if value in text:
            return f"the value of the environment variable {name}"
    for kind, pattern in _REGEX_BY_KIND.items():
        if any(_is_secret(match) for match in pattern.finditer(text)):
            return kind
    return None


def redact(text: str) -> str:
    """Replace each secret in a text by `[secret]`, before it is shown or sent: known patterns, and values of the environment."""
    for _, value in _secrets_of_environment():
        text = text.replace(value, HIDDEN_PLACEHOLDER)
    for pattern in _REGEX_BY_KIND.values():
        text = pattern.sub(_redacted_match, text)
    return text


def _redacted_match(match: re.Match[str]) -> str:
    """The replacement of a match: its named group is hidden, and the words around it stay."""
    if not _is_secret(match):
        return match[0]
    group = match.lastgroup or 0
    before = match.string[match.start() : match.start(group)]
    after = match.string[match.end(group) : match.end()]
    return f"{before}{HIDDEN_PLACEHOLDER}{after}"


def _is_secret(match: re.Match[str]) -> bool:
    """Whether what a pattern of secrets has matched is really one that must be hidden.

    - It was hidden already: no.
    - Its group is called `base64` (`Basic <word>`): only if the word decodes to `name:password`.
    - Otherwise: yes.
    """
    if HIDDEN_PLACEHOLDER in match[match.lastgroup or 0]:
        return False
    if match.lastgroup != "base64":
        return True
    try:
        return b":" in base64.b64decode(match["base64"], validate=True)
    except binascii.Error:
        return False


def _secrets_of_environment() -> Iterator[tuple[str, str]]:
    """(name, value) of each secret, longest value first: replacing a shorter one inside it first would leave the rest visible."""
    secrets = [(name, value) for name, value in os.environ.items() if _holds_secret(name, value)]
    yield from sorted(secrets, key=lambda secret: -len(secret[1]))


@lru_cache(maxsize=512)
def _holds_secret(name: str, value: str) -> bool:
    """Whether an environment variable holds a secret: its name says so, and its value does not look like something else.

    Something else is a short value, a number, a commit, a word for a kind of authentication, a database without a password, or a
    path. A commit counts as a secret if the name is that of a service's key.
    """
    if not SECRET_NAME_REGEX.search(name) or len(value) < MIN_SECRET_LENGTH or value.isdigit():
        return False
    if COMMIT_HASH_REGEX.fullmatch(value) and not SERVICE_KEY_NAME_REGEX.search(name):
        return False
    if name.upper().endswith("AUTH") and value.isalpha():
        return False  # how to authenticate: `required`, `kerberos`
    if re.search(r"(?:DATABASE|DB)_UR[LI]", name, re.IGNORECASE) and "@" not in value:
        return False  # a file of SQLite
    return not _looks_like_host_path(value)


def _looks_like_host_path(value: str) -> bool:
    """Whether the value of an environment variable is a path, and so no secret: of a file here, or one that could be created."""
    try:
        path = Path(value).expanduser()
        if path.exists():
            return True
        # A key in base64 may begin with a slash, but no directory of this host has its first part as name.
        return path.is_absolute() and len(path.parts) > 2 and Path(*path.parts[:2]).is_dir()
    except (OSError, ValueError, RuntimeError):  # too long for a name, a NUL in it, a user without a home
        return False
