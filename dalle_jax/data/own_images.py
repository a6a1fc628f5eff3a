"""Someone's own captioned images: a folder of them, or a set that TensorFlow Datasets prepared."""

import os
from pathlib import Path

from dalle_jax.data.record import DataSource, Record, SourceError
from dalle_jax.data.record_filters import Filters
from dalle_jax.data.sources import folder_splits

PREPARED = "dataset_info.json"  # of a set that TensorFlow Datasets prepared
_HELD_OUT = ("validation", "val", "test")


class Padded:
    """A source whose images are laid on white squares; they have other names than without."""

    def __init__(self, source: DataSource):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        record = self._source[index]
        return record | {"id": f"{record['id']}, padded", "pad": True}


def own_splits(
    path: str | os.PathLike, *, filters: Filters | None = None, pad: bool = False
) -> tuple[DataSource, DataSource]:
    """Opens the images to train on and those held out.

    Args:
      path: a folder of images with captions, see `folder_splits`; or the folder of one version of a
        prepared set, whose splits are "train" and one of "validation", "val" and "test".
      filters: images and captions of a folder to leave out.
      pad: lay images on white squares, in place of cutting squares out of them.
    Raises:
      SourceError: if there are none.
    """
    train, held_out = _splits(path, filters)
    return (Padded(train), Padded(held_out)) if pad else (train, held_out)


def _splits(path: str | os.PathLike, filters: Filters | None) -> tuple[DataSource, DataSource]:
    if not (Path(path) / PREPARED).is_file():
        return folder_splits(path, filters=filters)
    if filters not in (None, Filters()):
        raise SourceError(f"{path} is a prepared set; filters are for folders of images")
    from dalle_jax.data.tfds_source import PreparedSource, split_names

    names = split_names(path)
    held_out = next((name for name in _HELD_OUT if name in names), None)
    if held_out is None or "train" not in names:
        raise SourceError(
            f"{path} has the splits {', '.join(names)}, but training needs train and one of "
            f"{', '.join(_HELD_OUT)}"
        )
    return PreparedSource(path, "train"), PreparedSource(path, held_out)
