"""The tokenizer of dalle-mini and dalle-mega: byte-pair encoding of words with the space before.

It reads what its authors publish, vocab.json and merges.txt, and belongs to imported weights alone.
A caption is lower-cased, freed of double spaces, and stands between a start and an end, which a
truncated one keeps. The release also mends wrong encodings, spells emoji and other scripts in
ASCII, cuts hashtags and turns signs into commas; this does not.

Source: Dayma et al. 2021, and the authors' release; Lewis et al. 2019; Radford et al. 2019.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from dalle_jax.text.bpe import TextError
from dalle_jax.text.clip_bpe import BYTES, ENDINGS, SIGNS, kind_of, merge
from dalle_jax.text.published_bpe import PublishedBPETokenizer

START, END = "<s>", "</s>"
_SPACE = SIGNS[32]


class BARTTokenizer(PublishedBPETokenizer):
    """Pieces with numbers of their own; V is the number that the encoder has rows for."""

    KIND = "bart"

    def __init__(
        self, ids: Mapping[str, int], merges: Sequence[tuple[str, str]], *, vocabulary: int
    ):
        """Checks that every piece has a number.

        Args:
          ids: number of each piece; those from V on are left out.
          merges: pairs of pieces, the first ones first.
          vocabulary: V.
        Raises:
          TextError: if a byte, the start, the end or a merged piece has no number below V.
        """
        self._ids = {piece: number for piece, number in ids.items() if 0 <= number < vocabulary}
        pieces = [*SIGNS.values(), *("".join(pair) for pair in merges)]
        missing = [piece for piece in (START, END, *pieces) if piece not in self._ids]
        if missing:
            raise TextError(
                f"the vocabulary has no number below {vocabulary} for {missing[:4]}, wanted one "
                "for each byte, <s>, </s> and each merge; do the two files belong together?"
            )
        self._texts = {self._ids[piece]: piece for piece in pieces}
        self._remember(merges, vocabulary)
        self._merge = functools.lru_cache(2**16)(lambda word: merge(list(word), self._ranks))

    def encode(self, captions, *, length, overlong="truncate", dropout=0.0, seeds=None):
        """Turns captions into ids; see `Tokenizer.encode`. An empty one is start and end alone."""
        if length < 3:
            raise ValueError(f"length is {length}; start, end and one token need 3 slots")
        options = {"overlong": overlong, "dropout": dropout, "seeds": seeds}
        inner = super().encode(captions, length=length - 2, **options)
        slots = np.arange(length, dtype=np.int32)[None]
        ids = np.broadcast_to(self.vocabulary + slots, (len(captions), length)).copy()
        ends = 1 + (inner < self.vocabulary).sum(axis=1)
        ids[:, 1:-1] = np.where(inner < self.vocabulary, inner, ids[:, 1:-1])
        ids[:, 0] = self._ids[START]
        ids[np.arange(len(captions)), ends] = self._ids[END]
        return ids

    def decode(self, ids) -> str:
        """Returns the caption of one row of ids; pads, start and end say nothing."""
        signs = "".join(self._texts.get(int(i), "") for i in ids)
        return bytes(BYTES[sign] for sign in signs).decode("utf-8", errors="replace").strip()

    def _tokens(self, caption: str) -> list[int]:
        return [self._ids[piece] for word in _words(caption) for piece in self._merge(word)]


def _words(caption: str) -> Iterator[str]:
    """Runs of letters, of numbers and of other signs, with the space before them; and endings."""
    for part in caption.lower().split():
        at, space = 0, _SPACE
        while at < len(part):
            ending = next((x for x in ENDINGS if not space and part.startswith(x, at)), None)
            end = at + len(ending or " ")
            while not ending and end < len(part) and kind_of(part[end]) == kind_of(part[at]):
                end += 1
            yield space + "".join(SIGNS[byte] for byte in part[at:end].encode())
            at, space = end, ""
