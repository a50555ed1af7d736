"""Captions as people's files have them: several in one cell, none at all, in columns of any name."""

import ast
import io
import json
import re
import tokenize
from collections.abc import Sequence

NO_TEXT = frozenset("nan none null nil n/a #n/a na <na> nat undefined".split())  # what other programs write for nothing
# How the name of a column with captions goes, and what ends the name of one that is about captions only.
CAPTION_NAME = re.compile(
    r"sent|capt|text|txt|quer|desc|utter|phrase|narrat|prompt|paragraph|annot|summar|transcr|title"
)
ABOUT = re.compile(r"(id|ids|no|num|number|idx|index|count|len|length|url|file|path|lang|language|source|time)$")
LETTERS_APART = re.compile(r"[^\W\d_]\W*\s\W*[^\W\d_]")  # two words
# Text of a program's value: a list, dict, tuple, array(['…']) or b'…', also cut off or in quotes once more.
BRACKETS = re.compile(r"\[.*\]|\{.*\}", re.DOTALL)
LITERAL = re.compile(
    r"""["']? [\[{]+ \s* [bur]?['"] .* | \{\s*\w+\s*:.*\} | \(\s*[bur]?['"].*\) | [\w.]+\( [\s\[{(]* [bur]?['"].*\)
    | b(['"]).*\1""",
    re.DOTALL | re.VERBOSE,
)


def is_no_text(caption: str) -> bool:
    """Whether a caption is what programs write where there is none, such as ``nan``."""
    return caption.strip().lower() in NO_TEXT


def split_cell(cell: str, plain_brackets: bool = True) -> list[str]:
    """The captions of a cell: one, or those of a list of strings that Python or JSON wrote into it.

    Raises ValueError, saying what the cell looks like, for any other value of a program, and unless `plain_brackets`
    for all text in square or curly brackets.
    """
    text = cell.strip()
    listed = _strings(text)
    if listed is None:
        if LITERAL.fullmatch(text) and not _is_quote(text) or not plain_brackets and BRACKETS.fullmatch(text):
            what = "it looks like a value that a program wrote, not like a caption"
            raise ValueError(f"{what}: {text!r:.80}; give the caption alone, or a list such as ['a cat', 'a red cat']")
        return [cell]
    if not listed or not all(caption.strip() for caption in listed):
        raise ValueError(f"the list of captions holds an empty one or none: {text!r:.80}")
    if len(listed) > 2 and all(caption.isascii() and not re.search(r"\s", caption.strip()) for caption in listed):
        raise ValueError(f"it looks like a list of words, not of captions: {text!r:.80}; join them with spaces")
    return listed


def _strings(text: str) -> list[str] | None:
    """The strings of a list or tuple in JSON's or Python's notation; None for anything else."""
    if not (text.startswith(("[", "(")) and text.endswith(("]", ")"))):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            value = ast.literal_eval(text)
            tokens = tokenize.generate_tokens(io.StringIO(text).readline)
            # Python joins 'a' 'b' without a comma between them, as numpy prints arrays, into one string.
            if sum(token.type == tokenize.STRING for token in tokens) != len(value):
                return None
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, tokenize.TokenError):
            return None
    is_list = isinstance(value, (list, tuple)) and all(isinstance(entry, str) for entry in value)
    return list(value) if is_list else None


def _is_quote(text: str) -> bool:
    """Whether it is speech in round brackets: ("hello")."""
    return text.startswith("(") and "," not in text


def looks_like_captions(name: str, cells: Sequence[str]) -> bool:
    """Whether a column holds captions, by its name or by its cells: at least half of those with anything have words."""
    filled = [cell.strip() for cell in cells if cell.strip()]
    name = name.strip().lower()
    if filled and CAPTION_NAME.search(name) and not ABOUT.search(name):
        return not all(re.fullmatch(r"[\d.,:\-+\s]*", cell) for cell in filled)
    words = sum(bool(LETTERS_APART.search(cell)) or any(c > "\u2fff" for c in cell) for cell in filled)
    return 2 * words >= len(filled) > 0
