"""What a caption is before it becomes tokens, in training and in sampling alike."""

import unicodedata

_UNSEEN = {"Zs", "Zl", "Zp", "Cc", "Cf"}  # spaces, line breaks, controls, zero-width characters


def normalize_caption(text: str) -> str:
    """Takes white space from both ends; a text without a visible character becomes empty."""
    text = text.strip()
    if all(unicodedata.category(character) in _UNSEEN for character in text):
        return ""
    return text
