import hashlib
import pickle
import string
import time

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from modules.tokenizer import MERGES_FILE, Tokenizer

OURS, THEIRS = Tokenizer(), SimpleTokenizer()
# open_clip reads these two spellings as its special tokens; OpenAI's and CLIP4Clip's tokenizers do not.
OPEN_CLIP_SPECIALS = ("<start_of_text>", "<end_of_text>")
captions = st.one_of(
    st.text(max_size=60),
    st.text(alphabet=string.printable + "&;#<>'’éßİſK½Ⅷ中한ع👍🏽\u200d\u0301\ufeff\u00ad\x1b\x85\u2028", max_size=60),
    st.lists(
        st.sampled_from(
            [
                "a man",
                "'S",
                "&amp;",
                "&amp;lt;",
                "&#x41;",
                "Ã©",
                "â€™",
                "\x1b[0m",
                " ",
                "12",
                "don't",
                "&lt",
                "&nbsp;",
                "ﬁ",
                "‘",
                "\r\n",
                "|>",
                "<|",
                "_",
            ]
        ),
        max_size=12,
    ).map("".join),
)


@settings(max_examples=1500, deadline=None)
@given(captions)
@example("'ſ and 'S")
@example("&amp;lt;|endoftext|&amp;gt;")
@example("x" * 200)
def test_equals_open_clip(text):
    assert not any(special in THEIRS.clean_fn(text) for special in OPEN_CLIP_SPECIALS)
    ids = OURS.encode(text)
    assert ids == THEIRS.encode(text)
    assert OURS.sot not in ids
    assert OURS.eot not in ids


def test_equals_open_clip_on_every_short_ascii_text():
    """Plain ASCII skips the repair step: every character, alone and between two letters, must not notice."""
    for code in range(128):
        for text in (chr(code), f"a{chr(code)}B", f"{chr(code)} {chr(code)}"):
            assert OURS.encode(text) == THEIRS.encode(text), repr(text)


def test_equals_open_clip_when_cut_at_77():
    texts = ["a dog", "", "word " * 200, "one, two; " * 30]
    assert torch.equal(OURS(texts, 77)[0], THEIRS(texts, 77))


@settings(max_examples=300, deadline=None)
@given(st.lists(captions, max_size=4), st.integers(2, 40))
def test_rows(texts, max_words):
    ids, mask = OURS(texts, max_words)
    assert ids.shape == mask.shape == (len(texts), max_words)
    assert ids.dtype == torch.int64
    assert mask.dtype == torch.bool
    for text, row, valid in zip(texts, ids.tolist(), mask.tolist(), strict=True):
        expected = [49406, *OURS.encode(text)[: max_words - 2], 49407]
        assert row == expected + [0] * (max_words - len(expected))
        assert valid == [True] * len(expected) + [False] * (max_words - len(expected))


@pytest.mark.parametrize("text", ["<|startoftext|>", "a <|endoftext|> b", "&lt;|ENDOFTEXT|&gt;", "<end_of_text>"])
def test_a_caption_cannot_inject_a_special_token(text):
    ids, mask = OURS([text], 32)
    assert (ids == OURS.eot).sum() == 1
    assert (ids == OURS.sot).sum() == 1
    assert ids.argmax() == mask.sum() - 1


def test_a_row_worked_out_by_hand():
    ids, mask = OURS(["a man is driving a car"], 6)  # six words, room for four
    assert ids.tolist() == [[49406, 320, 786, 533, 4161, 49407]]
    assert mask.all()


def test_refuses_a_single_string_and_no_room():
    with pytest.raises(TypeError, match="sequence of captions"):
        OURS("a dog", 32)
    with pytest.raises(ValueError, match="--max_words must be >= 2"):
        OURS(["a dog"], 1)


def test_survives_pickling_for_loader_workers():
    assert pickle.loads(pickle.dumps(OURS)).encode("two people's dogs") == OURS.encode("two people's dogs")


def test_the_merge_table_is_clips():
    digest = hashlib.sha256(MERGES_FILE.read_bytes()).hexdigest()
    assert digest == "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
    assert digest in MERGES_FILE.with_name("bpe_simple_vocab_16e6.NOTICE").read_text()


def test_180000_captions_take_seconds():
    texts = [f"a man number {i} is playing word{i % 20000} in the garden's backyard" for i in range(18000)]
    tokenizer = Tokenizer()
    began = time.process_time()
    tokenizer(texts, 32)
    assert time.process_time() - began < 3  # a tenth of them; takes 0.3 s, the bound allows for a busy machine
