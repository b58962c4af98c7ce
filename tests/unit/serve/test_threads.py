"""A step on a CPU leaves a core to whoever answers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from selfdoubt.serve.engine.threads import limit_threads


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("cores", "wanted", "threads"), [(4, None, 3), (1, None, 1), (4, 2, 2), (2, 6, 6)])
def test_a_core_is_left_unless_somebody_says_how_many(pocket, cores, wanted, threads):
    torch.set_num_threads(cores)
    limit_threads(pocket, wanted)
    assert torch.get_num_threads() == threads
    with ThreadPoolExecutor(1) as pool:  # as the engine's
        assert pool.submit(torch.get_num_threads).result() == threads


def test_the_environment_is_obeyed_but_for_a_flag(pocket, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    torch.set_num_threads(4)
    limit_threads(pocket)
    assert torch.get_num_threads() == 4
    limit_threads(pocket, 1)
    assert torch.get_num_threads() == 1
