"""What the server takes on: limits of a request, of the queue and of time."""

from dataclasses import dataclass

from dalle_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Limits of the server; whatever is beyond them is refused in one sentence.

    Raises:
      UserError: if a limit is not positive.
    """

    max_prompt_length: int = 1000
    """Characters in a prompt."""
    max_images: int = 64
    """Images in a request (n)."""
    max_batch: int = 16
    """Images that are sampled together, from any number of requests; rounded down to a power of
    two. Each power of two up to it is compiled once."""
    max_waiting: int = 512
    """Images of all requests that wait or are being sampled; beyond it the answer is 429."""
    max_body_bytes: int = 2**23
    """Size of a request, its images in base64 included."""
    max_pixels: int = 2**22
    """Pixels of an uploaded image."""
    max_passes: int = 256
    """Stages and revisions of the progressive decoder together; each new number compiles."""
    request_timeout: float = 600.0
    """Seconds from a request's arrival to its last image."""
    upload_timeout: float = 20.0
    """Seconds that a client may take to send its request."""

    def __post_init__(self):
        for name in self.__dataclass_fields__:
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}, but must be positive")
