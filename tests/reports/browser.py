"""A headless Chromium that opens pages, driven by its WebDriver over HTTP."""

import base64
import json
import re
import shutil
import subprocess
import time
import urllib.request
from contextlib import contextmanager

import pytest

# A browser that asks nobody for anything by itself.
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
_SECONDS = 60


class Browser:
    """One session of a browser.

    Args:
        address: of the WebDriver, such as `http://127.0.0.1:4444`.
        binary: the browser.
        profile: an empty folder.
    """

    def __init__(self, address, binary, profile):
        self._address = address
        options = {
            "browserName": "chrome",
            "goog:chromeOptions": {
                "binary": binary,
                "args": [*FLAGS, f"--user-data-dir={profile}"],
            },
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        made = self._send("POST", "/session", {"capabilities": {"alwaysMatch": options}})
        self._session = f"/session/{made['sessionId']}"

    def open(self, path, width, height=800, dark=False):
        """Opens a file in a window of this size and scheme."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])
        self.log("browser"), self.log("performance")
        self._send("POST", f"{self._session}/url", {"url": path.resolve().as_uri()})

    def run(self, script, *arguments):
        """What a function body returns in the page."""
        body = {"script": script, "args": list(arguments)}
        return self._send("POST", f"{self._session}/execute/sync", body)

    def press(self, *keys):
        """Presses keys, one after the other, such as "\\ue004" for tab."""
        pressed = [{"type": way, "value": k} for k in keys for way in ("keyDown", "keyUp")]
        body = {"actions": [{"type": "key", "id": "keyboard", "actions": pressed}]}
        self._send("POST", f"{self._session}/actions", body)

    def log(self, kind):
        """The entries since the last call: "browser" has those of the console."""
        return self._send("POST", f"{self._session}/se/log", {"type": kind})

    def requests(self):
        """The addresses that were asked for since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]

    def screenshot(self, path):
        """Saves a picture of the whole page, not only of the window."""
        shot = self.devtools("Page.captureScreenshot", captureBeyondViewport=True, clip=self._box())
        path.write_bytes(base64.b64decode(shot["data"]))

    def devtools(self, command, **parameters):
        """Runs a command of the Chrome DevTools Protocol."""
        body = {"cmd": command, "params": parameters}
        return self._send("POST", f"{self._session}/goog/cdp/execute", body)

    def close(self):
        """Ends the session."""
        self._send("DELETE", self._session)

    def _box(self):
        width, height = self.run(
            "const page = document.documentElement; return [page.clientWidth, page.scrollHeight];"
        )
        return {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}

    def _send(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._address + path, data, method=method)
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            return json.load(answer)["value"]


@contextmanager
def browser(folder):
    """A browser that ends with the block; the test is skipped where there is none."""
    driver = shutil.which("chromedriver")
    binary = shutil.which("chromium")
    if not driver or not binary:
        pytest.skip("chromium or chromedriver is missing: apt-get install chromium chromium-driver")
    log = folder / "driver.log"
    with open(log, "wb") as out:
        process = subprocess.Popen([driver, "--port=0"], stdout=out, stderr=out)
        try:
            session = Browser(_address(log), binary, folder / "profile")
            try:
                yield session
            finally:
                session.close()
        finally:
            process.terminate()
            process.wait()


def _address(log):
    """Where a driver listens, which it says once it does."""
    for _ in range(10 * _SECONDS):
        found = re.search(r"successfully on port (\d+)", log.read_text())
        if found:
            return f"http://127.0.0.1:{found[1]}"
        time.sleep(0.1)
    raise RuntimeError(log.read_text())
