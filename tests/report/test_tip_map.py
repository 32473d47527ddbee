"""The picture says what was computed, and is on the disk in full or not at all."""

import sys

import matplotlib as mpl
import pytest
import torch
from matplotlib.figure import Figure

from tipdistill import Selection, TokenScores, quadrants, select, tip_map
from tipdistill.select.quadrants import NAMES, quadrant_shares


def skewed_scores(tokens=4000, seed=0):
    """Most tokens certain and agreed, a few uncertain, a few wrong."""
    generator = torch.Generator().manual_seed(seed)
    entropy, divergence = torch.rand(2, tokens, generator=generator)
    return TokenScores(entropy_norm=entropy**8, reverse_kl=10 * divergence**12)


@pytest.fixture
def figures(monkeypatch):
    """Every figure that was saved."""
    saved, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (saved.append(self), save(self, *args, **kwargs))
    )
    return saved


def shown(figure):
    """The panel's blocks: tag → label → (length of the bar, figure beside it)."""
    side = next(axes for axes in figure.axes if any(text.get_text() == "tokens" for text in axes.texts))
    bars = {round(bar.get_y() + bar.get_height() / 2, 3): bar.get_width() for bar in side.patches}
    blocks, block = {}, {}
    for text in side.texts:
        _, height = text.get_position()
        height = round(height, 3)
        if text.get_fontweight() == "bold":
            block = blocks[text.get_text()] = {}
        elif height in bars and text.get_ha() == "right":
            label = text.get_text()
        elif height in bars:
            block[label] = (bars[height], text.get_text())
    return blocks


@pytest.mark.parametrize("thresholds", [{}, {"entropy_threshold": 0.4, "divergence_threshold": 1.0}])
def test_shares_in_the_figure_are_those_computed(figures, tmp_path, thresholds):
    scores = skewed_scores()
    picked = select(scores, "soft_or", 0.2)
    tip_map(scores, tmp_path / "map.png", selection=picked, **thresholds)
    blocks = shown(figures[0])
    quadrant = quadrants(scores, **thresholds)
    tokens, mass = quadrant_shares(quadrant), quadrant_shares(quadrant, scores.reverse_kl)
    for number in NAMES:
        block = blocks[f"Q{number}"]
        assert block["tokens"][0] == pytest.approx(tokens[number])
        assert block["divergence"][0] == pytest.approx(mass[number])
        assert block["kept"][0] == pytest.approx(picked.weight[quadrant == number].mean().item())
        for length, figure in block.values():
            assert float(figure.strip("<>%")) == pytest.approx(100 * length, abs=0.51)
    assert blocks["Kept"]["tokens"][0] == pytest.approx(0.2)
    caught = (scores.reverse_kl[picked.mask].sum() / scores.reverse_kl.sum()).item()
    assert blocks["Kept"]["divergence"][0] == pytest.approx(caught)


def test_the_map_counts_every_token_and_outlines_what_is_mostly_kept(figures, tmp_path):
    corner = TokenScores(
        entropy_norm=torch.tensor([0.0] * 60 + [1.0] * 40), reverse_kl=torch.tensor([1e-3] * 60 + [5.0] * 40)
    )
    kept = torch.tensor([True] * 20 + [False] * 40 + [True] * 30 + [False] * 10)
    tip_map(corner, tmp_path / "map.png", selection=Selection(kept, kept.float(), kept.float()))
    density, _, outline, inside = figures[0].axes[0].collections
    assert sorted(density.get_array().tolist()) == [40, 60]
    for collection in (outline, inside):  # the hexagon of 40 alone: of the other a third is kept
        assert len(collection.get_paths()) == 1
        assert collection.get_paths()[0].vertices[:, 0].mean() == pytest.approx(1.0, abs=0.05)
        assert collection.get_paths()[0].vertices[:, 1].mean() > 0


def test_borders_are_the_thresholds(figures, tmp_path):
    tip_map(skewed_scores(), tmp_path / "map.png", entropy_threshold=0.4, divergence_threshold=0.01)
    vertical, horizontal = figures[0].axes[0].lines
    assert set(vertical.get_xdata()) == {0.4}
    assert set(horizontal.get_ydata()) == {-2}  # log₁₀


def test_without_a_selection_nothing_is_said_of_one(figures, tmp_path):
    tip_map(skewed_scores(), tmp_path / "map.png", title="Title")
    blocks = shown(figures[0])
    assert set(blocks) == {"Q1", "Q2", "Q3", "Q4"}
    assert all(set(block) == {"tokens", "divergence"} for block in blocks.values())
    assert figures[0].axes[0].get_title(loc="left") == "Title"


@pytest.mark.parametrize(
    ("name", "head"), [("map.png", b"\x89PNG"), ("map.PNG", b"\x89PNG"), ("map.svg", b"<?xml"), ("map.pdf", b"%PDF")]
)
def test_the_suffix_decides_the_format(tmp_path, name, head):
    path = tip_map(skewed_scores(), tmp_path / "new" / "folder" / name)
    assert path == tmp_path / "new" / "folder" / name
    assert path.read_bytes().startswith(head)
    assert [file.name for file in path.parent.iterdir()] == [name]


def test_a_failure_leaves_the_old_picture_and_no_part_of_a_new_one(tmp_path, monkeypatch):
    path = tmp_path / "map.png"
    path.write_bytes(b"old")

    def fails_half_way(self, file, **kwargs):
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(Figure, "savefig", fails_half_way)
    with pytest.raises(OSError, match="no space left"):
        tip_map(skewed_scores(), path)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["map.png"]


def test_global_state_of_matplotlib_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    before = dict(dict.items(mpl.rcParams))  # read plainly: rcParams loads pyplot when asked for its backend
    tip_map(skewed_scores(), tmp_path / "map.png")
    assert dict(dict.items(mpl.rcParams)) == before
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize(
    "scores",
    [
        TokenScores(entropy_norm=torch.tensor([0.3]), reverse_kl=torch.tensor([0.2])),
        TokenScores(entropy_norm=torch.zeros(5), reverse_kl=torch.zeros(5)),
        TokenScores(entropy=torch.tensor([0.1, 3.0]), reverse_kl=torch.tensor([-1e-9, 1e4])),
        TokenScores(entropy_norm=torch.rand(9).bfloat16(), reverse_kl=torch.rand(9).requires_grad_()),
    ],
    ids=["one token", "all solved", "nats and extremes", "half precision and gradients"],
)
def test_small_and_degenerate_batches_are_drawn(scores, tmp_path):
    selection = select(scores.map(torch.Tensor.detach), "divergence", 0.5)
    assert tip_map(scores, tmp_path / "map.png", selection=selection).stat().st_size > 10_000


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        (TokenScores(entropy_norm=torch.zeros(0), reverse_kl=torch.zeros(0)), {}, "no token to draw"),
        (TokenScores(entropy_norm=torch.zeros(3)), {}, "statistic 'reverse_kl' was not computed"),
        (TokenScores(entropy_norm=torch.ones(1), reverse_kl=torch.tensor([torch.inf])), {}, "infinite"),
        (TokenScores(entropy_norm=torch.ones(1), reverse_kl=torch.tensor([torch.nan])), {}, "NaN"),
        (skewed_scores(9), {"selection": select(skewed_scores(8))}, "selection is of 8 tokens, the scores of 9"),
        (skewed_scores(9), {"divergence_threshold": 0.0}, "must be > 0 on a logarithmic axis"),
        (skewed_scores(9), {"entropy_threshold": 2.0}, r"entropy_threshold must be in \[0, 1\]"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_a_file_is_touched(scores, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tip_map(scores, tmp_path / "map.png", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_suffix_names_the_known():
    with pytest.raises(ValueError, match=r"a \.png, \.svg, \.pdf file, got 'map.bmp'"):
        tip_map(skewed_scores(9), "map.bmp")
