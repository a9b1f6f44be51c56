"""`shardtune download`: fetches what a run takes from the hub, pinned to commits, for nodes that are offline."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config.help_text import show_help
from launch.config.user_files import SUFFIXES
from launch.config.verb_words import VerbWords, asks_for_help, flag, help_rows, read_words, setting_words, word
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from launch.download.pieces import FetchedPiece, Piece

DAMAGED = 69


@dataclass(kw_only=True)
class DownloadWords(VerbWords):
    """What `shardtune download` takes."""

    to: Path = word(
        "a settings file with those commits, which every verb takes; pinned.json beside it lists each fetched file with its "
        "size and SHA-256",
        default=Path("pinned.yaml"),
    )
    settings: list[str] = setting_words()
    dry_run: bool = flag("show what would be fetched, and how much of it is here already")
    verify: bool = flag(
        "read all files again, offline, and compare them with the list; exit code 69 if one is missing or differs"
    )
    as_json: bool = flag("print the answer as JSON, for a script", key="--json")


USAGE = f"""usage: shardtune download <words of a run> [to=pinned.yaml] [--dry-run] [--json]
       shardtune download --verify <pinned.yaml> [--json]

  shardtune download model.path=HuggingFaceTB/SmolLM2-135M data.path=hub:org/questions to=smollm2.yaml
  shardtune train smollm2.yaml tuning=lora budget.epochs=3          on a node without a network

download fetches the model, the tokenizer and the data sets (hub:<name>) of a run into the hub's own cache (HF_HOME).
Each is pinned to the commit that its branch or tag points to now (model.revision, data.sources.<name>.revision). A run
itself does not contact the hub. It takes what is in the cache.

{help_rows(DownloadWords)}"""


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code. Errors: ConfigError, DataError, StorageError."""
    if asks_for_help(argv) or not argv:
        show_help(USAGE)
        return 0 if argv else 64
    words, problems = read_words("download", DownloadWords, argv)
    if words.to.suffix not in SUFFIXES:
        problems.append(f"to={words.to}: is a file of settings; give it a name that ends in .yaml")
    if problems:
        raise ConfigError(problems)
    if words.verify:
        return _verify(words.settings, words.as_json)
    return _download(words.settings, words.to, words.dry_run, words.as_json)


def _download(words: list[str], target: Path, dry: bool, as_json: bool) -> int:
    """Fetch what the words name and write `target`, or show what that would be (`dry`); returns the exit code."""
    from launch.config.compose import compose
    from launch.download.pieces import check_room, fetch, pieces_of, resolve

    pieces = [resolve(piece) for piece in pieces_of(compose(words, check=False).config)]
    missing_bytes = sum(piece.lacking_bytes for piece in pieces)
    if dry:
        if as_json:
            print(json.dumps({"pieces": [piece.about() for piece in pieces], "lacking_bytes": missing_bytes}))
        else:
            print("\n".join([*(_planned(piece) for piece in pieces), f"to fetch: {_size(missing_bytes)}"]))
        return 0
    check_room(missing_bytes)
    fetched_pieces = []
    for piece in pieces:
        print(_planned(piece), file=sys.stderr, flush=True)
        fetched_pieces.append(fetch(piece))
    settings, manifest = _write(target, fetched_pieces)
    if as_json:
        print(json.dumps({"settings": str(settings), "manifest": str(manifest), **_as_dict(fetched_pieces)}))
        return 0
    for fetched in fetched_pieces:
        total_bytes = sum(file["bytes"] for file in fetched.files)
        print(f"{fetched.piece.key}: {len(fetched.files)} files, {_size(total_bytes)}, in {fetched.directory}")
    print(f"settings: {settings}  (shardtune train {settings} ...)\nmanifest: {manifest}")
    return 0


def _planned(piece: Piece) -> str:
    """A line about a piece: its commit, its size, and how much of it must be fetched."""
    to_fetch = f"{_size(piece.lacking_bytes)} to fetch" if piece.lacking_bytes else "all of it is here"
    size = _size(piece.total_bytes) if piece.total_bytes else "a size that the server does not give"
    return f"{piece.key}: {piece.kind} {piece.name} at {piece.commit[:12]}: {size}, {to_fetch}"


def _size(size_bytes: int) -> str:
    """A number of bytes for people."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.3g} {unit}"
    return f"{size_bytes} bytes"


def _as_dict(fetched_pieces: list[FetchedPiece]) -> dict[str, Any]:
    """What the manifest holds: each piece with its files."""
    entries = []
    for fetched in fetched_pieces:
        entries.append({**fetched.piece.about(), "directory": str(fetched.directory), "files": fetched.files})
    return {"pieces": entries}


def _write(target: Path, fetched_pieces: list[FetchedPiece]) -> tuple[Path, Path]:
    """Write the settings file and the manifest beside it; returns their paths. Errors: StorageError."""
    import yaml

    from strategies.errors import StorageError

    settings: dict[str, Any] = {}
    for fetched in fetched_pieces:
        for key, value in fetched.piece.settings():
            block = settings
            for part in key[:-1]:
                block = block.setdefault(part, {})
            block[key[-1]] = value
    manifest = target.with_suffix(".json")
    head = f"# Pinned by `shardtune download`; {manifest.name} has the files. A bare word of every verb.\n"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_text(json.dumps(_as_dict(fetched_pieces), indent=1) + "\n", encoding="utf-8")
        target.write_text(head + yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"to={target}: cannot be written ({error.strerror}); the files were fetched") from error
    return target, manifest


def _verify(words: list[str], as_json: bool) -> int:
    """Compare the fetched files with their manifest; returns the exit code. Errors: ConfigError."""
    from launch.download.pieces import damage

    if len(words) != 1:
        raise ConfigError(f"--verify: name one file, not {len(words)}: shardtune download --verify pinned.yaml")
    path = Path(words[0]).expanduser().with_suffix(".json")
    number_of_files = 0
    damaged = []
    try:
        for piece in json.loads(path.read_text(encoding="utf-8"))["pieces"]:
            for file in piece["files"]:
                number_of_files += 1
                problem = damage(Path(piece["directory"]), file)
                if problem:
                    damaged.append(f"{piece['key']}: {problem}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: is no list that download wrote ({type(error).__name__}: {error})") from error
    if as_json:
        print(json.dumps({"files": number_of_files, "damaged": damaged}))
    else:
        verdict = f"{len(damaged)} missing or not as fetched" if damaged else "as fetched"
        print("\n".join([*damaged, f"{number_of_files} files: {verdict}"]))
    return DAMAGED if damaged else 0
