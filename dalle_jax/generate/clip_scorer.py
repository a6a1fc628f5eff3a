"""A CLIP that scores how well images fit captions.

Its folder stands alone, or is the folder `clip` of a model folder:

    config.json           format, name, sizes, fingerprints of the files
    clip.safetensors      weights, rounded as those of a model folder
    tokenizer.model       SentencePiece
    README.md, LICENSE    card with the attribution of the data, and the terms of the weights

Letters: B batch, R pixel side, E features, U captions.
"""

import os
from collections.abc import Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, UInt8

from dalle_jax.generate import model_folder as files
from dalle_jax.generate import tensor_file
from dalle_jax.generate.micro_batching import micro_batches
from dalle_jax.generate.model_folder import ModelError
from dalle_jax.generate.part_checks import check_tensors, shapes
from dalle_jax.image import pixels
from dalle_jax.models.clip import CLIP, CLIPConfig
from dalle_jax.text.bpe import Tokenizer
from dalle_jax.text.caption import normalize_caption
from dalle_jax.text.tokenizer_file import load_tokenizer


class Clip:
    """A contrastive model and its tokenizer."""

    def __init__(
        self,
        *,
        name: str,
        config: CLIPConfig,
        params: Any,
        tokenizer: Tokenizer,
        card: str = "",
        license: str = "",
        fingerprints: dict[str, str] | None = None,
        kernels: tensor_file.Dtype = "bfloat16",
    ):
        """Checks that the parts belong to each other.

        Args:
          name: a short name, for messages.
          config: its sizes.
          params: its nested parameters.
          tokenizer: the tokenizer it was trained with.
          card: text of its card, Markdown, with the attribution of the data.
          license: text of the weights' licence.
          fingerprints: of the parts as they were saved; None for those of these parts.
          kernels: dtype that kernels are rounded to and stored in; float32 for imported models.
        Raises:
          ModelError: if a part has other sizes, or does not belong.
        """
        self.name, self.config, self.tokenizer = name, config, tokenizer
        self.kernels = kernels
        self.card, self.license = card, license
        if tokenizer.vocabulary != config.text_vocabulary:
            raise ModelError(
                f"CLIP {name!r} was made for text vocabulary {config.text_vocabulary}, but the "
                f"tokenizer has {tokenizer.vocabulary}; they do not belong together"
            )
        tensors = tensor_file.to_tensors(params, kernels=kernels)
        check_tensors(f"CLIP {name!r}", tensors, _shapes(config))
        fingerprint, self.params = tensor_file.place(tensors)
        self.fingerprints = {"clip": fingerprint, "tokenizer": tokenizer.fingerprint}
        for part, has in self.fingerprints.items():
            if has != (wanted := (fingerprints or self.fingerprints)[part]):
                raise ModelError(
                    f"the {part} of CLIP {name!r} is damaged or not the one it was saved with "
                    f"(fingerprint {has[:12]}, wanted {wanted[:12]}); put the original file back"
                )

    @classmethod
    def load(cls, name_or_folder: str | os.PathLike) -> "Clip":
        """Opens the CLIP of a shipped model by its name, or a folder that is one or has one.

        Raises:
          ModelError: if there is no CLIP, or a file is damaged or belongs to another.
        """
        folder = files.find_folder(name_or_folder)
        config = files.read_config(folder)
        if "clip" not in config:
            if not (folder / files.CLIP_FOLDER / files.CONFIG).is_file():
                raise ModelError(
                    f"the model in {folder} has no CLIP of its own; name the folder of another, or "
                    "train one with the stage `clip` of an experiment"
                )
            folder = folder / files.CLIP_FOLDER
            config = files.read_config(folder)
        try:
            name, fields = config["name"], config["clip"]
            fingerprints = {part: config["fingerprints"][part] for part in ("clip", "tokenizer")}
        except KeyError as error:
            raise ModelError(f"{folder / files.CONFIG} lacks {error}; restore it") from error
        return cls(
            name=name,
            config=files.config_from_fields(CLIPConfig, fields, folder),
            params=tensor_file.nest(tensor_file.read_tensors(folder / files.CLIP)),
            tokenizer=load_tokenizer(folder / files.TOKENIZER),
            fingerprints=fingerprints,
            kernels=config.get("kernels", "bfloat16"),
            **files.read_texts(folder),
        )

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the folder under a temporary name and renames it; replaces an older CLIP.

        Raises:
          ModelError: if the folder holds anything else.
        """
        with files.replace_folder(folder) as new:
            self.write(new)

    def write(self, folder: Path) -> None:
        """Writes the files into an empty folder."""
        files.write_config(
            folder,
            name=self.name,
            clip=self.config,
            fingerprints=self.fingerprints,
            kernels=self.kernels,
        )
        tensor_file.write_tensors(
            folder / files.CLIP, tensor_file.to_tensors(self.params, kernels=self.kernels)
        )
        self.tokenizer.save(folder / files.TOKENIZER)
        files.write_texts(folder, card=self.card, license=self.license)

    def encode_images(self, images: ArrayLike | Sequence[ArrayLike]) -> Float[np.ndarray, "B E"]:
        """Features of images.

        Args:
          images: uint8 [B, H, W, 3], or a list of uint8 [H, W, 3] of any sizes; those that are
            not R x R are scaled to a short side of R (Lanczos) and cut to the middle square.
        Returns:
          Vectors of length 1, in float32.
        Raises:
          UserError: if an image is not uint8 with three channels.
        """
        squares: np.ndarray = np.empty((len(images), *(self.config.px,) * 2, 3), np.uint8)
        for i, image in enumerate(images):
            squares[i] = pixels.square(np.asarray(image), self.config.px)
        return self._features("encode_images", squares)

    def encode_texts(self, captions: Sequence[str]) -> Float[np.ndarray, "B E"]:
        """Features of captions, which are normalized and truncated as in training.

        Returns:
          Vectors of length 1, in float32.
        """
        captions = [normalize_caption(caption) for caption in captions]
        text = self.tokenizer.encode(captions, length=self.config.slots)
        return self._features("encode_text", text)

    def score(
        self, captions: Sequence[str], images: UInt8[np.ndarray, "U n H W 3"]
    ) -> Float[np.ndarray, "U n"]:
        """Scores how well images fit captions.

        Args:
          captions: U of them.
          images: n images for each caption, as `Model.generate` returns them.
        Returns:
          Cosine similarities in [-1, 1].
        Raises:
          ValueError: if the numbers of captions and of rows of images differ.
        """
        U, n = images.shape[:2]
        if len(captions) != U:
            raise ValueError(
                f"got {len(captions)} captions and {U} rows of images; give a row for each"
            )
        seen = self.encode_images(images.reshape(U * n, *images.shape[2:])).reshape(U, n, -1)
        return np.einsum("UE,UnE->Un", self.encode_texts(captions), seen)

    def __repr__(self):
        million = sum(leaf.size for leaf in jax.tree.leaves(self.params)) / 1e6
        return f"Clip({self.name!r}: {self.config.px} px, {million:.1f}M parameters)"

    def _features(self, method, inputs):
        features = np.empty((len(inputs), self.config.features), np.float32)
        for indices, _ in micro_batches(len(inputs), self._bytes_each()):
            features[indices] = _encode(self.config, method, self.params, inputs[indices])
        return features

    def _bytes_each(self):
        c = self.config
        positions = max(c.grid**2 + 1, c.text_length)
        width = max(c.image_width, c.text_width)
        heads = max(c.image_heads, c.text_heads)
        return 4 * positions * (2 * (4 + c.mlp_ratio) * width + 3 * heads * positions)


def retrieval_accuracy(
    images: Float[np.ndarray, "B E"], texts: Float[np.ndarray, "B E"], captions: Sequence[Hashable]
) -> dict[str, float]:
    """How often images and captions find each other in a set.

    Equal captions count once. An image is right if its caption is among the k nearest of all
    different captions; a caption, if one of its images is among the k nearest of all images,
    where more images of the same caption take no place. Ties are wrong.

    Args:
      images: features of B images.
      texts: features of their captions, in the same order.
      captions: the captions, or anything that is equal where they are.
    Returns:
      The shares that are right, as "image_to_text_k" and "text_to_image_k" for k = 1 and 5.
    Source: the measure of Radford et al. 2021, section 3.1; how equal captions count is ours.
    """
    numbers = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    owner = np.array([numbers[caption] for caption in captions])
    first = np.unique(owner, return_index=True)[1]
    similarity = images @ texts[first].T  # B U
    own = owner[:, None] == np.arange(len(first))[None]
    right = similarity[own]  # each image has one caption
    ahead = {"image_to_text": (~own & (similarity >= right[:, None])).sum(axis=1)}
    right = np.where(own, similarity, -np.inf).max(axis=0)
    ahead["text_to_image"] = (~own & (similarity >= right[None])).sum(axis=0)
    return {f"{way}_{k}": float((n < k).mean()) for way, n in ahead.items() for k in (1, 5)}


@partial(jax.jit, static_argnums=(0, 1))
def _encode(config, method, params, inputs):
    return CLIP(config).apply({"params": params}, inputs, method=method)


def _shapes(config):
    # its setup declares all parameters, so that the forward pass need not be traced
    return shapes(partial(CLIP(config).init, method=lambda clip: clip.log_scale))
