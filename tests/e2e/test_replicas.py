"""Two engines on Ray, on one node or two, as a process: who asks gets an answer or a clear error, whoever dies."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import httpx
import pytest
import torch

from selfdoubt import RiskAwareLM
from tests.served import Served
from tests.waiting import wait_until

pytest.importorskip("ray", reason="the extra [ray] is not installed")
ASK = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0, "stream": True}


def engines(ancestor):
    """Process ids of the replicas that this process, or one of its children, has started."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and b"ServeReplica:selfdoubt:engine" in (folder / "cmdline").read_bytes():
                found += [pid for pid in [int(folder.name)] if descends(pid, ancestor)]
    return found


def descends(pid, ancestor):
    while pid not in (0, ancestor):
        status = Path(f"/proc/{pid}/status").read_text()
        pid = int(re.search(r"PPid:\s+(\d+)", status)[1])
    return pid == ancestor


def test_one_of_two_replicas_is_killed_under_load():
    served = Served("--replicas", "2", "--drain", "5", "--ui")
    try:
        assert "2 replicas" in served.line
        assert "<gradio-app" in httpx.get(f"{served.url}/").text
        outcomes = []

        def person():
            for _ in range(6):
                reply = httpx.post(f"{served.url}/v1/chat/completions", json=ASK, timeout=60)
                whole = reply.status_code == 200 and reply.text.rstrip().endswith("data: [DONE]")
                outcomes.append("answer" if whole else "error" if '"error"' in reply.text else reply.text)

        people = [threading.Thread(target=person) for _ in range(8)]
        for thread in people:
            thread.start()
        wait_until(lambda: outcomes)
        os.kill(engines(served.process.pid)[0], signal.SIGKILL)
        for thread in people:
            thread.join()
        assert len(outcomes) == 48
        assert set(outcomes) <= {"answer", "error"}
        assert outcomes.count("answer") > 24
        assert served.stop()[0] == 0
    finally:
        served.process.kill()


@pytest.mark.slow
def test_replicas_score_texts_and_end_those_whose_time_is_over():
    served = Served("--replicas", "2", "--drain", "5")

    def score(timeout=60, **body):
        return httpx.post(f"{served.url}/v1/score", json=body, timeout=timeout)

    try:
        items = [{"text": "Paris is in France."}, {"text": "In Estonia.", "question": "Where is Tartu?"}]
        found = score(input=items).json()["data"]
        alone = RiskAwareLM.load("pocket", dtype=torch.float32).score_batch(
            [(item.get("question"), item["text"]) for item in items], alternatives=0
        )
        for mine, own in zip(found, alone, strict=True):
            assert mine["scores"] == pytest.approx(dict(own.scores), rel=1e-3, abs=1e-4)
            assert mine["p_correct_note"] == own.p_correct_note
        long = score(input={"text": "Tartu " * 2000})
        assert (long.status_code, long.json()["error"]["code"]) == (400, "invalid_prompt")
        many = [{"text": f"The town number {i} is in Estonia. " * 12} for i in range(1024)]
        late = httpx.post(f"{served.url}/v1/score", json={"input": many, "timeout": 1}, timeout=60)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
        with pytest.raises(httpx.ReadTimeout):
            score(timeout=1, input=many)
        assert score(input=items[0]).status_code == 200
        assert served.stop()[0] == 0
    finally:
        served.process.kill()


@pytest.fixture
def cluster(tmp_path):
    """Two nodes that ask for a token, each with room for one replica: address, environment, process ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(secrets.token_hex(32))
    place = tempfile.mkdtemp(prefix="ray-")  # short: sockets lie there
    own = {"HOME": str(tmp_path), "RAY_TMPDIR": place, "RAY_USAGE_STATS_ENABLED": "0"}
    ray = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--num-cpus", "1"]
    head = ["--head", "--port", address.rpartition(":")[2], "--include-dashboard", "false"]
    nodes = []
    for role in (head, ["--address", address]):
        environment = {**os.environ, **own, "RAY_AUTH_MODE": "token"}
        nodes.append(subprocess.Popen([*ray, *role], env=environment, stdout=subprocess.PIPE, text=True))
        next(line for line in nodes[-1].stdout if "Ray runtime started" in line)
    yield address, own, [node.pid for node in nodes]
    for node in nodes:
        node.terminate()
    for node in nodes:
        node.communicate(timeout=60)
    shutil.rmtree(place, ignore_errors=True)


@pytest.mark.slow
def test_a_cluster_of_two_nodes_runs_a_replica_each(cluster):
    address, own, nodes = cluster
    served = Served("--replicas", "2", "--drain", "5", "--ray-address", address, **own)
    try:
        for _ in range(4):
            assert httpx.post(f"{served.url}/v1/chat/completions", json=ASK, timeout=60).text.endswith("[DONE]\n\n")
        assert [len(engines(node)) for node in nodes] == [1, 1]
        assert served.stop()[0] == 0
        assert not any(engines(node) for node in nodes)
    finally:
        served.process.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--replica-gpus", "500"], "2 replicas need 1000 GPUs and there are "),  # they would wait for ever
        (["--model", "/no/such/model"], "the replicas do not start: LoadError: no model folder at '/no/such/model'"),
    ],
)
def test_replicas_that_cannot_start_say_why_in_one_line(arguments, said):
    done = subprocess.run(
        [sys.executable, "-m", "selfdoubt", "serve", "--port", "0", "--replicas", "2", *arguments],
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(f"selfdoubt: {said}")
    assert done.stderr.count("\n") == 1
