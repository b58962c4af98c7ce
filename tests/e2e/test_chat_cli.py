"""``selfdoubt chat`` as a process: it says where it is, ends when told to, and says in one line what is wrong."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def command(*flags):
    return [sys.executable, "-m", "selfdoubt", "chat", "--no-open", *flags]


def complaint(*flags, before="pass"):
    run = [sys.executable, "-c", f"import sys; {before}; sys.argv = {['selfdoubt', *command(*flags)[3:]]}\n"
           "from selfdoubt.cli import main; main()"]  # fmt: skip
    done = subprocess.run(run, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    return line


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_it_says_where_it_is_and_ends_cleanly_when_told_to(number):
    with subprocess.Popen(
        command("--port", "0"), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("Chat at http://127.0.0.1:")
            url = line.split()[2]
            with urllib.request.urlopen(url, timeout=60) as page:
                html = page.read().decode()
            assert "selfdoubt: pocket" in html
            process.send_signal(number)
            assert process.wait(30) == 0
            assert process.stdout.read() == ""
            assert process.stderr.read() == ""
        finally:
            process.kill()


def test_a_taken_port_is_said_in_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"Cannot bind 127.0.0.1:{port}: address already in use. Try --port 0." in complaint("--port", port)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_machines_are_refused_and_the_way_to_serve_them_is_told(host):
    assert "selfdoubt serve --ui --api-key" in complaint("--host", host)


def test_a_port_that_is_none_is_said_and_no_other_taken():
    assert "65535" in complaint("--port", "70000")


def test_a_host_that_is_none_is_said_in_one_line():
    assert "no.such.host.invalid" in complaint("--host", "no.such.host.invalid")


def test_without_gradio_one_line_says_what_to_install():
    line = complaint(before="sys.modules['gradio'] = None")
    assert line.endswith('install it with: pip install "selfdoubt[serve]"')
    assert "'gradio'" in line


GUARDED = """
from fastapi import FastAPI
from fastapi.testclient import TestClient
from selfdoubt.lm.model import RiskAwareLM
from selfdoubt.serve.chat import mount
from selfdoubt.serve.engine.engine import Engine

engine = Engine(RiskAwareLM.load("pocket"))
page = TestClient(mount(FastAPI(), engine, title="Mine", auth=lambda name, word: word == "right"))
print([page.get("/config").status_code])
for word in ("wrong", "right"):
    print([page.post("/login", data={"username": "me", "password": word}).status_code, page.get("/config").status_code])
print(["Mine" in page.get("/").text])
"""


@pytest.mark.slow
def test_a_page_with_a_password_lets_in_who_has_it():
    done = subprocess.run(
        [sys.executable, "-c", GUARDED], env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.splitlines() == ["[401]", "[400, 401]", "[200, 200]", "[True]"], done.stderr
