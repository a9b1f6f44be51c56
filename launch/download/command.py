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
    from launch.config.compose import compose
    from launch.download.pieces import check_room, fetch, pieces_of, resolve

    pieces = [resolve(piece) for piece in pieces_of(compose(words, check=False).config)]
    lacking = sum(piece.lacking_bytes for piece in pieces)
    if dry:
        if as_json:
            print(json.dumps({"pieces": [piece.about() for piece in pieces], "lacking_bytes": lacking}))
        else:
            print("\n".join([*(_planned(piece) for piece in pieces), f"to fetch: {_size(lacking)}"]))
        return 0
    check_room(lacking)
    fetched = []
    for piece in pieces:
        print(_planned(piece), file=sys.stderr, flush=True)
        fetched.append(fetch(piece))
    settings, manifest = _write(target, fetched)
    if as_json:
        print(json.dumps({"settings": str(settings), "manifest": str(manifest), **_listed(fetched)}))
    else:
        for one in fetched:
            total = sum(file["bytes"] for file in one.files)
            print(f"{one.piece.key}: {len(one.files)} files, {_size(total)}, in {one.directory}")
        print(f"settings: {settings}  (shardtune train {settings} ...)\nmanifest: {manifest}")
    return 0


def _planned(piece: Piece) -> str:
    there = "all of it is here" if not piece.lacking_bytes else f"{_size(piece.lacking_bytes)} to fetch"
    size = _size(piece.total_bytes) if piece.total_bytes else "a size that the server does not give"
    return f"{piece.key}: {piece.kind} {piece.name} at {piece.commit[:12]}: {size}, {there}"


def _size(number: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number} bytes"


def _listed(fetched: list[FetchedPiece]) -> dict[str, Any]:
    return {"pieces": [{**one.piece.about(), "directory": str(one.directory), "files": one.files} for one in fetched]}


def _write(target: Path, fetched: list[FetchedPiece]) -> tuple[Path, Path]:
    """The file of settings, and the list of files beside it. Raises StorageError."""
    import yaml

    from strategies.errors import StorageError

    settings: dict[str, Any] = {}
    for one in fetched:
        for path, value in one.piece.settings():
            place = settings
            for part in path[:-1]:
                place = place.setdefault(part, {})
            place[path[-1]] = value
    manifest = target.with_suffix(".json")
    head = f"# Pinned by `shardtune download`; {manifest.name} has the files. A bare word of every verb.\n"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_text(json.dumps(_listed(fetched), indent=1) + "\n", encoding="utf-8")
        target.write_text(head + yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"to={target}: cannot be written ({error.strerror}); the files were fetched") from error
    return target, manifest


def _verify(words: list[str], as_json: bool) -> int:
    from launch.download.pieces import damage

    if len(words) != 1:
        raise ConfigError(f"--verify: name one file, not {len(words)}: shardtune download --verify pinned.yaml")
    path = Path(words[0]).expanduser().with_suffix(".json")
    try:
        pieces = json.loads(path.read_text(encoding="utf-8"))["pieces"]
        files = [(piece["key"], Path(piece["directory"]), file) for piece in pieces for file in piece["files"]]
        found = [f"{key}: {said}" for key, directory, file in files if (said := damage(directory, file))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: is no list that download wrote ({type(error).__name__}: {error})") from error
    if as_json:
        print(json.dumps({"files": len(files), "damaged": found}))
    else:
        print(
            "\n".join(
                [*found, f"{len(files)} files: {f'{len(found)} missing or not as fetched' if found else 'as fetched'}"]
            )
        )
    return DAMAGED if found else 0
