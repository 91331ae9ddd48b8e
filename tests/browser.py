"""Headless Chromium for the tests of the page, driven by its DevTools protocol through a pipe: no library, no port."""

import base64
import io
import json
import os
import selectors
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SECONDS = 60  # that anything may take, on a machine that has much else to do
KEYS, CODES = {" ": "Space", "/": "Slash"}, {"Enter": 13, "Escape": 27}


class Browser:
    """One window.  `requests` and `problems` hold what it asked for and complained of since the last open()."""

    def __init__(self, place: Path) -> None:
        """place: a folder for its profile and downloads."""
        commands, self._out = os.pipe()
        self._in, answers = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1440,900",
                 "--remote-debugging-pipe", f"--user-data-dir={place / 'profile'}", "--disable-background-networking"]
        # The ends of its pipes are 3 and 4 of the process; dash knows no numbers above 9 here.
        shell = f'exec "$0" "$@" 3<&{commands} 4>&{answers}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, shutil.which("chromium"), *flags, "about:blank"],
            pass_fds=(commands, answers), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(commands)
        os.close(answers)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._in, selectors.EVENT_READ)
        self._rest, self._number, self._session = b"", 0, None
        self.requests: list[str] = []
        self.problems: list[str] = []
        self.downloads = place / "downloads"
        self.downloads.mkdir()
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))
        self._session = session
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            for answer in self._read():
                if answer.get("id") == number:
                    assert "error" not in answer, (method, answer["error"])
                    return answer["result"]
        raise AssertionError(f"no answer to {method}")

    def _read(self) -> list[dict[str, Any]]:
        if not self._selector.select(timeout=1):
            return []
        received = os.read(self._in, 1 << 20)
        assert received, "the browser ended"
        *whole, self._rest = (self._rest + received).split(b"\0")
        messages = [json.loads(each) for each in whole]
        for message in messages:
            self._note(message.get("method"), message.get("params", {}))
        return messages

    def _note(self, method: str | None, told: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(told["exceptionDetails"]["exception"].get("description", "exception"))
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.problems.append(str(told["args"]))
        elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.problems.append(told["entry"]["text"])

    def open(self, page: Path, until: str = "document.querySelector('.open')") -> None:
        """Open a page from disk and wait until an expression holds."""
        self.requests.clear()
        self.problems.clear()
        self.send("Page.navigate", url=page.resolve().as_uri())
        self.wait(until)

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, (expression, found["exceptionDetails"])
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until it holds."""
        end = time.monotonic() + SECONDS
        while not self.run(f"Boolean({expression})"):
            assert time.monotonic() < end, (expression, self.problems)
            time.sleep(0.02)

    def press(self, *keys: str) -> None:
        """Press keys, by their names in KeyboardEvent.key."""
        for key in keys:
            text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
            about = {"key": key, "code": KEYS.get(key, key), "windowsVirtualKeyCode": CODES.get(key, 0)}
            self.send("Input.dispatchKeyEvent", type="keyDown", **about, **text)
            self.send("Input.dispatchKeyEvent", type="keyUp", **about)

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Drag with the left button."""
        for kind, (x, y) in (("mousePressed", start), ("mouseMoved", end), ("mouseReleased", end)):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Left, top, width and height of the first element, pixels."""
        return tuple(self.run(f"(({{x, y, width, height}}) => [x, y, width, height])"
                              f"(document.querySelector({selector!r}).getBoundingClientRect())"))  # fmt: skip

    def screenshot(self, path: Path | None = None) -> np.ndarray:
        """The window, (H, W, 3) uint8; also as a file."""
        data = base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])
        if path:
            path.write_bytes(data)
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    def close(self) -> None:
        """End the browser."""
        self._session = None
        self.send("Browser.close")
        self._process.wait(SECONDS)
        os.close(self._out)
        os.close(self._in)
