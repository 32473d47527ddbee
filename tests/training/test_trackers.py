"""The map and the disputed tokens go to the trackers that show them, and to no other."""

import types

import numpy as np
import pytest
import torch

from tipdistill.records import About, RecordsWriter
from tipdistill.tasks.arithmetic import build_tokenizer
from tipdistill.training import trackers
from tipdistill.training.trackers import COLUMNS, MAP, TOKENS, disputed, show_records
from tipdistill.types import Rollout, Scored, TokenScores, TopTokens, Turn

DIGITS = (2, 3, 4, 16)


@pytest.fixture
def records(tmp_path):
    about = About("student", "teacher", vocabulary=18, retention=0.25)
    values = {name: torch.linspace(0.1, 1.0, 8) for name in about.fields()}
    values["reverse_kl"] = torch.tensor([0.1, 4.0, 0.2, 0.3, 2.0, 0.0, 0.0, 0.0])
    top = TopTokens(torch.full((8, 5), 2), torch.full((8, 5), 0.2))
    rollouts = [Rollout(number, "1+1=", (1, 10), DIGITS, finished=True) for number in range(2)]
    with RecordsWriter(tmp_path / "step-3", build_tokenizer(), about) as writer:
        writer.write(rollouts, Scored(TokenScores(**values), top, top))
    return tmp_path / "step-3"


def test_the_most_disputed_tokens_come_first_with_what_stood_before(records):
    rows = disputed(records)
    assert [row[COLUMNS.index("reverse_kl")] for row in rows] == sorted(
        (row[COLUMNS.index("reverse_kl")] for row in rows), reverse=True
    )
    assert len(rows) == 8
    # the second token of the first rollout, and the first of the second, before which nothing stands
    assert rows[0][:4] == [0, 1, "2", "3"]
    assert rows[1][:4] == [1, 0, "", "2"]
    assert rows[0][COLUMNS.index("kept")] is True
    assert rows[0][COLUMNS.index("teacher")] == "2 0.20"


def test_what_stood_before_ends_at_a_tools_result(tmp_path):
    about = About("student", "teacher", vocabulary=18)
    turns = Turn("student", 0, 1, "2"), Turn("tool", 1, 2, "34"), Turn("student", 3, 2, "5$")
    top = TopTokens(torch.full((3, 5), 2), torch.full((3, 5), 0.2))
    scores = TokenScores(**{name: torch.tensor([1.0, 2.0, 3.0]) for name in about.fields()})
    with RecordsWriter(tmp_path, build_tokenizer(), about) as writer:
        writer.write([Rollout(0, "1+1=", (1,), (2, 3, 4, 5, 16), True, turns, "answered")], Scored(scores, top, top))
    assert [row[:4] for row in disputed(tmp_path)] == [[0, 4, "5", "$"], [0, 3, "", "5"], [0, 0, "", "2"]]


class Sent(dict):
    """Stands for the module of a tracker, and keeps what is logged."""

    def __init__(self):
        self.logged = []
        self.Image = lambda path: ("image", path)
        self.Table = lambda **given: ("table", given)
        self.log = self.logged.append


def tracker(name, **attributes):
    return type(name, (), attributes)()


def test_each_tracker_is_sent_what_it_shows(records):
    wandb, trackio, text, images = Sent(), Sent(), [], []
    writer = types.SimpleNamespace(
        add_image=lambda *given, **named: images.append((given, named)),
        add_text=lambda *given: text.append(given),
        flush=lambda: None,
    )
    callbacks = [
        tracker("WandbCallback", _wandb=wandb, _initialized=True),
        tracker("TrackioCallback", _trackio=trackio, _initialized=True),
        tracker("TensorBoardCallback", tb_writer=writer),
        tracker("MLflowCallback", _initialized=True),
    ]
    show_records(callbacks, records, 3)
    path = str(records / trackers.MAP_FILE)
    (logged,) = wandb.logged
    assert logged[MAP] == ("image", path)
    assert logged[TOKENS][1]["columns"] == list(COLUMNS)
    assert len(logged[TOKENS][1]["data"]) == 8
    assert logged["train/global_step"] == 3
    assert list(trackio.logged[0][TOKENS][1]["dataframe"].columns) == list(COLUMNS)
    ((tag, pixels, step), named), (written,) = images[0], text
    assert (tag, step, named) == (MAP, 3, {"dataformats": "HWC"})
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3
    assert pixels.std() > 5  # a picture, and no blank
    assert written[0] == TOKENS
    assert written[1].count("\n") == 9


def test_a_tracker_that_fails_is_a_warning_and_the_next_is_sent(records, caplog):
    broken, wandb = Sent(), Sent()
    broken.log = lambda shown: 1 / 0
    show_records(
        [
            tracker("TrackioCallback", _trackio=broken, _initialized=True),
            tracker("WandbCallback", _wandb=wandb, _initialized=True),
        ],
        records,
        3,
    )
    assert "Step 3: TrackioCallback did not take the TIP map: ZeroDivisionError" in caplog.text
    assert len(wandb.logged) == 1


@pytest.mark.parametrize("callbacks", [[], [tracker("WandbCallback", _initialized=False)], [tracker("Printer")]])
def test_without_a_tracker_nothing_is_drawn(records, callbacks):
    show_records(callbacks, records, 3)
    assert not (records / trackers.MAP_FILE).exists()
