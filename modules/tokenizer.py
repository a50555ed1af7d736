"""CLIP's byte-pair tokenizer: captions -> token ids and mask.

Method: Sennrich et al. 2016 (arXiv 1508.07909) on UTF-8 bytes, with OpenAI's merge table (see the NOTICE beside it).
"""

import gzip
import html
from collections.abc import Callable, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import ftfy
import regex
import torch

MERGES_FILE = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
LENGTHS_AT_A_TIME = 256
N_BYTES = 256
N_MERGES = 48894  # the file lists more; CLIP's vocabulary stops here: 2 * 256 bytes + 48894 merges + SOT + EOT = 49408

# IGNORECASE although text is lower-cased first: it also lets the long s (U+017F) match 's, as it does in CLIP.
WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
# Texts made only of these need no repair: printable ASCII without "&" (which may begin an HTML entity), and whitespace.
PLAIN = regex.compile(r"[ -%'-~\t\n\r]*")


def words(text: str) -> list[str]:
    """What CLIP's tokenizer sees of a text: texts of the same words have the same tokens.

    Mis-decoded characters are repaired, HTML escaping undone (twice), whitespace collapsed, letters lower-cased.
    """
    if not PLAIN.fullmatch(text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return WORD.findall(" ".join(text.split()).lower())


def lengths_of_cut(tokenize: Callable[..., Any], captions: Sequence[str], max_words: int) -> list[int]:
    """Of the captions that `max_words` cuts, how many tokens each has, start and end included.

    tokenize: an encoder's tokenizer, (captions, max_words) -> ids, mask.
    """
    found: list[int] = []
    for start in range(0, len(captions), LENGTHS_AT_A_TIME):
        block = captions[start : start + LENGTHS_AT_A_TIME]
        full = tokenize(block, max_words=max_words)[1].sum(dim=1) == max_words
        if rest := [caption for caption, is_full in zip(block, full.tolist()) if is_full]:
            # No token without a byte; cleaning may make a text longer, but not twice as long.
            room = 2 + 2 * max(len(text.encode("utf-8", "replace")) for text in rest)
            lengths = tokenize(rest, max_words=max(room, max_words))[1].sum(dim=1)
            found += lengths[lengths > max_words].tolist()
    return found


class Tokenizer:
    """Captions to token ids, equal to OpenAI's tokenizer but for one case.

    That case: the literal texts `<|startoftext|>` and `<|endoftext|>` are ordinary text here. OpenAI's code turns them
    into the real special ids, so that a caption holding `<|endoftext|>` would be cut there by the text tower, which
    reads the sentence at the highest id. `encode` never returns `sot` or `eot`.

    Attributes: `sot` 49406, `eot` 49407. Padding is 0, which is also the id of "!": use the mask.
    """

    def __init__(self) -> None:
        # Bytes that are visible Latin-1 characters come first and stand for themselves in the merge table; the others
        # follow, written as the characters from U+0100 on, because the table separates its fields by whitespace.
        visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        order = visible + sorted(set(range(N_BYTES)) - set(visible))
        written = map(chr, [*visible, *range(0x100, 0x100 + N_BYTES - len(visible))])
        # An id below 256 is a byte inside a word, +256 a byte that ends one, then one id per merge in order of rank.
        id_of = {character: i for i, character in enumerate(written)}
        id_of |= {f"{character}</w>": i + N_BYTES for character, i in id_of.items()}
        self._merged: dict[tuple[int, int], int] = {}
        with gzip.open(MERGES_FILE, "rt", encoding="utf-8") as file:
            for merge, line in enumerate(islice(file, 1, 1 + N_MERGES), start=2 * N_BYTES):
                left, right = line.split()
                id_of[left + right] = self._merged[id_of[left], id_of[right]] = merge
        self._id_of_byte = {byte: i for i, byte in enumerate(order)}
        self._words: dict[str, list[int]] = {}  # captions reuse few words: each is merged once
        self.sot, self.eot = 2 * N_BYTES + N_MERGES, 2 * N_BYTES + N_MERGES + 1

    def encode(self, text: str) -> list[int]:
        """Token ids of the :func:`words` of `text`, without SOT and EOT, of any length; [] for an empty text."""
        ids: list[int] = []
        for word in words(text):
            if word not in self._words:
                self._words[word] = self._merge(word)
            ids += self._words[word]
        return ids

    def __call__(self, texts: Sequence[str], max_words: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows SOT, at most `max_words - 2` tokens (the first ones), EOT, then zeros.

        Returns ids int64 [N, max_words] and mask bool [N, max_words], True from SOT to EOT. ValueError for
        `max_words` < 2; TypeError for a single string, which would otherwise be read as one caption per letter.
        """
        if isinstance(texts, str):
            raise TypeError(f"texts must be a sequence of captions, got the single string {texts[:40]!r}: use [text]")
        if max_words < 2:
            raise ValueError(f"--max_words must be >= 2 (start and end token), got {max_words}")
        rows = [[self.sot, *self.encode(text)[: max_words - 2], self.eot] for text in texts]
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        padded = [row + [0] * (max_words - len(row)) for row in rows]
        ids = torch.tensor(padded, dtype=torch.int64).reshape(len(rows), max_words)
        return ids, torch.arange(max_words) < lengths[:, None]

    def _merge(self, word: str) -> list[int]:
        """Byte-pair encoding of one word: join the best-ranked neighbours, wherever they stand, until none is left."""
        ids = [self._id_of_byte[byte] for byte in word.encode("utf-8")]
        ids[-1] += N_BYTES
        while len(ids) > 1:
            # Merges are numbered by rank: the lowest merged id is the best pair.
            best = min(self._merged.get(pair, self.sot) for pair in pairwise(ids))
            if best == self.sot:
                break
            joined = ids[:1]
            for i in ids[1:]:
                if self._merged.get((joined[-1], i)) == best:
                    joined[-1] = best
                else:
                    joined.append(i)
            ids = joined
        return ids
