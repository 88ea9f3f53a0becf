"""The monitor page in a real browser: pictures move, the divider drags, the charts fill."""

import json
import shutil
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
from commands import command, free_port
from streams import Camera, RtspServer

from pipeline.errors import ConfigError
from pipeline.page import CameraFigures, PageServer, page, pair_jpeg

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SIZE = (48, 80)


class Cameras:
    """Two cameras whose pictures and counts change at every look; one has no picture yet."""

    def __init__(self):
        self._looks = count()
        yard = CameraFigures(
            "yard", "live", 24.9, {"p50": 61.0, "p95": 80.0, "p99": 95.0}, 100, 98, 2, 0, 0, 1
        )
        self.all = [yard, replace(yard, name="<b>gate/1</b>", state="source lost")]

    def figures(self):
        n = next(self._looks)
        return [replace(c, fps=20 + n % 5, dropped=c.dropped + 3 * n) for c in self.all]

    def pair(self, name):
        if name != "yard":
            return None
        level = int(time.monotonic() * 200) % 200
        before = np.full((*SIZE, 3), 20, np.uint8)
        after = np.full((*SIZE, 3), 220, np.uint8)
        before[:, :, 0] = after[:, :, 2] = level
        return pair_jpeg(before, after)


@pytest.fixture(scope="module")
def url():
    cameras = Cameras()
    with PageServer(page(cameras.figures, cameras.pair), "127.0.0.1:0") as server:
        host, port = server.address
        yield f"http://{host}:{port}/"


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("no chromium here: the page is tested in a real browser only")
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture
def tab(browser, url):
    """The page, opened; anything said on its console or not found fails the test."""
    tab = browser.new_page(viewport={"width": 1000, "height": 700})
    said = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("response", lambda r: said.append(f"{r.status} {r.url}") if r.status >= 400 else None)
    tab.goto(url)
    tab.locator("#waiting").wait_for(state="hidden")
    yield tab
    tab.close()
    assert said == []


def pixel(tab, x_share):
    """RGB of what is seen at a place of the picture, half-way down but off the handle."""
    import cv2

    shot = cv2.imdecode(np.frombuffer(tab.locator("#picture").screenshot(), np.uint8), 1)
    return shot[int(shot.shape[0] * 0.3), int(shot.shape[1] * x_share)][::-1].astype(int)


def is_before(rgb):
    return rgb[1] < 120


def test_the_picture_moves(tab):
    seen = {tuple(pixel(tab, 0.25)) for _ in range(5) if not tab.wait_for_timeout(200)}
    assert len(seen) > 2


def test_before_is_left_of_the_divider_and_after_right_of_it(tab):
    assert is_before(pixel(tab, 0.25))
    assert not is_before(pixel(tab, 0.75))


def test_the_divider_follows_the_mouse_and_the_keys(tab):
    box = tab.locator("#picture").bounding_box()
    tab.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5)
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + box["height"] * 0.5, steps=5)
    tab.mouse.up()
    handle = tab.get_by_role("slider")
    assert handle.get_attribute("aria-valuenow") == "90"
    assert is_before(pixel(tab, 0.75))
    assert not is_before(pixel(tab, 0.95))
    handle.focus()
    for _ in range(5):
        handle.press("ArrowLeft")
    assert handle.get_attribute("aria-valuenow") == "80"


def test_the_charts_fill(tab):
    tab.wait_for_timeout(3200)
    for chart in ("chart-fps", "chart-latency", "chart-drops"):
        drawn = tab.evaluate(
            """id => {const c = document.getElementById(id);
            return c.getContext('2d').getImageData(0, 0, c.width, c.height).data
              .filter((v, n) => n % 4 == 3 && v > 0).length}""",
            chart,
        )
        assert drawn > 20, chart
    assert float(tab.locator("#now-fps").text_content()) >= 20
    assert float(tab.locator("#now-drops").text_content()) > 0


def test_every_camera_has_its_state_and_names_are_only_text(tab):
    buttons = tab.locator("nav button")
    assert buttons.all_text_contents() == ["yard", "<b>gate/1</b>"]
    assert buttons.nth(1).get_attribute("title") == "source lost"
    buttons.nth(1).click()
    assert buttons.nth(1).get_attribute("aria-pressed") == "true"
    tab.locator("#waiting").wait_for(state="visible")
    assert tab.locator("#figures dd").first.text_content() == "source lost"


def status(address):
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None  # nobody listens yet


def test_what_is_not_there_is_404_and_nothing_else_is_served(url):
    wanted = {
        "cameras/yard/pair.jpg": 200, "cameras/%3Cb%3Egate%2F1%3C%2Fb%3E/pair.jpg": 204,
        "cameras/none/pair.jpg": 404, "page/__init__.py": 404, "..%2f__init__.py": 404, "docs": 404,
    }  # fmt: skip
    assert {path: status(url + path) for path in wanted} == wanted


def test_the_figures_are_json(url):
    with urllib.request.urlopen(url + "cameras", timeout=5) as answer:
        yard = json.load(answer)[0]
    assert yard["name"] == "yard"
    assert set(yard["latency_ms"]) == {"p50", "p95", "p99"}


def test_a_taken_port_is_one_clear_error():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"--monitor 127\.0\.0\.1:{port}: Address already in use"
        ):
            PageServer(page(list, lambda _: None), f"127.0.0.1:{port}")


def test_closing_leaves_no_thread_and_frees_the_port():
    before = set(threading.enumerate())
    server = PageServer(page(list, lambda _: None), "127.0.0.1:0")
    port = server.address[1]
    server.close()
    server.close()
    assert set(threading.enumerate()) <= before
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))


def test_restore_stream_serves_the_page_of_real_cameras(browser, tiny_checkpoint, tmp_path):
    port, config = free_port(), tmp_path / "cameras.yaml"
    with (
        RtspServer() as server,
        Camera(server.url("gate"), "160x120", 10),
        Camera(server.url("yard"), "96x64", 10),
    ):
        ends = [(name, server.url(name), server.url(f"{name}-out")) for name in ("gate", "yard")]
        cameras = [{"name": n, "source": source, "sink": sink} for n, source, sink in ends]
        config.write_text(json.dumps({"cameras": cameras}))
        process = command(
            "--config", config, "--monitor", f"127.0.0.1:{port}",
            "--model", tiny_checkpoint, "--strength", 0, "--pool", "local",
        )  # fmt: skip
        try:
            tab = browser.new_page()
            deadline = time.monotonic() + 60
            while status(f"http://127.0.0.1:{port}/") != 200:
                assert time.monotonic() < deadline
                time.sleep(0.2)
            tab.goto(f"http://127.0.0.1:{port}/")
            for name, width in (("gate", 160), ("yard", 96)):
                button = tab.locator("nav button", has_text=name)
                button.click(timeout=60_000)
                tab.locator("#waiting").wait_for(state="hidden", timeout=60_000)
                tab.locator(f"nav button[data-state=live]:text('{name}')").wait_for(timeout=60_000)
                seen = set()
                while len(seen) < 3:
                    assert time.monotonic() < deadline + 60
                    seen.add(tab.locator("#picture").screenshot())
                assert tab.evaluate("document.getElementById('after').width") == width
                assert int(tab.locator("#figures dd").nth(2).text_content()) > 0
            tab.close()
        finally:
            process.send_signal(signal.SIGTERM)
            _, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
