"""The report in a real browser: wide, narrow and dark, without errors, requests or sideways scrolling.

Drives headless Chromium through its debugging pipe; screenshots go to ``$REPORT_SHOTS`` or to pytest's folder.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from reporting import write_run

from adagrpo.report.page import write_report

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--remote-debugging-pipe",
]  # fmt: skip
PLACES = {"wide": (1280, 900, False), "narrow": (390, 844, False), "dark": (1280, 900, True), "phone": (360, 740, True)}
OVERFLOW = """(() => {
  const wide = document.documentElement.scrollWidth, room = document.documentElement.clientWidth;
  const scrolls = (e) => e && (["auto", "scroll"].includes(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  const out = [...document.querySelectorAll("body *")].filter((e) => e.getBoundingClientRect().right > room + 1
    && e.checkVisibility() && !e.closest(".hidden") && !scrolls(e));
  return JSON.stringify({wide, room, out: out.map((e) => e.outerHTML.slice(0, 80))});
})()"""
SMALLEST_TEXT = """Math.min(...[...document.querySelectorAll("svg text, td, p, li")]
  .map((e) => parseFloat(getComputedStyle(e).fontSize)))"""


class Browser:
    """One page of headless Chromium; ``events`` holds everything it has said."""

    def __init__(self, read: int, write: int) -> None:
        self.read, self.write, self.numbers, self.rest = read, write, itertools.count(1), b""
        self.events: list[dict[str, Any]] = []
        self.session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params} | ({"sessionId": self.session} if self.session else {})
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def wait(self, method: str) -> None:
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._next())

    def evaluate(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def show(self, page: Path, width: int, height: int, dark: bool) -> None:
        self.events.clear()
        media = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=media)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        self.call("Page.navigate", url=page.as_uri())
        self.wait("Page.loadEventFired")

    def click(self, selector: str) -> None:
        element = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f'{element}.scrollIntoView({{block: "center", behavior: "instant"}})')
        box = json.loads(self.evaluate(f"JSON.stringify({element}.getBoundingClientRect())"))
        at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, **at, button="left", clickCount=1)

    def shoot(self, path: Path, full: bool = True) -> bytes:
        shot = base64.b64decode(self.call("Page.captureScreenshot", format="png", captureBeyondViewport=full)["data"])
        path.write_bytes(shot)
        return shot

    def complaints(self) -> list[str]:
        """Errors and console messages, and requests for anything but the page itself and what is embedded in it."""
        said = [json.dumps(e) for e in self.events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
        said += [json.dumps(e) for e in self.events if e["method"] == "Runtime.consoleAPICalled"]
        asked = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return said + [url[:200] for url in asked if not url.startswith(("file:", "data:"))]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            chunk = os.read(self.read, 1 << 20)
            assert chunk, "the browser has ended"
            self.rest += chunk
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    binary = shutil.which("chromium")
    if binary is None:
        pytest.skip("no chromium on this machine")
    profile = tmp_path_factory.mktemp("profile")
    (to_browser, write), (read, from_browser) = os.pipe(), os.pipe()
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (to_browser, from_browser)]
    command = f'exec "$0" "$@" 3<&{high[0]} 4>&{high[1]}'
    process = subprocess.Popen(
        ["bash", "-c", command, binary, *FLAGS, f"--user-data-dir={profile}"],
        pass_fds=high,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for fd in (to_browser, from_browser, *high):
        os.close(fd)
    try:
        opened = Browser(read, write)
        yield opened
        opened.session = None
        with contextlib.suppress(AssertionError, OSError):
            opened.call("Browser.close")
    finally:
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
        os.close(read)
        os.close(write)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run, one still going with hostile text, and three runs compared."""
    folder = tmp_path_factory.mktemp("pages")
    one = write_run(folder / "tiny-001", grids=6)
    young = write_run(folder / ("a-run-with-a-rather-long-name-that-does-not-break" + "x" * 60), iterations=12)
    with (young / "events.jsonl").open("a") as file:
        file.write(json.dumps({"iteration": 3, "kind": "warning", "message": "<script>throw 1</script>" + "long" * 90}) + "\n")
    arms = ((2, "random"), (3, "hardest"))
    others = [write_run(folder / f"tiny-00{i}", seed=i, level=0.25 - 0.06 * i, strategy=arm, grids=2) for i, arm in arms]
    compared = {"one": [one], "young": [young], "several": [one, *others]}
    return {name: write_report(runs, folder / f"{name}.html") for name, runs in compared.items()}


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("REPORT_SHOTS") or tmp_path_factory.mktemp("shots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.proof
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["one", "young", "several"])
def test_fits_and_is_silent(browser: Browser, pages: dict[str, Path], shots: Path, name: str, place: str) -> None:
    browser.show(pages[name], *PLACES[place])
    found = json.loads(browser.evaluate(OVERFLOW))
    assert found["wide"] <= found["room"] == PLACES[place][0] and found["out"] == []
    assert browser.evaluate(SMALLEST_TEXT) >= 11
    picture = browser.shoot(shots / (f"{place}.png" if name == "one" else f"{name}-{place}.png"))
    assert len(picture) > 20_000
    assert browser.complaints() == []


@pytest.mark.proof
def test_dark_is_dark(browser: Browser, pages: dict[str, Path]) -> None:
    brightness = []
    for dark in (False, True):
        browser.show(pages["one"], 1280, 900, dark)
        colour = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness.append(sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))) / 3)
    assert brightness[0] > 200 and brightness[1] < 50


@pytest.mark.proof
def test_pointer_shows_the_values_of_the_run(browser: Browser, pages: dict[str, Path], shots: Path) -> None:
    browser.show(pages["one"], 1280, 900, False)
    lines = (pages["one"].parent / "tiny-001" / "metrics.jsonl").read_text().splitlines()
    for plot, share, key, label in ((0, 0.5, "reward/train", "train"), (0, 0.0, "reward/train", "train")):
        box = json.loads(browser.evaluate(
            f'JSON.stringify([...document.querySelectorAll(".frame")][{plot}].getBoundingClientRect())'
        ))  # fmt: skip
        x, y = box["x"] + share * box["width"], box["y"] + box["height"] / 2
        browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        rows = browser.evaluate('[...document.querySelectorAll(".tip div")].map((row) => row.textContent).join("|")').split("|")
        iteration = int(rows[0].removeprefix("iteration "))
        assert abs(iteration - (1 + 99 * share)) <= 1
        shown = float(next(row for row in rows if row.startswith(f"{label}: ")).split(": ")[1])
        assert shown == pytest.approx(json.loads(lines[iteration - 1])[key], abs=2e-4)
        if share == 0:
            assert rows[-1].startswith("held-out: ") and rows[-1].endswith(" (at 10)"), "no value at iteration 1"
        browser.shoot(shots / "pointer.png", full=False)
    assert browser.complaints() == []


@pytest.mark.proof
def test_samples_switch_without_script(browser: Browser, pages: dict[str, Path], shots: Path) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.show(pages["one"], 1280, 900, False)
        visible = '[...document.querySelectorAll(".frames > *")].findIndex((e) => e.checkVisibility())'
        assert browser.evaluate(visible) == 4
        browser.click("label[for=v0-1]")
        assert browser.evaluate(visible) == 1
        image = 'document.querySelector(".grid img")'
        size = f"JSON.stringify([{image}.clientWidth, {image}.naturalWidth])"
        shown, natural = json.loads(browser.evaluate(size))
        assert shown < natural
        browser.click(".size")
        assert json.loads(browser.evaluate(size)) == [natural, natural]
        assert json.loads(browser.evaluate(OVERFLOW))["out"] == []
        browser.shoot(shots / "full-size.png", full=False)
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
