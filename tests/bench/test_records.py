"""Two million tokens must be written in under five minutes beyond the models' time, and in flat memory."""

from tipdistill.bench.records import run_records

MOST_SECONDS = 300 / 2_000_000  # per token


def test_writing_is_fast_enough_for_two_million_tokens():
    result = run_records(say=lambda line: None, sizes=(128_000,), vocabulary=5000)
    found = result["sizes"]["128000"]
    assert found["tokens_read_back"] == 128_000
    assert found["seconds"]["total"] < MOST_SECONDS * 128_000
    # 128 rollouts of a thousand tokens, where 100 must stay under 10 MB and 2 GiB
    assert found["report"]["page_bytes"] < 10e6
    assert found["report"]["peak_memory_gib"] < 2
