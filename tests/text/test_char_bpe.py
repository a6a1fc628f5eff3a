"""minDALL-E's tokenizer gives the tokens of its authors' code, with tokenizers 0.22.1."""

import json

import numpy as np
import pytest
import recipe
from saved_tokenizer import check_saved

from dalle_jax.text.bpe import TextError
from dalle_jax.text.char_bpe import CharBPETokenizer
from dalle_jax.text.tokenizer_file import load_tokenizer

ROWS = len(recipe.PIECES)
# Of minDALL-E's build_tokenizer with these files and a context of 20; the pad is 1.
PEER = {
    "the cat": [89, 87],
    "The  DOG's red\tcat, isn't it?": [89, 91, 80, 62, 93, 87, 0, 10, 20, 57, 80, 63, 10, 63, 0],
    "": [],
    "1234 cats &amp; dogs &lt;3": [
        94, 31, 74, 86, 21, 62, 81, 2, 14, 59, 82, 90, 8, 62, 81, 13, 63, 82, 73,
    ],
    "a\0b\ufffdc\u200dd\x1ce\u00a0f\u3000g\u2028h": [2, 3, 4, 5, 48, 49, 50, 51],
    "\u4f60\u597da \u0130X \u1e9e": [0, 0, 44, 10, 0, 67, 0],
    "the-dog;;;12": [89, 83, 91, 82, 82, 82, 29, 72],
    "\u201ccat\u201d \u2014 dog\u2026 \u0378 \U0001f600cat": [0, 87, 0, 0, 91, 0, 0, 0, 87],
    "a^b`c|d~ $5+3=8 x\u00b2 \u00b7": [
        44, 0, 45, 0, 46, 0, 47, 0, 0, 75, 0, 73, 0, 78, 25, 0, 0,
    ],
    "the cat " * 20: [89, 87] * 10,
}  # fmt: skip


def tokenizer(folder, *, rows=ROWS, pieces=tuple(recipe.PIECES)):
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    merges = "\n".join(["#version: 0.2", *recipe.MERGES, ""])
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    return CharBPETokenizer.from_files(folder / "vocab.json", folder / "merges.txt", rows=rows)


def test_tokens_are_those_of_the_peer(tmp_path):
    found = tokenizer(tmp_path)
    ids = found.encode(list(PEER), length=20)
    pads = ROWS + np.arange(20)
    for row, wanted in zip(ids, PEER.values(), strict=True):
        assert list(row) == [*wanted, *pads[len(wanted) :]]
    assert (found.truncated, found.pad) == (1, 1)
    assert found.decode(ids[0]) == "the cat"
    assert found.decode(ids[2]) == ""


def test_a_pad_without_a_number_gets_the_next_one_as_the_peer_gives_it(tmp_path):
    pieces = [piece for piece in recipe.PIECES if piece != "[PAD]"]
    assert tokenizer(tmp_path, pieces=pieces).pad == ROWS - 1
    with pytest.raises(TextError, match=r"no number below 95 for \['\[PAD\]'\]"):
        tokenizer(tmp_path, pieces=pieces, rows=ROWS - 1)


def test_a_saved_tokenizer_is_opened_as_it_was(tmp_path):
    check_saved(tokenizer(tmp_path), tmp_path, list(PEER), vocabulary=ROWS)


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    with pytest.raises(TextError, match=r"96 pieces, and no number below 94 for \['12', 'Ã©'\]"):
        tokenizer(tmp_path, rows=94)
    with pytest.raises(TextError, match=r"for \['\[UNK\]'\]"):
        tokenizer(tmp_path, pieces=[piece for piece in recipe.PIECES if piece != "[UNK]"])
    with pytest.raises(TextError, match="no number below 96 for some, wanted one for each piece"):
        tokenizer(tmp_path, pieces=[*recipe.PIECES, "more"])


@pytest.mark.parametrize(
    "data",
    [
        '{"kind": "char"}',
        '{"kind": "char", "vocabulary": 3, "ids": {"a": 0.5}, "merges": []}',
        '{"kind": "char", "vocabulary": 3, "ids": {"[UNK]": 0}, "merges": ["a"]}',
    ],
)
def test_a_damaged_tokenizer_is_named(data, tmp_path):
    (tmp_path / "tokenizer.model").write_text(data)
    with pytest.raises(TextError, match=r"cannot read the tokenizer .*tokenizer.model: .*damaged"):
        load_tokenizer(tmp_path / "tokenizer.model")
