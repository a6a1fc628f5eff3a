import pytest

from dalle_jax.text.caption import normalize_caption


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ("red apple\n", "red apple"),
        ("  Red  apple\u2028", "Red  apple"),
        ("one\u2028two", "one\u2028two"),
        ("\u200b", ""),
        (" \u200b\ufeff\u2060 ", ""),
        ("", ""),
        ("\U0001f469\u200d\U0001f680", "\U0001f469\u200d\U0001f680"),
    ],
)
def test_captions_lose_white_space_at_both_ends_and_nothing_visible(text, caption):
    assert normalize_caption(text) == caption
