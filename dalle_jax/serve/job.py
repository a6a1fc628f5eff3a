"""One accepted request: its images as they come, and who waits for them.

Letters: R pixel side, G grid side, K codebook.
"""

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from dalle_jax.errors import UserError
from dalle_jax.generate.edit import blend
from dalle_jax.generate.joint_sampler import ImageSpec
from dalle_jax.generate.model import Model
from dalle_jax.generate.part_checks import DECODERS
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.serve.image_request import ImageRequest

OnProgress = Callable[[int, UInt8[np.ndarray, "R R 3"]], None]


class Result(NamedTuple):
    """The images of a request, in the order in which they are returned."""

    images: UInt8[np.ndarray, "n R R 3"]
    numbers: Int[np.ndarray, " n"]
    """Which samples they are."""
    scores: Float[np.ndarray, " n"] | None
    """How well they fit the prompt; None without a CLIP."""


class Job:
    """A request on its way; only the worker's thread calls anything but `cancel`.

    Args:
      request: with a seed.
      sampling: how to sample.
      image: its decoded image.
      mask: its decoded mask.
      on_progress: called from the worker's thread with the number of an image and the image so far,
        grey where no code is sampled yet; None if nobody looks.
    """

    def __init__(
        self,
        request: ImageRequest,
        sampling: SamplingConfig,
        *,
        image: UInt8[np.ndarray, "H W 3"] | None = None,
        mask: UInt8[np.ndarray, "H W 3"] | None = None,
        on_progress: OnProgress | None = None,
    ):
        self.request, self.sampling, self.on_progress = request, sampling, on_progress
        self.image, self.mask = image, mask
        self.part: str | None = None
        """The prior that samples it; None until it is prepared."""
        self.next_number = 0  # the first image that is in no batch yet
        self.unfinished = request.n
        self.result: Future[Result] = Future()
        self.result.set_running_or_notify_cancel()  # whoever waits may stop waiting, no more
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Gives up: images that are in no batch yet are not sampled."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._cancelled.is_set()

    @property
    def batch_key(self) -> tuple:
        """Equal for jobs whose images can be sampled in one batch."""
        empty = None if self._known is None else int((self._known[0] == self._empty_code).sum())
        return self.part, self.sampling, empty

    def prepare(self, model: Model) -> None:
        """Chooses the prior and encodes the image.

        Raises:
          UserError: if the request does not fit the model.
        """
        request, sampling = self.request, self.sampling
        self._known, self._blend, self._empty_code = None, lambda images: images, model.codec.codes
        if request.keep is not None and model.clip is None:
            raise UserError("this model has no CLIP to choose the best images with; leave keep out")
        is_edit = request.mask is not None or request.strength is not None
        if is_edit and sampling.decoder == "autoregressive":
            raise UserError("mask and strength need the progressive decoder; leave decoder out")
        if is_edit:
            sampling = dataclasses.replace(sampling, decoder="progressive")
        part = model.prior_for(sampling)
        if is_edit:
            old, edited, self._known = model.edit_codes(
                self.image,
                mask=self.mask,
                strength=request.strength,
                n=request.n,
                seed=request.seed,
            )
            if request.mask is not None:
                self._blend = lambda images: blend(old, images, edited[0])
        elif request.image is not None:
            codes = model.prompt_codes(self.image, request.keep_rows)
            self._known = np.repeat(codes, request.n, axis=0)
        # who names the default decoder is sampled with who does not
        decoder = sampling.decoder or DECODERS[part][0]
        self.sampling = dataclasses.replace(model.as_recommended(sampling), decoder=decoder)
        self._images = np.empty((request.n, model.px, model.px, 3), np.uint8)
        self.part = part

    def spec(self, number: int) -> ImageSpec:
        """What one of the images depends on."""
        known = None if self._known is None else self._known[number]
        return ImageSpec(self.request.prompt, self.request.seed, number, known)

    def show(self, number: int, image: UInt8[np.ndarray, "R R 3"]) -> None:
        """Shows an image on its way."""
        if self.on_progress is not None:
            self.on_progress(number, self._blend(image[None])[0])

    def add(self, number: int, image: UInt8[np.ndarray, "R R 3"]) -> None:
        """Takes a finished image."""
        self._images[number] = self._blend(image[None])[0]
        self.unfinished -= 1
        if self.on_progress is not None:
            self.on_progress(number, self._images[number])

    def finish(self, model: Model) -> None:
        """Gives the result, once all images are there."""
        numbers, scores = np.arange(self.request.n), None
        if model.clip is not None:
            scores = model.clip.score([self.request.prompt], self._images[None])[0]
            if self.request.keep is not None:
                numbers = np.argsort(-scores, kind="stable")[: self.request.keep]
            scores = scores[numbers]
        self.result.set_result(Result(self._images[numbers], numbers, scores))
