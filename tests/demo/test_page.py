"""The page of `python -m src.demo`, served and used: `make test-demo`."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.browsing import EVERY, opened

from tprl.build import load_component
from tprl.data.scenes import Scenes
from tprl.demo.compare import compare_pruners

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parents[2]


def command(directory: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "src.demo", *words, f"hydra.run.dir={directory}"]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    try:
        import_module("gradio")
    except ImportError:
        missing = pytest.fail if os.environ.get("NEED_BROWSER") else pytest.skip
        missing("gradio is not installed: pip install -c constraints.txt -e '.[demo]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    directory = tmp_path_factory.mktemp("demo")
    with (directory / "log").open("w+") as log:
        server = subprocess.Popen(
            command(directory, f"port={port}"), cwd=ROOT, stdout=log, stderr=log
        )
        end = time.monotonic() + 120
        while "open http" not in (directory / "log").read_text():
            assert server.poll() is None, (directory / "log").read_text()
            assert time.monotonic() < end, "the page is not there after two minutes"
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/"
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
    lines = (directory / "log").read_text().splitlines()
    assert lines == [
        f"open http://127.0.0.1:{port}/ in a browser; Ctrl-C ends it",
        f"run: {directory}",
    ]


@pytest.fixture
def page(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    with opened(browser, address, *getattr(request, "param", ())) as page:
        page.wait_for_selector(".answers .card")
        yield page


def ask(page: Any, question: str) -> None:
    """Type a question and wait for its answers."""
    page.get_by_label("Question").fill(question)
    page.get_by_role("button", name="Ask").click()
    page.get_by_role("heading", name=question).wait_for()


def lines(page: Any) -> list[str]:
    return [text.strip("“”") for text in page.locator(".said").all_inner_texts()]


@pytest.mark.parametrize("page", EVERY, indirect=True)
def test_the_page_makes_no_requests_logs_no_errors_and_fits(page: Any, address: str) -> None:
    ask(page, "is there a purple triangle?")
    assert page.heard == []
    assert page.asked
    assert [url for url in page.asked if not url.startswith((address, "data:", "blob:"))] == []
    wide, room = page.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert wide <= room


def test_answers_are_those_of_the_function_behind_it(page: Any) -> None:
    lvlm, tprl = load_component("model", "tiny_llava"), load_component("pruner", "tprl")
    sample = Scenes("test")[0]
    page.get_by_label("number input for Kept fraction").fill("0.3")
    for question in ("how many purple objects are there?", "where is the purple square?"):
        ask(page, question)
        comparison = compare_pruners(lvlm, {"tprl": tprl}, sample.images[0], question, 0.3)
        assert lines(page) == [comparison.full.answer, comparison.pruned[0].answer]
        assert (
            page.locator(".answers [role=status]")
            .inner_text()
            .startswith("With 43 of 144 visual tokens and ")
        )
        numbers = page.locator("table").nth(1).inner_text()
        assert re.search(r"time\s+[\d.]+ ms", numbers)
        assert all(stage in numbers for stage in ("vision", "selector", "prefill", "decode"))


def test_an_example_and_a_suggestion_are_answered_at_once(page: Any) -> None:
    samples = Scenes("test")
    page.get_by_label("Thumbnail 2 of 6").click()
    page.get_by_role("heading", name=samples[5].question).wait_for()
    page.get_by_label(samples[6].question).check()
    page.get_by_role("heading", name=samples[6].question).wait_for()
    lvlm = load_component("model", "tiny_llava")
    pruners = {"tprl": load_component("pruner", "tprl")}
    comparison = compare_pruners(lvlm, pruners, samples[6].images[0], samples[6].question, 0.11)
    assert lines(page) == [comparison.full.answer, comparison.pruned[0].answer]


def test_an_image_is_uploaded_and_a_broken_one_refused(page: Any, tmp_path: Path) -> None:
    Image.new("RGB", (300, 200), "red").save(tmp_path / "red.jpg")
    (tmp_path / "part.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    page.get_by_label("Remove Image").click()
    page.locator("input[type=file]").first.set_input_files(tmp_path / "red.jpg")
    page.get_by_label("Remove Image").wait_for()
    ask(page, "is there a red square?")
    assert len(lines(page)) == 2
    assert (
        page.locator(".answers img").first.evaluate("i => i.naturalWidth / i.naturalHeight") == 1.5
    )
    page.get_by_label("Remove Image").click()
    page.locator("input[type=file]").first.set_input_files(tmp_path / "part.png")
    page.get_by_label("Remove Image").wait_for()
    page.get_by_role("button", name="Ask").click()
    page.get_by_text("The image cannot be read: give a complete PNG").wait_for()


def test_bad_questions_end_in_a_sentence_and_the_next_one_is_answered(page: Any) -> None:
    for question, sentence in (
        (" ", "There is no question"),
        ("where is the dog?", 'does not know "dog"'),
    ):
        page.get_by_label("Question").fill(question)
        page.get_by_role("button", name="Ask").click()
        page.get_by_text(sentence).wait_for()
    ask(page, "where is the purple square?")
    assert len(lines(page)) == 2


def test_a_keyboard_is_enough(page: Any) -> None:
    reached = []
    page.get_by_label("Question").focus()
    page.get_by_label("Question").fill("is there a purple square?")
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "document.activeElement.getAttribute('aria-label') "
                "|| document.activeElement.innerText"
            )
        )
        if reached[-1] == "Ask":
            page.keyboard.press("Enter")
            break
    page.get_by_role("heading", name="is there a purple square?").wait_for()
    assert "range slider for Kept fraction of the visual tokens" in reached
    assert "Pruners" in reached
    page.locator("summary").focus()
    page.keyboard.press("Enter")
    assert page.get_by_alt_text("Keep probability per patch").is_visible()


def test_a_port_that_is_taken_ends_in_a_sentence(address: str, tmp_path: Path) -> None:
    port = address.rstrip("/").rpartition(":")[2]
    done = subprocess.run(
        command(tmp_path, f"port={port}"), cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert re.fullmatch(
        rf"error: the page cannot be served on host=127.0.0.1, port={port} \(.*\)\.\n", done.stderr
    )
