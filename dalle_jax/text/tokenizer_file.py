"""Opens the tokenizer of a model folder, whichever kind it is."""

from pathlib import Path

from dalle_jax.text.bart_bpe import BARTTokenizer
from dalle_jax.text.bpe import TextError, Tokenizer
from dalle_jax.text.char_bpe import CharBPETokenizer
from dalle_jax.text.clip_bpe import CLIPTokenizer
from dalle_jax.text.yttm_bpe import YTTMTokenizer

_KINDS: dict[bytes, type[Tokenizer]] = {
    b'{"kind": "bart"': BARTTokenizer,
    b'{"kind": "char"': CharBPETokenizer,
    b'{"kind": "yttm"': YTTMTokenizer,
}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads ours, CLIP's, or those of imported priors; TextError if missing or damaged."""
    try:
        data = Path(path).read_bytes()
        if data[:1] != b"{":
            return Tokenizer.from_bytes(data)
        kinds = (kind for start, kind in _KINDS.items() if data.startswith(start))
        return next(kinds, CLIPTokenizer).from_bytes(data)
    except (OSError, TextError) as error:
        raise TextError(f"cannot read the tokenizer {path}: {error}") from error
