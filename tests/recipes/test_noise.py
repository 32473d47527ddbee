"""Warnings of libraries go into the log file, and not onto the screen."""

import logging
import warnings

import datasets
import pytest
import transformers

from tipdistill.recipes.noise import LOG_FILE, logged, quiet


@pytest.fixture
def plain_warnings():
    """Python's own ways to warn, which pytest puts others in the place of."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield


def test_warnings_and_bars_are_silent_meanwhile(tmp_path, plain_warnings, capsys):
    bars = transformers.utils.logging.is_progress_bar_enabled(), datasets.utils.logging.is_progress_bar_enabled()
    with quiet(verbose=False), logged(tmp_path) as run:
        warnings.warn("old name", FutureWarning, stacklevel=1)
        logging.getLogger("transformers.trainer").warning("what transformers says")
        run.info("step 1")
        assert not transformers.utils.logging.is_progress_bar_enabled()
        assert not datasets.utils.logging.is_progress_bar_enabled()
    assert bars == (
        transformers.utils.logging.is_progress_bar_enabled(),
        datasets.utils.logging.is_progress_bar_enabled(),
    )
    text = (tmp_path / LOG_FILE).read_text(encoding="utf-8")
    assert "FutureWarning: old name" in text
    assert "WARNING transformers.trainer: what transformers says" in text
    assert "INFO tipdistill.run: step 1" in text
    assert "old name" not in capsys.readouterr().err
    handlers = [handler for name in ("", "transformers", "py.warnings") for handler in logging.getLogger(name).handlers]
    assert not any(getattr(handler, "baseFilename", "").endswith(LOG_FILE) for handler in handlers)


def test_verbose_prints_them(capsys):
    with quiet(verbose=True):
        assert warnings.showwarning.__module__ != "logging"
        assert transformers.utils.logging.is_progress_bar_enabled()


def test_a_log_is_gone_on_with(tmp_path):
    for line in ("first", "second"):
        with logged(tmp_path) as run:
            run.info(line)
    assert [line.rpartition(" ")[2] for line in (tmp_path / LOG_FILE).read_text().splitlines()] == ["first", "second"]
