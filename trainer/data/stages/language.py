"""Which language a text is in, as py3langid sees it: one text, one document, or a count over a sample for the report."""

from __future__ import annotations

import difflib
import functools
import re
from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec
from itertools import islice
from typing import Any

from trainer.data.document import Document

JUDGED_CHARACTERS = 3000
"""A document is judged by this many characters from its start; more does not change the answer."""
NO_LANGUAGE = "zxx"
"""ISO 639-2: no linguistic content (code, numbers)."""
FENCE = re.compile(r"^ {0,3}(`{3,}(?=[^`\n]*$)|~{3,})", re.MULTILINE)
"""The opening of a Markdown code fence."""
UNJUDGED = "unjudged"
"""How the count names documents too short to judge or without linguistic content."""

LANGUAGES = frozenset(
    "ace af am an ar ary arz as az ba bcl be bg bn br bs ca crh cs cy da de dz el en eo es et eu ext fa fi fo fr fuv fy ga "  # noqa: SIM905
    "gcf gcr gd gl gom grc gu gug guw ha hbo he hi hr ht hu hy id ig is it ja jv ka kab kik kk km kn ko ku ky la lb lg lij ln "
    "lo lt ltg lv mg mk ml mn mr ms mt my ne nl nn no nso oc om or pa pcm pl ps pt qu ro ru rw sa sdh se si sk sl sn so sq sr "
    "st sv sw ta te tg th tk tl tr tt ug uk ur uz uzs vec vi vo wa wuu xh yo yue zh zu".split()
)
"""ISO 639 codes that the detector tells apart (py3langid 0.4)."""


def problems(languages: list[str]) -> list[str]:
    """One line for each code of `data.filters.languages` that the detector does not know, and one if there is no detector."""
    lines = []
    if languages and find_spec("py3langid") is None:
        lines.append(
            "data.filters.languages needs the package py3langid, which is not installed: pip install py3langid"
        )
    for code in languages:
        if code not in LANGUAGES:
            near = difflib.get_close_matches(code.lower(), sorted(LANGUAGES), n=1, cutoff=0.5)
            near = [code[:2].lower()] if code[:2].lower() in LANGUAGES else near
            hint = f"; did you mean {near[0]}?" if near else ""
            lines.append(f"data.filters.languages: {code!r} is not an ISO 639 code the detector knows{hint}")
    return lines


@functools.cache
def _identifier() -> Any:
    """The model, 0.5 s to load, once a process."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def detect(text: str) -> tuple[str, float]:
    """(ISO 639 code, probability 0 to 1). Below some 40 characters the answer is often wrong.

    Naive Bayes over byte n-grams: Lui and Baldwin, langid.py, ACL 2012 system demonstrations.
    """
    code, probability = _identifier().classify(text)
    return str(code), float(probability)


def split_code(text: str) -> list[tuple[bool, str]]:
    """(is code, part) in order; the parts joined are `text`. Code is what stands between Markdown fences.

    Fences follow CommonMark 0.31, section 4.5: three or more backticks or tildes, closed by at least as many of the
    same; one that is never closed reaches to the end.
    """
    if "```" not in text and "~~~" not in text:
        return [(False, text)]
    parts, start = [], 0
    while opening := FENCE.search(text, start):
        mark = opening[1]
        closing = re.compile(rf"^ {{0,3}}{mark[0]}{{{len(mark)},}}[ \t\r]*$", re.MULTILINE).search(text, opening.end())
        end = closing.end() if closing else len(text)
        parts += [(False, text[start : opening.start()]), (True, text[opening.start() : end])]
        start = end
    return [part for part in [*parts, (False, text[start:])] if part[1]]


def judged_text(document: Document) -> str:
    """What the language of a document is judged by: all turns but system prompts and rejected answers, without code."""
    turns = [*(document.messages or []), *(document.chosen or [])]
    texts = [turn["content"] for turn in turns if turn["role"] != "system"]
    texts += [text for text in (document.prompt, document.completion, document.text) if text]
    prose = "".join(part for code, part in split_code("\n".join(texts)) if not code)
    return prose[:JUDGED_CHARACTERS].strip()


def share(documents: Iterable[Document], *, max_documents: int = 1000, min_characters: int = 60) -> dict[str, int]:
    """Documents by language, commonest first, over the first `max_documents`; `unjudged` are those with too little text."""
    counts: Counter[str] = Counter()
    for document in islice(documents, max_documents):
        text = judged_text(document)
        code = detect(text)[0] if len(text) >= min_characters else UNJUDGED
        counts[UNJUDGED if code == NO_LANGUAGE else code] += 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
