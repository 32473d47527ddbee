"""Token records held against each other."""

import pytest


def same_records(recorded, wanted):
    """Assert that every column of two tokens.parquet (as pandas) is the same, to the rounding of sums over float32."""
    assert list(recorded) == list(wanted)
    for name, column in wanted.items():
        if name.endswith("_top5"):
            for field in ("token_id", "token"):
                assert [[token[field] for token in row] for row in recorded[name]] == [
                    [token[field] for token in row] for row in column
                ]
            found, given = (
                [token["probability"] for row in rows for token in row] for rows in (recorded[name], column)
            )
            assert found == pytest.approx(given, rel=1e-4)
        elif column.dtype == "float32":
            # a score may be scaled by the range of all tokens, which enlarges what was rounded at 5 nats
            assert recorded[name].tolist() == pytest.approx(column.tolist(), rel=1e-4, abs=1e-5), name
        else:
            assert recorded[name].tolist() == column.tolist(), name
