"""Two sides to compare: a model that draws, or a folder of pictures that something else drew."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from dalle_jax.data.sources import FolderSource
from dalle_jax.errors import UserError
from dalle_jax.generate.folder import CONFIG, shipped
from dalle_jax.generate.model import Model
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.image.pixels import crop_center, decode

FOLDER_PX = 256  # side that pictures of a folder are shown at

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Painter:
    """One side.

    Attributes:
      name: as it was given.
      known: the captions it has pictures for; None for any.
      paint: captions to uint8 [M, R, R, 3], telling what is done.
    """

    name: str
    known: frozenset[str] | None
    paint: Callable[[Sequence[str], Progress | None], UInt8[np.ndarray, "M R R 3"]]


def open_painter(
    name: str, *, seed: int = 0, sampling: SamplingConfig = SamplingConfig()
) -> Painter:
    """Opens a shipped model, a model folder, or a folder of captioned pictures.

    Args:
      name: of the model or folder.
      seed: for a model, as for `Model.generate`.
      sampling: how a model samples.
    Raises:
      ModelError: if the model cannot be used.
      SourceError: if the folder holds no captioned pictures.
    """
    if name in shipped() or (Path(name) / CONFIG).is_file() or not Path(name).is_dir():
        model = Model.load(name)

        def draw(captions, progress=None):
            images = model.generate(captions, seed=seed, sampling=sampling, progress=progress)
            return images[:, 0]

        return Painter(name=name, known=None, paint=draw)

    source = FolderSource(name)
    records = {source[i]["captions"][0]: source[i]["image"] for i in range(len(source))}

    def show(captions, progress=None):
        del progress
        return np.stack([crop_center(decode(records[text]), FOLDER_PX) for text in captions])

    return Painter(name=name, known=frozenset(records), paint=show)


def shared_captions(painters: Sequence[Painter], file: Path, *, must: bool) -> list[str]:
    """The captions to compare on.

    Args:
      painters: both sides.
      file: a caption a line, for models.
      must: whether these captions and no others are wanted; else folders of pictures decide.
    Raises:
      UserError: if there are none, the file is not in UTF-8, or a folder has no picture for a
        caption that is wanted.
    """
    known = [painter.known for painter in painters if painter.known is not None]
    if known and not must:
        asked = sorted(frozenset.intersection(*known))
    else:
        try:
            lines = file.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not in UTF-8 ({error}); save it so") from error
        asked = [line.strip() for line in lines]
        asked = [caption for caption in dict.fromkeys(asked) if caption]
        for painter in painters:
            missing = [c for c in asked if painter.known is not None and c not in painter.known]
            if missing:
                raise UserError(
                    f"{painter.name} has no picture for {len(missing)} of {len(asked)} captions, "
                    f"such as {missing[0]!r}; its first captions have to be the same, letter by "
                    "letter"
                )
    if not asked:
        raise UserError("there are no captions that both sides have pictures for")
    return asked
