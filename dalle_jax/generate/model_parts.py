"""The parts of a model and their folder: checked, loaded and saved as one.

Letters: R pixel side, G grid side, K codes.
"""

import copy
import os
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh

from dalle_jax.generate import model_folder as files
from dalle_jax.generate import tensor_file
from dalle_jax.generate.clip_scorer import Clip
from dalle_jax.generate.cost import announce
from dalle_jax.generate.image_codec import Codec
from dalle_jax.generate.model_folder import CLIP_FOLDER, ModelError
from dalle_jax.generate.part_checks import (
    CONFIGS,
    AnyPriorConfig,
    check_fingerprints,
    check_parts,
    check_tensors,
    prior_shapes,
)
from dalle_jax.generate.sampling import AS_TRAINED, SamplingConfig
from dalle_jax.generate.tensor_file import Dtype
from dalle_jax.models import codec as codecs
from dalle_jax.models.codec import CodecConfig
from dalle_jax.models.gpt_prior import GPTConfig
from dalle_jax.models.prior_config import PriorConfig
from dalle_jax.models.progressive_prior import ProgressiveConfig
from dalle_jax.models.seq2seq_prior import Seq2SeqConfig
from dalle_jax.text.bpe import Tokenizer
from dalle_jax.text.tokenizer_file import load_tokenizer

Priors = dict[str, tuple[AnyPriorConfig, Any]]
Parts = TypeVar("Parts", bound="ModelParts")


class ModelParts(Codec):
    """A codec (dVAE or VQ-GAN), optional priors with their tokenizer, and an optional CLIP.

    Weights are rounded as they are stored and widened to float32, so that a model samples the same
    images before it is saved and after it is loaded.
    """

    def __init__(
        self,
        *,
        name: str,
        px: int,
        codec: CodecConfig,
        codec_params: Any,
        prior: PriorConfig | None = None,
        prior_params: Any = None,
        progressive: ProgressiveConfig | None = None,
        progressive_params: Any = None,
        seq2seq: Seq2SeqConfig | None = None,
        seq2seq_params: Any = None,
        gpt: GPTConfig | None = None,
        gpt_params: Any = None,
        tokenizer: Tokenizer | None = None,
        clip: Clip | Path | None = None,
        card: str = "",
        license: str = "",
        recommended: SamplingConfig = SamplingConfig(),
        fingerprints: dict[str, str] | None = None,
        kernels: Dtype = "bfloat16",
        dtype: Dtype = "float32",
        mesh: Mesh | None = None,
        on_devices: bool = True,
    ):
        """Checks that the parts belong to each other.

        Args:
          name: a short name, for messages and reports.
          px: side R of its images, in pixels.
          codec: sizes of the dVAE or VQ-GAN.
          codec_params: its nested parameters.
          prior: sizes of the autoregressive prior; None for none.
          prior_params: its nested parameters.
          progressive: sizes of the progressive prior; None for none.
          progressive_params: its nested parameters.
          seq2seq: sizes of dalle-mini's prior, which samples code after code; None for none.
          seq2seq_params: its nested parameters.
          gpt: sizes of minDALL-E's or ruDALL-E's prior, which do so too; None for none.
          gpt_params: its nested parameters.
          tokenizer: the tokenizer that both were trained with.
          clip: ranks its images; a folder is loaded when the CLIP is first needed.
          card: text of the model card, Markdown, with the attribution of the data.
          license: text of the weights' licence.
          recommended: temperature, guidance and passes of revision that sample best, for callers
            who name none.
          fingerprints: of the parts that the prior was trained with; None for those of these parts.
          kernels: dtype that kernels are rounded to and stored in; float32 for imported models.
          dtype: of the priors' kernels and of their products; bfloat16 halves their memory.
          mesh: from `parallel.mesh.make_mesh`: devices that the priors' weights are sharded over;
            None for one device, or for the sharding that they have.
          on_devices: False leaves the priors' weights where they are, such as in files, for a model
            that is only saved.
        Raises:
          ModelError: if a part is missing, has other sizes, or does not belong.
        """
        super().__init__(px=px, codec=codec, codec_params=codec_params, kernels=kernels)
        self.name = name
        self.tokenizer, self.card, self.license = tokenizer, card, license
        self.recommended = recommended
        if SamplingConfig().or_else(recommended) != recommended.or_else(SamplingConfig()):
            raise ModelError(
                f"model {name!r} recommends {recommended.describe()}, but a model can recommend "
                f"{', '.join(AS_TRAINED)} alone"
            )
        self._clip = clip
        self._rounded = dtype != "float32" == kernels
        priors: Priors = {}
        if prior is not None:
            priors["prior"] = prior, prior_params
        if progressive is not None:
            priors["progressive"] = progressive, progressive_params
        if seq2seq is not None:
            priors["seq2seq"] = seq2seq, seq2seq_params
        if gpt is not None:
            priors["gpt"] = gpt, gpt_params
        check_parts(self, {part: sizes for part, (sizes, _) in priors.items()})

        self.priors: Priors = {}
        """Sizes and parameters of "prior", "progressive", "seq2seq" and "gpt", those there are."""
        for part, (sizes, params) in priors.items():
            assert tokenizer is not None  # check_parts has seen to it
            tensors = tensor_file.to_tensors(params, kernels=kernels)
            check_tensors(part, tensors, prior_shapes(sizes))
            if on_devices:
                self.fingerprints[part], held = tensor_file.place(tensors, dtype=dtype, mesh=mesh)
            else:
                self.fingerprints[part] = tensor_file.fingerprint(tensors)
                held = tensor_file.nest(tensors)
            self.fingerprints["tokenizer"] = tokenizer.fingerprint
            self.priors[part] = sizes, held
        check_fingerprints(name, self.fingerprints, fingerprints or {})

    @classmethod
    def load(
        cls: type[Parts],
        name_or_folder: str | os.PathLike,
        *,
        dtype: Dtype = "float32",
        mesh: Mesh | None = None,
    ) -> Parts:
        """Opens a shipped model by its name, else a model folder by its path.

        Args:
          name_or_folder: of the model.
          dtype: of the priors' kernels, float32 or bfloat16.
          mesh: devices that the priors' weights are sharded over; None for one device.
        Raises:
          ModelError: if there is no such model, it does not fit into memory, or a file is damaged
            or belongs to another model.
        """
        folder = files.find_folder(name_or_folder)
        config = files.read_config(folder)
        if "clip" in config:
            raise ModelError(f"{folder} holds a CLIP, which cannot sample; open it with Clip.load")
        try:
            parts = {"name": config["name"], "px": config["px"]}
            fingerprints = config["fingerprints"]
            kind = next((kind for kind in files.CODECS if kind in config), "dvae")
            parts["codec"] = files.config_from_fields(codecs.KINDS[kind], config[kind], folder)
        except KeyError as error:
            raise ModelError(f"{folder / files.CONFIG} lacks {error}; restore it") from error
        weights = tensor_file.read_tensors(folder / files.CODECS[kind])
        parts["codec_params"] = tensor_file.nest(weights)
        for part, file in files.PRIORS.items():
            if config.get(part) is not None:
                parts[part] = files.config_from_fields(CONFIGS[part], config[part], folder)
                weights = tensor_file.read_tensors(folder / file)
                parts[f"{part}_params"] = tensor_file.nest(weights)
                parts["tokenizer"] = load_tokenizer(folder / files.TOKENIZER)
        if (folder / CLIP_FOLDER / files.CONFIG).is_file():
            parts["clip"] = folder / CLIP_FOLDER
        parts |= files.read_texts(folder)
        if mesh is None:
            priors = {p: (parts[p], parts[f"{p}_params"]) for p in files.PRIORS if p in parts}
            announce(
                parts["name"],
                parts["codec"],
                parts["codec_params"],
                priors,
                px=parts["px"],
                dtype=dtype,
            )
        recommended = files.config_from_fields(SamplingConfig, config.get("sampling", {}), folder)
        return cls(
            fingerprints=fingerprints,
            recommended=recommended,
            kernels=config.get("kernels", "bfloat16"),
            dtype=dtype,
            mesh=mesh,
            **parts,
        )

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the model folder under a temporary name and renames it; replaces an older model.

        Raises:
          ModelError: if the folder holds anything else.
        """
        with files.replace_folder(folder) as new:
            self.write(new)

    def write(self, folder: Path | None) -> None:
        """Writes the files into an empty folder.

        If weights are sharded over several processes, all of them call this: one with the folder,
        the others with None.

        Raises:
          ModelError: if its priors hold less than their files did.
        """
        if self._rounded and self.priors:
            raise ModelError(
                f"model {self.name!r} was stored in float32 and is in memory in bfloat16; open it "
                "in float32 to save it"
            )
        for part, (_, params) in self.priors.items():
            file = None if folder is None else folder / files.PRIORS[part]
            tensor_file.write_tensors(file, tensor_file.to_tensors(params, kernels=self.kernels))
        if folder is None:
            return
        files.write_config(
            folder,
            name=self.name,
            px=self.px,
            **{self.kind: self.codec},
            **{part: sizes for part, (sizes, _) in self.priors.items()},
            fingerprints=self.fingerprints,
            sampling=self.recommended.recommendations(),
            kernels=self.kernels,
        )
        codec = tensor_file.to_tensors(self.codec_params, kernels=self.kernels)
        tensor_file.write_tensors(folder / files.CODECS[self.kind], codec)
        if self.priors and self.tokenizer is not None:
            self.tokenizer.save(folder / files.TOKENIZER)
        if self.clip is not None:
            (folder / CLIP_FOLDER).mkdir()
            self.clip.write(folder / CLIP_FOLDER)
        files.write_texts(folder, card=self.card, license=self.license)

    @property
    def clip(self) -> Clip | None:
        """The CLIP that ranks its images, if it has one."""
        if isinstance(self._clip, Path):
            self._clip = Clip.load(self._clip)
        return self._clip

    def with_clip(self: Parts, clip: Clip) -> Parts:
        """Returns this model with another CLIP; weights are shared."""
        other = copy.copy(self)
        other._clip = clip
        return other

    def __repr__(self):
        sizes = f"{self.px} px, {self.grid} x {self.grid} of {self.codec.codes} codes"
        parts = [
            f"{part} of {sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6:.1f}M parameters"
            for part, (_, params) in self.priors.items()
        ]
        return f"{type(self).__name__}({self.name!r}: {sizes}, {', '.join(parts) or 'no prior'})"
