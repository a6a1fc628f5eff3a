"""How much an evaluation samples."""

import dataclasses
from dataclasses import dataclass

from dalle_jax.generate.sampling import SamplingConfig

STUDIES = ("blur", "sampling", "rerank", "composition", "retrieval")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How much to sample for each part of a report; `quick_config` is the small one."""

    captions: int | None = None
    """Captions of the suite for the main metrics; None for all."""
    sampling_captions: int | None = None
    """Captions for each setting of the sampling study; None for as many as above."""
    temperatures: tuple[float, ...] = (0.5, 0.7, 0.85, 1.0)
    """Settings of the sampling study; one option changes at a time."""
    top_ps: tuple[float, ...] = (0.8, 0.9, 0.95)
    """The same."""
    guidances: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0)
    """The same."""
    rerank_captions: int = 64
    """Captions of the rerank study."""
    rerank_samples: int = 512
    """Images of each of them."""
    composition_cases: int | None = None
    """Held-out cases of each family of the composition study; None for all."""
    composition_samples: int = 4
    """Images of each of them."""
    retrieval_captions: int | None = 256
    """Captions of each group of the retrieval study; None for all."""
    retrieval_samples: int = 8
    """Images of each of them."""

    def settings(self, base: SamplingConfig) -> list[SamplingConfig]:
        """Settings of the sampling study, each once: `base`, then one change at a time.

        Args:
          base: with a scale of guidance.

        >>> config = EvaluationConfig(temperatures=(0.5,), top_ps=(0.9,), guidances=())
        >>> [sampling.describe() for sampling in config.settings(SamplingConfig(guidance=1))]
        ['as trained', 'temperature 0.5', 'top_p 0.9']
        """
        values = {
            "temperature": self.temperatures,
            "top_p": self.top_ps,
            "guidance": self.guidances,
        }
        changed = [
            dataclasses.replace(base, **{name: value}) for name in values for value in values[name]
        ]
        return list(dict.fromkeys([base, *changed]))


def quick_config() -> EvaluationConfig:
    """Some minutes on two cores with a shipped model."""
    return EvaluationConfig(
        captions=256,
        sampling_captions=128,
        temperatures=(0.7, 1.0),
        top_ps=(0.9,),
        guidances=(1.0, 2.0),
        rerank_captions=16,
        rerank_samples=32,
        composition_cases=40,
        composition_samples=2,
        retrieval_captions=32,
        retrieval_samples=4,
    )
