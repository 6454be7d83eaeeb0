import pytest
import torch

import images


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    """Scripts under test train on 240 drawn images, so that a run takes seconds."""
    monkeypatch.setattr(images, "SHAPES_COUNT", {True: 240, False: 40})


@pytest.fixture(autouse=True)
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)
