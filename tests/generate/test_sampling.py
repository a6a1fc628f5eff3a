import dataclasses
import math

import numpy as np
import pytest

import dalle_jax
from dalle_jax.errors import UserError
from dalle_jax.generate.sampling import PROGRESSIVE_ONLY, SamplingConfig


def test_it_is_exported_and_frozen():
    assert dalle_jax.SamplingConfig is SamplingConfig
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingConfig().temperature = 2.0


def test_whole_and_numpy_numbers_become_plain_ones():
    config = SamplingConfig(temperature=0, guidance=np.float32(2), top_k=np.int64(5), top_p=1)
    plain = SamplingConfig(temperature=0.0, guidance=2.0, top_k=5, top_p=1.0)
    assert repr(config) == repr(plain)
    assert hash(config) == hash(plain)


def test_it_survives_a_round_trip_through_plain_fields():
    config = SamplingConfig(temperature=0.7, decoder="progressive", stages=8, revise=1)
    assert SamplingConfig(**dataclasses.asdict(config)) == config


def test_it_describes_what_is_not_at_its_default():
    assert SamplingConfig().describe() == "as trained"
    config = SamplingConfig(guidance=2, temperature=0.5)
    assert config.describe() == "temperature 0.5, guidance 2.0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.5}, r"temperature is -0.5, but must be 0 \(always the likeliest"),
        ({"temperature": math.nan}, "temperature is nan, but must be 0"),
        ({"temperature": math.inf}, "temperature is inf, but must be 0"),
        ({"temperature": "hot"}, "temperature is 'hot', but must be a number"),
        ({"choice_temperature": None}, "choice_temperature is None, but must be a number"),
        ({"top_k": 0}, "top_k is 0, but must be at least 1"),
        ({"top_k": 2.5}, "top_k is 2.5, but must be a whole number"),
        ({"top_k": True}, "top_k is True, but must be a whole number"),
        ({"top_p": 0.0}, "top_p is 0.0, but must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5, but must be above 0 and at most 1"),
        ({"top_p": math.nan}, "top_p is nan, but must be above 0 and at most 1"),
        ({"guidance": -1e300}, "guidance is -1e\\+300, but must be a number up to 1e\\+09"),
        ({"guidance": math.inf}, "guidance is inf, but must be a number up to 1e\\+09; 1 turns"),
        (
            {"decoder": "diffusion"},
            "decoder is 'diffusion', but must be autoregressive or jac",
        ),
        ({"stages": 0}, "stages is 0, but must be at least 1"),
        ({"schedule": None}, "schedule is None, but must be cosine or linear"),
        ({"order": "spiral"}, "order is 'spiral', but must be random or raster or dynamic or"),
        ({"choice_temperature": -1.0}, "choice_temperature is -1.0, but must be 0"),
        ({"revise": -1}, "revise is -1; it is a number of passes, 0 for none"),
    ],
)
def test_bad_options_say_what_is_allowed(options, message):
    with pytest.raises(UserError, match=message):
        SamplingConfig(**options)


OTHER = {"stages": 4, "schedule": "linear", "order": "raster", "choice_temperature": 2, "revise": 1}


@pytest.mark.parametrize("name", PROGRESSIVE_ONLY)
def test_the_autoregressive_decoder_refuses_choices_of_the_other_one(name):
    SamplingConfig(decoder="progressive", **{name: OTHER[name]})
    with pytest.raises(UserError, match=f"{name} is .*, but only the progressive decoder has it"):
        SamplingConfig(decoder="autoregressive", **{name: OTHER[name]})
