"""Sets that TensorFlow Datasets has prepared, such as COCO with captions."""

import os
from typing import Any

import tensorflow_datasets as tfds

from dalle_jax.data.record import Record, SourceError
from dalle_jax.text.caption import normalize_caption

_CAPTIONS = ("captions", "caption", "text")


class PreparedSource:
    """One split of a prepared set, read without TensorFlow.

    Captions are the feature "captions", "caption" or "text": a text, several, or several objects
    with a "text" each, as COCO's are.

    Args:
      path: the folder of one version, with its dataset_info.json.
      split: name of the split.
    Raises:
      SourceError: if there is no such split, it cannot be read at random, or has no captions.
    """

    def __init__(self, path: str | os.PathLike, split: str):
        builder = tfds.builder_from_directory(os.fspath(path))
        if split not in builder.info.splits:
            known = ", ".join(builder.info.splits)
            raise SourceError(f"{path} has no split {split!r}; choose from {known}")
        features = builder.info.features
        names = [name for name in _CAPTIONS if name in features]
        if not names or "image" not in features:
            raise SourceError(
                f"{path} has the features {', '.join(features)}, but a set of captioned images "
                f"needs image and one of {', '.join(_CAPTIONS)}"
            )
        self._captions = names[0]
        try:
            decoders = {"image": tfds.decode.SkipDecoding()}
            self._stored = builder.as_data_source(split, decoders=decoders)
        except NotImplementedError:
            raise SourceError(
                f"{path} is stored for reading in order only; prepare it again with "
                "tfds build --file_format=array_record"
            ) from None
        self._name = f"{builder.info.name}/{split}"

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, index: int) -> Record:
        stored = self._stored[index]
        return {
            "id": f"{self._name}/{index}",
            "image": stored["image"],
            "captions": [text for text in _texts(stored[self._captions]) if text],
        }


def split_names(path: str | os.PathLike) -> list[str]:
    """Names of the splits of a prepared set, whose folder is that of one version."""
    return list(tfds.builder_from_directory(os.fspath(path)).info.splits)


def _texts(value: Any) -> list[str]:
    if isinstance(value, str | bytes):
        text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        return [normalize_caption(text)]
    if isinstance(value, dict):
        return _texts(value["text"])
    return [text for part in value for text in _texts(part)]
