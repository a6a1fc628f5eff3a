"""Which images to train on: options of commands and scripts.

Source: ours.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from dalle_jax.data.own_images import own_splits
from dalle_jax.data.record_filters import Filters
from dalle_jax.generate.model import Model
from dalle_jax.train.trainers import Data


@runtime_checkable
class DataOptions(Protocol):
    """A frozen dataclass of options that say which data to open."""

    def open(self, px: int) -> Data:
        """Opens the data, for a model of images of side px."""
        ...


@dataclass(frozen=True, kw_only=True)
class FolderOptions:
    """A folder of images with captions, or a set that TensorFlow Datasets prepared."""

    data: Path
    """Folder with x.jpg beside x.txt, or with captions.jsonl or captions.csv; or one version of a
    set that TensorFlow Datasets prepared."""
    filters: Filters = field(default_factory=Filters)
    pad: bool = False
    """Lay images that are not square on white squares, in place of cutting out their middle."""

    def open(self, px: int) -> Data:
        """Opens the images to train on and those held out."""
        train, validation = own_splits(self.data, filters=self.filters, pad=self.pad)
        few = range(min(6, len(validation)))
        return Data(
            train=train,
            validation=validation,
            captions=[validation[i]["captions"][0] for i in few],
            attribution=f"Images and captions of the folder {self.data.resolve().name}.",
        )


@dataclass(frozen=True, kw_only=True)
class ContinuedOptions:
    """Images for a model that goes on from another one, whose attribution and terms it keeps."""

    images: DataOptions
    model: Model
    """The other one."""

    def open(self, px: int) -> Data:
        """Opens the images."""
        data = self.images.open(px)
        _, _, before = self.model.card.partition("## Data\n")
        begun = f"The weights go on from those of the model {self.model.name}."
        return dataclasses.replace(
            data,
            attribution="\n\n".join(filter(None, (data.attribution, begun, before.strip()))),
            license=self.model.license,
        )
