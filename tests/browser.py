"""A headless Chromium, driven through a pipe by its protocol; tests skip where there is none."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time

import pytest

KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Enter": 13, "Tab": 9}
KEYS |= {"PageUp": 33, "PageDown": 34, "Home": 36, "End": 35, "Escape": 27}


class Page:
    """One page of the browser; `errors` are what scripts and the console reported."""

    def __init__(self, reader, writer, seconds):
        self.errors, self.requests = [], []
        self._reader, self._writer, self._seconds = reader, writer, seconds
        self._held, self._number, self._session = b"", 0, None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, url):
        """Load a page and wait until it is there, whatever it makes of its fragment."""
        self._call("Page.navigate", url=url)
        address = json.dumps(url.split("#")[0])
        self.wait(
            f"document.readyState === 'complete' && location.href.split('#')[0] === {address}"
        )

    def look(self, width, height, *, dark=False, phone=False):
        """The size of the window and the colors that the reader prefers."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])

    def evaluate(self, expression):
        """A JavaScript expression's value; a promise is waited for."""
        answer = self._call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def wait(self, condition, seconds=20):
        """Until an expression is true."""
        end = time.monotonic() + seconds
        while not self.evaluate(f"Boolean({condition})"):
            assert time.monotonic() < end, f"never true: {condition}"
            time.sleep(0.05)

    def key(self, name, *, shift=False):
        """Press a key."""
        text = {"Enter": "\r"}.get(name)
        event = {"key": name, "code": name, "windowsVirtualKeyCode": KEYS[name]}
        event |= {"modifiers": 8 if shift else 0} | ({"text": text} if text else {})
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, **event)

    def type(self, text):
        """Type into what has the focus."""
        self._call("Input.insertText", text=text)

    def point(self, x, y, *, press=False):
        """Move the pointer to a place of the window, and press it there."""
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased") if press else ():
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, *, whole=False):
        """A PNG of the window, or of the whole page."""
        answer = self._call("Page.captureScreenshot", captureBeyondViewport=whole)
        return base64.b64decode(answer["data"])

    def _call(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._writer, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._keep(answer)

    def _keep(self, event):
        given = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(given["exceptionDetails"])
        elif event.get("method") == "Log.entryAdded" and given["entry"]["level"] == "error":
            self.errors.append(given["entry"]["text"])
        elif event.get("method") == "Network.requestWillBeSent":
            self.requests.append(given["request"]["url"])

    def _next(self):
        while b"\0" not in self._held:
            ready, _, _ = select.select([self._reader], [], [], self._seconds)
            assert ready, "the browser does not answer"
            read = os.read(self._reader, 1 << 20)
            assert read, "the browser ended"
            self._held += read
        message, _, self._held = self._held.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def browser_page(folder, seconds=60):
    """A page of a browser that keeps its profile in a folder."""
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    program = next(filter(None, found), None)
    if program is None or shutil.which("bash") is None:
        pytest.skip("there is no Chromium")
    ends = [*os.pipe(), *os.pipe()]
    theirs, writer, reader, ours = ends
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    flags += ["--no-first-run", "--disable-extensions", "--disable-background-networking"]
    flags += ["--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"]
    process = subprocess.Popen(
        ["bash", "-c", f'exec "$@" 3<&{theirs} 4>&{ours}', "bash", program, *flags],
        pass_fds=(theirs, ours),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs)
    os.close(ours)
    try:
        yield Page(reader, writer, seconds)
    finally:
        process.terminate()
        process.wait(30)
        os.close(reader)
        os.close(writer)
