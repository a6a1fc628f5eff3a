"""Captions to tokens and back: byte-pair encoding as the paper's author describes it.

A caption is lower-cased and cut at every character outside a-z. Merges happen inside a run of
letters only; a space, digit or sign is a token of its own and is never glued to a word. Characters
the corpus hardly shows are spelled in bytes, so nothing is lost. P - 1 caption slots follow the
start-of-text token, and slot j without a token holds the pad id V + j.
Source: Ramesh et al. 2021, section 2.2; cut at a-z from the author's answer in openai/DALL-E #22.
"""

from __future__ import annotations

import collections
import hashlib
import io
import itertools
import logging
import random
import re
import string
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import sentencepiece
from jaxtyping import Int32

from dalle_jax.errors import UserError

_log = logging.getLogger(__name__)

_SPACE = "\u2581"  # SentencePiece writes a space so, and would read this sign back as a space
_LETTERS = string.ascii_lowercase
_RUN = re.compile("[a-z]+|[^a-z]", re.DOTALL)
_MERGED = re.compile("[a-z]{2,}$")
# Merging takes time that grows with the square of a run, so longer ones are encoded in parts.
_PART = re.compile("[a-z]{1,64}|[^a-z]", re.DOTALL)
SMALLEST_VOCABULARY = 1 + 256 + len(_SPACE) + len(_LETTERS)  # <unk>, bytes, the space, the letters


class TextError(UserError):
    """A caption or tokenizer that cannot be used, said in one sentence."""


class Tokenizer:
    """A trained vocabulary; `vocabulary` is its size V, `truncated` counts captions cut short."""

    def __init__(self, data: bytes):
        if not data:
            raise TextError("the tokenizer is empty; restore tokenizer.model from its model folder")
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise TextError(
                "the tokenizer is damaged: SentencePiece cannot read it; "
                "restore tokenizer.model from its model folder"
            ) from error
        self._data = data
        self.vocabulary: int = len(self._pieces)
        pieces = map(self._pieces.id_to_piece, range(self.vocabulary))
        # SentencePiece numbers merges in the order in which it learned them
        self._merges = {piece: rank for rank, piece in enumerate(pieces) if _MERGED.match(piece)}
        self._encoded: dict[str, list[int]] = {}  # of merged pieces and single characters
        self.fingerprint: str = hashlib.sha256(data).hexdigest()
        self.truncated: int = 0

    @classmethod
    def train(cls, captions: Iterable[str], *, vocabulary: int) -> Tokenizer:
        """Learns the merges of a corpus; the same captions in any order give the same bytes.

        Args:
          captions: the corpus, read once; only its distinct runs of letters stay in memory.
          vocabulary: pieces wanted, at least 284 (256 bytes, a-z, space, unknown); 16,384 in the
            paper. A corpus with fewer merges gives fewer: read `.vocabulary` afterwards. Of more
            characters than it can hold the rare ones are spelled in bytes.
        Returns:
          the tokenizer.
        Raises:
          TextError: if the vocabulary is too small or no caption holds a character.
        Source: Ramesh et al. 2021, section 2.2; byte fallback is ours.
        """
        if vocabulary < SMALLEST_VOCABULARY:
            raise TextError(
                f"a vocabulary of {vocabulary} is too small; it must hold at least "
                f"{SMALLEST_VOCABULARY} pieces (256 bytes, the letters a-z, the space and the "
                "unknown sign)"
            )
        runs: collections.Counter[str] = collections.Counter()
        for caption in captions:
            runs.update(_RUN.findall(_clean(caption)))
        # the trainer reads "run <tab> count" lines, so control characters are left to the bytes
        runs = collections.Counter({run: n for run, n in runs.items() if run.isprintable()})
        if not runs:
            raise TextError("no text to learn a tokenizer from; every caption is empty")
        try:
            return cls(_learn(runs, vocabulary))
        except RuntimeError:  # too many different characters
            return cls(_learn(_without_rare(runs, vocabulary), vocabulary))

    @classmethod
    def from_bytes(cls, data: bytes) -> Tokenizer:
        """Reads what `to_bytes` gave; raises TextError if it is damaged."""
        return cls(data)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Reads a tokenizer file; raises TextError naming it if missing or damaged."""
        try:
            return cls(Path(path).read_bytes())
        except (OSError, TextError) as error:
            raise TextError(f"cannot read the tokenizer {path}: {error}") from error

    def to_bytes(self) -> bytes:
        """Returns the SentencePiece model, equal for equal corpora."""
        return self._data

    def save(self, path: str | Path) -> None:
        """Writes the SentencePiece model to a file."""
        Path(path).write_bytes(self._data)

    def encode(
        self,
        captions: Sequence[str],
        *,
        length: int,
        overlong: Literal["truncate", "error"] = "truncate",
        dropout: float = 0.0,
        seeds: Sequence[int] | None = None,
    ) -> Int32[np.ndarray, "B length"]:
        """Turns captions into ids; slot j without a token holds the pad id V + j.

        Args:
          captions: any text; an empty one gives pads only, which stands for "no caption".
          length: caption slots P - 1, at least 1.
          overlong: cut a caption of more tokens (counted in `truncated` and the log), or raise.
          dropout: chance in [0, 1] that a merge is skipped; 0.1 in the paper's training.
          seeds: one non-negative number per caption, needed with dropout: the same caption and
            seed give the same tokens in any order, thread and process.
        Returns:
          ids below V + length.
        Raises:
          TextError: on an over-long caption with `overlong="error"`.
          ValueError: if length, dropout or seeds are out of range.
        Source: Ramesh et al. 2021, section 2.2 (dropout after Provilkov et al. 2019).
        """
        if length < 1:
            raise ValueError(f"length is {length}; at least one caption slot is needed")
        if not 0 <= dropout <= 1:
            raise UserError(f"BPE dropout is {dropout}; it is a chance and lies in [0, 1]")
        if dropout and (seeds is None or len(seeds) != len(captions)):
            got = "none" if seeds is None else str(len(seeds))
            raise ValueError(f"BPE dropout needs one seed per caption: {len(captions)}, got {got}")

        ids = np.tile(self.vocabulary + np.arange(length, dtype=np.int32), (len(captions), 1))
        for row, caption in enumerate(captions):
            tokens = self._draw(caption, dropout, seeds[row]) if dropout else self._tokens(caption)
            if len(tokens) > length:
                self._overlong(caption, len(tokens), length, overlong)
            ids[row, : len(tokens)] = tokens[:length]
        return ids

    def decode(self, ids: Int32[np.ndarray, " length"]) -> str:
        """Returns the lower-cased caption of one row of ids; pads (ids from V on) say nothing."""
        return self._pieces.decode([int(i) for i in ids if i < self.vocabulary])

    def _tokens(self, caption: str) -> list[int]:
        return self._pieces.encode(_clean(caption))

    def _draw(self, caption: str, dropout: float, seed: int) -> list[int]:
        """Algorithm 1 of Provilkov et al. 2019: every merge may be left out at every step.

        SentencePiece 0.2.3 has it too, but samples differently in each process for the same seed.
        """
        draw = random.Random(int(seed)).random
        tokens: list[int] = []
        for run in _PART.findall(_clean(caption)):
            parts = list(run)
            while len(parts) > 1:
                pairs = (self._merges.get(a + b) for a, b in itertools.pairwise(parts))
                possible = [
                    (rank, at)
                    for at, rank in enumerate(pairs)
                    if rank is not None and draw() >= dropout
                ]
                if not possible:
                    break
                _, at = min(possible)
                parts[at : at + 2] = [parts[at] + parts[at + 1]]
            for part in parts:
                if part not in self._encoded:
                    self._encoded[part] = self._pieces.encode(part)
                tokens += self._encoded[part]
        return tokens

    def _overlong(self, caption: str, tokens: int, length: int, overlong: str) -> None:
        said = f"the caption {caption[:40]!r} has {tokens} tokens, but only {length} fit"
        if overlong == "error":
            raise TextError(f"{said}; shorten it, or allow it to be truncated")
        self.truncated += 1
        if str(self.truncated).strip("0") == "1":  # 1, 10, 100, ...: a count, not a flood
            _log.warning("%s: truncated (%d so far)", said, self.truncated)


def _learn(runs: collections.Counter[str], vocabulary: int) -> bytes:
    """Trains SentencePiece; RuntimeError if the vocabulary cannot hold the characters."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(f"{run}\t{count}" for run, count in sorted(runs.items())),
        input_format="tsv",
        model_writer=written,
        model_type="bpe",
        vocab_size=vocabulary,
        hard_vocab_limit=False,
        byte_fallback=True,
        required_chars=_LETTERS + _SPACE,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return written.getvalue()


def _without_rare(runs: collections.Counter[str], vocabulary: int) -> collections.Counter[str]:
    """Leaves the rare characters to the bytes: the others get half of the room, merges the rest."""
    others = [run for run in runs if run not in _LETTERS + " " and len(run) == 1]
    others.sort(key=lambda run: (-runs[run], run))
    kept = collections.Counter(runs)
    for run in others[(vocabulary - SMALLEST_VOCABULARY) // 2 :]:
        del kept[run]
    return kept or collections.Counter({" ": 1})


def _clean(caption: str) -> str:
    # a lone surrogate, which JSON may hold, cannot be written as bytes
    return caption.lower().replace(_SPACE, " ").encode("utf-8", "replace").decode("utf-8")
