"""What a client asks for: one JSON object, which no part of ever names a file.

Beside the fields below a request has those of `SamplingConfig`.
"""

import base64
import binascii
import dataclasses
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dalle_jax.errors import UserError
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.serve.config import ServeConfig
from dalle_jax.serve.schema import check_names, json_schema, read_fields


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """Images for one prompt."""

    prompt: str
    """Caption of the images."""
    n: int = 1
    """Images to generate."""
    seed: int | None = None
    """Number from 0 to 4294967295: the same one gives the same images, as `dalle-jax generate`
    does. null for a new one, which the answer names."""
    keep: int | None = None
    """Images to return, those with the best CLIP scores, best first; null for all, in the order of
    their numbers. Needs a model with a CLIP."""
    image: str | None = None
    """An image (PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF) in base64, or a data URL of one. Its middle
    square counts. Give one of keep_rows, mask and strength with it."""
    keep_rows: int = 0
    """Rows of codes at the top of `image` that are kept; the rest is generated."""
    mask: str | None = None
    """A second image of the same size, white where `image` is generated again, and black or
    transparent elsewhere. Needs a model with a progressive prior, as strength does."""
    strength: float | None = None
    """Share of the cells of `image` to generate again, at random, above 0 and up to 1: variations
    of it."""
    stream: bool = False
    """Answer with server-sent events: `progress`, with the images so far, then `done` or
    `error`."""

    def __post_init__(self):
        if not self.prompt.strip():
            raise UserError("prompt is empty; say what the image shows")
        try:
            self.prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"prompt has half a character ({error.reason}); mend it") from error
        if self.n < 1:
            raise UserError(f"n is {self.n!r:.20}, but must be at least 1")
        if self.keep is not None and not 1 <= self.keep <= self.n:
            raise UserError(
                f"keep is {self.keep!r:.20}, but must be 1 to n, which is {self.n!r:.20}"
            )
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed!r:.20}, but must be 0 to {2**32 - 1}")
        ways = [self.keep_rows != 0, self.mask is not None, self.strength is not None]
        if self.image is None and any(ways):
            raise UserError("keep_rows, mask and strength need an image; give it as image")
        if self.image is not None and sum(ways) != 1:
            raise UserError(
                "an image needs one of keep_rows (to continue it), mask (to edit it) and strength "
                "(to vary it)"
            )
        if self.strength is not None and not 0 < self.strength <= 1:
            raise UserError(f"strength is {self.strength}, but must be above 0 and at most 1")


def read_request(
    body: Mapping[str, Any], limits: ServeConfig
) -> tuple[ImageRequest, SamplingConfig]:
    """Reads a request, and gives it a seed if it has none.

    Args:
      body: the JSON object.
      limits: that it must keep to.
    Raises:
      UserError: if something is not as it has to be.
    """
    check_names(body, request_schema()["properties"])
    request = ImageRequest(**read_fields(ImageRequest, body))
    sampling = SamplingConfig(**read_fields(SamplingConfig, body))
    if len(request.prompt) > limits.max_prompt_length:
        raise UserError(
            f"prompt has {len(request.prompt)} characters; this server takes at most "
            f"{limits.max_prompt_length}"
        )
    if request.n > limits.max_images:
        raise UserError(
            f"n is {request.n!r:.20}; this server generates at most {limits.max_images} images a "
            "request"
        )
    passes = (sampling.stages or 1) + (sampling.revise or 0)
    if passes > limits.max_passes:
        raise UserError(
            f"stages and revise are {passes!r:.20} passes in all; this server makes at most "
            f"{limits.max_passes}"
        )
    if request.seed is None:
        request = dataclasses.replace(request, seed=secrets.randbits(32))
    return request, sampling


def request_schema() -> dict[str, Any]:
    """JSON Schema of a request."""
    own, of_sampling = json_schema(ImageRequest), json_schema(SamplingConfig)
    return {
        "type": "object",
        "properties": own["properties"] | of_sampling["properties"],
        "required": own["required"],
        "additionalProperties": False,
    }


def read_base64(name: str, text: str) -> bytes:
    """Bytes of a base64 text or a data URL; UserError if it is neither."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{name} is not base64 ({error}); encode the file's bytes") from error
