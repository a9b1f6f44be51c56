"""Folds the help of the verbs to 80 columns when it is printed."""

import re
import textwrap

TERMINAL_COLUMNS = 80
USAGE_INDENT = 11
"""Columns before the further lines of `usage: shardtune ...`."""
TABLE_ROW_REGEX = re.compile(r"(?P<head> +\S.*?(?: {2,}|(?<==) ))(?P<text>\S.*)")
"""A line of a table: an indented word or more, a gap, and what it means. A group's `experiment=` may fill its column."""
CONTINUED_ROW_REGEX = re.compile(r" {10,}\S")
"""The further lines of a row."""
COMMAND_REGEX = re.compile(r" +(\w+=\S+ )*(shardtune|torchrun|sbatch) ")
MAX_UNBROKEN_COLUMNS = 60
"""Columns up to which what stands in brackets is kept in one line."""
MAX_ALIGNED_HEAD_COLUMNS = 36
"""Columns of a row's head up to which its text begins in the same line."""


def fold_help(text: str) -> str:
    """Fold a verb's help to at most 80 columns: paragraphs filled, tables in their columns, commands with backslashes.

    `text`: as the verb's module has it, with long lines.
    """
    # Commands that the source has over several lines become one line each, and are folded again.
    lines = re.sub(r" *\\\n *", " ", text).split("\n")
    folded_lines: list[str] = []
    for block in _join_continued_lines(lines):
        folded_lines += _fold_block(block)
    return "\n".join(folded_lines)


def show_help(text: str) -> None:
    """Print a verb's help."""
    print(fold_help(text))


def _join_continued_lines(lines: list[str]) -> list[str]:
    """Undo the line breaks of a help text's source: each paragraph and table row becomes one long line.

    A line continues the one before it if that is a row of a table and this one is indented as its text, or if both are prose and
    the one before is too long to have ended a paragraph.
    """
    blocks: list[str] = []
    previous = ""
    for line in lines:
        is_row_continued = CONTINUED_ROW_REGEX.match(line) and TABLE_ROW_REGEX.fullmatch(previous or " ")
        is_paragraph_continued = len(previous) > TERMINAL_COLUMNS and _is_prose(previous) and _is_prose(line)
        if is_row_continued or is_paragraph_continued:
            blocks[-1] = f"{blocks[-1]} {line.strip()}"
        else:
            blocks.append(line)
        if not is_row_continued:  # a row may go on for several lines, each of which is compared with its first
            previous = line
    return blocks


def _is_prose(line: str) -> bool:
    """Whether a line belongs to a paragraph, and not to a table, a command or the usage."""
    return bool(line) and not line.startswith((" ", "usage:"))


def _fold_block(block: str) -> list[str]:
    """Fold one paragraph, table row, usage line or command to lines of at most 80 columns; a short one stays as it is.

    A row has a head (`batch.micro=4`) and a text in a column of its own; under a wide head the text starts on the next line.
    """
    if len(block) <= TERMINAL_COLUMNS:
        return [block.rstrip()]
    indent = len(block) - len(block.lstrip())
    if block.startswith(("usage:", "       shardtune")):  # a second line of usage is lined up with the first
        return _fill(_unbreakable_pieces(block), indent=USAGE_INDENT)
    if COMMAND_REGEX.match(block):
        return _fold_command(block, indent)
    row = TABLE_ROW_REGEX.fullmatch(block)
    if row is None:
        hanging_indent = indent + 2 if indent else 0
        return _fill(_unbreakable_pieces(block), indent=hanging_indent)
    head = row["head"]
    if len(head) > MAX_ALIGNED_HEAD_COLUMNS:
        return [*_fold_block(head.rstrip()), *_indented_lines(row["text"])]
    # The head keeps its column: it is padded as one piece, less the blank that `_fill` puts behind it.
    padded_head = head.rstrip().ljust(len(head) - 1)
    return _fill([padded_head, *row["text"].split(" ")], indent=len(head))


def _fold_command(block: str, indent: int) -> list[str]:
    """Fold an example command to lines that end in backslashes, as a shell takes them, with what it does below.

    `block`: the command, two spaces, and what it does, which may be missing.
    `indent`: the columns before the command; the lines that continue it are indented by 4 more. A synopsis, with optional parts
        in brackets, gets no backslashes, because nobody types it as it is.
    """
    command, _, meaning = block.strip().partition("  ")
    is_synopsis = " [" in command
    line_end = "" if is_synopsis else " \\"
    pieces = _unbreakable_pieces(" " * indent + command)
    lines = _fill(pieces, indent=indent + 4, width=TERMINAL_COLUMNS - len(line_end))
    continued_lines = [line + line_end for line in lines[:-1]]
    return [*continued_lines, lines[-1], *_indented_lines(meaning.strip())]


def _indented_lines(text: str) -> list[str]:
    """The lines of a text that stands, indented by 6, below what it explains."""
    return textwrap.wrap(text, TERMINAL_COLUMNS, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _unbreakable_pieces(text: str) -> list[str]:
    """The words of a help text, the first with its indentation; what stands in brackets is one piece, if it is not too long."""
    indent = text[: len(text) - len(text.lstrip())]
    pieces: list[str] = []
    depth = 0
    for word in text.split():
        if depth > 0 and len(pieces[-1]) + len(word) < MAX_UNBROKEN_COLUMNS:
            pieces[-1] = f"{pieces[-1]} {word}"
        else:
            pieces.append(word)
        depth += word.count("[") - word.count("]")
    return [indent + pieces[0], *pieces[1:]]


def _fill(pieces: list[str], *, indent: int, width: int = TERMINAL_COLUMNS) -> list[str]:
    """Put pieces of text into lines of at most `width` columns, all but the first line indented. A longer piece is not cut."""
    lines = [pieces[0]]
    for piece in pieces[1:]:
        if len(lines[-1]) + 1 + len(piece) <= width:
            lines[-1] = f"{lines[-1]} {piece}"
        else:
            lines.append(" " * indent + piece)
    return lines
