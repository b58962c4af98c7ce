"""Clients take turns, and nobody is lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from selfdoubt.lm.sampling import Sampling
from selfdoubt.lm.text.prompt import Prompt
from selfdoubt.serve.engine.queue import FairQueue
from selfdoubt.serve.engine.request import GenerationRequest, RequestHandle

CLIENTS = st.lists(st.sampled_from("abc"), max_size=12)


def job(client):
    return RequestHandle(GenerationRequest(Prompt([1], [True]), Sampling(), client=client))


def queue(clients):
    waiting, jobs = FairQueue(), [job(c) for c in clients]
    for each in jobs:
        waiting.add(each)
    return waiting, jobs


def test_the_first_of_each_goes_before_the_second_of_any():
    waiting, _ = queue("aaabbc")
    assert "".join(waiting.take().request.client for _ in range(6)) == "abcaba"


@given(CLIENTS)
def test_everybody_comes_out_once_and_in_the_order_of_their_client(clients):
    waiting, jobs = queue(clients)
    assert len(waiting) == len(jobs)
    out = []
    while (head := waiting.next()) is not None:
        assert waiting.take() is head
        out.append(head)
    assert len(waiting) == 0
    for client in "abc":
        assert [j for j in out if j.request.client == client] == [j for j in jobs if j.request.client == client]


@given(CLIENTS, st.sets(st.integers(0, 11)))
def test_who_is_removed_is_gone_and_the_rest_stays(clients, places):
    waiting, jobs = queue(clients)
    unwanted = [each for i, each in enumerate(jobs) if i in places]
    assert set(waiting.remove(lambda each: each in unwanted)) == set(unwanted)
    assert set(waiting) == set(jobs) - set(unwanted)
    assert waiting.remove(lambda each: each in unwanted) == []


@given(CLIENTS)
def test_between_two_turns_of_one_client_everybody_else_has_had_one(clients):
    waiting, _ = queue(clients)
    order = [waiting.take().request.client for _ in range(len(waiting))]
    for i, client in enumerate(order):
        for j in range(i + 1, len(order)):
            if order[j] == client:
                later = set(order[j:])
                assert later - {client} <= set(order[i + 1 : j])
                break
