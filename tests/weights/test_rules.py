"""Rules on a written-out small network."""

import ml_dtypes
import numpy as np
import pytest

from dalle_jax.weights.errors import WeightsError
from dalle_jax.weights.rules import CONV, MATRIX, Rule, to_ours, to_theirs

SHAPES = {"in/kernel": (3, 3, 2, 4), "in/bias": (4,), "qkv/kernel": (2, 4, 3, 2, 2)}
RULES = (
    Rule("conv.weight", "in/kernel", CONV),
    Rule("conv.bias", "in/bias"),
    *(
        Rule(f"layers.{{i}}.{name}.weight", f"qkv/kernel[{{i}},:,{n}]", MATRIX)
        for n, name in enumerate("qkv")
    ),
    Rule("loss.{*}"),
)


def tensors():
    draw = np.random.default_rng(0).normal
    return {
        "conv.weight": draw(size=(4, 2, 3, 3)).astype(np.float32),
        "conv.bias": draw(size=4).astype(np.float16),
        "loss.any.thing": np.zeros(2),
        **{
            f"layers.{i}.{name}.weight": draw(size=(4, 4)).astype(ml_dtypes.bfloat16)
            for i in range(2)
            for name in "qkv"
        },
    }


def test_tensors_are_turned_stacked_and_cut_into_heads():
    theirs = tensors()
    ours = to_ours(theirs, RULES, SHAPES)
    assert {name: array.shape for name, array in ours.items()} == SHAPES
    assert all(array.dtype == np.float32 for array in ours.values())
    assert ours["in/kernel"][2, 1, 0, 3] == theirs["conv.weight"][3, 0, 2, 1]
    # layer 1, input 3, keys, head 1, second of its numbers: row 3 of theirs
    assert ours["qkv/kernel"][1, 3, 1, 1, 1] == theirs["layers.1.k.weight"][3, 3]
    assert ours["qkv/kernel"][1, 2, 2, 0, 1] == theirs["layers.1.v.weight"][1, 2]


def test_everything_that_does_not_fit_is_listed_at_once():
    theirs = tensors() | {"extra": np.zeros(1), "layers.2.q.weight": np.zeros((4, 4), np.float32)}
    theirs["conv.weight"] = theirs["conv.weight"].transpose(1, 0, 2, 3)
    theirs["conv.bias"] = np.arange(4)
    del theirs["layers.0.v.weight"]
    with pytest.raises(WeightsError) as error:
        to_ours(theirs, RULES, SHAPES)
    for part in (
        "no rule for extra",
        "conv.weight has shape [2, 4, 3, 3], which becomes [3, 3, 4, 2], wanted [3, 3, 2, 4]",
        "conv.bias holds int64, wanted floating-point numbers",
        "layers.2.q.weight has no place: ours is [2, 4, 3, 2, 2]",
        "nothing in the files for our in/kernel, in/bias, qkv/kernel",
    ):
        assert part in str(error.value)


def test_axes_are_joined_or_split_but_never_mixed():
    same = (Rule("a", "a"),)
    tensor = np.arange(36, dtype=np.float32)
    split = to_ours({"a": tensor.reshape(4, 9)}, same, {"a": (2, 2, 9)})["a"]
    split = np.asarray(split)
    np.testing.assert_array_equal(split, tensor.reshape(2, 2, 9))
    assert to_theirs({"a": split}, same)["a"][1, 0, 1] == 19
    with pytest.raises(WeightsError, match=r"a has shape \[4, 9\], which becomes"):
        to_ours({"a": tensor.reshape(4, 9)}, same, {"a": (6, 6)})


def test_whole_arrays_go_back_bit_for_bit():
    theirs = {name: tensors()[name].astype(np.float32) for name in ("conv.weight", "conv.bias")}
    shapes = {name: SHAPES[name] for name in ("in/kernel", "in/bias")}
    ours = {name: np.asarray(x) for name, x in to_ours(theirs, RULES, shapes).items()}
    back = to_theirs(ours, RULES)
    assert back.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_array_equal(back[name], theirs[name])
    with pytest.raises(WeightsError, match="no place for our other"):
        to_theirs({"other": np.zeros(1)}, RULES)


def test_two_tensors_for_one_place_are_refused():
    rules = (Rule("a", "x"), Rule("b", "x"))
    with pytest.raises(WeightsError, match="no rule for b"):
        to_ours(dict.fromkeys("ab", np.zeros(2, np.float32)), rules, {"x": (2,)})


def test_memory_is_taken_only_for_what_the_files_hold():
    huge = {"qkv/kernel": (10**9, 4, 3, 2, 2)}  # 192 GB
    part = {"layers.0.q.weight": np.zeros((4, 4), np.float32)}
    with pytest.raises(WeightsError, match="nothing in the files for our qkv/kernel"):
        to_ours(part, RULES, huge)


def test_an_array_is_made_when_it_is_used_and_not_before():
    vast = np.broadcast_to(np.float32(3), (10**6, 10**6))  # 4 TB
    ours = to_ours(
        {"a": vast, "b": np.ones(2, np.float32)},
        (Rule("a", "a"), Rule("b", "b")),
        {"a": vast.shape, "b": (2,)},
    )
    assert ours["a"].nbytes == 4 * 10**12
    np.testing.assert_array_equal(ours["b"], [1, 1])
