"""dalle-mini's tokenizer gives the tokens of transformers' BartTokenizerFast (4.40.2)."""

import json

import numpy as np
import pytest
from saved_tokenizer import check_saved

from dalle_jax.text.bart_bpe import BARTTokenizer
from dalle_jax.text.bpe import TextError
from dalle_jax.text.clip_bpe import SIGNS
from dalle_jax.text.tokenizer_file import load_tokenizer

MERGES = [
    "c a", "ca t", "Ġ t", "h e", "Ġt he", "d o", "do g", "Ġ r", "Ġr e", "1 2", "Ã ©", "Ġ ca",
    "Ġca t", "Ġ Ġ",
]  # fmt: skip
PIECES = ["<s>", "<pad>", "</s>", "<unk>", *SIGNS.values()]
PIECES += [merge.replace(" ", "") for merge in MERGES] + ["<mask>"]
ROWS = len(PIECES) - 1  # as in the release, the mask has no row

# Of BartTokenizerFast with these files, max_length=16, for captions as dalle-mini cleans them:
# lower case, single spaces, a space first; the pad is 1.
PEER = {
    "the cat": [0, 264, 224, 261, 2],
    "The  DOG's red\tcat, isn't it?": [
        0, 264, 224, 266, 10, 86, 268, 71, 224, 261, 15, 224, 76, 86, 81, 2,
    ],
    "": [0, 2],
    "1234 cats &amp; dogs &lt;3": [
        0, 224, 269, 22, 23, 224, 261, 86, 224, 9, 68, 80, 83, 30, 224, 2,
    ],
    "cafe\u0301 caf\u00e9 \u00c9t\u00e9 \u4f60\u597d": [
        0, 271, 73, 72, 140, 227, 271, 73, 270, 224, 270, 87, 270, 224, 164, 2,
    ],
    "''s re're -- ___ 'll": [0, 224, 10, 10, 86, 268, 10, 85, 72, 224, 16, 16, 224, 66, 66, 2],
    "the\tcat \n dog's  3 12  ": [0, 264, 224, 261, 224, 266, 10, 86, 224, 22, 224, 269, 2],
}  # fmt: skip


def tokenizer(folder, *, rows=ROWS, pieces=tuple(PIECES)):
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    return BARTTokenizer.from_files(folder / "vocab.json", folder / "merges.txt", rows=rows)


def test_tokens_are_those_of_the_peer_and_truncated_captions_keep_their_end(tmp_path):
    found = tokenizer(tmp_path)
    ids = found.encode(list(PEER), length=16)
    pads = ROWS + np.arange(16)
    for row, wanted in zip(ids, PEER.values(), strict=True):
        assert list(row) == [*wanted, *pads[len(wanted) :]]
    assert found.truncated == 4
    assert found.decode(ids[0]) == "the cat"
    assert found.decode(ids[2]) == ""


def test_a_saved_tokenizer_is_opened_as_it_was(tmp_path):
    check_saved(tokenizer(tmp_path), tmp_path, list(PEER), vocabulary=ROWS)


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    with pytest.raises(TextError, match=r"no number below 272 for \['Ġcat', 'ĠĠ'\]"):
        tokenizer(tmp_path, rows=272)
    with pytest.raises(TextError, match="</s>"):
        tokenizer(tmp_path, pieces=[piece for piece in PIECES if piece != "</s>"])


@pytest.mark.parametrize("data", ["[]", "{", '{"a": "b"}', "[" * 10**5])
def test_a_damaged_vocabulary_is_named(data, tmp_path):
    (tmp_path / "vocab.json").write_text(data)
    with pytest.raises(TextError, match=r"vocab.json is no list of pieces"):
        BARTTokenizer.from_files(tmp_path / "vocab.json", tmp_path / "merges.txt", rows=9)


@pytest.mark.parametrize(
    "data", ['{"kind": "bart"}', '{"kind": "bart", "merges": [], "ids": [], "vocabulary": 3}']
)
def test_a_damaged_tokenizer_is_named(data, tmp_path):
    (tmp_path / "tokenizer.model").write_text(data)
    with pytest.raises(TextError, match=r"cannot read the tokenizer .*tokenizer.model: .*damaged"):
        load_tokenizer(tmp_path / "tokenizer.model")
