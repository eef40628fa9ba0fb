"""Debian's Chromium, headless, spoken to by the DevTools protocol over two pipes.

Nothing to install but the browser itself (`apt-get install chromium`). For pictures of a page:

    python -m tests.browser PAGE.html PICTURE.jpg WIDTH [HEIGHT [TOP]]
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
FLAGS = ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
FLAGS += ("--disable-background-networking", "--hide-scrollbars", "--remote-debugging-pipe")
FLAGS += ("--no-sandbox",)  # root in a container has none
LAUNCH = """
import fcntl, os, sys
read, write = (fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3])
os.dup2(read, 3), os.dup2(write, 4)  # where Chromium expects them
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One page of a headless browser. errors: what its console complained of; requests: URLs that
    it asked for, other than the page itself and data: URLs."""

    def __init__(self) -> None:
        assert CHROMIUM is not None
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs, ours = os.pipe(), os.pipe()
        command = [sys.executable, "-c", LAUNCH, str(theirs[0]), str(ours[1]), CHROMIUM, *FLAGS]
        self._process = subprocess.Popen(
            [*command, f"--user-data-dir={self._profile.name}", "about:blank"],
            pass_fds=(theirs[0], ours[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs[0])
        os.close(ours[1])
        self._to, self._from = os.fdopen(theirs[1], "wb", 0), os.fdopen(ours[0], "rb")
        self._count, self._page = 0, ""
        self._buffer = b""

    def __enter__(self) -> Browser:
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._page = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._to.close()
        self._from.close()
        self._process.kill()
        self._process.wait()
        self._profile.cleanup()

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and wait for its answer; events on the way are kept."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._page:
            message["sessionId"] = self._page
        self._to.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer["error"]
                return dict(answer["result"])

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            got = os.read(self._from.fileno(), 1 << 20)
            assert got, "the browser went away"
            self._buffer += got
        text, _, self._buffer = self._buffer.partition(b"\0")
        answer: dict[str, Any] = json.loads(text)
        self._keep(answer.get("method", ""), answer.get("params", {}))
        return answer

    def _keep(self, event: str, what: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(what["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and what["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(what["args"]))
        elif event == "Log.entryAdded" and what["entry"]["level"] in ("error", "warning"):
            self.errors.append(what["entry"]["text"])
        elif event == "Network.requestWillBeSent":
            url = what["request"]["url"]
            if not url.startswith(("data:", "file:")):
                self.requests.append(url)

    def open(self, page: Path, width: int, height: int = 900, *, scripts: bool = True) -> None:
        """Load a file at a window's size, and wait until it is there."""
        self.send("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.size(width, height)
        self.send("Page.navigate", url=page.resolve().as_uri())
        while self._receive().get("method") != "Page.loadEventFired":
            pass

    def size(self, width: int, height: int) -> None:
        phone = width < 600
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """A key, as a keyboard sends it to what has the focus."""
        code = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, "Tab": 9}[key]
        for kind in ("rawKeyDown", "keyUp"):
            self.send(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code
            )

    def screenshot(self, path: Path, height: int = 0, top: int = 0) -> None:
        """A JPEG of the page from `top`, `height` CSS pixels of it (0: all)."""
        box = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": top, "width": box["width"], "height": height or box["height"] - top}
        shot = self.send(
            "Page.captureScreenshot",
            format="jpeg",
            quality=85,
            clip={**clip, "scale": 1},
            captureBeyondViewport=True,
        )
        path.write_bytes(base64.b64decode(shot["data"]))


def main(page: str, picture: str, width: str, height: str = "0", top: str = "0") -> None:
    with Browser() as browser:
        browser.open(Path(page), int(width))
        browser.screenshot(Path(picture), int(height), int(top))


if __name__ == "__main__":
    main(*sys.argv[1:])
