"""What tokenizers with a published vocabulary and list of merges share: their files.

Source: ours.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, TypeVar

from dalle_jax.errors import UserError
from dalle_jax.text.bpe import TextError, Tokenizer
from dalle_jax.text.clip_bpe import read_merges

Published = TypeVar("Published", bound="PublishedBPETokenizer")

_LARGEST = 2**26  # bytes of a vocabulary; the published ones have 1 MB and less


class PublishedBPETokenizer(Tokenizer):
    """Pieces whose numbers a file says; belongs to imported weights alone.

    A subclass sets `_ids` and calls `_remember` in a constructor `(ids, merges, *, vocabulary)`.
    """

    KIND: ClassVar[str]
    """Name of the kind in saved tokenizers."""
    _ids: Mapping[str, int]

    def _remember(self, merges: Sequence[tuple[str, str]], vocabulary: int) -> None:
        """Keeps the merges by rank, V, and what `to_bytes` gives."""
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.vocabulary = vocabulary
        self.truncated = 0
        content = {"kind": self.KIND, "vocabulary": vocabulary, "ids": self._ids}
        content["merges"] = [" ".join(pair) for pair in merges]
        self._data = json.dumps(content, ensure_ascii=False).encode()
        self.fingerprint = hashlib.sha256(self._data).hexdigest()

    @classmethod
    def from_bytes(cls: type[Published], data: bytes) -> Published:
        """Reads what `to_bytes` gave; raises TextError if it is damaged."""
        try:
            content = json.loads(data)
            if content["kind"] != cls.KIND:
                raise ValueError(content["kind"])
            pairs = [tuple(line.split(" ")) for line in content["merges"]]
            ids, vocabulary = _numbers(content["ids"]), int(content["vocabulary"])
            if any(len(pair) != 2 for pair in pairs):
                raise ValueError("a merge that is no pair")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise TextError(f"the tokenizer is damaged ({error!r:.100}); restore it") from error
        return cls(ids, pairs, vocabulary=vocabulary)

    @classmethod
    def from_files(cls: type[Published], vocabulary: Path, merges: Path, *, rows: int) -> Published:
        """Reads the published files.

        Args:
          vocabulary: JSON object with the number of each piece.
          merges: text file with a pair of pieces in each line.
          rows: V, tokens that the network has rows for.
        Raises:
          TextError: if they are no such files, or do not belong together.
        """
        try:
            with vocabulary.open("rb") as file:
                ids = _numbers(json.loads(file.read(_LARGEST)))
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise TextError(f"{vocabulary} is no list of pieces ({error!r:.100})") from error
        return cls(ids, read_merges(merges), vocabulary=rows)

    def _draw(self, caption: str, dropout: float, seed: int) -> list[int]:
        raise UserError("the tokenizer of an imported model has no BPE dropout; leave it at 0")


def _numbers(ids) -> dict[str, int]:
    if not all(type(number) is int for number in ids.values()):
        raise ValueError("a piece whose number is no whole number")
    return ids
