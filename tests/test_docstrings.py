"""The examples in docstrings give what they say."""

import doctest
import importlib

import pytest

MODULES = (
    "evaluate.composition",
    "evaluate.evaluation_config",
    "generate.edit",
    "generate.logits",
    "generate.micro_batching",
    "generate.progressive_sampler",
    "generate.sampling",
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_say(name):
    result = doctest.testmod(importlib.import_module(f"dalle_jax.{name}"))
    assert result.attempted
    assert not result.failed
