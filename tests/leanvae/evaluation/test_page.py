"""The page in headless Chromium, opened from disk: Playwright drives Debian's browser."""

import os
import shutil
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from leanvae import LeanVAE, LeanVAEConfig
from leanvae.evaluation import page as page_module
from leanvae.evaluation.run import evaluate
from leanvae.media.writer import VideoWriter, write_png

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="the page's tests need playwright: pip install playwright"
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="the page's tests need Chromium: apt-get install chromium, or its path in CHROMIUM"
)
# Without them Chromium looks for hosts that no test needs.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
CLIP, IMAGE, ODD = "it's 100%.mp4", "picture #1.png", "odd <!--<script>.mp4"
MODELS = ["jpeg:10", "lean", "identity"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One report with its pictures inside, and one with them beside it."""
    root = tmp_path_factory.mktemp("page")
    files = root / "files"
    files.mkdir()
    _write_moving_square(files / CLIP, 64, 80, frames=25)
    _write_moving_square(files / ODD, 35, 51, frames=7)
    write_png(files / IMAGE, np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8))
    (files / "broken.mp4").write_bytes(b"<script>alert(1)</script>")
    torch.manual_seed(0)
    LeanVAE(LeanVAEConfig(low_channels=4, high_channels=8)).save_pretrained(root / "lean")
    specs = ["jpeg:10", f"{root}/lean", "identity"]
    found = {}
    for name, limit in (("inside", page_module.INLINE_BYTES), ("beside", 0)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(page_module, "INLINE_BYTES", limit)
            evaluate(specs, files, root / name)
        found[name] = root / name / "report.html"
    return found


def _write_moving_square(path: Path, height: int, width: int, frames: int) -> None:
    """A clip whose frame shows its number by where a bright square stands."""
    with VideoWriter(path, width, height, time_base=Fraction(1, 10), rate=Fraction(10)) as writer:
        for index in range(frames):
            image = np.full((height, width, 3), 40, np.uint8)
            image[8:16, 2 * index : 2 * index + 8] = 220
            writer.write(image)


BOTH = pytest.mark.parametrize("page", ["inside", "beside"], indirect=True)


@pytest.fixture
def page(request: pytest.FixtureRequest, browser: Any, reports: dict[str, Path]) -> Iterator[Any]:
    """The page of a report, by default that with its pictures inside, opened from disk; its console stays silent."""
    context = browser.new_context(viewport={"width": 1100, "height": 900}, offline=True)
    opened = context.new_page()
    said: list[str] = []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("requestfailed", lambda request: said.append(f"failed: {request.url[:200]}"))
    opened.goto(reports[getattr(request, "param", "inside")].as_uri())
    _open(opened, CLIP)
    yield opened
    assert said == []
    context.close()


def _open(page: Any, name: str) -> None:
    page.select_option("#clip", label=name)
    page.wait_for_function("[...document.querySelectorAll('#stage video')].every((video) => video.readyState >= 2)")


def _times(page: Any) -> list[float]:
    return page.evaluate("[...document.querySelectorAll('#stage video')].map((video) => video.currentTime)")


def _show_frame(page: Any, key: str) -> None:
    page.focus("#stage")
    page.keyboard.press(key)
    page.wait_for_function("[...document.querySelectorAll('#stage video')].every((video) => !video.seeking)")


def _picture(page: Any, selector: str = "#stage") -> np.ndarray:
    data = page.locator(selector).screenshot()
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1].astype(float)


@BOTH
def test_page_shows_totals_and_what_is_missing(page: Any) -> None:
    rows = page.locator("#summary tbody tr").all_inner_texts()
    assert [row.split("\t")[0].strip() for row in rows] == MODELS
    assert "∞" in rows[2]
    assert "LPIPS is left out" in page.inner_text("#notes")
    assert "broken.mp4: cannot be decoded" in page.inner_text("#skipped")
    assert page.locator("#distribution svg circle").count() == 3 * 2  # identity has no finite PSNR
    assert page.input_value("#right") == "jpeg:10"


def test_slider_moves_with_pointer_keys_and_control(page: Any) -> None:
    def clip_path() -> str:
        return page.eval_on_selector("#pane-right", "(pane) => pane.style.clipPath")

    assert "50%" in clip_path()
    page.locator("#stage").scroll_into_view_if_needed()
    box = page.locator("#stage").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    assert "75%" in clip_path()
    page.focus("#stage")
    page.keyboard.press("ArrowLeft")
    assert "73%" in clip_path()
    page.focus("#slider")
    page.keyboard.press("Home")
    assert page.input_value("#slider") == "0"
    right_only = _picture(page)
    page.keyboard.press("End")
    assert np.abs(_picture(page) - right_only).mean() > 0.2


@BOTH
def test_both_videos_play_in_step(page: Any) -> None:
    page.focus("#stage")
    page.keyboard.press("Space")
    assert page.inner_text("#play") == "Pause"
    page.wait_for_function("document.querySelector('#stage video').currentTime > 0.3")
    drifts = []
    for _ in range(12):
        left, right = _times(page)
        drifts.append(abs(left - right))
        page.wait_for_timeout(50)
    assert sorted(drifts)[len(drifts) // 2] < 0.1  # a frame's length
    page.keyboard.press("Space")
    assert page.inner_text("#play") == "Play"
    page.wait_for_function("[...document.querySelectorAll('#stage video')].every((video) => video.paused)")
    left, right = _times(page)
    assert left == right > 0.3


def test_clip_starts_again_at_its_end(page: Any) -> None:
    _show_frame(page, "End")
    assert page.inner_text("#position") == "frame 25 of 25"
    page.click("#play")
    page.wait_for_function("document.querySelector('#stage video').currentTime < 1")
    page.wait_for_function("document.querySelector('#stage video').currentTime > 0.2")
    page.click("#play")


def _squares(page: Any) -> list[int]:
    """The frames that the panes show side by side, by where the square stands."""
    picture = _picture(page).mean(2)
    panes = np.array_split(picture, 2, axis=1)
    rows = [pane[pane.shape[0] * 12 // 64] for pane in panes]  # through the square's middle
    return [round(int(np.argmax(row > 130)) * 80 / len(row) / 2) for row in rows]


@BOTH
def test_frames_are_stepped_exactly(page: Any) -> None:
    page.select_option("#view", "side")
    for key, frame in ((".", 1), (".", 2), (".", 3), (",", 2), ("End", 24), ("Home", 0)):
        _show_frame(page, key)
        assert page.inner_text("#position") == f"frame {frame + 1} of 25"
        deadline = time.monotonic() + 5
        while _squares(page) != [frame, frame] and time.monotonic() < deadline:
            page.wait_for_timeout(50)
        assert _squares(page) == [frame, frame]
    page.fill("#time", "10")
    page.wait_for_function("Math.abs(document.querySelector('#stage video').currentTime - 1.05) < 0.01")
    assert _times(page) == pytest.approx([1.05, 1.05])


def test_difference_is_dark_where_frames_agree(page: Any) -> None:
    page.select_option("#view", "difference")
    page.wait_for_timeout(150)
    different = _picture(page)
    page.fill("#gain", "32")
    page.wait_for_timeout(150)
    assert _picture(page).mean() > different.mean() > 5
    page.select_option("#right", "identity")
    page.wait_for_function("[...document.querySelectorAll('#stage video')].every((video) => video.readyState >= 2)")
    page.wait_for_timeout(150)
    assert _picture(page)[10:-10, 10:-10].mean() < 8


def test_zoom_enlarges_and_pans(page: Any) -> None:
    page.select_option("#zoom", "4")
    transform = "(video) => video.style.transform"
    before = page.eval_on_selector("#pane-left video", transform)
    assert "scale(4)" in before
    assert page.eval_on_selector("#pane-right video", transform) == before
    page.focus("#stage")
    page.keyboard.press("ArrowRight")
    assert page.eval_on_selector("#pane-left video", transform) != before
    page.select_option("#zoom", "1")
    assert "translate(0px, 0px) scale(1)" in page.eval_on_selector("#pane-left video", transform)


@BOTH
def test_images_and_clips_of_odd_sizes_are_shown(page: Any) -> None:
    page.select_option("#clip", label=IMAGE)
    page.wait_for_function("[...document.querySelectorAll('#stage img')].every((image) => image.naturalWidth === 56)")
    assert page.locator("#player").is_hidden()
    _open(page, ODD)
    sizes = "[...document.querySelectorAll('#stage video')].map((video) => [video.videoWidth, video.videoHeight])"
    assert page.evaluate(sizes) == [[52, 36], [52, 36]]


def test_files_are_sorted_and_open_the_viewer(page: Any) -> None:
    first = page.locator("#clips tbody tr").first
    worst = first.inner_text()
    page.select_option("#clips-order", "best")
    assert first.inner_text() != worst
    page.select_option("#clips-model", "lean")
    page.locator("#clips tbody button", has_text=CLIP).focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "stage"
    assert (page.input_value("#left"), page.input_value("#right")) == ("source", "lean")
    page.wait_for_function("[...document.querySelectorAll('#details img')].every((image) => image.naturalWidth > 0)")
    assert page.locator("#details img").count() == 2
    assert "Latent channels of lean" in page.inner_text("#details")


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_page_fits_a_small_screen_in_both_schemes(
    browser: Any, reports: dict[str, Path], scheme: str, dark: bool
) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 640}, color_scheme=scheme)
    page = context.new_page()
    page.goto(reports["inside"].as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    box = page.locator("#stage").bounding_box()
    assert 300 <= box["width"] <= 360
    page.evaluate("scrollTo(0, 0)")
    corner = cv2.imdecode(np.frombuffer(page.screenshot(), np.uint8), cv2.IMREAD_COLOR)[2, 2]
    assert bool(corner.mean() < 60) is dark
    context.close()
