"""Which images to train on: options of commands and scripts.

Source: ours.
"""

import dataclasses
import re
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
        begun = f"The weights go on from those of the model {self.model.name}, whose card says:"
        attribution = "\n\n".join((data.attribution, begun, _data_section(self.model.card)))
        return dataclasses.replace(data, attribution=attribution, license=self.model.license)


def _data_section(card: str) -> str:
    """What a model card says of the data, as a quotation; all of it if it has no such section."""
    found = re.search(r"^## Data.*\n((?:(?!## ).*\n?)*)", card, re.MULTILINE)
    text = found[1] if found else card
    return "\n".join(f"> {line}".rstrip() for line in text.strip().splitlines())
