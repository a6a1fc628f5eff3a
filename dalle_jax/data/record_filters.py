"""Which captioned images to leave out before training, as the paper did.

Its third text filter, a detector of other languages than English, is not here.
Source: Ramesh et al. 2021, section 2 and appendix B, after Sharma et al. 2018; the numbers that the
paper does not give are ours.
"""

import dataclasses
import re

from dalle_jax.errors import UserError

_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|"
    r"sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\.?"
)
_DAY = r"\d{1,2}(?:st|nd|rd|th)?"
_DATE = re.compile(
    rf"\b(?:\d{{1,4}}[-./]\d{{1,2}}[-./]\d{{1,4}}|{_MONTH}\s+{_DAY},?\s+\d{{4}}|"
    rf"{_DAY}\s+(?:of\s+)?{_MONTH},?\s+\d{{4}}|{_MONTH},?\s+\d{{4}})\b",
    re.IGNORECASE,
)
_BOILERPLATE = re.compile(
    r"an?|am|at|by|captured|created|date|image|in|of|on|photo(?:graph(?:ed)?)?|picture|pm|shot|"
    r"taken|the|this|uploaded|was"
)
_WORD = re.compile(r"[^\W\d_]+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filters:
    """Images and captions to leave out."""

    max_aspect: float | None = None
    """Most that the long side may be of the short one; 2 in the paper; None for any."""
    min_caption_words: int = 0
    """Fewest words of a caption; the paper has a least length, but does not give it."""
    boilerplate: bool = True
    """Use captions that say no more than "photographed on 3 May 2010"; the paper left them out."""

    def __post_init__(self):
        if self.max_aspect is not None and self.max_aspect < 1:
            raise UserError(f"max_aspect is {self.max_aspect}, but must be at least 1, or None")
        if self.min_caption_words < 0:
            raise UserError(
                f"min_caption_words is {self.min_caption_words}, but must be at least 0"
            )

    @property
    def of_captions(self) -> bool:
        """Whether a caption may be left out."""
        return self.min_caption_words > 0 or not self.boilerplate

    def fault(self, caption: str) -> str | None:
        """Says what is wrong with a caption: "short" or "boilerplate"; None if nothing is."""
        if len(caption.split()) < self.min_caption_words:
            return "short"
        if not self.boilerplate and is_boilerplate(caption):
            return "boilerplate"
        return None

    def fits(self, width: int, height: int) -> bool:
        """Whether an image is square enough; one of unknown size, 0 by 0, is."""
        short, long = sorted((width, height))
        return self.max_aspect is None or long <= self.max_aspect * short


PAPER = Filters(max_aspect=2.0, min_caption_words=2, boilerplate=False)


def is_boilerplate(caption: str) -> bool:
    """Whether a caption holds a date, and apart from it nothing but words such as "taken on"."""
    rest, dates = _DATE.subn(" ", caption.lower())
    return dates > 0 and all(map(_BOILERPLATE.fullmatch, _WORD.findall(rest)))
