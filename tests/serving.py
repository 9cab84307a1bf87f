"""A workbench in a process of its own, for tests: started once, asked over HTTP."""

import json
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest


class Bench:
    """A running server."""

    def __init__(self, address, process):
        self.address, self.process = address, process

    def call(self, method, path, body=None, headers=None, raw=False):
        """(status, answer); bytes are sent as they are, all else as JSON."""
        content = (
            body
            if body is None or isinstance(body, bytes)
            else json.dumps(body).encode()
        )
        sent = {"X-Consilience": "test", **(headers or {})}
        if content is not None and not isinstance(body, bytes):
            sent.setdefault("Content-Type", "application/json")
        request = urllib.request.Request(
            self.address + path, content, sent, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                got, status, self.headers = (
                    answer.read(),
                    answer.status,
                    answer.headers,
                )
        except urllib.error.HTTPError as error:
            got, status, self.headers = error.read(), error.code, error.headers
        if raw:
            return status, got
        try:
            return status, json.loads(got)
        except ValueError:
            return status, got.decode(errors="replace")

    def give(self, path, name=None):
        """An image's number."""
        content = Path(path).read_bytes()
        status, told = self.call(
            "POST", "/api/images", content, {"X-Name": name or Path(path).name}
        )
        assert status == 200, told
        return told["image"]

    def events(self, job):
        """All events of a job until its end, as (kind, facts)."""
        found = []
        with urllib.request.urlopen(
            f"{self.address}/api/jobs/{job}/events", timeout=240
        ) as stream:
            kind = ""
            for line in stream:
                text = line.decode().rstrip("\n")
                if text.startswith("event: "):
                    kind = text[7:]
                elif text.startswith("data: "):
                    found.append((kind, json.loads(text[6:])))
        return found

    def explained(self, **asked):
        """Events of a job that is asked for here."""
        status, told = self.call("POST", "/api/explanations", asked)
        assert status == 200, told
        return told["job"], self.events(told["job"])


@contextmanager
def served(*arguments):
    """A server with these arguments of ``consilience serve``."""
    for module in ("fastapi", "uvicorn"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "consilience",
            "serve",
            "--port",
            "0",
            *map(str, arguments),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    errors = []
    reader = threading.Thread(
        target=lambda: errors.extend(process.stderr), daemon=True
    )
    reader.start()
    try:
        line = process.stdout.readline()
        assert line.startswith("workbench: "), (line, errors)
        address = line.split()[1].partition("?")[0].rstrip("/")
        bench = Bench(address, process)
        bench.said, bench.errors = line.strip(), errors
        yield bench
    finally:
        process.send_signal(2)
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
        process.stdout.close()
