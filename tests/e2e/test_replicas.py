"""Two engines on Ray, as a process; one is killed under load, and nobody is left without an answer or a clear error."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.served import Served

pytest.importorskip("ray", reason="the extra [ray] is not installed")
pytestmark = pytest.mark.slow
ASK = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0, "stream": True}


def engines():
    """Process ids of the replicas."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and b"ServeReplica:selfdoubt:engine" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


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
        time.sleep(1)
        os.kill(engines()[0], signal.SIGKILL)
        for thread in people:
            thread.join()
        assert len(outcomes) == 48
        assert set(outcomes) <= {"answer", "error"}
        assert outcomes.count("answer") > 24
        assert served.stop()[0] == 0
    finally:
        served.process.kill()
