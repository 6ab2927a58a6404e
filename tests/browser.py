"""Debian's chromium without a window, asked over the pipe of its DevTools: no port and no package."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--hide-scrollbars")
DEADLINE_S = 60.0


class Browser:
    """One page in one browser. `errors` are the page's exceptions and complaints, `requests` what it asked for."""

    def __init__(self, home: Path) -> None:
        assert PROGRAM is not None
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_read, to_write)]  # so that 3 and 4 are free

        def pipes() -> None:
            for number, end in zip((3, 4), theirs, strict=True):
                os.dup2(end, number)

        flags = (*FLAGS, "--remote-debugging-pipe", f"--user-data-dir={home}")
        self._child = subprocess.Popen(
            [PROGRAM, *flags], preexec_fn=pipes, pass_fds=(3, 4), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for end in (to_read, to_write, *theirs):
            os.close(end)
        self._left = b""
        self._asked = 0
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")

    def close(self) -> None:
        self._child.kill()
        self._child.wait()
        os.close(self._write)
        os.close(self._read)

    def ask(self, method: str, **parameters: Any) -> Any:
        """A command of the DevTools protocol to the page; its result."""
        return self._ask(method, self._session, **parameters)

    def open(self, path: Path | str, address: str = "", ready: str = "document.body?.dataset.ready ?? ''") -> None:
        """Load a file, or a URL, with `address` behind its #, and wait until the page says that it is `ready`."""
        self.ask("Page.navigate", url="about:blank")
        self.ask("Page.navigate", url=f"{path}#{address}" if isinstance(path, str) else f"file://{path}#{address}")
        until_s = time.monotonic() + DEADLINE_S
        while self.run(ready) == "":
            assert time.monotonic() < until_s, (path, self.errors)
            time.sleep(0.02)

    def run(self, script: str) -> Any:
        """What a line of JavaScript gives; of a promise, what it comes to."""
        asked = {"expression": script, "awaitPromise": True, "returnByValue": True}
        answer = self.ask("Runtime.evaluate", **asked)
        assert "exceptionDetails" not in answer, (script, answer)
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            typed = {"text": key} if kind == "keyDown" and len(key) == 1 else {}
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, **typed)

    def look(self, width: int, height: int, dark: bool = False) -> None:
        """The window's size and the colours that its user likes."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self) -> bytes:
        return base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"])

    def _ask(self, method: str, session: str = "", **parameters: Any) -> Any:
        self._asked += 1
        said = {"id": self._asked, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(self._write, json.dumps(said).encode() + b"\0")
        until_s = time.monotonic() + DEADLINE_S
        while (answer := self._heard(until_s)).get("id") != self._asked:
            self._note(answer)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _heard(self, until_s: float) -> dict[str, Any]:
        while b"\0" not in self._left:
            ready, _, _ = select.select([self._read], [], [], max(0.0, until_s - time.monotonic()))
            assert ready, f"{PROGRAM} did not answer in {DEADLINE_S:g} s"
            some = os.read(self._read, 1 << 20)
            assert some, f"{PROGRAM} has ended with {self._child.poll()}"
            self._left += some
        message, self._left = self._left.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        method, said = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(said["exceptionDetails"].get("exception", {}).get("description", "exception"))
        if method == "Log.entryAdded" and said["entry"]["level"] == "error":
            self.errors.append(said["entry"]["text"])
        if method == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])
