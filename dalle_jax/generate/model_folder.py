"""A model folder: all files of one model, with its card and licence.

    config.json              format, name, px, sizes of the networks, fingerprints of the files, and
                             the type that kernels are stored in
    dvae.safetensors         weights, nested names joined by "/"; kernels in bfloat16, the rest and
                             the kernels next to codes and tokens in float32; of imported models all
                             in float32, as they were published
    vqgan.safetensors        in place of it, if the codec is a VQ-GAN; or maskgit_vqgan.safetensors
    prior.safetensors        the same, of the autoregressive prior; optional
    progressive.safetensors  of the progressive prior; optional
    seq2seq.safetensors      of dalle-mini's prior; optional
    gpt.safetensors          of minDALL-E's or ruDALL-E's prior; optional
    tokenizer.model          SentencePiece; there if there is a prior
    clip                     folder of the CLIP that ranks its images (`clip_scorer`); optional
    README.md, LICENSE       model card with the attribution of the data, and terms of the weights

A prior knows codes and tokens only by number, so config.json holds the fingerprints of the codec
and the tokenizer that it was trained with, and any other is refused.
"""

import dataclasses
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dalle_jax.errors import UserError

FORMAT = 1
SHIPPED = Path(__file__).parent.parent / "pretrained"
CONFIG, TOKENIZER = "config.json", "tokenizer.model"
CODECS = {kind: f"{kind}.safetensors" for kind in ("dvae", "vqgan", "maskgit_vqgan")}
"""Codecs, one of which a model has, and their files."""
PRIORS = {part: f"{part}.safetensors" for part in ("prior", "progressive", "seq2seq", "gpt")}
"""Priors, and their files."""
CARD, LICENSE = "README.md", "LICENSE"
CLIP, CLIP_FOLDER = "clip.safetensors", "clip"
CAPTIONS = "captions.txt"  # beside a shipped model

_OWN = {CONFIG, TOKENIZER, CARD, LICENSE, CLIP, *CODECS.values(), *PRIORS.values()}


class ModelError(UserError):
    """A model, or a folder with one, that cannot be used."""


def shipped_models() -> list[str]:
    """Names of the models that come with this package."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{CONFIG}"))


def default_captions(name: str) -> tuple[str, ...]:
    """The first captions of the list beside a shipped model, for callers without captions."""
    return tuple((SHIPPED / name / CAPTIONS).read_text(encoding="utf-8").splitlines()[:12])


def find_folder(name_or_folder: str | os.PathLike) -> Path:
    """Returns the folder of a shipped model, else the folder of that path.

    Raises:
      ModelError: if there is neither; the message lists the shipped models.
    """
    if name_or_folder in shipped_models():
        return SHIPPED / name_or_folder
    folder = Path(name_or_folder)
    if (folder / CONFIG).is_file():
        return folder
    if not folder.exists():
        for old in folder.parent.glob(f".{glob.escape(folder.name)}.*/old/{CONFIG}"):
            raise ModelError(
                f"saving {folder} was cut short; the model that was there is in {old.parent}, the "
                f"new one in {old.parent.with_name('new')}; move one of them back"
            )
    names = ", ".join(shipped_models()) or "none in this installation"
    problem = f"has no {CONFIG}" if folder.is_dir() else "is neither a shipped model nor a folder"
    raise ModelError(f"{str(name_or_folder)!r} {problem}; shipped models: {names}")


def read_config(folder: Path) -> dict[str, Any]:
    """Reads config.json.

    Raises:
      ModelError: if it is no JSON object, or of a format this version does not know.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        version = config["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is damaged ({error!r}); restore it") from error
    if version != FORMAT:
        raise ModelError(
            f"{path} has format {version}, but this dalle_jax reads format {FORMAT}; "
            "install the version that wrote it"
        )
    return config


def config_from_fields(cls: type, fields: Any, path: Path) -> Any:
    """Builds a config dataclass from its saved fields; ModelError if they do not fit."""
    if isinstance(fields, dict):  # folders of version 0.1 have a field for the kind of prior
        style = fields.pop("style", None)
        if style == "progressive":
            raise ModelError(
                f"{path / CONFIG} describes a progressive prior of version 0.1, which this version "
                'cannot run; train it again, or take the entry "progressive" out of the file'
            )
    try:  # JSON has lists, configs have tuples
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelError(
            f"{path / CONFIG} does not describe a {cls.__name__} of this version: {error}"
        ) from error


def read_texts(folder: Path) -> dict[str, str]:
    """Reads card and license, if they exist; ModelError if they are not in UTF-8."""
    texts = {"card": folder / CARD, "license": folder / LICENSE}
    try:
        return {k: path.read_text(encoding="utf-8") for k, path in texts.items() if path.is_file()}
    except UnicodeDecodeError as error:
        raise ModelError(f"card or license in {folder} is not in UTF-8 ({error})") from error


def write_texts(folder: Path, *, card: str, license: str) -> None:
    """Writes card and license, unless they are empty."""
    for text, file in ((card, CARD), (license, LICENSE)):
        if text:
            (folder / file).write_text(text, encoding="utf-8")


def write_config(folder: Path, **fields: Any) -> None:
    """Writes config.json; dataclasses among the fields become objects."""
    plain = {
        name: dataclasses.asdict(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type)
        else value
        for name, value in fields.items()
    }
    text = json.dumps({"format": FORMAT, **plain}, indent=2)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def copy_other_priors(old: Path, new: Path) -> None:
    """Copies the priors that an older model folder has for the same codec and tokenizer."""
    before, now = read_config(old), read_config(new)
    of_codes = (*CODECS, "tokenizer")
    if any(before["fingerprints"].get(x) != now["fingerprints"].get(x) for x in of_codes):
        return
    fingerprints = before["fingerprints"] | now.pop("fingerprints")
    for part, file in PRIORS.items():
        if before.get(part) is not None and now.get(part) is None:
            shutil.copyfile(old / file, new / file)
            now[part] = before[part]
    del now["format"]
    write_config(new, **now, fingerprints=fingerprints)


@contextmanager
def replace_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Yields an empty folder, which replaces `folder` if no error is raised.

    Files of the old folder that no model writes are kept. After an error the old model is in its
    place, or both models are in a folder beside it, which the error names.

    Raises:
      ModelError: if the folder holds other files, or if neither model could be put in its place.
    """
    target = Path(folder).resolve()
    if target.exists() and not (target / CONFIG).is_file() and not _is_empty(target):
        raise ModelError(f"{target} holds other files; choose a new folder for the model")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    new, old = temporary / "new", temporary / "old"
    try:
        new.mkdir()  # unlike mkdtemp it lets others read the folder
        yield new
        if target.exists():
            _keep_other_files(target, new)
            os.replace(target, old)
        os.replace(new, target)
    finally:
        if old.exists() and new.exists():  # stopped between the two
            try:
                os.replace(old, target)
            except OSError as error:
                raise ModelError(
                    f"{target} could not be replaced ({error.strerror}); the model that was there "
                    f"is in {old}, the new one in {new}; move one of them back"
                ) from error
        shutil.rmtree(temporary)


def _keep_other_files(old: Path, new: Path) -> None:
    """Links or copies files that are not of a model from one model folder to another."""
    for path in old.rglob("*"):
        place = path.relative_to(old)
        if place.name in _OWN and place.parts[:-1] in ((), (CLIP_FOLDER,)):
            continue
        copy = new / place
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            copy.symlink_to(path.readlink())
        elif path.is_file():
            try:
                os.link(path, copy)
            except OSError:  # a file system without hard links
                shutil.copy2(path, copy)


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
