"""The tokenizer of CLIP: byte-pair encoding of whole words, whose last piece ends in `</w>`.

It reads what CLIP's authors publish, a list of merges, and belongs to imported weights alone; ours
are `text.bpe`. Text is normalised (NFC), lower-cased and freed of HTML's signs and of double
spaces. It is not mended where a wrong encoding spoiled it, as the authors' code does with ftfy.

Source: Radford et al. 2021, section 2.4, and the authors' release; Sennrich et al. 2016.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import html
import itertools
import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dalle_jax.errors import UserError
from dalle_jax.text.bpe import TextError, Tokenizer

MERGES = 49152 - 256 - 2
"""How many lines of the published list count; 256 bytes, start and end make 49,152."""
_END = "</w>"
ENDINGS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
"""English endings, which are words of their own."""
_LARGEST = 2**26  # bytes of a list of merges, unpacked; the published one has 1.4 MB


class CLIPTokenizer(Tokenizer):
    """Merges of CLIP; V counts pieces without start and end."""

    def __init__(self, merges: Sequence[tuple[str, str]]):
        byte_pieces = [SIGNS[byte] for byte in _ORDER]
        pieces = [*byte_pieces, *(sign + _END for sign in byte_pieces)]
        pieces += [first + second for first, second in merges]
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._ids = {piece: number for number, piece in enumerate(pieces)}
        self._texts = pieces
        self.vocabulary = len(pieces)
        self.truncated = 0
        content = {"kind": "clip", "merges": [" ".join(pair) for pair in merges]}
        self._data = json.dumps(content, ensure_ascii=False).encode()
        self.fingerprint = hashlib.sha256(self._data).hexdigest()
        self._merge = functools.lru_cache(2**16)(self._merged)

    @classmethod
    def from_bytes(cls, data: bytes) -> CLIPTokenizer:
        """Reads what `to_bytes` gave; raises TextError if it is damaged."""
        try:
            content = json.loads(data)
            if content["kind"] != "clip":
                raise ValueError(content["kind"])
            pairs = [tuple(line.split(" ")) for line in content["merges"]]
            if any(len(pair) != 2 for pair in pairs):
                raise ValueError("a merge that is no pair")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TextError(f"the tokenizer is damaged ({error!r:.100}); restore it") from error
        return cls(pairs)

    @classmethod
    def from_merges(cls, path: Path) -> CLIPTokenizer:
        """Reads the published list, as text or packed: bpe_simple_vocab_16e6.txt.gz, merges.txt.

        Raises:
          TextError: if it is no such list.
        """
        return cls(read_merges(path, MERGES))

    def _tokens(self, caption: str) -> list[int]:
        text = html.unescape(html.unescape(caption))
        text = " ".join(unicodedata.normalize("NFC", text).split()).lower()
        signs = ("".join(SIGNS[byte] for byte in word.encode()) for word in _words(text))
        return [self._ids[piece] for word in signs for piece in self._merge(word)]

    def _draw(self, caption: str, dropout: float, seed: int) -> list[int]:
        raise UserError("the tokenizer of an imported model has no BPE dropout; leave it at 0")

    def decode(self, ids) -> str:
        """Returns the caption of one row of ids, spaces between its words; pads say nothing."""
        signs = "".join(self._texts[i] for i in ids if i < self.vocabulary)
        data = bytes(BYTES[sign] for sign in signs.replace(_END, " "))
        return data.decode("utf-8", errors="replace").strip()

    def _merged(self, word: str) -> tuple[str, ...]:
        return merge([*word[:-1], word[-1] + _END], self._ranks)


def merge(parts: list[str], ranks: Mapping[tuple[str, str], int]) -> tuple[str, ...]:
    """Joins the parts of a word, pair after pair, the pair of the lowest rank first."""
    while len(parts) > 1:
        pairs = list(itertools.pairwise(parts))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        joined, at = [], 0
        while at < len(parts):
            pair = tuple(parts[at : at + 2])
            joined.append("".join(pair) if pair == best else parts[at])
            at += 2 if pair == best else 1
        parts = joined
    return tuple(parts)


def read_merges(path: Path, most: int | None = None) -> list[tuple[str, str]]:
    """Reads a list of merges below a title, as text or packed (.gz).

    Raises:
      TextError: if it is no such list.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            lines = file.read(_LARGEST).decode("utf-8").split("\n")
    except (OSError, EOFError, ValueError) as error:
        raise TextError(f"{path} is no list of merges ({error!r:.100})") from error
    pairs = [tuple(line.split()) for line in lines[1:][:most] if line.strip()]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise TextError(f"{path} is no list of merges: two pieces are wanted in each line")
    return pairs


def _words(text: str) -> Iterator[str]:
    """Runs of letters, single digits, English endings, and runs of other signs."""
    at = 0
    while at < len(text):
        ending = next((x for x in ENDINGS if text.startswith(x, at)), None)
        end = at + 1
        if ending:
            end = at + len(ending)
        elif (kind := kind_of(text[at])) != "number":
            while end < len(text) and kind_of(text[end]) == kind:
                end += 1
        if ending or kind != "space":
            yield text[at:end]
        at = end


def kind_of(sign: str) -> str:
    """What a character is, to cut words by: letter, number, space or other."""
    if sign.isspace():
        return "space"
    return {"L": "letter", "N": "number"}.get(unicodedata.category(sign)[0], "other")


def _order() -> list[int]:
    """Bytes in the order of their ids: first those that are printed as themselves."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return shown + [byte for byte in range(256) if byte not in shown]


_ORDER = _order()
SIGNS = {byte: chr(byte if i < 188 else 256 + i - 188) for i, byte in enumerate(_ORDER)}
BYTES = {sign: byte for byte, sign in SIGNS.items()} | {" ": 32}
