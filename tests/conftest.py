from fused_ddpm import images

import pytest
import torch


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    """Scripts under test train on 240 drawn images, so that a run takes seconds."""
    monkeypatch.setattr(images, "SHAPES_COUNT", {True: 240, False: 40})


@pytest.fixture(autouse=True)
def the_same_numbers_each_time():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def one_thread():
    """Networks of this size are fastest on one; a test that wants more sets them, for itself."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
