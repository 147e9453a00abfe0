"""TensorRT's log in Python's, version numbers and shapes."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from pipeline.backends.trt_api import collected, errors_of, logger, named_shape, version_number


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


@pytest.fixture
def trt(request):
    return SimpleNamespace(__name__=f"trt_{request.node.name}", ILogger=ILogger)


@pytest.mark.parametrize(
    ("version", "number"),
    [("8.6.0", 8600), ("8.6.1.6", 8601), ("9.2.0.post12", 9200), ("10.3.0", 100300), ("11.4", 110400)],
)
def test_version_number(version, number):
    assert version_number(version) == number


def test_levels(trt, caplog):
    caplog.set_level(1)
    for severity in (ILogger.VERBOSE, ILogger.INFO, ILogger.WARNING, ILogger.ERROR, ILogger.INTERNAL_ERROR):
        logger(trt).log(severity, "text")
    levels = [record.levelno for record in caplog.records]
    assert levels == [logging.DEBUG - 5, logging.DEBUG, logging.WARNING, logging.ERROR, logging.ERROR]


def test_one_logger_per_library(trt):
    assert logger(trt) is logger(trt)


def test_collected_errors_are_the_collectors(trt, caplog):
    with collected(trt) as outer:
        with collected(trt) as inner:
            logger(trt).log(ILogger.ERROR, "[a.cpp::f::12] bad")
            logger(trt).log(ILogger.ERROR, "bad")
            logger(trt).log(ILogger.WARNING, "odd")
        logger(trt).log(ILogger.ERROR, "later")
    assert errors_of(inner) == ["bad"]
    assert errors_of(outer) == ["later"]
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == ["odd"]


def test_threads_collect_their_own_messages(trt):
    entered = threading.Event()

    def collect():
        with collected(trt) as messages:
            entered.set()
            logger(trt).log(ILogger.ERROR, "theirs")
        return messages

    with ThreadPoolExecutor(1) as pool:
        with collected(trt) as mine:
            theirs = pool.submit(collect)
            assert not entered.wait(0.1)
            logger(trt).log(ILogger.ERROR, "mine")
        assert theirs.result(10) == ["E: theirs"]
    assert mine == ["E: mine"]


def test_an_unknown_severity_is_survived(trt):
    logger(trt).log(99, "text")


def test_named_shape():
    assert named_shape("x", (-1, 3, -1, 8), ("batch", 3)) == ("batch", 3, "x_2", 8)
