"""A server process, as users start it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import httpx
import openai
import pytest

KEY = "a-key-for-tests"


class Served:
    """A server process."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            # The dtype is said: what is quickest here, and so the last digits, would depend on the machine.
            [sys.executable, "-m", "selfdoubt", "serve", "--port", "0", "--dtype", "float32", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
        )  # fmt: skip
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        found = re.search(r"http://\S+(?=/v1)", self.line)
        if found is None:
            pytest.fail(f"the server did not start: {self.line}{self.process.communicate()}")
        self.url = found[0]

    def stop(self) -> tuple[int, str]:
        """Ask it to end; its exit code and what it logged."""
        self.process.terminate()
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **{"max_retries": 0, **options})

    def measured(self, name: str) -> float:
        """A number of /metrics."""
        text = httpx.get(f"{self.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}, timeout=30).text
        return float(next(line.rpartition(" ")[2] for line in text.splitlines() if line.startswith(f"{name} ")))

    def is_idle(self) -> bool:
        names = ("selfdoubt_sequences_running", "selfdoubt_requests_waiting", "selfdoubt_requests_active")
        return not any(self.measured(name) for name in names)
