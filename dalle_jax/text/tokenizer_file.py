"""Opens the tokenizer of a model folder, whichever kind it is."""

from pathlib import Path

from dalle_jax.text.bart_bpe import BARTTokenizer
from dalle_jax.text.bpe import TextError, Tokenizer
from dalle_jax.text.clip_bpe import CLIPTokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads ours, CLIP's or dalle-mini's; TextError if missing or damaged."""
    try:
        data = Path(path).read_bytes()
        if data[:1] != b"{":
            return Tokenizer.from_bytes(data)
        kind = BARTTokenizer if data.startswith(b'{"kind": "bart"') else CLIPTokenizer
        return kind.from_bytes(data)
    except (OSError, TextError) as error:
        raise TextError(f"cannot read the tokenizer {path}: {error}") from error
