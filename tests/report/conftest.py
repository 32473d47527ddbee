"""Token records made from nothing, in the schema that `tipdistill score` writes."""

import base64
import json
import shutil
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tipdistill.report.pack import TYPES

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync", "--no-first-run"]


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium. What needs it is skipped, and says so, where there is none."""
    if CHROMIUM is None:
        pytest.skip("no Chromium was found (apt-get install chromium): the report was not tried in a browser")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def open_offline(browser):
    """Open a page by its path, and check at the end that it asked for nothing and complained of nothing."""
    trouble, contexts = [], []

    def opened(path, **options):
        context = browser.new_context(offline=True, **{"viewport": {"width": 1300, "height": 900}, **options})
        contexts.append(context)
        page, address = context.new_page(), path.as_uri()
        page.on("console", lambda message: trouble.append(f"console: {message.type} {message.text}"))
        page.on("pageerror", lambda error: trouble.append(f"error: {error}"))
        page.on("request", lambda request: trouble.append(request.url) if request.url != address else None)
        page.goto(address)
        page.wait_for_selector("html[data-ready]", timeout=20_000)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert trouble == []


def write_records(directory, tokens, prompts=None, *, sidecar=None, seed=0, shared=None, row_group_size=None):
    """Records of rollouts given as lists of tokens (str, or bytes that are no UTF-8), with drawn statistics.

    Args:
        directory: made where there is none.
        tokens: one list per rollout.
        prompts: one per rollout.
        sidecar: records.json.
        seed: of the statistics.
        shared: what the columns of the same name hold instead, each [N].
        row_group_size: of the Parquet file.

    Returns:
        The columns.
    """
    directory.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    flat = [token for rollout in tokens for token in rollout]
    count, lengths = len(flat), [len(rollout) for rollout in tokens]
    vocabulary = {text: number for number, text in enumerate(dict.fromkeys(flat))}
    texts = [token.decode("utf-8", "replace") if isinstance(token, bytes) else token for token in vocabulary]
    columns = {
        "rollout": np.repeat(np.arange(len(tokens)), lengths).astype(np.int32),
        "position": np.concatenate([np.arange(length) for length in lengths] or [[]]).astype(np.int32),
        "prompt_id": np.repeat(np.arange(len(tokens)), lengths).astype(np.int32),
        "token_id": np.array([vocabulary[token] for token in flat], dtype=np.int32),
        "entropy": (2 * draw.random(count) ** 6).astype(np.float32),
        "reverse_kl": (5 * draw.random(count) ** 10).astype(np.float32),
        "forward_kl": (6 * draw.random(count) ** 10).astype(np.float32),
        "teacher_entropy": draw.random(count).astype(np.float32),
        "student_logprob": np.log(draw.random(count)).astype(np.float32),
        "teacher_logprob": np.log(draw.random(count)).astype(np.float32),
        "quadrant": np.ones(count, dtype=np.int8),
        "kept": draw.random(count) < 0.5,
        "score": draw.random(count).astype(np.float32),
    } | (shared or {})
    table = {name: pa.array(values) for name, values in columns.items()}
    table["token"] = pa.array([texts[number] for number in columns["token_id"]], type=pa.string())
    table["token_bytes"] = pa.array([token if isinstance(token, bytes) else None for token in flat], type=pa.binary())
    for whose in ("student", "teacher"):
        if f"{whose}_top5" not in (shared or {}):
            ids = draw.integers(0, max(1, len(texts)), (count, 5))
            probability = np.sort(draw.dirichlet(np.full(6, 0.3), count), axis=1)[:, ::-1][:, :5]
            table[f"{whose}_top5"] = choices(ids, probability, texts)
    pq.write_table(pa.table(table), directory / "tokens.parquet", row_group_size=row_group_size)
    whole = [
        b"".join(t if isinstance(t, bytes) else t.encode() for t in rollout).decode("utf-8", "replace")
        for rollout in tokens
    ]
    pq.write_table(
        pa.table(
            {
                "rollout": pa.array(range(len(tokens)), pa.int32()),
                "prompt_id": pa.array(range(len(tokens)), pa.int32()),
                "prompt": pa.array(prompts or [f"prompt {number}" for number in range(len(tokens))], pa.string()),
                "completion": pa.array(whole, pa.string()),
                "tokens": pa.array(lengths, pa.int32()),
                "finished": pa.array([True] * len(tokens)),
            }
        ),
        directory / "rollouts.parquet",
    )
    sidecar = sidecar or {"rule": "soft_or", "retention": 0.5}
    (directory / "records.json").write_text(
        json.dumps({"schema_version": 1, "tokens": count, "rollouts": len(tokens)} | sidecar)
    )
    return table


def choices(ids, probability, texts):
    """A top-5 column from ids and probabilities, both [N, 5]."""
    items = pa.StructArray.from_arrays(
        [
            pa.array(ids.ravel().astype(np.int32)),
            pa.array(texts, pa.string()).take(pa.array(ids.ravel())),
            pa.array(probability.ravel().astype(np.float32)),
        ],
        names=["token_id", "token", "probability"],
    )
    return pa.ListArray.from_arrays(pa.array(np.arange(len(ids) + 1) * 5, pa.int32()), items)


@pytest.fixture
def records_writer():
    return write_records


@pytest.fixture
def top_choices():
    return choices


@pytest.fixture
def unpack():
    """(pack, place) → the array, read as the page does it: planes of bytes, from the lowest to the highest."""

    def read(pack, place):
        whole = np.frombuffer(zlib.decompress(base64.b64decode(pack.text())), dtype=np.uint8)
        size = np.dtype(TYPES[place["type"]]).itemsize
        planes = whole[place["at"] : place["at"] + size * place["length"]].reshape(size, place["length"])
        return np.ascontiguousarray(planes.T).view(TYPES[place["type"]]).ravel()

    return read
