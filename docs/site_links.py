"""What the site adds to the pages: the repository's other files, and links to the glossary. MkDocs calls the functions `on_...`.

Pages link to files outside docs/: to CONTRIBUTING.md, to an experiment, to a kept result. In a clone such a link opens the
file. The site has no clone beside it. So each file that a page links to becomes a file of the site, below repository/.

The first use of each word of docs/glossary.md on a page becomes a link to its explanation.
"""

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = "repository"
"""Folder of the site for files from outside docs/."""
LINK = re.compile(r"(?P<text>!?\[(?:[^\[\]]|\[[^\[\]]*\])*\])\((?P<target>[^()\s#]+)(?P<anchor>#[^()\s]*)?\)")
"""A link with its text, its target, and its anchor if there is one. A link within the page has no target, and is left alone."""
GLOSSARY = "glossary.md"
CODE = re.compile(r"(^```.*?^```$|`[^`\n]*`)", re.MULTILINE | re.DOTALL)
"""Code, in which nothing is a link."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ that a page links to. An added page is read in turn for links of its own."""
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    met = set(waiting)
    while waiting:
        page = waiting.pop()
        for path in linked_files(page):
            if path in met or path.startswith("docs/"):
                continue
            met.add(path)
            files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
            if path.endswith(".md"):
                waiting.append(path)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point each link to where its file lies in the site. A link to a folder becomes its text, since a site shows no folders."""
    here = repository_path(page.file.src_uri)

    def in_site(match: re.Match[str]) -> str:
        target = target_path(here, match["target"])
        if target is None:
            return match[0]
        if (ROOT / target).is_dir():
            return match["text"].strip("[]")
        # Kept results of comparisons leave their plots out.
        if match["text"].startswith("!") and not (ROOT / target).is_file():
            return ""
        link = os.path.relpath(site_path(target), PurePosixPath(page.file.src_uri).parent)
        return f"{match['text']}({link}{match['anchor'] or ''})"

    # Every second piece is code.
    pieces = CODE.split(markdown)
    pieces[::2] = [LINK.sub(in_site, piece) for piece in pieces[::2]]
    # Answers open on a click. Forges read the markdown within them as it is; MkDocs must be told to.
    linked = "".join(pieces).replace("<details>", '<details markdown="1">')
    if here.startswith("docs/") and page.file.src_uri != GLOSSARY:
        return with_glossary_links(linked, glossary_terms(), folder=PurePosixPath(page.file.src_uri).parent)
    return linked


def glossary_terms() -> list[str]:
    """The words that the glossary explains: its headings of the third level."""
    return re.findall(r"^### (.+)$", (ROOT / "docs" / GLOSSARY).read_text(encoding="utf-8"), re.MULTILINE)


def with_glossary_links(markdown: str, terms: list[str], *, folder: PurePosixPath) -> str:
    """Link the first use of each term to the glossary. Code, headings and links stay as they are.

    `folder`: where the page lies below docs/.
    """
    glossary = os.path.relpath(GLOSSARY, folder)
    anchors = {term.lower(): re.sub(r"[^\w]+", "-", term.lower()) for term in terms}
    # The longest first: "LoRA rank" before "LoRA".
    alternatives = "|".join(re.escape(term) for term in sorted(anchors, key=len, reverse=True))
    untouched = rf"{CODE.pattern}|{LINK.pattern}|^#[^\n]*|<[^>]+>|^:::[^\n]*"
    pattern = re.compile(rf"(?P<untouched>{untouched})|\b(?P<term>{alternatives})(?P<plural>s?)\b", re.M | re.S | re.I)
    met = set()

    def linked(match: re.Match[str]) -> str:
        if match["untouched"] or match["term"].lower() in met:
            return match[0]
        met.add(match["term"].lower())
        return f"[{match[0]}]({glossary}#{anchors[match['term'].lower()]})"

    return pattern.sub(linked, markdown)


def linked_files(page: str) -> list[str]:
    """Files that the page links to. `page` and the answer: paths from the root of the repository."""
    text = CODE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    targets = [target_path(page, match["target"]) for match in LINK.finditer(text)]
    return [target for target in targets if target is not None and (ROOT / target).is_file()]


def target_path(page: str, link: str) -> str | None:
    """The path from the root of the repository that a link of `page` names; None for an address in the net."""
    if ":" in link:
        return None
    return os.path.normpath(PurePosixPath(page).parent / link)


def site_path(path: str) -> str:
    """Where a file of the repository lies in the site."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{OUTSIDE}/{path}"


def repository_path(site_file: str) -> str:
    """Where a file of the site lies in the repository: the inverse of `site_path`."""
    if site_file.startswith(f"{OUTSIDE}/"):
        return site_file.removeprefix(f"{OUTSIDE}/")
    return f"docs/{site_file}"
