"""The tokenizer of dalle-mini and dalle-mega: byte-pair encoding of words with the space before.

It reads what its authors publish, vocab.json and merges.txt, and belongs to imported weights alone.
A caption is lower-cased, freed of double spaces, and stands between a start and an end, which a
truncated one keeps. The release also mends wrong encodings, spells emoji and other scripts in
ASCII, cuts hashtags and turns signs into commas; this does not.

Source: Dayma et al. 2021, and the authors' release; Lewis et al. 2019; Radford et al. 2019.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from dalle_jax.errors import UserError
from dalle_jax.text.bpe import TextError, Tokenizer
from dalle_jax.text.clip_bpe import BYTES, ENDINGS, SIGNS, kind_of, merge, read_merges

START, END = "<s>", "</s>"
_LARGEST = 2**26  # bytes of vocab.json; the published one has 1 MB
_SPACE = SIGNS[32]


class BARTTokenizer(Tokenizer):
    """Pieces with numbers of their own; V is the number that the encoder has rows for."""

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
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.vocabulary = vocabulary
        self.truncated = 0
        content = {"kind": "bart", "vocabulary": vocabulary, "ids": self._ids}
        content["merges"] = [" ".join(pair) for pair in merges]
        self._data = json.dumps(content, ensure_ascii=False).encode()
        self.fingerprint = hashlib.sha256(self._data).hexdigest()
        self._merge = functools.lru_cache(2**16)(lambda word: merge(list(word), self._ranks))

    @classmethod
    def from_bytes(cls, data: bytes) -> BARTTokenizer:
        """Reads what `to_bytes` gave; raises TextError if it is damaged."""
        ids, pairs, vocabulary = from_content(data, "bart")
        return cls(ids, pairs, vocabulary=vocabulary)

    @classmethod
    def from_files(cls, vocabulary: Path, merges: Path, *, rows: int) -> BARTTokenizer:
        """Reads the published files, vocab.json and merges.txt.

        Args:
          vocabulary: vocab.json.
          merges: merges.txt.
          rows: V, tokens that the encoder has rows for.
        Raises:
          TextError: if they are no such files, or do not belong together.
        """
        ids = read_vocabulary(vocabulary)
        return cls(ids, read_merges(merges), vocabulary=rows)

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

    def _draw(self, caption: str, dropout: float, seed: int) -> list[int]:
        raise UserError("the tokenizer of an imported model has no BPE dropout; leave it at 0")


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


def from_content(data: bytes, kind: str) -> tuple[dict[str, int], list[tuple[str, str]], int]:
    """Reads numbers, merges and V of a saved tokenizer of this kind.

    Raises:
      TextError: if it is damaged.
    """
    try:
        content = json.loads(data)
        if content["kind"] != kind:
            raise ValueError(content["kind"])
        pairs = [tuple(line.split(" ")) for line in content["merges"]]
        ids, vocabulary = _numbers(content["ids"]), int(content["vocabulary"])
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError("a merge that is no pair")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TextError(f"the tokenizer is damaged ({error!r:.100}); restore it") from error
    return ids, pairs, vocabulary


def read_vocabulary(path: Path) -> dict[str, int]:
    """Reads the number of each piece from a JSON file.

    Raises:
      TextError: if it is no such file.
    """
    try:
        with path.open("rb") as file:
            return _numbers(json.loads(file.read(_LARGEST)))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise TextError(f"{path} is no list of pieces ({error!r:.100})") from error


def _numbers(ids) -> dict[str, int]:
    if not all(type(number) is int for number in ids.values()):
        raise ValueError("a piece whose number is no whole number")
    return ids
