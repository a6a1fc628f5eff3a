"""What votes compare: images of a model, or of a folder that another program wrote."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from dalle_jax.data.sources import FolderSource
from dalle_jax.errors import UserError
from dalle_jax.generate.model import Model
from dalle_jax.generate.model_folder import CONFIG, shipped_models
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.image.pixels import crop_center, decode

FOLDER_PX = 256  # side that images of a folder are shown at

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class ImageProvider:
    """A model, or a folder of images.

    Attributes:
      name: of the model or folder.
      captions: that it has images for; None for any.
      images: captions to uint8 [M, R, R, 3]; calls back with the images made so far and in all.
    """

    name: str
    captions: frozenset[str] | None
    images: Callable[[Sequence[str], Progress | None], UInt8[np.ndarray, "M R R 3"]]


def open_image_provider(
    name: str, *, seed: int = 0, sampling: SamplingConfig = SamplingConfig()
) -> ImageProvider:
    """Opens a shipped model, a model folder, or a folder of captioned images.

    Args:
      name: of the model or folder.
      seed: for a model, as for `Model.generate`.
      sampling: how a model samples.
    Raises:
      ModelError: if the model cannot be used.
      SourceError: if the folder holds no captioned images.
    """
    if name in shipped_models() or (Path(name) / CONFIG).is_file() or not Path(name).is_dir():
        model = Model.load(name)

        def generate(captions, progress=None):
            images = model.generate(captions, seed=seed, sampling=sampling, progress=progress)
            return images[:, 0]

        return ImageProvider(name=name, captions=None, images=generate)

    source = FolderSource(name)
    records = {source[i]["captions"][0]: source[i]["image"] for i in range(len(source))}

    def read(captions, progress=None):
        del progress
        return np.stack([crop_center(decode(records[text]), FOLDER_PX) for text in captions])

    return ImageProvider(name=name, captions=frozenset(records), images=read)


def shared_captions(providers: Sequence[ImageProvider], file: Path, *, required: bool) -> list[str]:
    """The captions that all of them have images for.

    Args:
      providers: models or folders.
      file: a caption a line, for models.
      required: whether all captions of the file are compared; else those that the folders share,
        if there is one.
    Raises:
      UserError: if there are none, the file is not in UTF-8, or a folder has no image for a
        required caption.
    """
    known = [provider.captions for provider in providers if provider.captions is not None]
    if known and not required:
        shared = sorted(frozenset.intersection(*known))
    else:
        try:
            lines = file.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not in UTF-8 ({error}); save it so") from error
        shared = [caption for caption in dict.fromkeys(line.strip() for line in lines) if caption]
        for provider in providers:
            if provider.captions is None:
                continue
            missing = [caption for caption in shared if caption not in provider.captions]
            if missing:
                raise UserError(
                    f"{provider.name} has no image for {len(missing)} of {len(shared)} captions, "
                    f"such as {missing[0]!r}; its first captions have to be the same, letter by "
                    "letter"
                )
    if not shared:
        raise UserError("there are no captions that both have images for")
    return shared
