"""Remembers what `shardtune prepare` made of which words, so that the same call again answers without composing.

A record holds while nothing it depends on has moved: the words and the directory they were typed in, the configuration
files, the versions of the libraries, and every input and tokenizer file with its size, inode and times of change (the
inode's change time moves with every write and cannot be set back by a program).
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.choices import CONF_DIR, OWN_DIRECTORIES
from launch.own_files import is_file_word
from strategies.errors import ShardtuneError

if TYPE_CHECKING:
    from trainer.config.run import RunConfig

LIBRARIES = (
    "shardtune",
    "transformers",
    "tokenizers",
    "datasets",
    "pyarrow",
    "orjson",
    "ftfy",
    "phonenumbers",
    "python-stdnum",
    "rensa",
)
PSEUDONYMS = "key of the pseudonyms"
NOT_WEIGHTS = {".json", ".jinja", ".model", ".txt", ".tiktoken"}


def recall(words: list[str]) -> dict[str, Any] | None:
    """The manifest of the prepared data set that these words made, if it is still what they would make; else None.

    It is compared with its hashes as `data.verify` says, like any that is used again. Raises DataError where it differs.
    """
    from trainer.data.cache import compare
    from trainer.data.config import Verify

    try:
        record = json.loads(_path(words).read_text(encoding="utf-8"))
        if record["inputs"] != {key: _state(key, value) for key, value in record["values"].items()}:
            return None
        directory, how = Path(record["directory"]), Verify(record["verify"])
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        hashes = manifest["hashes"]
    except (OSError, ValueError, KeyError, ShardtuneError):
        return None
    compare(directory, hashes, how)
    return {**manifest, **record}


def remember(words: list[str], config: RunConfig, directory: Path) -> None:
    """Note what was made. Left out where something comes from a hub or an address; never fails for the disk."""
    from trainer.data.read.paths import sets_of

    model = Path(str(config.model.tokenizer or config.model.path)).expanduser()
    values: dict[str, Any] = {"model": str(model)} if model.is_dir() else {}
    if config.model.chat_template is not None:
        values["model.chat_template"] = config.model.chat_template
    values["data.path"] = config.data.path
    for split in ("eval", "test"):
        values.update(sets_of(getattr(config.data, f"{split}_path"), split).values())
    values |= {f"data.sources.{name}.path": source.path for name, source in config.data.sources.items()}
    values["data.decontamination.paths"] = config.data.decontamination.paths
    if config.data.privacy.mode == "pseudonymise":
        values[PSEUDONYMS] = "environment"
    values = {key: value for key, value in values.items() if value is not None}
    if "model" not in values or any("hub:" in str(v) or "://" in str(v) for v in values.values()):
        return
    record = {
        "directory": str(directory.absolute()),
        "verify": str(config.data.verify),
        "values": values,
        "inputs": {key: _state(key, value) for key, value in values.items()},
    }
    with suppress(OSError):
        path = _path(words)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(record), encoding="utf-8")
        temporary.replace(path)


def _path(words: list[str]) -> Path:
    identity = {
        "words": words,
        "from": str(Path.cwd()),
        "own": [
            (str(f), f.read_text(encoding="utf-8"))
            for f in [
                *map(Path, filter(is_file_word, words)),
                *(g for d in OWN_DIRECTORIES for g in sorted(d.rglob("*.yaml"))),
            ]
            if f.is_file()
        ],
        "conf": [
            (str(f.relative_to(CONF_DIR)), f.read_text(encoding="utf-8")) for f in sorted(CONF_DIR.rglob("*.yaml"))
        ],
        "versions": {name: _version(name) for name in LIBRARIES},
        "code": [_file_state(f) for f in sorted(Path(__file__).parents[1].glob("trainer/data/**/*.py"))],
    }
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "shardtune" / "recall" / f"{digest[:40]}.json"


def _version(name: str) -> str:
    try:
        return version(name)
    except ImportError:
        return ""


def _state(key: str, value: Any) -> list[Any]:
    """The files behind a setting with what tells that one has changed. Raises DataError for files that are gone."""
    if key == PSEUDONYMS:
        from trainer.data.stages.privacy.stage import key_identity

        return [key_identity()]
    if key == "model":
        files = sorted(path for path in Path(value).iterdir() if path.suffix in NOT_WEIGHTS)
    elif key == "model.chat_template":
        files = [Path(value).expanduser()]
    else:
        from trainer.data.read.paths import expand

        files = [path for path in expand(value, key) if isinstance(path, Path)]
    return [_file_state(path) for path in files]


def _file_state(path: Path) -> list[Any]:
    about = path.stat()
    return [str(path.absolute()), about.st_size, about.st_ino, about.st_mtime_ns, about.st_ctime_ns]
