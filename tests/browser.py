"""Drive a headless Chromium over chromedriver's own protocol (W3C WebDriver)."""

import base64
import contextlib
import json
import re
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for path in map(shutil.which, NAMES) if path), "")
CHROMEDRIVER = shutil.which("chromedriver") or ""
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--force-device-scale-factor=1",
]
KEYS = {"tab": "\ue004", "enter": "\ue007", "escape": "\ue00c", "right": "\ue014"}


class Browser:
    def __init__(self, port: int, profile: str):
        self.url, self.session = f"http://127.0.0.1:{port}", ""
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self("POST", "/session", capabilities={"alwaysMatch": wanted})
        self.session = f"/session/{session['sessionId']}"

    def __call__(self, method: str, path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            self.url + self.session + path,
            json.dumps(body).encode() if method == "POST" else None,
            {"Content-Type": "application/json"},
            method=method,
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, page: Path | str) -> None:
        self("POST", "/url", url=page.as_uri() if isinstance(page, Path) else page)

    def js(self, script: str, *arguments: Any) -> Any:
        return self("POST", "/execute/sync", script=script, args=arguments)

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self("POST", "/goog/cdp/execute", cmd=command, params=parameters)

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)

    def pointer(self, x: float, y: float, *then: str) -> None:
        """Move the mouse to x, y. then: "Down", "Up" """
        actions = [{"type": "pointerMove", "x": round(x), "y": round(y)}]
        actions += [{"type": f"pointer{step}", "button": 0} for step in then]
        self("POST", "/actions", actions=[{"type": "pointer", "id": "mouse", "actions": actions}])

    def middle(self, selector: str) -> tuple[float, float]:
        """Scroll the element into view and return the place of its middle."""
        return self.js(
            "const e = document.querySelector(arguments[0]); e.scrollIntoView({block: 'center'});"
            "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]",
            selector,
        )

    def hover(self, selector: str, *then: str) -> None:
        self.pointer(*self.middle(selector), *then)

    def click(self, selector: str) -> None:
        self.hover(selector, "Down", "Up")

    def press(self, *keys: str) -> None:
        actions = [
            {"type": kind, "value": KEYS[key]} for key in keys for kind in ("keyDown", "keyUp")
        ]
        self("POST", "/actions", actions=[{"type": "key", "id": "keys", "actions": actions}])

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"
        return self.js(script, selector)

    def fetched(self) -> list[str]:
        """Return the addresses that the page fetched."""
        names = self.js("return performance.getEntriesByType('resource').map(e => e.name)")
        return [name for name in names if not name.startswith(("data:", "blob:"))]

    def errors(self) -> list[str]:
        """Return the console's errors since the last call, refused requests among them."""
        log = self("POST", "/se/log", type="browser")
        return [entry["message"] for entry in log if entry["level"] == "SEVERE"]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self("GET", "/screenshot")))


@contextlib.contextmanager
def start_browser() -> Iterator[Browser]:
    """Start a browser with a fresh profile. Skips the test where none is installed."""
    if not CHROMIUM or not CHROMEDRIVER:
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [CHROMEDRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            assert process.stdout
            ports = (re.search(r"on port (\d+)\.", line) for line in process.stdout)
            driver = Browser(int(next(filter(None, ports))[1]), f"{folder}/profile")
            try:
                yield driver
            finally:
                driver("DELETE", "")
        finally:
            process.terminate()
            process.wait(timeout=10)
