"""Settings of the whole suite: one thread per process (tiny tensors are slower with more), one process group of one,
and Ctrl-C as in a terminal."""

import functools
import os
import re
import signal

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the promises are for the CPU, also on a machine with a GPU

import pytest
import torch

from rlhf.distributed import Distributed

torch.set_num_threads(int(os.environ.get("RLHF_TEST_THREADS", "1")))
COMPARES_FLOATS = re.compile(r"assert_close|approx\(|allclose|rollout\.conformance")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background by a shell without job control
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of every file that compares floats up to rounding: what `make test-isa` runs."""
    compares = functools.cache(lambda path: bool(COMPARES_FLOATS.search(path.read_text())))
    for item in items:
        if compares(item.path):
            item.add_marker("rounding")


@pytest.fixture(scope="session")
def distributed() -> Distributed:
    """This process alone."""
    return Distributed()
