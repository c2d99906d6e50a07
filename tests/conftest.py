"""Settings of the whole suite: one thread per process (tiny tensors are slower with more), one process group of one,
and Ctrl-C as in a terminal."""

import os
import signal

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the promises are for the CPU, also on a machine with a GPU

import pytest
import torch

from rlhf.distributed import Distributed

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background by a shell without job control
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def distributed() -> Distributed:
    """This process alone."""
    return Distributed()
