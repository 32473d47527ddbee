"""What goes into the page comes out of it, and text stays text."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tipdistill.report.pack import Pack, script_json, short_floats


def test_arrays_come_back(unpack):
    draw, pack = np.random.default_rng(0), Pack()
    arrays = {
        "u8": draw.integers(0, 2**8, 7),
        "u16": draw.integers(0, 2**16, (3, 5)),
        "u32": draw.integers(0, 2**32, 11),
        "f32": draw.normal(size=13).astype(np.float32),
    }
    places = {kind: pack.add(values, kind) for kind, values in arrays.items()} | {"empty": pack.add(np.zeros(0), "u16")}
    for kind, values in arrays.items():
        assert (unpack(pack, places[kind]) == values.ravel()).all()
    assert len(unpack(pack, places["empty"])) == 0


def test_a_value_that_does_not_fit_is_our_mistake():
    with pytest.raises(AssertionError, match="do not fit into u8"):
        Pack().add(np.array([256]), "u8")


@pytest.mark.parametrize("bits", [7, 11])
def test_short_floats_keep_their_digits(bits):
    draw = np.random.default_rng(0)
    values = np.concatenate(
        [draw.normal(size=1000) * 10.0 ** draw.integers(-20, 20, 1000), [0.0, 1.0, -1.0, 1.9999999]]
    )
    values = values.astype(np.float32)
    short = short_floats(values, bits)
    assert (np.abs(short - values) <= 2.0 ** -(bits + 1) * np.abs(values)).all()
    assert (short.view(np.uint32) & ((1 << (23 - bits)) - 1) == 0).all()


@given(st.text() | st.just("</script><!--<script>\u2028&"))
def test_json_in_a_script_is_inert_and_the_same(text):
    written = script_json({text: [text]})
    assert not set("<>&\u2028\u2029") & set(written)
    assert json.loads(written) == {text: [text]}


def test_half_a_surrogate_pair_is_written_as_a_replacement():
    assert json.loads(script_json("a\ud83d")).encode("utf-8") == "a\ufffd".encode()


def test_what_json_has_no_word_for_is_refused():
    with pytest.raises(ValueError, match="JSON compliant"):
        script_json(float("nan"))
