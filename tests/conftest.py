"""Settings of the whole suite: one thread per process (tiny tensors are slower with more), and one process group of one."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the promises are for the CPU, also on a machine with a GPU

import pytest
import torch

from rlhf.distributed import Distributed

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def distributed() -> Distributed:
    """This process alone."""
    return Distributed()
