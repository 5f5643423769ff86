"""Messages between devices and server: all that is allowed arrives, nothing else."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hsee_jax.deployment.protocol import (
    Refusal,
    check_finite,
    check_labels,
    form_of,
    named,
    pack,
    size_limit,
    split,
    tree_from,
    unpack,
    with_rows,
)

DTYPES = ("float32", "float16", "int8", "uint8", "int32", "bool", "bfloat16")
SHAPE = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)


@st.composite
def tensors(draw):
    """Some arrays by name."""
    found = {}
    for name in draw(st.lists(st.text(min_size=1, max_size=9), unique=True)):
        dtype, shape = draw(st.sampled_from(DTYPES)), draw(SHAPE)
        size = int(np.prod(shape))
        bits = draw(st.binary(min_size=4 * size, max_size=4 * size))
        ints = np.frombuffer(bits, np.uint8)[:size].reshape(shape)
        found[name] = ints.astype(jnp.dtype(dtype))
    found.pop("__metadata__", None)  # safetensors keeps this name for itself
    return found


def is_refused(message, form):
    with pytest.raises(Refusal) as refusal:
        fields, data = split(message, ("round",), limit=size_limit(form))
        unpack(data, form)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@settings(max_examples=60, deadline=None)
@given(tensors(), st.integers(-1, 2**31 - 1))
def test_what_is_packed_is_unpacked(found, number):
    message = pack({"round": number}, found)
    form = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in found.items()}
    fields, data = split(message, ("round",), limit=size_limit(form))
    assert fields == {"round": number}
    result = unpack(data, form)
    assert list(result) == list(found)
    for name, array in found.items():
        assert result[name].dtype == array.dtype
        np.testing.assert_array_equal(result[name], array)


FORM = {
    "inputs": jax.ShapeDtypeStruct((3, 2), np.dtype(np.float32)),
    "labels": jax.ShapeDtypeStruct((3,), np.dtype(np.int32)),
}
GOOD = pack(
    {"round": 1},
    {"inputs": np.ones((3, 2), np.float32), "labels": np.zeros(3, np.int32)},
)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
@example(b"")
@example(b'{"round": 1}\n')
@example(b"[" * 3000 + b"\n")
@example(b'{"round": 1}\n' + (2**40).to_bytes(8, "little") + b"{}")
@example(b'{"round": 1}\n' + b"\x02" + bytes(7) + b"{}")
def test_bytes_that_are_no_message_are_refused(message):
    is_refused(message, FORM)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_a_changed_byte_is_refused_or_changes_a_value_only(place, change):
    """Nothing else than `Refusal` is raised, and the form is what it was."""
    changed = bytearray(GOOD)
    changed[place] ^= change
    try:
        fields, data = split(bytes(changed), ("round",), limit=size_limit(FORM))
        found = unpack(data, FORM)
    except Refusal:
        return
    assert form_of(found) == form_of(unpack(GOOD.partition(b"\n")[2], FORM))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"inputs": np.ones((3, 3), np.float32)}, "inputs: float32[3, 3]"),
        ({"inputs": np.ones((3, 2), np.float64)}, "inputs: float64[3, 2]"),
        ({"inputs": np.ones((3, 2), np.int32)}, "inputs: int32[3, 2]"),
        ({"labels": np.zeros((3, 1), np.int32)}, "labels: int32[3, 1]"),
        ({"more": np.zeros(1, np.int32)}, "tensors: more is missing or one too many"),
        ({"more": np.zeros(10**6, np.int8)}, "size: "),
    ],
)
def test_another_form_is_refused(changes, reason):
    good = unpack(GOOD.partition(b"\n")[2], FORM)
    assert reason in is_refused(pack({"round": 1}, good | changes), FORM)
    assert "labels is missing" in is_refused(
        pack({"round": 1}, {"inputs": good["inputs"]}), FORM
    )


@pytest.mark.parametrize(
    "line",
    [
        {"round": 1, "step": 0},
        {},
        {"round": 2**31},
        {"round": -2},
        {"round": 1.0},
        {"round": True},
        {"round": None},
        [1],
    ],
)
def test_other_fields_are_refused(line):
    is_refused(json.dumps(line).encode() + b"\n", {})


def test_names_that_arrive_are_fit_for_a_log():
    message = pack({"round": 1}, {"\x1b[31m\n" + "x" * 400: np.zeros(1, np.int8)})
    assert "tensors: ?[31m?xxx" in is_refused(message, FORM)


def test_values_are_checked():
    check_labels(np.array([0, 2], np.int32), num_classes=3)
    check_labels(np.zeros(0, np.int32), num_classes=3)
    for labels in ([-1, 0], [0, 3]):
        with pytest.raises(Refusal, match="labels: from"):
            check_labels(np.array(labels, np.int32), num_classes=3)
    codes = np.full(3, 127, np.int8)
    check_finite({"codes": codes, "step": np.array([9.0], np.float32)}, bound=10)
    for value in (np.nan, np.inf, -np.inf, 11.0, -11.0):
        for dtype in (np.float32, np.float16, jnp.bfloat16):
            with pytest.raises(Refusal, match="step: a value of"):
                check_finite({"step": np.array([0, value], dtype)}, bound=10)


def test_a_tree_becomes_tensors_and_a_tree_again():
    tree = {"a": [np.ones(2), None], "b": (np.zeros((2, 3)),)}
    found = named(tree, "x")
    assert list(found) == ["x['a'][0]", "x['b'][0]"]
    back = tree_from(found, tree, "x")
    jax.tree.map(np.testing.assert_array_equal, tree, back)
    assert with_rows(form_of(tree), 7)["['b'][0]"].shape == (7, 3)
