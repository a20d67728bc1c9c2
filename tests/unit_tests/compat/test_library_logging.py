"""Loggers and progress bars of other libraries, checked on the libraries themselves."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging as transformers_logging

from langchain_quantllm.compat.library_logging import dropped_messages, progress_bars, quiet_logger, without_torchao


def bars_shown() -> tuple[bool, bool]:
    """Whether transformers and the Hub show progress bars."""
    return transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()


@pytest.fixture
def bars_restored() -> Iterator[None]:
    """Restores the progress bars after the test."""
    models, hub = bars_shown()
    yield
    (transformers_logging.enable_progress_bar if models else transformers_logging.disable_progress_bar)()
    (enable_progress_bars if hub else disable_progress_bars)()


def test_only_messages_below_the_level_are_dropped_inside_the_block(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("quantllm.test")
    logger.setLevel(logging.INFO)
    with quiet_logger("quantllm.test"):
        logger.warning("a warning inside")
        logger.error("an error inside")
    logger.info("an info after")
    assert [record.message for record in caplog.records] == ["an error inside", "an info after"]
    assert logger.level == logging.INFO


def test_a_logger_s_level_is_restored_after_an_error() -> None:
    logger = logging.getLogger("quantllm.test")
    logger.setLevel(logging.DEBUG)
    with pytest.raises(ZeroDivisionError), quiet_logger("quantllm.test", logging.CRITICAL):
        raise ZeroDivisionError
    assert logger.level == logging.DEBUG


def test_loggers_of_torchao_are_quiet_inside_the_block() -> None:
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    before = [logger.level for logger in loggers]
    with without_torchao():
        assert not any(logger.isEnabledFor(logging.WARNING) for logger in loggers)
    assert [logger.level for logger in loggers] == before


@pytest.mark.parametrize("models", [True, False])
@pytest.mark.parametrize("hub", [True, False])
@pytest.mark.usefixtures("bars_restored")
def test_progress_bars_are_hidden_inside_the_block_and_restored(models: bool, hub: bool) -> None:
    (transformers_logging.enable_progress_bar if models else transformers_logging.disable_progress_bar)()
    (enable_progress_bars if hub else disable_progress_bars)()
    with progress_bars(False):
        assert bars_shown() == (False, False)
    assert bars_shown() == (models, hub)
    with pytest.raises(ZeroDivisionError), progress_bars(False):
        raise ZeroDivisionError
    assert bars_shown() == (models, hub)


@pytest.mark.usefixtures("bars_restored")
def test_shown_progress_bars_are_left_as_they_are() -> None:
    before = bars_shown()
    with progress_bars(True):
        assert bars_shown() == before


@pytest.mark.usefixtures("bars_restored")
def test_the_bars_of_transformers_are_the_ones_that_loading_shows(capfd: pytest.CaptureFixture[str]) -> None:
    transformers_logging.enable_progress_bar()
    for shown in (True, False):
        with progress_bars(shown):
            for _ in transformers_logging.tqdm(range(3), desc="weights"):
                pass
        assert ("weights" in capfd.readouterr().err) == shown


def test_messages_that_begin_with_a_text_are_dropped_inside_the_block(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("quantllm_dropped")
    with dropped_messages(logger.name, "Known"):
        with dropped_messages(logger.name, "Other"):
            logger.warning("Known %s", "and dropped")
        logger.warning("Other")
        logger.warning("New")
    logger.warning("Known after it")
    assert [record.getMessage() for record in caplog.records] == ["Other", "New", "Known after it"]
