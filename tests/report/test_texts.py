"""Characters whose bytes are spread over tokens."""

import pytest

from tipdistill.report.texts import joined_texts

SMILE, WAVE = "🙂".encode(), "👋🏽".encode()


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ([None, None], {}),
        ([SMILE[:1], SMILE[1:2], SMILE[2:]], {0: "🙂", 1: "", 2: ""}),
        ([b" " + SMILE[:2], SMILE[2:], None], {0: " 🙂", 1: ""}),
        # the second token ends one character and begins the next
        ([SMILE[:3], SMILE[3:] + WAVE[:3], WAVE[3:]], {0: "🙂👋🏽", 1: "", 2: ""}),
        ([SMILE[:2], None, SMILE[2:]], {0: "⟨F0 9F⟩", 2: "⟨99 82⟩"}),
        ([SMILE[:2]], {0: "⟨F0 9F⟩"}),
        ([b"\xff", SMILE[:2], SMILE[2:]], {0: "⟨FF⟩", 1: "🙂", 2: ""}),
        ([SMILE[:2], SMILE[:2], SMILE[2:]], {0: "⟨F0 9F⟩", 1: "🙂", 2: ""}),
        # bytes that could go on, a part that is broken inside, and a whole one after it
        ([SMILE[:1], SMILE[1:] + b"\xff", SMILE[:3], SMILE[3:]], {0: "⟨F0⟩", 1: "⟨9F 99 82 FF⟩", 2: "🙂", 3: ""}),
        ([], {}),
    ],
)
def test_joined(raw, expected):
    assert joined_texts(raw) == expected
