"""One model, ready to draw: captions to pictures, pictures to codes, codes to pictures.

Letters: B batch, R pixel side, G grid side, P text positions, K codes, T all positions, L layers,
D width. Work is cut into micro-batches, so that memory stays bounded whatever is asked for.
"""

import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Int, Int32, Key, UInt8, UInt32

from dalle_jax.generate import folder as files
from dalle_jax.generate.autoregressive import sample
from dalle_jax.generate.folder import ModelError
from dalle_jax.image import pixels
from dalle_jax.models.cache import layout
from dalle_jax.models.dvae import DVAE, DVAEConfig, pictures, tokens
from dalle_jax.models.transformer import Prior, PriorConfig
from dalle_jax.text.bpe import Tokenizer

MEMORY = 2**30  # bytes that one micro-batch may need besides the weights, about
LARGEST = 32  # pictures in a micro-batch; on 2 cores 8 to 64 take the same time a picture, 0.6 s


class Model:
    """A dVAE and, if it can draw, the prior and the tokenizer that belong to it.

    Weights are rounded as they are stored and kept in float32, so that a model draws the same
    pictures before it is saved and after it is loaded.
    """

    def __init__(
        self,
        *,
        name: str,
        px: int,
        dvae: DVAEConfig,
        dvae_params: Any,
        prior: PriorConfig | None = None,
        prior_params: Any = None,
        tokenizer: Tokenizer | None = None,
        card: str = "",
        license: str = "",
        fingerprints: dict[str, str] | None = None,
    ):
        """Puts the parts together and checks that they belong to each other.

        Args:
          name: short name, shown to people.
          px: side R of its pictures, in pixels.
          dvae: sizes of the dVAE.
          dvae_params: its nested parameters.
          prior: sizes of the prior; None for a dVAE alone.
          prior_params: its nested parameters.
          tokenizer: the tokenizer it was trained with.
          card: text of the model card, Markdown, with the attribution of the data.
          license: text of the terms for the weights.
          fingerprints: of the parts that the prior was trained with; None for the ones given.
        Raises:
          ModelError: if a part is missing, has other sizes, or does not belong.
        """
        self.name, self.px, self.dvae, self.prior = name, px, dvae, prior
        self.tokenizer, self.card, self.license = tokenizer, card, license
        _check_parts(self)

        tensors = files.to_tensors(dvae_params)
        _check_tensors("dVAE", tensors, _dvae_shapes(dvae))
        self.fingerprints = {"dvae": files.fingerprint(tensors)}
        self.dvae_params = jax.device_put(files.to_params(tensors))
        if prior is not None:
            tensors = files.to_tensors(prior_params)
            _check_tensors("prior", tensors, _prior_shapes(prior))
            self.fingerprints["prior"] = files.fingerprint(tensors)
            self.fingerprints["tokenizer"] = tokenizer.fingerprint
            self.prior_params = jax.device_put(files.to_params(tensors))
        _check_fingerprints(name, self.fingerprints, fingerprints or {})

    @classmethod
    def load(cls, name_or_folder: str | os.PathLike) -> "Model":
        """Opens a shipped model by its name, else a model folder by its path.

        Raises:
          ModelError: if there is no such model, a file is damaged or belongs to another model.
        """
        folder = files.find(name_or_folder)
        config = files.read_config(folder)
        try:
            parts = {"name": config["name"], "px": config["px"]}
            dvae, prior, fingerprints = config["dvae"], config["prior"], config["fingerprints"]
        except KeyError as error:
            raise ModelError(f"{folder / files.CONFIG} lacks {error}; restore it") from error
        if prior is not None:
            parts["prior"] = files.sizes(PriorConfig, prior, folder)
            parts["prior_params"] = files.to_params(files.read_tensors(folder / files.PRIOR))
            parts["tokenizer"] = Tokenizer.load(folder / files.TOKENIZER)
        for part, file in (("card", files.CARD), ("license", files.LICENSE)):
            if (folder / file).is_file():
                parts[part] = (folder / file).read_text(encoding="utf-8")
        return cls(
            dvae=files.sizes(DVAEConfig, dvae, folder),
            dvae_params=files.to_params(files.read_tensors(folder / files.DVAE)),
            fingerprints=fingerprints,
            **parts,
        )

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the model folder, whole or not at all; an older model there is replaced.

        Raises:
          ModelError: if the folder holds anything else.
        """
        with files.replacing(folder) as new:
            files.write_config(
                new,
                name=self.name,
                px=self.px,
                dvae=self.dvae,
                prior=self.prior,
                fingerprints=self.fingerprints,
            )
            files.write_tensors(new / files.DVAE, files.to_tensors(self.dvae_params))
            if self.prior is not None:
                files.write_tensors(new / files.PRIOR, files.to_tensors(self.prior_params))
                self.tokenizer.save(new / files.TOKENIZER)
            for text, file in ((self.card, files.CARD), (self.license, files.LICENSE)):
                if text:
                    (new / file).write_text(text, encoding="utf-8")

    @property
    def grid(self) -> int:
        """Side G of the square of codes."""
        return self.px // self.dvae.factor

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        n: int = 1,
        seed: int = 0,
        temperature: float | int = 1.0,
        top_k: int | None = None,
        top_p: float | int | None = None,
        guidance: float | int = 1.0,
        image_prompt: str | os.PathLike | ArrayLike | None = None,
        keep_rows: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> UInt8[np.ndarray, "prompts n R R 3"]:
        """Draws n pictures for each caption.

        Args:
          prompts: captions; one alone counts as a list of one.
          n: pictures per caption, at least 1.
          seed: in [0, 2**32). Sample j of a caption depends on seed, caption and j alone, up to
            float rounding: not on the other captions, nor on n.
          temperature: divides the logits; 1 as trained, 0 always takes the likeliest code.
          top_k: draw from the k likeliest codes only, 1 to K; None for all.
          top_p: draw from the likeliest codes that hold this probability, in (0, 1]; None for all.
          guidance: s in u + s * (c - u) of the logits with (c) and without (u) caption; 1 is off.
          image_prompt: a picture, as a file or uint8 [H, W, 3], of which the top rows are kept.
          keep_rows: rows of codes to keep, 1 to G - 1; 0 without image_prompt.
          progress: called with the pictures drawn so far and in all.
        Returns:
          The pictures.
        Raises:
          ModelError: if the model has no prior.
          ValueError: if an argument is out of its range or a caption is empty or too long.
          PictureError: if the picture to start from cannot be read.
        Source: Ramesh et al. 2021, section 2.6; guidance: Ho and Salimans 2021.
        """
        if self.prior is None:
            raise ModelError(
                f"model {self.name!r} holds a dVAE alone: it can encode and decode, but drawing "
                "needs a prior trained on its codes"
            )
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        _check_request(prompts, n=n, seed=seed)
        kept = self._kept_codes(image_prompt, keep_rows)

        slots = self.prior.text_length - 1
        text = self.tokenizer.encode(prompts, length=slots, overlong="error")
        hashes = [zlib.crc32(prompt.lower().encode("utf-8", "replace")) for prompt in prompts]
        hashes = np.asarray(hashes, np.uint32)
        images = np.empty((len(prompts), n, self.px, self.px, 3), np.uint8)
        drawn = 0
        for rows, columns, new in _rectangles(len(prompts), n, self._bytes_to_sample(guidance)):
            batch = len(rows) * len(columns)
            codes = sample(
                self.prior,
                self.prior_params,
                text[rows],
                _keys(np.uint32(seed), hashes[rows], columns.astype(np.uint32)),
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                guidance=guidance,
                prompt_codes=None if kept is None else kept[None].repeat(batch, axis=0),
                keep_rows=keep_rows,
            )
            shape = (len(rows), len(columns), *images.shape[2:])
            images[rows[:, None], columns] = self.decode(np.asarray(codes)).reshape(shape)
            drawn += new
            if progress is not None:
                progress(drawn, len(prompts) * n)
        return images

    def encode(self, images: ArrayLike | Sequence[ArrayLike]) -> Int32[np.ndarray, "B G G"]:
        """Turns pictures into codes, the likeliest one of each cell.

        Args:
          images: uint8 [B, H, W, 3], or a list of uint8 [H, W, 3] of any sizes; those that are
            not R x R are scaled to a short side of R and cut to the middle square.
        Returns:
          Codes in [0, K).
        Raises:
          ValueError: if a picture is not uint8 with three channels.
        """
        squares = np.empty((len(images), self.px, self.px, 3), np.uint8)
        for i, image in enumerate(images):
            squares[i] = self._square(np.asarray(image))
        codes = np.empty((len(images), self.grid, self.grid), np.int32)
        for batch, _ in _micro_batches(len(images), self._bytes_to_convolve()):
            codes[batch] = _encode(self.dvae, self.dvae_params, squares[batch])
        return codes

    def decode(self, codes: Int[ArrayLike, "B G G"]) -> UInt8[np.ndarray, "B R R 3"]:
        """Turns codes into pictures.

        Args:
          codes: integers in [0, K).
        Returns:
          The pictures.
        Raises:
          ValueError: if a code is not in the codebook.
        """
        codes = np.asarray(codes)
        if codes.size and not 0 <= codes.min() <= codes.max() < self.dvae.codes:
            raise ValueError(
                f"codes go from {codes.min()} to {codes.max()}, but the codebook holds 0 to "
                f"{self.dvae.codes - 1}; were they made by another dVAE?"
            )
        side = codes.shape[1] * self.dvae.factor
        images = np.empty((len(codes), side, side, 3), np.uint8)
        for batch, _ in _micro_batches(len(codes), self._bytes_to_convolve()):
            images[batch] = _decode(self.dvae, self.dvae_params, codes[batch])
        return images

    def __repr__(self):
        sizes = f"{self.px} px, {self.grid} x {self.grid} of {self.dvae.codes} codes"
        if self.prior is None:
            return f"Model({self.name!r}: {sizes}, no prior)"
        million = sum(leaf.size for leaf in jax.tree.leaves(self.prior_params)) / 1e6
        return f"Model({self.name!r}: {sizes}, prior of {million:.1f}M parameters)"

    def _kept_codes(self, image_prompt, keep_rows):
        if image_prompt is None:
            if keep_rows:
                raise ValueError(f"keep_rows is {keep_rows}, but no image prompt was given")
            return None
        if not 1 <= keep_rows < self.grid:
            raise ValueError(
                f"keep_rows is {keep_rows}; with an image prompt it must be 1 to "
                f"{self.grid - 1}, since the grid has {self.grid} rows"
            )
        if isinstance(image_prompt, str | os.PathLike):
            image_prompt = pixels.decode(image_prompt, min_px=self.grid)
        return self.encode([image_prompt])[0]

    def _square(self, image):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(
                f"got a picture of {image.dtype} {list(image.shape)}; it must be uint8 [H, W, 3] "
                "with values from 0 to 255"
            )
        if image.shape[:2] == (self.px, self.px):
            return image
        return pixels.crop_center(image, self.px)

    def _bytes_to_sample(self, guidance):
        c = self.prior
        plans = (layout(kind, grid=c.grid, kernel=c.kernel) for kind in c.kinds)
        slots = sum((plan.lane.max() + 1) * plan.seen.shape[1] for plan in plans)
        text = c.depth * c.text_length  # as if each picture had a caption of its own
        branches = 1 if guidance == 1 else 2
        return int(2 * 4 * c.width * (slots + text) * branches)  # keys and values in float32

    def _bytes_to_convolve(self):
        return 4 * 4 * self.px**2 * self.dvae.width  # about four feature maps live at a time


def _check_parts(model):
    name, px, dvae, prior = model.name, model.px, model.dvae, model.prior
    if px < 1 or px % dvae.factor:
        raise ModelError(f"model {name!r}: px is {px}, but must be a multiple of {dvae.factor}")
    if prior is None:
        return
    if model.tokenizer is None:
        raise ModelError(
            f"model {name!r} has a prior but no tokenizer; give the one it learned with"
        )
    for owner, what, has, needs in (
        ("dVAE", "grid", model.grid, prior.grid),
        ("dVAE", "codes", dvae.codes, prior.codes),
        ("tokenizer", "text vocabulary", model.tokenizer.vocabulary, prior.text_vocabulary),
    ):
        if has != needs:
            raise ModelError(
                f"model {name!r}: the prior was made for {what} {needs}, but the "
                f"{owner} has {has}; they do not belong together"
            )


def _check_tensors(what, tensors, shapes):
    wanted = {name: tuple(leaf.shape) for name, leaf in shapes.items()}
    got = {name: tensor.shape for name, tensor in tensors.items()}
    for name in sorted(wanted.keys() | got.keys()):
        if wanted.get(name) != got.get(name):
            raise ModelError(
                f"the weights of the {what} do not fit its config: {name} has shape "
                f"{got.get(name, 'missing')}, wanted {wanted.get(name, 'none')}"
            )


def _check_fingerprints(name, has, wanted):
    reasons = {
        "dvae": f"the dVAE of model {name!r} is damaged or not the one it was trained with",
        "tokenizer": f"the tokenizer of model {name!r} is not the one it was trained with",
        "prior": f"the prior of model {name!r} is damaged",
    }
    for part, reason in reasons.items():
        if part in wanted and part in has and wanted[part] != has[part]:
            raise ModelError(
                f"{reason} (fingerprint {has[part][:12]}, wanted {wanted[part][:12]}); "
                "put the original file back"
            )


def _check_request(prompts, *, n, seed):
    if not prompts:
        raise ValueError("no caption was given; give at least one")
    for i, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise ValueError(f"caption {i} of {len(prompts)} is empty; say what to draw")
    if n < 1:
        raise ValueError(f"n is {n}; at least 1 picture per caption can be drawn")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}; it must be a whole number from 0 to {2**32 - 1}")


@jax.jit
def _keys(
    seed: UInt32[Array, ""], hashes: UInt32[Array, " U"], numbers: UInt32[Array, " W"]
) -> Key[Array, " pictures"]:
    """One key a picture, from seed, hash of its caption and number alone, caption by caption."""
    of_caption = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), hashes)
    of_picture = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    return of_picture(of_caption, numbers).ravel()


def _rectangles(
    prompts: int, n: int, bytes_each: int
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Cuts prompts x n pictures into rectangles, since samples of a prompt share its text."""
    for columns, new_columns in _micro_batches(n, bytes_each):
        for rows, new_rows in _micro_batches(prompts, bytes_each, width=len(columns)):
            yield rows, columns, new_rows * new_columns


def _micro_batches(
    total: int, bytes_each: int, *, width: int = 1
) -> Iterator[tuple[np.ndarray, int]]:
    """Cuts `total` things into index arrays of one length, the last filled up with its last index.

    Lengths are 2**k or 3 * 2**k, so that all the requests of a session compile a few shapes only.
    Each comes with the number of things in it that are new. A thing stands for `width` pictures.
    """
    if not total:
        return
    largest = max(1, min(LARGEST, MEMORY // bytes_each) // width)
    lengths = [s for k in range(largest.bit_length()) for s in (2**k, 3 * 2**k) if s <= largest]
    even = math.ceil(total / math.ceil(total / max(lengths)))
    length = min(s for s in lengths if s >= even)
    for start in range(0, total, length):
        indices = np.arange(start, start + length)
        yield np.minimum(indices, total - 1), int((indices < total).sum())


_encode = jax.jit(tokens, static_argnums=0)
_decode = jax.jit(pictures, static_argnums=0)


def _dvae_shapes(config):
    picture = jax.ShapeDtypeStruct((1, config.factor, config.factor, 3), jnp.float32)
    return _shapes(DVAE(config).init, picture)


def _prior_shapes(config):
    # its setup declares all parameters, so that the forward pass, 0.2 s to trace, is not needed
    return _shapes(partial(Prior(config).init, method=lambda prior: prior.head))


def _shapes(init, *inputs):
    key = jax.eval_shape(jax.random.key, 0)
    return files.flat(jax.eval_shape(init, key, *inputs)["params"])
