"""ruDALL-E's tokenizer gives the tokens of YouTokenToMe 1.0.6."""

import json

import numpy as np
import pytest
from saved_tokenizer import check_saved

from dalle_jax.text.bpe import TextError
from dalle_jax.text.tokenizer_file import load_tokenizer
from dalle_jax.text.yttm_bpe import YTTMTokenizer

CHARACTERS = {0x2581: 4, ord("a"): 5, ord("b"): 6, ord("c"): 7, ord("я"): 8}
MERGES = [  # 12 and 13 are both "abc"
    (5, 6, 9), (6, 7, 10), (5, 5, 11), (5, 10, 12), (9, 7, 13), (4, 8, 14), (11, 5, 15), (14, 8, 16)
]  # fmt: skip
# Of youtokentome's BPE with this file, after lower() and strip() as in ruDALL-E.
PEER = {
    "abc": [4, 13],
    "aaa aaaa": [4, 15, 4, 11, 11],
    "bcabc": [4, 10, 13],
    "aabc": [4, 5, 13],
    "Я яя ЯЯя": [14, 16, 16, 8],
    "xyz a?b": [4, 1, 4, 5, 1, 6],
    " a\u00a0b ": [4, 5, 1, 6],
    "a\u2581b": [4, 5, 4, 6],
    "": [],
    "\x1ca\x1cb": [4, 5, 1, 6],
}
ROWS = 20


def model(*, characters=CHARACTERS, merges=MERGES, special="1 0 2 3", sizes=None):
    lines = [sizes or f"{len(characters)} {len(merges)}"]
    lines += [f"{code} {number}" for code, number in characters.items()]
    lines += [" ".join(map(str, merge)) for merge in merges]
    return "\n".join([*lines, special, ""])


def tokenizer(folder, *, rows=ROWS, **changed):
    (folder / "bpe.model").write_text(model(**changed))
    return YTTMTokenizer.from_file(folder / "bpe.model", rows=rows)


def test_tokens_are_those_of_the_peer_between_start_and_end(tmp_path):
    ids = tokenizer(tmp_path).encode(list(PEER), length=8)
    pads = ROWS + np.arange(8)
    for row, wanted in zip(ids, PEER.values(), strict=True):
        tokens = [2, *wanted, 3]
        assert list(row) == [*tokens, *pads[len(tokens) :]]


def test_a_truncated_caption_loses_its_end(tmp_path):
    found = tokenizer(tmp_path)
    assert found.encode(["aaa aaaa"], length=4).tolist() == [[2, 4, 15, 4]]
    assert found.truncated == 1


def test_decoding_gives_the_caption_back(tmp_path):
    found = tokenizer(tmp_path)
    for caption, wanted in {"яЯ abc  aaa": "яя abc aaa", "a?b": "ab", "": ""}.items():
        assert found.decode(found.encode([caption], length=12)[0]) == wanted


def test_a_long_word_takes_time_in_proportion(tmp_path):
    word = tokenizer(tmp_path).encode(["a" * 2**17], length=2**16)
    assert (word[0, 2:] == 11).all()  # at the square of its length this would take minutes


def test_a_saved_tokenizer_is_opened_as_it_was(tmp_path):
    found = tokenizer(tmp_path)
    check_saved(found, tmp_path, list(PEER), vocabulary=ROWS)
    with pytest.raises(ValueError, match="no BPE dropout"):
        found.encode(["a"], length=4, dropout=0.1, seeds=[0])


TWICE = [(5 + i, 5 + i, 6 + i) for i in range(11)]  # "a", "aa", "aaaa": 2^11 characters


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"sizes": "5 9"}, r"38 numbers for 5 characters and 9 merges"),
        ({"sizes": "-2 14"}, "is no model of YouTokenToMe"),
        ({"sizes": "x"}, "is no model of YouTokenToMe"),
        ({"special": "3 0 1 2"}, r"numbers \[3, 0, 1, 2\] .* wanted \[1, 0, 2, 3\]"),
        ({"special": "1 -1 2 3"}, "which ruDALL-E has built in"),
        ({"merges": MERGES[:3] + MERGES[4:]}, "from 4 on without a gap"),
        ({"merges": [(1, 5, 9)]}, "merge of 1 and 5 joins a piece that is not there yet"),
        ({"merges": [(5, 10, 9), (5, 6, 10)]}, "merge of 5 and 10 joins a piece that is not"),
        ({"characters": {0x2581: 4, ord("a"): 5}, "merges": TWICE}, "more than 1000 characters"),
        ({"characters": {ord("a"): 4}, "merges": []}, r"lacks the sign U\+2581"),
        ({"characters": {0x2581: 4, 0x110000: 5}, "merges": []}, "outside of Unicode"),
        ({"rows": 16}, "17 pieces, but the prior has rows for 16"),
    ],
)
def test_files_that_are_no_model_are_refused_in_a_sentence(changed, said, tmp_path):
    with pytest.raises(TextError, match=said) as error:
        tokenizer(tmp_path, **changed)
    assert "\n" not in str(error.value)


def test_a_file_beyond_any_vocabulary_is_not_read(tmp_path):
    (tmp_path / "bpe.model").write_bytes(b"1 " * 2**21 + b"1")
    with pytest.raises(TextError, match="more than 4194304 bytes"):
        YTTMTokenizer.from_file(tmp_path / "bpe.model", rows=ROWS)


@pytest.mark.parametrize(
    "content",
    [
        {"kind": "yttm"},
        {"kind": "yttm", "vocabulary": 9, "characters": [[1]], "merges": []},
        {"kind": "yttm", "vocabulary": 9, "characters": [[1, 2]], "merges": [[1, 2]]},
    ],
)
def test_a_damaged_tokenizer_is_named(content, tmp_path):
    (tmp_path / "tokenizer.model").write_text(json.dumps(content))
    with pytest.raises(TextError, match=r"cannot read the tokenizer .*tokenizer.model: .*damaged"):
        load_tokenizer(tmp_path / "tokenizer.model")
