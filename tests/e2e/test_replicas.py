"""Two engines on Ray, as a process; one is killed under load, and nobody is left without an answer or a clear error."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

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
    command = [
        str(Path(sys.executable).parent / "selfdoubt"),
        "serve",
        "--replicas",
        "2",
        "--port",
        "0",
        "--drain",
        "5",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert "2 replicas" in line
        url = line.split(" at ")[1].split("/v1")[0]
        outcomes = []

        def person():
            for _ in range(6):
                reply = httpx.post(f"{url}/v1/chat/completions", json=ASK, timeout=60)
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
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.stdout.close()
        process.wait()
