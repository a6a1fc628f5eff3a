import logging
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_jax.text.bpe import TextError, Tokenizer

CAPTIONS = [
    "a red apple",
    "Crying cat, version 2.0",
    "woman astronaut: medium skin tone",
    "woman astronaut: dark skin tone",
    "don't panic",
    "blue heart 12:30",
    "flag: côte d’ivoire",
] * 5
TOKENIZER = Tokenizer.train(CAPTIONS, vocabulary=420)
PHRASE = "woman astronaut: medium skin tone crying cat"


def pieces(caption, **options):
    ids = TOKENIZER.encode([caption], length=256, **options)[0]
    return [TOKENIZER._pieces.id_to_piece(int(i)) for i in ids if i < TOKENIZER.vocabulary]


def test_merges_stay_inside_runs_of_letters():
    assert pieces("Woman astronaut: red2.0") == [
        *["woman", "▁", "astronaut", ":", "▁", "red", "2", ".", "0"]
    ]
    learned = [TOKENIZER._pieces.id_to_piece(i) for i in range(257, TOKENIZER.vocabulary)]
    assert all(len(piece) == 1 or re.fullmatch("[a-z]+", piece) for piece in learned)


def test_spaces_are_never_dropped_or_glued():
    assert pieces("  a  cat ") == ["▁", "▁", "a", "▁", "▁", "cat", "▁"]


def test_unknown_characters_are_spelled_in_bytes():
    assert pieces("日") == ["<0xE6>", "<0x97>", "<0xA5>"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40))
def test_decode_gives_the_lower_cased_caption_back(caption):
    lowered = caption.lower()
    ids = TOKENIZER.encode([caption, caption], length=512, dropout=0.5, seeds=[1, 2])
    assert [TOKENIZER.decode(row) for row in ids] == [lowered, lowered]


def test_signs_without_a_spelling_become_plain_ones():
    ids = TOKENIZER.encode(["a▁b\ud800"], length=8)
    assert TOKENIZER.decode(ids[0]) == "a b?"


def test_each_empty_slot_holds_its_own_pad():
    V = TOKENIZER.vocabulary
    ids = TOKENIZER.encode(["", "red"], length=3)
    assert ids.dtype == np.int32
    assert ids[0].tolist() == [V, V + 1, V + 2]
    assert ids[1, 0] < V
    assert ids[1, 1:].tolist() == [V + 1, V + 2]
    assert TOKENIZER.decode(ids[0]) == ""


def test_same_corpus_in_any_order_gives_the_same_bytes():
    again = Tokenizer.train(reversed(CAPTIONS), vocabulary=420)
    assert again.to_bytes() == TOKENIZER.to_bytes()
    assert again.fingerprint == TOKENIZER.fingerprint
    assert Tokenizer.train(CAPTIONS, vocabulary=400).fingerprint != TOKENIZER.fingerprint


def test_small_corpus_shrinks_the_vocabulary():
    assert Tokenizer.train(["cat"], vocabulary=4096).vocabulary < 300


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_dropout_of_almost_nothing_equals_sentencepiece(caption):
    drawn = TOKENIZER.encode([caption], length=512, dropout=1e-12, seeds=[3])
    np.testing.assert_array_equal(drawn, TOKENIZER.encode([caption], length=512))


def test_dropout_draws_the_same_in_every_process():
    drawn = pieces("a crying cat", dropout=0.5, seeds=[1])
    assert drawn == ["a", "▁", "c", "ry", "in", "g", "▁", "cat"]


def test_dropout_repeats_for_a_seed_in_any_thread():
    seeds = list(range(300))
    expected = {s: TOKENIZER.encode([PHRASE], length=64, dropout=0.3, seeds=[s]) for s in seeds}
    with ThreadPoolExecutor(8) as pool:
        drawn = pool.map(
            lambda s: TOKENIZER.encode([PHRASE], length=64, dropout=0.3, seeds=[s]), seeds[::-1]
        )
    for seed, ids in zip(seeds[::-1], drawn, strict=True):
        np.testing.assert_array_equal(ids, expected[seed])
    assert len({ids.tobytes() for ids in expected.values()}) > 100


@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**32, 2**63])
def test_every_seed_repeats(seed):
    drawn = {
        TOKENIZER.encode([PHRASE], length=64, dropout=0.5, seeds=[seed]).tobytes()
        for _ in range(10)
    }
    assert len(drawn) == 1


def test_dropout_skips_about_a_tenth_of_the_merges():
    plain, whole = len(pieces(PHRASE)), len(PHRASE)
    drawn = [len(pieces(PHRASE, dropout=0.1, seeds=[s])) for s in range(200)]
    assert plain < np.mean(drawn) < whole / 2
    assert len(pieces(PHRASE, dropout=1.0, seeds=[0])) == whole


def test_overlong_captions_are_truncated_and_counted(caplog):
    tokenizer = Tokenizer.from_bytes(TOKENIZER.to_bytes())
    with caplog.at_level(logging.WARNING):
        ids = tokenizer.encode(["red red red", "red"] * 10, length=3)
    assert tokenizer.decode(ids[0]) == "red red"
    assert tokenizer.truncated == 10
    assert [r.getMessage()[-20:] for r in caplog.records] == [
        "truncated (1 so far)",
        "runcated (10 so far)",
    ]


def test_overlong_captions_can_be_an_error():
    with pytest.raises(TextError, match="'red red' has 3 tokens, but only 2 fit; shorten it"):
        TOKENIZER.encode(["red red"], length=2, overlong="error")


def test_rare_characters_are_spelled_in_bytes_if_the_vocabulary_cannot_hold_all():
    characters = [chr(0x4E00 + i) for i in range(600)]
    captions = ["red apple", "".join(characters), "".join(characters[:20])]
    tokenizer = Tokenizer.train(captions * 3, vocabulary=400)
    assert tokenizer.vocabulary <= 400
    caption = f"red {characters[0]}{characters[599]}"
    ids = tokenizer.encode([caption], length=16)[0]
    assert tokenizer.decode(ids) == caption
    assert [tokenizer._pieces.id_to_piece(int(i)) for i in ids if i < tokenizer.vocabulary] == [
        *["red", "▁", characters[0]],
        *[f"<0x{byte:02X}>" for byte in characters[599].encode()],
    ]


@pytest.mark.parametrize("captions", [CAPTIONS, ["日本"], [" "]])
def test_the_smallest_vocabulary_spells_everything(captions):
    tokenizer = Tokenizer.train(captions, vocabulary=284)
    assert tokenizer.vocabulary <= 284
    assert tokenizer.decode(tokenizer.encode(["日2 red"], length=16)[0]) == "日2 red"


def test_dropout_in_a_long_run_takes_time_in_proportion_to_it(monkeypatch):
    merges = TOKENIZER._merges
    asked = []

    class Counting(dict):
        def get(self, pair):
            asked.append(pair)
            return merges.get(pair)

    tokenizer = Tokenizer.from_bytes(TOKENIZER.to_bytes())
    tokenizer._merges = Counting()
    counts = []
    for letters in (640, 6400):
        asked.clear()
        ids = tokenizer.encode(["redcat" * (letters // 6)], length=8000, dropout=0.1, seeds=[0])
        assert tokenizer.decode(ids[0]) == "redcat" * (letters // 6)
        counts.append(len(asked))
    assert counts[1] < 11 * counts[0]


def test_a_tokenizer_that_was_trained_before_is_trained_alike():
    """Shipped models hold tokenizers of earlier versions; captions must keep their tokens."""
    assert TOKENIZER.fingerprint[:16] == "7913963fcad88f8a"


def test_saved_tokenizer_is_the_same(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer.model")
    loaded = Tokenizer.load(tmp_path / "tokenizer.model")
    assert loaded.fingerprint == TOKENIZER.fingerprint
    assert loaded.vocabulary == TOKENIZER.vocabulary


def test_damaged_or_missing_tokenizer_is_refused(tmp_path):
    path = tmp_path / "tokenizer.model"
    with pytest.raises(TextError, match="cannot read the tokenizer .*tokenizer.model"):
        Tokenizer.load(path)
    path.write_bytes(TOKENIZER.to_bytes()[:1000])
    with pytest.raises(TextError, match="tokenizer.model: the tokenizer is damaged"):
        Tokenizer.load(path)
    with pytest.raises(TextError, match="the tokenizer is empty"):
        Tokenizer.from_bytes(b"")


def test_impossible_requests_say_what_is_allowed():
    with pytest.raises(TextError, match="vocabulary of 100 is too small; .* at least 284"):
        Tokenizer.train(CAPTIONS, vocabulary=100)
    with pytest.raises(TextError, match="every caption is empty"):
        Tokenizer.train(["", ""], vocabulary=400)
    with pytest.raises(ValueError, match=r"dropout is 1.5; .* \[0, 1\]"):
        TOKENIZER.encode(["a"], length=4, dropout=1.5, seeds=[0])
    with pytest.raises(ValueError, match="one seed per caption: 1, got none"):
        TOKENIZER.encode(["a"], length=4, dropout=0.1)
    with pytest.raises(ValueError, match="length is 0; at least one"):
        TOKENIZER.encode(["a"], length=0)
