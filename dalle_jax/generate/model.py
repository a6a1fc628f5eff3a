"""A model that generates images from captions, and from images and captions.

Letters: B batch, F passes, R pixel side, G grid side, K codes.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Int, UInt8
from PIL import Image

from dalle_jax.errors import UserError
from dalle_jax.generate.clip_scorer import Clip
from dalle_jax.generate.code_sampler import check_request, last_pass, passes_by_row, sample_codes
from dalle_jax.generate.edit import blend, masked_cells, random_cells
from dalle_jax.generate.model_folder import ModelError
from dalle_jax.generate.model_parts import ModelParts
from dalle_jax.generate.part_checks import DECODERS
from dalle_jax.generate.rerank import Ranked, RunningBest
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.image import pixels
from dalle_jax.image.sheet import PAPER
from dalle_jax.models import codec as codecs

Progress = Callable[[int, int], None]


class Model(ModelParts):
    """Generates, ranks, traces and edits images, and encodes and decodes them by its codec."""

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        n: int = 1,
        seed: int = 0,
        sampling: SamplingConfig = SamplingConfig(),
        image_prompt: str | os.PathLike | ArrayLike | None = None,
        keep_rows: int = 0,
        progress: Progress | None = None,
    ) -> UInt8[np.ndarray, "prompts n R R 3"]:
        """Generates n images for each caption.

        Args:
          prompts: captions, or one caption. They are normalized and truncated as in training; the
            log counts truncated ones.
          n: images per caption, at least 1.
          seed: in [0, 2**32). Sample j of a caption depends on seed, caption and j alone, up to
            float rounding, and not on the other captions or n.
          sampling: how to sample.
          image_prompt: an image, as a file or uint8 [H, W, 3], of which the top rows are kept.
          keep_rows: rows of codes to keep, 1 to G - 1; 0 without image_prompt.
          progress: called with the images generated so far and in all.
        Returns:
          The images, in the order of captions and sample numbers.
        Raises:
          ModelError: if the model has no prior, or not the one of the decoder.
          UserError: if an argument is out of its range or a caption is empty.
          ImageError: if the image to start from cannot be read.
        Source: Ramesh et al. 2021, section 2.6.
        """
        prompts = _as_list(prompts)
        known = self.prompt_codes(image_prompt, keep_rows)
        parts = self._sample(prompts, n, seed, sampling, known, progress)
        return self._collect_images(map(last_pass, parts), len(prompts), n)[0]

    def rank(
        self,
        prompts: str | Sequence[str],
        *,
        n: int,
        keep: int,
        seed: int = 0,
        sampling: SamplingConfig = SamplingConfig(),
        image_prompt: str | os.PathLike | ArrayLike | None = None,
        keep_rows: int = 0,
        clip: Clip | None = None,
        progress: Progress | None = None,
    ) -> Ranked:
        """Generates n images for each caption and returns the best, by their CLIP scores.

        Only the best images so far are in memory, however many are generated.

        Args: as for `generate`, and
          keep: how many images per caption to return, 1 to n.
          clip: scores how well an image fits its caption; None for the model's own.
        Returns:
          The images of each caption, best first, and their scores.
        Raises: as `generate`, and
          ModelError: if there is no CLIP.
        Source: Ramesh et al. 2021, section 2.6 (which keeps the best of 512).
        """
        prompts = _as_list(prompts)
        if not 1 <= keep <= n:
            raise UserError(f"keep is {keep}; it must be 1 to {n}, the images per caption")
        clip = clip or self.clip
        if clip is None:
            raise ModelError(
                f"model {self.name!r} has no CLIP to rank images with; give another as clip"
            )
        best = RunningBest(prompts, keep=keep, px=self.px, clip=clip)
        known = self.prompt_codes(image_prompt, keep_rows)
        for part in self._sample(prompts, n, seed, sampling, known, progress):
            best.add(part.prompts, self._decode_passes(last_pass(part).passes)[0])
        return best.ranked()

    def trace(
        self,
        prompts: str | Sequence[str],
        *,
        n: int = 1,
        seed: int = 0,
        sampling: SamplingConfig = SamplingConfig(),
        image_prompt: str | os.PathLike | ArrayLike | None = None,
        keep_rows: int = 0,
        progress: Progress | None = None,
    ) -> UInt8[np.ndarray, "frames prompts n R R 3"]:
        """Generates images as `generate` does, and shows how each of them is filled.

        Args: as for `generate`.
        Returns:
          The images after each pass of the progressive decoder, or after each row of the
          autoregressive one, grey where no code is sampled yet; the last are those of `generate`.
        Raises: as `generate`.
        Source: ours.
        """
        prompts = _as_list(prompts)
        known = self.prompt_codes(image_prompt, keep_rows)
        parts = self._sample(prompts, n, seed, sampling, known, progress)
        return self._collect_images(map(passes_by_row, parts), len(prompts), n)

    def edit(
        self,
        image: str | os.PathLike | ArrayLike,
        prompts: str | Sequence[str],
        *,
        mask: str | os.PathLike | ArrayLike | Image.Image | None = None,
        strength: float | None = None,
        n: int = 1,
        seed: int = 0,
        sampling: SamplingConfig = SamplingConfig(),
        progress: Progress | None = None,
    ) -> UInt8[np.ndarray, "prompts n R R 3"]:
        """Samples a part of an image again, with the progressive decoder.

        Args:
          image: the image, as a file or uint8 [H, W, 3]; its middle square counts.
          prompts: captions of the whole image.
          mask: which part: an image of the same size, white there and black or transparent
            elsewhere, as `masked_cells` takes it: a file, an array, or an image of Pillow. All
            cells that it touches are sampled again, given the codes of all others, and blended into
            the image over half a cell around them; beyond, no pixel changes.
          strength: instead of a mask: share of the cells, chosen at random for each sample, above 0
            and at most 1. All of the result is decoded from codes.
          n: images per caption, at least 1.
          seed: as for `generate`.
          sampling: how to sample, with the progressive decoder.
          progress: as for `generate`.
        Returns:
          The images.
        Raises:
          ModelError: if the model has no progressive prior.
          UserError: if an argument is out of its range, or mask and image do not fit.
          ImageError: if an image cannot be read.
        Source: ours; Chang et al. 2022, section 4.3.
        """
        if (mask is None) == (strength is None):
            raise UserError(f"the mask is {mask} and strength {strength}; give one of the two")
        if sampling.decoder not in (None, "progressive"):
            raise UserError("an edit needs the progressive decoder; leave decoder out")
        sampling = dataclasses.replace(sampling, decoder="progressive")
        prompts = _as_list(prompts)
        check_request(prompts, n=n, seed=seed)
        self.prior_for(sampling)
        old, edited, known = self.edit_codes(image, mask=mask, strength=strength, n=n, seed=seed)
        parts = self._sample(prompts, n, seed, sampling, known, progress)
        images = self._collect_images(map(last_pass, parts), len(prompts), n)[0]
        return images if mask is None else blend(old, images, edited[0])

    def edit_codes(
        self,
        image: str | os.PathLike | ArrayLike,
        *,
        mask: str | os.PathLike | ArrayLike | Image.Image | None,
        strength: float | None,
        n: int,
        seed: int,
    ) -> tuple[UInt8[np.ndarray, "R R 3"], Bool[np.ndarray, "n G G"], Int[np.ndarray, "n G G"]]:
        """Prepares an edit.

        Args: as for `edit`.
        Returns:
          The middle square of the image, which cells are sampled again, and the codes of all
          others, with K in these.
        """
        image = self._read_image(image)
        old, size = pixels.square(image, self.px), image.shape[:2]
        if strength is not None:
            edited = random_cells(strength, self.grid, n=n, seed=seed)
        else:
            cells = masked_cells(mask, size, px=self.px, grid=self.grid)
            edited = np.repeat(cells[None], n, axis=0)
        return old, edited, np.where(edited, self.codec.codes, self.encode([old]))

    def prior_for(self, sampling: SamplingConfig) -> str:
        """The name of the prior that samples; refuses options that its decoder does not have."""
        if not self.priors:
            raise ModelError(
                f"model {self.name!r} holds a {codecs.TITLES[self.kind]} alone: it can encode and "
                "decode, but generating needs a prior trained on its codes"
            )
        fitting = [p for p, names in DECODERS.items() if sampling.decoder in (None, *names)]
        part = next((part for part in fitting if part in self.priors), fitting[0])
        if part not in self.priors:
            able = " or ".join(name for part in self.priors for name in DECODERS[part])
            if "progressive" in self.priors:
                able += f"; with order raster and stages {self.grid**2} it takes code after code"
            raise ModelError(
                f"model {self.name!r} has no {sampling.decoder} prior; its decoder is {able}"
            )
        dataclasses.replace(sampling, decoder=sampling.decoder or DECODERS[part][0])  # checked
        return part

    def as_recommended(self, sampling: SamplingConfig) -> SamplingConfig:
        """Fills in what the model recommends for its decoder, where nothing is given."""
        recommended = self.recommended
        if self.prior_for(sampling) != "progressive":
            recommended = dataclasses.replace(recommended, revise=None)
        return sampling.or_else(recommended)

    def _sample(self, prompts, n, seed, sampling, known, progress):
        sampling = self.as_recommended(sampling)
        config, params = self.priors[self.prior_for(sampling)]
        done = 0
        for part in sample_codes(
            config, params, self.tokenizer, prompts, n=n, seed=seed, sampling=sampling, known=known
        ):
            yield part
            done += len(part.prompts) * len(part.sample_numbers)
            if progress is not None:
                progress(done, len(prompts) * n)

    def _collect_images(self, samples, prompts, n):
        """The images of all passes [F, prompts, n, R, R, 3]."""
        images = None
        for part in samples:
            if images is None:
                frames = len(part.passes)
                images = np.empty((frames, prompts, n, self.px, self.px, 3), np.uint8)
            images[:, part.prompts[:, None], part.sample_numbers] = self._decode_passes(part.passes)
        return images

    def _decode_passes(self, passes):
        """Images [F, ..., R, R, 3] of the codes after each pass, grey where there is no code."""
        empty = passes == self.codec.codes
        codes = np.where(empty, passes[-1:], passes)  # empty cells would change those beside them
        images = self.decode(codes.reshape(-1, *codes.shape[-2:]))
        images = images.reshape(*codes.shape[:-2], *images.shape[1:])
        images[empty.repeat(self.codec.factor, -2).repeat(self.codec.factor, -1)] = PAPER
        return images

    def prompt_codes(self, image_prompt, keep_rows):
        """Codes [1, G, G] of the rows to keep, and K below."""
        if image_prompt is None:
            if keep_rows:
                raise UserError(f"keep_rows is {keep_rows}, but no image prompt was given")
            return None
        if not 1 <= keep_rows < self.grid:
            raise UserError(
                f"keep_rows is {keep_rows}; with an image prompt it must be 1 to "
                f"{self.grid - 1}, since the grid has {self.grid} rows"
            )
        codes = self.encode([self._read_image(image_prompt)])
        codes[:, keep_rows:] = self.codec.codes
        return codes

    def _read_image(self, image):
        if isinstance(image, str | os.PathLike):
            return pixels.decode(image, min_px=self.grid)
        return np.asarray(image)


def _as_list(prompts):
    return [prompts] if isinstance(prompts, str) else list(prompts)
