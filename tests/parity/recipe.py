"""Random weights that need no file: the same numbers here and where PyTorch is."""

import string
import zlib

import numpy as np

MERGES = ["c a", "ca t</w>", "t h", "th e</w>", "d o", "do g</w>", "r e", "re d</w>", "1 2", "Ã ©"]
"""A small list of merges for CLIP's tokenizer."""
_SIGNS = string.ascii_lowercase + string.digits + "'&;-Ã©"
PIECES = [
    *("[UNK]", "[PAD]", *_SIGNS, *(sign + "</w>" for sign in _SIGNS)),
    *(merge.replace(" ", "") for merge in MERGES),
]
"""Pieces of minDALL-E's tokenizer with these merges; other signs are unknown to it."""
CAPTIONS = [
    "the cat",
    "The  DOG's red\tcat, isn't it?",
    "",
    "1234 cats &amp; dogs &lt;3",
    "cafe\u0301 caf\u00e9 \u00c9t\u00e9 \u4f60\u597d \U0001f600\u200d\U0001f525 x\u00b2 \u2167",
    "''s re're -- ___ 'll",
    "the cat " * 20,
]
"""Captions, hard ones included."""
RUSSIAN_CORPUS = [
    "рыжий котик сидит на окне и смотрит на рыжий лес",
    "красная кошка и рыжий кот спят на красном диване",
    "старый дом у реки, за рекой большой лес и поле",
    "большая собака бежит по полю за красным мячом",
    "портрет девушки в красном платье, масло, холст",
    "ночной город под дождём: огни, машины и люди",
    "the red cat sits on the red mat, 12 cats and 3 dogs",
    "ааа аааа аааааа ббб",
]
"""What the small vocabulary of YouTokenToMe is learned from."""
RUSSIAN = [
    "рыжий котик",
    "  Красная   КОШКА\tи\nсобака,  ёжик?! ",
    "",
    "аааааа ааааааааааа ба абаба",
    "a cat 你好 x² \N{EM DASH} «цитата»",
    "\u2581рыжий\u2581\u2581кот\u00a0дом\x1cлес\x0bполе",
    "😀😀кот😀 123 котик😀😀",
    "кошка и собака " * 12,
]
"""Captions for ruDALL-E, hard ones included."""


def weights(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers for a tensor, float32, by its name and shape alone."""
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith(("bias", ".b")):
        noise *= 0.1
    elif "embed" in name or len(shape) < 2:
        noise = noise * 0.5 + (1.0 if len(shape) == 1 and "embed" not in name else 0.0)
    else:
        noise /= np.sqrt(np.prod(shape[1:]))
    return np.asarray(noise, np.float32)


def images(px: int) -> np.ndarray:
    """Two images, uint8 [2, px, px, 3]."""
    return np.random.RandomState(px).randint(0, 256, (2, px, px, 3)).astype(np.uint8)
