"""One model, ready to draw: captions to pictures, and pictures to pictures.

Letters: B batch, F passes, R pixel side, G grid side, K codes.
"""

import copy
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import UInt8
from PIL import Image

from dalle_jax.errors import UserError
from dalle_jax.generate import folder as files
from dalle_jax.generate.clip import Clip
from dalle_jax.generate.codec import Codec
from dalle_jax.generate.edit import blend, masked_cells, some_cells
from dalle_jax.generate.fit import (
    CONFIGS,
    DECODERS,
    check_fingerprints,
    check_parts,
    check_tensors,
    prior_shapes,
)
from dalle_jax.generate.folder import CLIP_FOLDER, Dtype, ModelError
from dalle_jax.generate.grids import check_request, draw_grids, finished, row_by_row
from dalle_jax.generate.rerank import Best, Ranked
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.image import pixels
from dalle_jax.image.sheet import PAPER
from dalle_jax.models import codec as codecs
from dalle_jax.models.codec import CodecConfig
from dalle_jax.models.prior_config import PriorConfig
from dalle_jax.models.progressive_prior import ProgressiveConfig
from dalle_jax.parallel.sharding_rules import PRIOR, shardings
from dalle_jax.text.bpe import Tokenizer

Progress = Callable[[int, int], None]


class Model(Codec):
    """A codec (dVAE or VQ-GAN) and, if it can draw, its priors and tokenizer; maybe a CLIP too.

    Weights are rounded as they are stored and kept in float32, so that a model draws the same
    pictures before it is saved and after it is loaded.
    """

    def __init__(
        self,
        *,
        name: str,
        px: int,
        codec: CodecConfig,
        codec_params: Any,
        prior: PriorConfig | None = None,
        prior_params: Any = None,
        progressive: ProgressiveConfig | None = None,
        progressive_params: Any = None,
        tokenizer: Tokenizer | None = None,
        clip: Clip | Path | None = None,
        card: str = "",
        license: str = "",
        fingerprints: dict[str, str] | None = None,
        kernels: Dtype = "bfloat16",
        dtype: Dtype = "float32",
        mesh: Mesh | None = None,
    ):
        """Puts the parts together and checks that they belong to each other.

        Args:
          name: short name, shown to people.
          px: side R of its pictures, in pixels.
          codec: sizes of the dVAE or VQ-GAN that turns pictures into codes and back.
          codec_params: its nested parameters.
          prior: sizes of the autoregressive prior; None for none.
          prior_params: its nested parameters.
          progressive: sizes of the progressive prior; None for none.
          progressive_params: its nested parameters.
          tokenizer: the tokenizer that both were trained with.
          clip: ranks its pictures; a folder is opened when it is first needed.
          card: text of the model card, Markdown, with the attribution of the data.
          license: text of the terms for the weights.
          fingerprints: of the parts that the prior was trained with; None for the ones given.
          kernels: what kernels are rounded to and stored in; float32 for those of others.
          dtype: of the priors' kernels and of their products; bfloat16 halves their memory.
          mesh: from `parallel.mesh.make_mesh`: devices that the priors' weights are spread over;
            None for one device, or where they lie if they are spread already.
        Raises:
          ModelError: if a part is missing, has other sizes, or does not belong.
        """
        super().__init__(px=px, codec=codec, codec_params=codec_params, kernels=kernels)
        self.name = name
        self.tokenizer, self.card, self.license = tokenizer, card, license
        self._clip = clip
        given = {"prior": (prior, prior_params), "progressive": (progressive, progressive_params)}
        given = {part: both for part, both in given.items() if both[0] is not None}
        check_parts(self, {part: sizes for part, (sizes, _) in given.items()})

        self.priors: dict[str, tuple[PriorConfig | ProgressiveConfig, Any]] = {}
        """Sizes and parameters of the parts that draw codes: "prior", "progressive", or both."""
        for part, (sizes, params) in given.items():
            tensors = files.to_tensors(params, kernels=kernels)
            check_tensors(part, tensors, prior_shapes(sizes))
            self.fingerprints[part] = files.fingerprint(tensors)
            self.fingerprints["tokenizer"] = tokenizer.fingerprint
            self.priors[part] = sizes, _placed(files.to_params(tensors, dtype=dtype), mesh)
        check_fingerprints(name, self.fingerprints, fingerprints or {})

    @classmethod
    def load(
        cls,
        name_or_folder: str | os.PathLike,
        *,
        dtype: Dtype = "float32",
        mesh: Mesh | None = None,
    ) -> "Model":
        """Opens a shipped model by its name, else a model folder by its path.

        Args:
          name_or_folder: of the model.
          dtype: as above.
          mesh: as above.
        Raises:
          ModelError: if there is no such model, a file is damaged or belongs to another model.
        """
        folder = files.find(name_or_folder)
        config = files.read_config(folder)
        if "clip" in config:
            raise ModelError(f"{folder} holds a CLIP, which cannot draw; open it with Clip.load")
        try:
            parts = {"name": config["name"], "px": config["px"]}
            fingerprints = config["fingerprints"]
            kind = next((kind for kind in files.CODECS if kind in config), "dvae")
            parts["codec"] = files.sizes(codecs.KINDS[kind], config[kind], folder)
        except KeyError as error:
            raise ModelError(f"{folder / files.CONFIG} lacks {error}; restore it") from error
        for part, file in files.PRIORS.items():
            if config.get(part) is not None:
                parts[part] = files.sizes(CONFIGS[part], config[part], folder)
                tensors = files.read_tensors(folder / file)
                parts[f"{part}_params"] = files.to_params(tensors, dtype=dtype)
                parts["tokenizer"] = Tokenizer.load(folder / files.TOKENIZER)
        if (folder / CLIP_FOLDER / files.CONFIG).is_file():
            parts["clip"] = folder / CLIP_FOLDER
        parts |= files.read_texts(folder)
        return cls(
            codec_params=files.to_params(files.read_tensors(folder / files.CODECS[kind])),
            fingerprints=fingerprints,
            kernels=config.get("kernels", "bfloat16"),
            dtype=dtype,
            mesh=mesh,
            **parts,
        )

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the model folder, whole or not at all; an older model there is replaced.

        Raises:
          ModelError: if the folder holds anything else.
        """
        with files.replacing(folder) as new:
            self.write(new)

    def write(self, folder: Path | None) -> None:
        """Writes the files into an empty folder.

        If weights are spread over several processes, all of them have to call it: the one that
        writes, and the others without a folder.
        """
        for part, (_, params) in self.priors.items():
            file = None if folder is None else folder / files.PRIORS[part]
            files.write_tensors(file, files.to_tensors(params, kernels=self.kernels))
        if folder is None:
            return
        files.write_config(
            folder,
            name=self.name,
            px=self.px,
            **{self.kind: self.codec},
            **{part: sizes for part, (sizes, _) in self.priors.items()},
            fingerprints=self.fingerprints,
            kernels=self.kernels,
        )
        codec = files.to_tensors(self.codec_params, kernels=self.kernels)
        files.write_tensors(folder / files.CODECS[self.kind], codec)
        if self.priors:
            self.tokenizer.save(folder / files.TOKENIZER)
        if self.clip is not None:
            (folder / CLIP_FOLDER).mkdir()
            self.clip.write(folder / CLIP_FOLDER)
        files.write_texts(folder, card=self.card, license=self.license)

    @property
    def clip(self) -> Clip | None:
        """Ranks its pictures, if it has one."""
        if isinstance(self._clip, Path):
            self._clip = Clip.load(self._clip)
        return self._clip

    def with_clip(self, clip: Clip) -> "Model":
        """Gives this model with another CLIP; weights are shared."""
        other = copy.copy(self)
        other._clip = clip
        return other

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
          prompts: captions; one alone counts as a list of one. White space around them does not
            count, and those too long for the prior are cut, which the log says: as in training.
          n: images per caption, at least 1.
          seed: in [0, 2**32). Sample j of a caption depends on seed, caption and j alone, up to
            float rounding: not on the other captions, nor on n.
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
        given = self._top_rows(image_prompt, keep_rows)
        parts = self._sample(prompts, n, seed, sampling, given, progress)
        return self._gathered(map(finished, parts), len(prompts), n)[0]

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
        best = Best(prompts, keep=keep, px=self.px, clip=clip)
        given = self._top_rows(image_prompt, keep_rows)
        for part in self._sample(prompts, n, seed, sampling, given, progress):
            best.add(part.prompts, self._pictures(finished(part).passes)[0])
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
        given = self._top_rows(image_prompt, keep_rows)
        parts = self._sample(prompts, n, seed, sampling, given, progress)
        return self._gathered(map(row_by_row, parts), len(prompts), n)

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
        if sampling.decoder == "autoregressive":
            raise UserError("an edit needs the progressive decoder; leave decoder out")
        sampling = dataclasses.replace(sampling, decoder="progressive")
        prompts = _as_list(prompts)
        check_request(prompts, n=n, seed=seed)
        self._prior(sampling)
        image = self._opened(image)
        old, size = pixels.square(image, self.px), image.shape[:2]
        if mask is None:
            edited = some_cells(strength, self.grid, n=n, seed=seed)
        else:
            cells = masked_cells(mask, size, px=self.px, grid=self.grid)
            edited = np.repeat(cells[None], n, axis=0)
        given = np.where(edited, self.codec.codes, self.encode([old]))
        parts = self._sample(prompts, n, seed, sampling, given, progress)
        images = self._gathered(map(finished, parts), len(prompts), n)[0]
        return images if mask is None else blend(old, images, edited[0])

    def __repr__(self):
        sizes = f"{self.px} px, {self.grid} x {self.grid} of {self.codec.codes} codes"
        parts = [
            f"{part} of {sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6:.1f}M parameters"
            for part, (_, params) in self.priors.items()
        ]
        return f"Model({self.name!r}: {sizes}, {', '.join(parts) or 'no prior'})"

    def _prior(self, sampling: SamplingConfig) -> str:
        """The part that samples; SamplingConfig refuses options that its decoder does not have."""
        if not self.priors:
            raise ModelError(
                f"model {self.name!r} holds a {codecs.TITLES[self.kind]} alone: it can encode and "
                "decode, but generating needs a prior trained on its codes"
            )
        usual = "progressive" if "progressive" in self.priors else "prior"
        part = {name: part for part, name in DECODERS.items()}.get(sampling.decoder, usual)
        if part not in self.priors:
            able = " or ".join(DECODERS[part] for part in self.priors)
            raise ModelError(
                f"model {self.name!r} has no {sampling.decoder} prior; its decoder is {able}"
            )
        dataclasses.replace(sampling, decoder=DECODERS[part])
        return part

    def _sample(self, prompts, n, seed, sampling, given, progress):
        config, params = self.priors[self._prior(sampling)]
        done = 0
        for part in draw_grids(
            config, params, self.tokenizer, prompts, n=n, seed=seed, sampling=sampling, given=given
        ):
            yield part
            done += len(part.prompts) * len(part.numbers)
            if progress is not None:
                progress(done, len(prompts) * n)

    def _gathered(self, drawn, prompts, n):
        """The pictures of all passes [F, prompts, n, R, R, 3]."""
        images = None
        for part in drawn:
            if images is None:
                frames = len(part.passes)
                images = np.empty((frames, prompts, n, self.px, self.px, 3), np.uint8)
            images[:, part.prompts[:, None], part.numbers] = self._pictures(part.passes)
        return images

    def _pictures(self, passes):
        """Pictures [..., R, R, 3] of codes after each pass, grey where there is none."""
        empty = passes == self.codec.codes
        codes = np.where(empty, passes[-1:], passes)  # or the cells beside them would look odd
        images = self.decode(codes.reshape(-1, *codes.shape[-2:]))
        images = images.reshape(*codes.shape[:-2], *images.shape[1:])
        images[empty.repeat(self.codec.factor, -2).repeat(self.codec.factor, -1)] = PAPER
        return images

    def _top_rows(self, image_prompt, keep_rows):
        """Codes [1, G, G] of the rows to be kept, and K below."""
        if image_prompt is None:
            if keep_rows:
                raise UserError(f"keep_rows is {keep_rows}, but no image prompt was given")
            return None
        if not 1 <= keep_rows < self.grid:
            raise UserError(
                f"keep_rows is {keep_rows}; with an image prompt it must be 1 to "
                f"{self.grid - 1}, since the grid has {self.grid} rows"
            )
        codes = self.encode([self._opened(image_prompt)])
        codes[:, keep_rows:] = self.codec.codes
        return codes

    def _opened(self, image):
        if isinstance(image, str | os.PathLike):
            return pixels.decode(image, min_px=self.grid)
        return np.asarray(image)


def _as_list(prompts):
    return [prompts] if isinstance(prompts, str) else list(prompts)


def _placed(params, mesh):
    if mesh is not None:
        return jax.device_put(params, shardings(params, mesh, PRIOR))
    return jax.tree.map(lambda x: x if files.is_spread(x) else jax.device_put(x), params)
