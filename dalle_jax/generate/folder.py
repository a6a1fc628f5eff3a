"""A model folder: everything one model needs, its licence included, in one place.

    config.json              format, name, px, sizes of the networks, fingerprints of the files, and
                             the type that kernels are stored in
    dvae.safetensors         weights, nested names joined by "/"; kernels in bfloat16, the rest and
                             the kernels next to codes and tokens in float32; of imported models all
                             in float32, as others published them
    vqgan.safetensors        in place of it, if pictures become codes by a VQ-GAN; or
                             maskgit_vqgan.safetensors
    prior.safetensors        the same, of the autoregressive prior; optional
    progressive.safetensors  of the progressive prior; optional
    tokenizer.model          SentencePiece; there if a prior is
    clip                     folder of the CLIP that ranks its pictures (`generate.clip`); optional
    README.md, LICENSE       model card with the attribution of the data, and terms of the weights

A prior knows codes and ids only by number, so config.json names the very dVAE or VQ-GAN, and the
tokenizer, that it was trained with, and any other is refused.
"""

import dataclasses
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import flax.traverse_util
import ml_dtypes
import numpy as np
import safetensors

from dalle_jax.errors import UserError

FORMAT = 1
SHIPPED = Path(__file__).parent.parent / "pretrained"
CONFIG, TOKENIZER = "config.json", "tokenizer.model"
CODECS = {kind: f"{kind}.safetensors" for kind in ("dvae", "vqgan", "maskgit_vqgan")}
"""Parts that turn pictures into codes and back, one of which a model has, and their files."""
PRIORS = {"prior": "prior.safetensors", "progressive": "progressive.safetensors"}
"""Parts that draw codes, and their files."""
CARD, LICENSE = "README.md", "LICENSE"
CLIP, CLIP_FOLDER = "clip.safetensors", "clip"
CAPTIONS = "captions.txt"  # beside a shipped model

_OWN = {CONFIG, TOKENIZER, CARD, LICENSE, CLIP, *CODECS.values(), *PRIORS.values()}

# The ends of the network, where rounding would choose other codes: with all kernels in bfloat16
# the shipped dVAE kept the codes of 46 % of the cells, with these in float32 of 99 %.
EXACT = ("encoder/output/", "decoder/input/", "encoder/conv_out/", "quant_conv/", "head/")

PIECE = 2**26  # bytes that are brought to the host at a time of what is spread over devices
_DTYPES = {"float32": "F32", "bfloat16": "BF16"}  # names in safetensors

Tensors = dict[str, Any]
"""Arrays of numpy, or of JAX where they are spread over devices."""


class ModelError(UserError):
    """A model, or a folder with one, that cannot be used, said in one sentence."""


def shipped() -> list[str]:
    """Names of the models that come with this package."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{CONFIG}"))


def listed(name: str) -> tuple[str, ...]:
    """The first captions of the list beside a shipped model: what it draws if told nothing."""
    return tuple((SHIPPED / name / CAPTIONS).read_text(encoding="utf-8").splitlines()[:6])


def find(name_or_folder: str | os.PathLike) -> Path:
    """Returns the folder of a shipped model, else the folder of that path.

    Raises:
      ModelError: if there is neither; the message lists the shipped models.
    """
    if name_or_folder in shipped():
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
    names = ", ".join(shipped()) or "none in this installation"
    problem = f"has no {CONFIG}" if folder.is_dir() else "is neither a shipped model nor a folder"
    raise ModelError(f"{str(name_or_folder)!r} {problem}; shipped models: {names}")


def flat(params: Any) -> dict[str, Any]:
    """Leaves of nested parameters under the names they are stored by, sorted."""
    return dict(sorted(flax.traverse_util.flatten_dict(params, sep="/").items()))


Dtype = Literal["float32", "bfloat16"]


def to_tensors(params: Any, *, kernels: Dtype = "bfloat16") -> Tensors:
    """Flattens nested parameters and rounds the kernels to bfloat16, as they are stored.

    With `kernels` in float32 nothing is rounded. Arrays of JAX stay where they lie, spread over
    devices if they are.

    Source: Ramesh et al. 2021, appendix D, keeps gains, biases, embeddings and unembeddings in
    float32, and the released dVAE its convolutions next to the codes.
    """

    def rounded(name, array):
        exact = kernels == "float32" or not name.endswith("kernel") or name.startswith(EXACT)
        dtype = np.dtype(np.float32 if exact else ml_dtypes.bfloat16)
        return array.astype(dtype) if is_spread(array) else np.asarray(array, dtype)

    return {name: rounded(name, array) for name, array in flat(params).items()}


def to_params(tensors: Tensors, *, dtype: Dtype = "float32") -> Any:
    """Nests tensors again and widens them to float32, or leaves the kernels in bfloat16."""
    if dtype == "float32":
        tensors = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    return flax.traverse_util.unflatten_dict(tensors, sep="/")


def fingerprint(tensors: Tensors) -> str:
    """Sha256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        for piece in pieces(tensor):
            digest.update(piece.tobytes())
    return digest.hexdigest()


def pieces(tensor: Any) -> Iterator[np.ndarray]:
    """Gives a tensor on the host, a few of its rows at a time if it is spread over devices.

    If these are of several processes, all of them have to ask.
    """
    if not is_spread(tensor):
        yield np.ascontiguousarray(tensor)
        return
    import jax  # late, as the names of models are listed without it
    from jax.experimental import multihost_utils

    rows = len(tensor)
    most = max(PIECE * rows // tensor.nbytes, 1)
    for start in range(0, rows, most):
        # The index is no constant, so that one program cuts all pieces of a length.
        piece = jax.lax.dynamic_slice_in_dim(tensor, start, min(most, rows - start))
        if not piece.is_fully_addressable:
            piece = multihost_utils.process_allgather(piece, tiled=True)
        yield np.asarray(piece)


def is_spread(array: Any) -> bool:
    """Whether it is an array of JAX of which devices have different parts."""
    return not getattr(array, "is_fully_replicated", True)


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


def sizes(cls: type, fields: Any, path: Path) -> Any:
    """Makes a config dataclass from its saved fields; ModelError if they do not fit."""
    if isinstance(fields, dict):  # folders of version 0.1 name the kind of a prior in it
        style = fields.pop("style", None)
        if style == "progressive":
            raise ModelError(
                f"{path / CONFIG} describes a progressive prior of version 0.1, which this version "
                'cannot run; train it again, or take the entry "progressive" out of the file'
            )
    try:  # of sequences JSON knows lists alone, configs tuples
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelError(
            f"{path / CONFIG} does not describe a {cls.__name__} of this version: {error}"
        ) from error


def read_tensors(path: Path) -> Tensors:
    """Reads a safetensors file; ModelError if it is missing or cut short."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelError(
            f"cannot read the weights {path}: missing or damaged ({error}); restore the file"
        ) from error


def read_texts(folder: Path) -> dict[str, str]:
    """Reads what there is of card and license; ModelError if it is not in UTF-8."""
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
        name: dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
        for name, value in fields.items()
    }
    text = json.dumps({"format": FORMAT, **plain}, indent=2)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def write_tensors(path: Path | None, tensors: Tensors) -> None:
    """Writes a safetensors file, piece by piece: the library needs all bytes at once.

    Args:
      path: of the file; None in a process that has a part of the tensors, while another writes.
      tensors: arrays on the host, or spread over devices.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header, end = {}, 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(os.devnull if path is None else path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for piece in pieces(tensors[name]):
                file.write(piece.tobytes())


def take_over(old: Path, new: Path) -> None:
    """Copies into a model folder what an older one has of other priors for the same codes."""
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
def replacing(folder: str | os.PathLike) -> Iterator[Path]:
    """Gives an empty folder to fill, which takes the place of `folder` when all went well.

    Files of the old folder that no model writes come along. Whatever happens in between, the old
    model stays in its place, or both models stay in a folder beside it, which the error names.

    Raises:
      ModelError: if something is there that is not a model folder; it is left alone. If neither
        model could be put in its place.
    """
    target = Path(folder).resolve()
    if target.exists() and not (target / CONFIG).is_file() and not _is_empty(target):
        raise ModelError(f"{target} holds other files; choose a new folder for the model")
    target.parent.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    new, old = workplace / "new", workplace / "old"
    try:
        new.mkdir()  # unlike mkdtemp it lets others read the folder
        yield new
        if target.exists():
            _bring_along(target, new)
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
        shutil.rmtree(workplace)


def _bring_along(old: Path, new: Path) -> None:
    """Links or copies the files that are not of a model from one model folder to another."""
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
