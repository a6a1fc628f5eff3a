"""The tokenizer of minDALL-E: byte-pair encoding of characters, the last of a word with `</w>`.

It reads what its authors publish, bpe-16k-vocab.json and bpe-16k-merges.txt, and belongs to
imported weights alone. A caption is freed of control characters and lower-cased; each punctuation
mark and each Chinese character is a word of its own. A character without a number is `[UNK]`. The
names [UNK] and [PAD] within a caption are words like others.

Source: Kim et al. 2021, the authors' release, and CharBPETokenizer of Hugging Face's tokenizers;
Sennrich et al. 2016.
"""

from __future__ import annotations

import functools
import string
import unicodedata
from collections.abc import Iterator, Mapping, Sequence

from dalle_jax.text.bpe import TextError
from dalle_jax.text.clip_bpe import merge
from dalle_jax.text.published_bpe import PublishedBPETokenizer

UNKNOWN, PAD = "[UNK]", "[PAD]"
_END = "</w>"
_IDEOGRAPHS = (
    *((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF)),
    *((0x2A700, 0x2B81F), (0x2B920, 0x2CEAF), (0x2F800, 0x2FA1F)),
)
"""First and last of each range, as in tokenizers, whose range from 2B920 on is Unicode's 2B820."""


class CharBPETokenizer(PublishedBPETokenizer):
    """Pieces with numbers of their own; V is the number that the prior has rows for."""

    KIND = "char"

    def __init__(
        self, ids: Mapping[str, int], merges: Sequence[tuple[str, str]], *, vocabulary: int
    ):
        """Checks that every piece has a number; a pad that has none gets the next one.

        Args:
          ids: number of each piece.
          merges: pairs of pieces, the first ones first.
          vocabulary: V.
        Raises:
          TextError: if a piece has no number below V.
        """
        self._ids = {PAD: len(ids)} | dict(ids)
        pieces = [UNKNOWN, PAD, *("".join(pair) for pair in merges)]
        missing = [piece for piece in pieces if not 0 <= self._ids.get(piece, -1) < vocabulary]
        if missing or not all(0 <= number < vocabulary for number in self._ids.values()):
            raise TextError(
                f"the vocabulary has {len(ids)} pieces, and no number below {vocabulary} for "
                f"{missing[:4] or 'some'}, wanted one for each piece, [UNK], [PAD] and each merge; "
                "do the files belong together?"
            )
        self._texts = {number: piece for piece, number in self._ids.items()}
        self._remember(merges, vocabulary)
        self._encoded = functools.lru_cache(2**16)(self._encode)

    @property
    def pad(self) -> int:
        """Number of the pad, which the prior wants to know."""
        return self._ids[PAD]

    def decode(self, ids) -> str:
        """Returns the caption of one row of ids, spaces between its words; pads say nothing."""
        pieces = (self._texts.get(int(i), PAD) for i in ids)
        return "".join(piece for piece in pieces if piece != PAD).replace(_END, " ").strip()

    def _tokens(self, caption: str) -> list[int]:
        return [token for word in _words(caption) for token in self._encoded(word)]

    def _encode(self, word: str) -> list[int]:
        signs = [*word[:-1], word[-1] + _END]
        known = [sign if sign in self._ids else UNKNOWN for sign in signs]
        return [self._ids[piece] for piece in merge(known, self._ranks)]


def _words(caption: str) -> Iterator[str]:
    """Runs of characters between spaces, punctuation and ideographs, and the latter two alone."""
    word = ""
    for sign in caption:
        category = unicodedata.category(sign)
        space = sign.isspace() and (category != "Cc" or sign in "\t\n\r")
        if not space and (category in ("Cc", "Cf", "Co") or sign == "\ufffd"):
            continue
        alone = sign in string.punctuation or category[0] == "P" or _is_ideograph(sign)
        if word and (space or alone):
            yield word
            word = ""
        if alone:
            yield sign
        elif not space:
            word += sign.lower()
    if word:
        yield word


def _is_ideograph(sign: str) -> bool:
    return any(first <= ord(sign) <= last for first, last in _IDEOGRAPHS)
