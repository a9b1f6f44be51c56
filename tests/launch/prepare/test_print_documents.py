"""`shardtune prepare --print`: what it finds, what it shows, and how it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from launch.main import main as command
from launch.prepare.command import main
from launch.prepare.print_documents import parse_sequence_numbers
from strategies.errors import ConfigError, DataError
from tests.helpers.tokenizers import tiny_tokenizer
from trainer.data.document import Document
from trainer.data.report.inspection import find_prepared, find_sequences
from trainer.data.store.documents import DOCUMENTS_FILE, document_schema, to_record_batch
from trainer.data.store.sequences import Sample, Sequences, StoreWriter

ROOT = Path(__file__).parents[3]
TURNS = [
    ("hello world", "the quick fox"),
    ("what is it ?", "a lazy dog [bold]not markup[/bold]"),
    ("Hello \x1b[31mred", "answer\x07"),
    ("over", "HELLO again"),
]


def sample_of(tokenizer, question, answer):
    context = tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n", add_special_tokens=False)
    learned = tokenizer.encode(f"{answer}<|im_end|>", add_special_tokens=False)
    mask = np.array([False] * len(context) + [True] * len(learned))
    return Sample(np.array(context + learned, np.int32), mask)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Four documents, the second cut into two sequences; train is 3, 0, 1, 1b (in this order), eval is 2."""
    root = tmp_path_factory.mktemp("prepared")
    directory, tokenizer = root / "data", tiny_tokenizer()
    directory.mkdir()
    tokenizer.save_pretrained(root / "tokenizer")
    documents = [
        Document(
            "chat.jsonl", number + 1, messages=[{"role": "user", "content": q}, {"role": "assistant", "content": a}]
        )
        for number, (q, a) in enumerate(TURNS)
    ]
    table = pa.ipc.new_stream(str(directory / DOCUMENTS_FILE), document_schema())
    table.write_batch(to_record_batch(documents[:2]))  # two batches: rows must be numbered through
    table.write_batch(to_record_batch(documents[2:]))
    table.close()
    of = [0, 1, 1, 2, 3]
    sequences = Sequences.from_samples([sample_of(tokenizer, *TURNS[number]) for number in of], lambda s: {"loss": 1})
    sequences.columns |= {"document": np.array(of), "source": np.array([0, 0, 0, 1, 1]), "ended": np.ones(5, np.int64)}
    store = StoreWriter(directory)
    store.append(sequences)
    store.finish()
    about = {"path": str(root / "tokenizer"), "vocab_size": len(tokenizer)}
    manifest = {"fingerprint": "f00", "tokenizer": about, "sources": ["chat", "web"], "label_names": None}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    for split, index in (("train", [4, 0, 1, 2]), ("eval", [3])):
        (directory / split).mkdir()
        np.save(directory / split / "index.npy", np.array(index))
        (directory / split / "manifest.json").write_text(
            json.dumps({"fingerprint": f"f00/{split}", "sources": ["chat", "web"]})
        )
    return directory


def shown(capsys, *words):
    assert main(["--print", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_splits_lengths_and_sources(prepared, capsys):
    out = shown(capsys, prepared)
    lengths = [len(sample_of(tiny_tokenizer(), *TURNS[n]).input_ids) for n in (3, 0, 1, 1)]
    (train,) = (line.split() for line in out.splitlines() if line.split()[:1] == ["train"])
    assert train[:4] == ["train", "3", "4", f"{sum(lengths):,}"] and train[-1] == str(max(lengths))
    (evaluation,) = (line.split() for line in out.splitlines() if line.split()[:1] == ["eval"])
    assert evaluation[1:3] == ["1", "1"]
    (chat,) = (line.split() for line in out.splitlines() if line.split()[:2] == ["source", "chat"])
    assert chat[2:4] == ["3", "75.0%"]
    bars = [line.rsplit(" ", 1) for line in out.splitlines() if "█" in line]
    assert sum(int(count) for _, count in bars) == 4


def test_print_decodes_the_right_sequence_above_its_document(prepared, capsys):
    out = shown(capsys, prepared, "rows=[2,0]", "documents=true")
    second, first = out.split("train 0")
    assert "chat.jsonl:2" in second and "⟦a lazy dog [bold]not markup[/bold]<|im_end|>⟧" in second
    assert "chat.jsonl:4" in first and "⟦HELLO again<|im_end|>⟧" in first
    assert second.count("what is it ?") == first.count("over") == 2, "once decoded, once in the document"
    assert "<|im_start|>user" in first and "sequences" not in out, "no table unless asked for"


def test_terminal_codes_in_texts_are_shown_not_obeyed(prepared, capsys):
    out = shown(capsys, prepared, "split=eval", "rows=[0]", "documents=true")
    assert "\x1b" not in out and "\x07" not in out
    assert out.count("\\x1b[31mred") == 2


def test_colour_on_a_terminal(prepared, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    out = shown(capsys, prepared, "rows=0", "documents=true")
    assert "\x1b[32mHELLO again<|im_end|>" in out and "⟦" not in out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "⟦HELLO again<|im_end|>⟧" in shown(capsys, prepared, "rows=0")


def test_find_agrees_with_a_plain_search(prepared, capsys):
    for text in ("hello", "LAZY", "fox", "im_end", "ß"):
        brute = [
            place
            for place, document in enumerate([3, 0, 1, 1])
            if any(text.lower() in turn.lower() for turn in TURNS[document])
        ]
        assert find_sequences(find_prepared(prepared), "train", text).tolist() == brute, text
    out = shown(capsys, prepared, "find=lazy", "limit=1")
    assert "2 of 4 sequences of train hold it, the first 1 shown" in out and out.count("a lazy dog") == 1
    assert "0 of 4 sequences" in shown(capsys, prepared, "find=nowhere")


def test_random_rows_follow_the_seed(prepared, capsys):
    first = shown(capsys, prepared, "random=2", "seed=3")
    assert first == shown(capsys, prepared, "random=2", "seed=3")
    rows = {tuple(shown(capsys, prepared, "random=2", f"seed={seed}").split("⟦")[1:]) for seed in range(6)}
    assert len(rows) > 1
    assert shown(capsys, prepared, "random=9").count("⟦") == 4, "no more than there are, none twice"


def test_accepts_a_split_and_a_run_directory(prepared, capsys, tmp_path):
    assert "eval: length" in shown(capsys, prepared / "eval")
    (tmp_path / "run.json").write_text(json.dumps({"data_directory": str(prepared)}))
    assert str(prepared) in shown(capsys, tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="does not say where the data"):
        main(["--print", str(tmp_path)])
    (tmp_path / "run.json").write_text(json.dumps({"data_directory": "gone"}))
    with pytest.raises(ConfigError, match=r"gone: the prepared data of .* no longer there"):
        main(["--print", str(tmp_path)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rows=9"], "rows=9: train has 4 sequences, numbered from 0 to 3"),
        (["rows=[a,-1]"], r"rows=a: must be a number.*\nrows=-1: must be a number"),
        (["rows=3-1"], "rows=3-1"),
        (["split=dev"], "split=dev: there is no such split; one of train, eval"),
        (["random=0"], "random=0: must be a whole number, at least 1"),
        (["lines=x", "documents=2"], "lines=x: must be a whole number, at least 2\ndocuments=2: must be true or false"),
        (["random=1", "rows=1"], "rows= and random=: give one of them"),
        (["find="], "find needs a value, as in find=text"),
        (["splt=eval"], "splt=eval: there is no such argument; did you mean split="),
        (["--colour"], "--colour: no such argument beside a directory; one of split, rows"),
        (["rows=0", "tokenizer=nowhere/at-all"], "tokenizer=nowhere/at-all: cannot be loaded"),
    ],
)
def test_refusals_name_the_word(prepared, words, message):
    with pytest.raises(ConfigError, match=message):
        main(["--print", str(prepared), *words])


def test_refusals_of_directories_and_words(prepared, tmp_path):
    with pytest.raises(ConfigError, match="no such directory"):
        main(["--print", str(tmp_path / "no")])
    with pytest.raises(ConfigError, match="no prepared data set"):
        main(["--print", str(tmp_path)])
    other = tmp_path / "other"
    tiny_tokenizer(vocab_size=300).save_pretrained(other)
    with pytest.raises(ConfigError, match="the data was prepared with one of"):
        main(["--print", str(prepared), "rows=0", f"tokenizer={other}"])
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        main(["--print", str(tmp_path)])


def test_print_ranges_of_rows():
    assert parse_sequence_numbers("0, 5,10-12", 20, "train") == [0, 5, 10, 11, 12]
    with pytest.raises(ConfigError, match="at most"):
        parse_sequence_numbers("0-1000", 5000, "train")


def test_looking_at_sizes_loads_no_tokenizer_library(prepared):
    code = f"from launch.prepare.command import main; main(['--print', {str(prepared)!r}]); import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = set(done.stdout.splitlines()[-1].split())
    assert "rich" in modules and not {"torch", "transformers", "datasets", "pyarrow"} & modules


def test_print_help_and_the_removed_verb(capsys):
    assert main(["--print"]) == 64 and main(["--print", "--help"]) == 0
    assert capsys.readouterr().out.count("documents=true    also show the document") == 2
    assert command(["data", "inspect", "x"]) == 64
    assert "there is no verb data; did you mean prepare --print?" in capsys.readouterr().err
