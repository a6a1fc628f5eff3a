"""How codes are sampled: one list of options for `Model`, the command line and evaluation."""

import dataclasses
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args

from dalle_jax.errors import UserError

Decoder = Literal["autoregressive", "jacobi", "progressive"]
Schedule = Literal["cosine", "linear"]
Order = Literal["random", "raster", "dynamic", "confidence"]

LARGEST = (
    1e9  # of a temperature or a scale: beyond any use, and its products stay finite in float32
)

AS_TRAINED = {"temperature": 1.0, "guidance": 1.0, "revise": 0}
"""Options that a model can recommend, and what they are if it recommends nothing."""

PROGRESSIVE_ONLY = ("stages", "schedule", "order", "choice_temperature", "revise")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How codes are sampled from a prior; the defaults sample from what it has learned.

    Limits that depend on a model (the size of its codebook, the cells of its grid) are checked when
    it samples, all others here.

    Raises:
      UserError: if a value is out of its range, or a choice of the progressive decoder is made for
        the other one.
    Source: Ramesh et al. 2021, section 2.6 (temperature); Holtzman et al. 2020 (top-p); Ho and
      Salimans 2021 (guidance); Chang et al. 2022 (cosine schedule, confidence).

    >>> SamplingConfig(temperature=0.9, guidance=2).describe()
    'temperature 0.9, guidance 2.0'
    >>> SamplingConfig(top_p=1.5)
    Traceback (most recent call last):
    dalle_jax.errors.UserError: top_p is 1.5, but must be above 0 and at most 1
    """

    temperature: float | None = None
    """Divides the logits: 1 as trained, below 1 safer, 0 always the likeliest code. None for what
    the model recommends, else 1."""
    top_k: int | None = None
    """Sample from this many likeliest codes only; None for all of them."""
    top_p: float | None = None
    """Sample from the likeliest codes that hold this probability, above 0 and up to 1; None for all
    of them."""
    guidance: float | None = None
    """Scale s of classifier-free guidance, u + s (c - u) of the logits with (c) and without (u)
    caption: 1 is off, 2 to 4 follow the caption more closely. None for what the model
    recommends, else 1. The progressive decoder raises s along a line, from near 1 in the first
    stage."""
    decoder: Decoder | None = None
    """Code after code (autoregressive); the same codes in passes over all cells, until none changes
    any more, for devices on which a step takes as long as a pass (jacobi); or in few passes from
    coarse to fine (progressive). None for the latter if the model has it, else code after code."""
    stages: int | None = None
    """Passes of the progressive decoder, at most one a cell; None for 16, or fewer if fewer cells
    are empty."""
    schedule: Schedule = "cosine"
    """How many cells each stage fills: few at first (cosine) or always as many (linear)."""
    order: Order = "random"
    """Cells that the progressive decoder fills first: random; raster; dynamic, the most certain
    ones given the caption alone; confidence, those with the likeliest samples so far, which doubles
    the work."""
    choice_temperature: float = 1.0
    """Weight of the Gumbel noise, in nats, in choosing cells; 0 for none. For the order confidence
    it falls along a line to 0 in the last stage."""
    revise: int | None = None
    """Passes of the progressive decoder over the full grid, each of which replaces the codes that
    are less than a quarter as likely as another one. None for what the model recommends, else 0."""

    def __post_init__(self):
        for name in ("temperature", "top_p", "guidance", "choice_temperature"):
            self._convert(name, Real, float, "number")
        for name in ("top_k", "stages", "revise"):
            self._convert(name, Integral, int, "whole number")
        for name, choices in (("decoder", Decoder), ("schedule", Schedule), ("order", Order)):
            value = getattr(self, name)
            if value not in get_args(choices) and (name, value) != ("decoder", None):
                allowed = " or ".join(get_args(choices))
                raise UserError(f"{name} is {value!r}, but must be {allowed}")
        if self.temperature is not None and not 0 <= self.temperature <= LARGEST:
            raise UserError(
                f"temperature is {self.temperature}, but must be 0 (always the likeliest code) or "
                f"a positive number up to {LARGEST:g}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}, but must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}, but must be above 0 and at most 1")
        if self.guidance is not None and not abs(self.guidance) <= LARGEST:
            raise UserError(
                f"guidance is {self.guidance}, but must be a number up to {LARGEST:g}; 1 turns it "
                "off"
            )
        if self.stages is not None and self.stages < 1:
            raise UserError(f"stages is {self.stages}, but must be at least 1")
        if not 0 <= self.choice_temperature <= LARGEST:
            raise UserError(
                f"choice_temperature is {self.choice_temperature}, but must be 0 (no noise) or a "
                f"positive number up to {LARGEST:g}"
            )
        if self.revise is not None and self.revise < 0:
            raise UserError(f"revise is {self.revise}; it is a number of passes, 0 for none")
        if self.decoder in ("autoregressive", "jacobi"):
            for name in self._changed():
                if name in PROGRESSIVE_ONLY:
                    raise UserError(
                        f"{name} is {getattr(self, name)}, but only the progressive decoder has it"
                    )

    @property
    def guided(self) -> bool:
        """Whether logits without the caption are needed too: twice the work."""
        return self.guidance not in (None, 1)

    def describe(self) -> str:
        """Names the options that are not at their defaults, or says "as trained"."""
        changed = [f"{name} {value}" for name, value in self._changed().items()]
        return ", ".join(changed) or "as trained"

    def recommendations(self) -> dict[str, float | int]:
        """The options that are given, of those that a model can recommend."""
        found = {name: getattr(self, name) for name in AS_TRAINED}
        return {name: value for name, value in found.items() if value is not None}

    def or_else(self, recommended: "SamplingConfig") -> "SamplingConfig":
        """Fills in what another one recommends, or what is as trained, where nothing is given.

        >>> SamplingConfig(guidance=3).or_else(SamplingConfig(guidance=2, revise=1)).describe()
        'guidance 3.0, revise 1'
        """
        filled: dict[str, Any] = AS_TRAINED | recommended.recommendations() | self.recommendations()
        return dataclasses.replace(self, **filled)

    def _changed(self) -> dict[str, Any]:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {
            name: value
            for name, value in vars(self).items()
            if value not in (defaults[name], AS_TRAINED.get(name))
        }

    def _convert(self, name, kind, to, noun):
        """Makes an int or numpy's scalar the plain number that its field is for."""
        value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
        if value is None and default is None:
            return
        if isinstance(value, bool) or not isinstance(value, kind):
            raise UserError(f"{name} is {value!r}, but must be a {noun}")
        object.__setattr__(self, name, to(value))
