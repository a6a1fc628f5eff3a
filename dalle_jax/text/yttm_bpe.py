"""The tokenizer of ruDALL-E Malevich: byte-pair encoding as YouTokenToMe does it.

It reads what its authors publish, bpe.model, and belongs to imported weights alone. A caption is
lower-cased and cut at spaces; each word begins with a sign for the space before it. Characters
without a number that follow each other become one `<UNK>`. A caption stands between a start and an
end; a truncated one loses its end, as in the release.

bpe.model is text, whole numbers alone: how many characters and how many merges there are; then code
point and number of each character; then, of each merge, the numbers of its parts and its own; last
the numbers of unknown, pad, start and end.

Source: the authors' releases (ruDALL-E, YouTokenToMe); Sennrich et al. 2016.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from dalle_jax.errors import UserError
from dalle_jax.text.bpe import TextError, Tokenizer

KIND = "yttm"
SPACE = 0x2581
PAD, UNKNOWN, START, END = range(4)
"""Numbers that the release has built in."""
_SPECIAL = [UNKNOWN, PAD, START, END]  # in the order of the file
_GAP = re.compile(f"[\t-\r {chr(SPACE)}]+")
_LARGEST = 2**22  # bytes of a file; one with 16,384 pieces has about 0.3 MB
_LONGEST = 1000  # characters of a piece


class YTTMTokenizer(Tokenizer):
    """Pieces with numbers of their own; V is the number that the prior has rows for."""

    def __init__(
        self,
        characters: Mapping[int, int],
        merges: Sequence[tuple[int, int, int]],
        *,
        vocabulary: int,
    ):
        """Checks that the numbers are those of one vocabulary.

        Args:
          characters: number of each code point.
          merges: numbers of two pieces and of what they become, the first ones first.
          vocabulary: V.
        Raises:
          TextError: if the numbers do not run from 4 on, go beyond V, or a merge joins what is not
            there yet.
        """
        _check(characters, merges, vocabulary)
        self._characters = {chr(code): number for code, number in characters.items()}
        self._signs = {number: sign for sign, number in self._characters.items()}
        self._parts = {made: (left, right) for left, right, made in merges}
        self._merges = merges
        self._ranks = {(left, right): rank for rank, (left, right, _) in enumerate(merges)}
        self._encoded = functools.lru_cache(2**16)(self._encode)
        self.vocabulary = vocabulary
        self.truncated = 0
        content = {"kind": KIND, "vocabulary": vocabulary, "characters": sorted(characters.items())}
        self._data = json.dumps(content | {"merges": merges}).encode()
        self.fingerprint = hashlib.sha256(self._data).hexdigest()

    @classmethod
    def from_file(cls, path: Path, *, rows: int) -> YTTMTokenizer:
        """Reads bpe.model.

        Args:
          path: of the file.
          rows: V, tokens that the network has rows for.
        Raises:
          TextError: if it is no such file, or has other special tokens than the release.
        """
        try:
            with path.open("rb") as file:
                data = file.read(_LARGEST + 1)
            if len(data) > _LARGEST:
                raise ValueError(f"more than {_LARGEST} bytes")
            n, m, *numbers = map(int, data.split())
            if min(n, m) < 0 or len(numbers) != 2 * n + 3 * m + 4:
                raise ValueError(f"{len(numbers)} numbers for {n} characters and {m} merges")
        except (OSError, ValueError) as error:
            raise TextError(f"{path} is no model of YouTokenToMe ({error!r:.100})") from error
        special = numbers[-4:]
        if special != _SPECIAL:
            raise TextError(
                f"{path} has the numbers {special} for unknown, pad, start and end, wanted "
                f"{_SPECIAL}, which ruDALL-E has built in"
            )
        codes, merged = numbers[: 2 * n], iter(numbers[2 * n : -4])
        characters = dict(zip(codes[::2], codes[1::2], strict=True))
        return cls(characters, list(zip(merged, merged, merged, strict=True)), vocabulary=rows)

    @classmethod
    def from_bytes(cls, data: bytes) -> YTTMTokenizer:
        """Reads what `to_bytes` gave; raises TextError if it is damaged."""
        try:
            content = json.loads(data)
            if content["kind"] != KIND:
                raise ValueError(content["kind"])
            characters = {int(code): int(number) for code, number in content["characters"]}
            merges = [(int(a), int(b), int(made)) for a, b, made in content["merges"]]
            vocabulary = int(content["vocabulary"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise TextError(f"the tokenizer is damaged ({error!r:.100}); restore it") from error
        return cls(characters, merges, vocabulary=vocabulary)

    def decode(self, ids) -> str:
        """Returns the caption of one row of ids; pads, unknown, start and end say nothing."""
        signs = []
        stack = [int(i) for i in reversed(ids) if i < self.vocabulary]
        while stack:
            piece = stack.pop()
            if piece in self._parts:
                stack.extend(reversed(self._parts[piece]))
            else:
                signs.append(self._signs.get(piece, ""))
        return "".join(signs).replace(chr(SPACE), " ").strip()

    def _tokens(self, caption: str) -> list[int]:
        words = filter(None, _GAP.split(caption.lower().strip()))
        return [START, *(token for word in words for token in self._encoded(word)), END]

    def _draw(self, caption: str, dropout: float, seed: int) -> list[int]:
        raise UserError("the tokenizer of an imported model has no BPE dropout; leave it at 0")

    def _encode(self, word: str) -> list[int]:
        """Joins the pair of the lowest rank, of equal ones the first, until there is none."""
        parts: list[int | None] = [self._characters[chr(SPACE)]]
        for sign in word:
            number = self._characters.get(sign, UNKNOWN)
            if number != UNKNOWN or parts[-1] != UNKNOWN:
                parts.append(number)
        before, behind = list(range(-1, len(parts) - 1)), list(range(1, len(parts) + 1))
        waiting: list[tuple[int, int]] = []

        def wait(at):
            if at >= 0 and behind[at] < len(parts):
                rank = self._ranks.get((parts[at], parts[behind[at]]))
                if rank is not None:
                    heapq.heappush(waiting, (rank, at))

        for at in range(len(parts)):
            wait(at)
        while waiting:
            rank, at = heapq.heappop(waiting)
            left, right, made = self._merges[rank]
            after = behind[at]
            if parts[at] != left or after == len(parts) or parts[after] != right:
                continue  # one of them has become part of another piece
            parts[at], parts[after] = made, None
            behind[at] = behind[after]
            if behind[at] < len(parts):
                before[behind[at]] = at
            wait(before[at])
            wait(at)
        return [part for part in parts if part is not None]


def _check(characters, merges, vocabulary):
    numbers = sorted([*characters.values(), *(made for _, _, made in merges)])
    if numbers != list(range(len(_SPECIAL), len(_SPECIAL) + len(numbers))):
        raise TextError(
            "the numbers of characters and merges do not run from 4 on without a gap; is it a "
            "model of YouTokenToMe?"
        )
    if len(_SPECIAL) + len(numbers) > vocabulary:
        raise TextError(
            f"the tokenizer has {len(_SPECIAL) + len(numbers)} pieces, but the prior has rows for "
            f"{vocabulary}; do the files belong together?"
        )
    if SPACE not in characters or not all(0 <= code < 0x110000 for code in characters):
        raise TextError(
            "the tokenizer lacks the sign U+2581, or has characters outside of Unicode; restore it"
        )
    lengths = dict.fromkeys(characters.values(), 1)
    for left, right, made in merges:
        lengths[made] = lengths.get(left, _LONGEST) + lengths.get(right, _LONGEST)
        if lengths[made] > _LONGEST:
            raise TextError(
                f"the merge of {left} and {right} joins a piece that is not there yet, or makes "
                f"one of more than {_LONGEST} characters; restore the tokenizer"
            )
