"""The tokenizer of a run: learned from the captions once, and kept in its workdir.

Source: ours.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

from dalle_jax import atomic
from dalle_jax.data.sources import DataSource
from dalle_jax.generate.model_folder import TOKENIZER
from dalle_jax.parallel.processes import is_leader, leader_first
from dalle_jax.terminal import bar
from dalle_jax.text.bpe import Tokenizer
from dalle_jax.train import data_digest

log = logging.getLogger(__name__)


def run_tokenizer(source: DataSource, *, vocabulary: int, folder: Path) -> Tokenizer:
    """Gives the tokenizer of a workdir; it is learned first if captions or vocabulary are new.

    A run that has begun with another one is refused by its fingerprint.

    Args:
      source: its captions are learned from.
      vocabulary: tokens to learn, at most.
      folder: of the run; holds `tokenizer.model`, and in `tokenizer.json` what it was made of.
    Raises:
      TextError: if there is nothing to learn from.
    """
    path, note = folder / TOKENIZER, folder / "tokenizer.json"
    with leader_first("tokenizer"):
        if is_leader():
            made_of = {"captions": data_digest.captions_digest(source), "vocabulary": vocabulary}
            if not path.is_file() or _read(note) != made_of:
                if path.is_file():
                    log.info("captions or vocabulary have changed; the tokenizer is learned anew")
                folder.mkdir(parents=True, exist_ok=True)
                tokenizer = Tokenizer.train(_captions(source), vocabulary=vocabulary)
                note.unlink(missing_ok=True)
                with atomic.replaced(path) as partial:
                    tokenizer.save(partial)
                note.write_text(json.dumps(made_of))  # last: without it, it is learned again
        return Tokenizer.load(path)


def _read(note: Path) -> dict | None:
    try:
        return json.loads(note.read_text())
    except (OSError, ValueError):
        return None


def _captions(source: DataSource) -> Iterator[str]:
    with bar("Reading captions") as progress:
        for i in range(len(source)):
            yield from source[i]["captions"]
            progress(i + 1, len(source))
