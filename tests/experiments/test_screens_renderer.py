"""The renderer of experiments/screens: node, its packages and chromium are needed, so `make
test-browser` runs these."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tprl.data.screens import Screens
from tprl.data.taking import take

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parents[2]
RENDERER = ROOT / "experiments" / "screens"
PAGES = 4


@pytest.fixture(scope="module", autouse=True)
def _tools() -> None:
    missing = pytest.fail if os.environ.get("NEED_BROWSER") else pytest.skip
    if not shutil.which("node"):
        missing("node is not installed: apt install nodejs npm.")
    if not (RENDERER / "node_modules").is_dir():
        missing(f"the renderer's packages are not installed: cd {RENDERER} && npm install.")
    if not (os.environ.get("CHROMIUM") or shutil.which("chromium")):
        missing("chromium is not installed: apt install chromium.")


def node(
    *words: str, renderer: Path = RENDERER, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["node", *words],
        cwd=renderer,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        timeout=300,
    )


def render(out: Path, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    words = ("--split", "train", "--seed", "5", "--pages", str(PAGES), "--out", str(out), *options)
    return node("render.mjs", *words, env=env)


def evaluated(code: str) -> Any:
    """What a piece of JavaScript prints as JSON."""
    done = node("--input-type=module", "--eval", code)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("screens") / "train-5"
    done = render(out)
    assert (done.returncode, done.stdout) == (0, f"pages: {out}\n"), done.stderr
    return out


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.png")}


class TestPages:
    def test_the_dataset_reads_them(self, folder: Path) -> None:
        data = Screens("train", source=str(folder.parent), seed=5, bare=True, max_bad_rows=0.0)
        samples = take(data, range(len(data)))
        assert len({sample.uid.split("/")[2] for sample in samples}) == PAGES
        assert {sample.images[0].size for sample in samples} == {(320, 320)}
        assert len({sample.family for sample in samples}) >= 5

    def test_the_same_seed_makes_the_same_bytes_in_any_number_of_tabs(
        self, folder: Path, tmp_path: Path
    ) -> None:
        assert render(tmp_path / "train-5", "--tabs", "1").returncode == 0
        assert pictures(tmp_path / "train-5") == pictures(folder)
        for name in ("questions.jsonl", "elements.jsonl"):
            again = lines(tmp_path / "train-5" / name)
            assert sorted(again, key=json.dumps) == sorted(lines(folder / name), key=json.dumps)

    def test_what_a_page_shows_lies_where_it_is_drawn(self, folder: Path) -> None:
        """Characters are drawn inside the boxes of their runs: there the picture is not of one
        color."""
        for page in lines(folder / "elements.jsonl"):
            number = f"{page['page']:08d}"
            file = folder / "images" / number[:5] / f"{number}.png"
            picture = np.asarray(Image.open(file).convert("L")).astype(int)
            runs = [run for run in page["runs"] if not run["covered"] and not run["cut"]]
            assert len(runs) >= 10
            for run in runs:
                assert len(run["xs"]) == len(run["text"]) + 1
                x1, y1, x2, y2 = (round(value) for value in run["box"])
                assert np.ptp(picture[y1:y2, x1:x2]) > 30, run["text"]
            for element in page["elements"]:
                assert {
                    "role",
                    "box",
                    "text",
                    "label",
                    "value",
                    "checked",
                    "active",
                } <= element.keys()

    def test_an_interrupted_rendering_goes_on(self, folder: Path, tmp_path: Path) -> None:
        out = tmp_path / "train-5"
        shutil.copytree(folder, out)
        questions = out / "questions.jsonl"
        whole = lines(questions)
        # As a kill leaves it: the last page lacks questions, and the last line is torn.
        questions.write_text(
            "".join(f"{json.dumps(row)}\n" for row in whole[:-2]) + json.dumps(whole[-2])[:20]
        )
        kept = next((out / "images").rglob("*.png"))
        before = kept.stat().st_mtime_ns
        assert render(out).returncode == 0
        assert sorted(lines(questions), key=json.dumps) == sorted(whole, key=json.dumps)
        assert kept.stat().st_mtime_ns == before or whole[-1]["img_filename"].endswith(kept.name)

    def test_asking_anew_gives_the_same_questions(self, folder: Path, tmp_path: Path) -> None:
        out = tmp_path / "train-5"
        shutil.copytree(folder, out)
        assert node("reask.mjs", str(out)).returncode == 0
        assert sorted(lines(out / "questions.jsonl"), key=json.dumps) == sorted(
            lines(folder / "questions.jsonl"), key=json.dumps
        )


class TestAsking:
    """`ask` on a page written by hand: a row of three buttons, of which two are called the same,
    and a field."""

    CODE = """
      import {{ ask }} from './lib/ask.mjs'
      const run = (text, x, y, owner, part) => ({{
        text, xs: [x, x + 30], y1: y, y2: y + 10, part, size: 12,
        covered: false, cut: false, box: [x, y, x + 30, y + 10], owner }})
      const element = (role, x, y, more) => ({{
        role, box: [x, y, x + 40, y + 16], covered: false, cut: false, pieces: 1, icons: [],
        label: '', value: '', fits: true, checked: null, active: false, disabled: false,
        placeholder: false, text: '', clear: true, ...more }})
      const shown = {{ size: [320, 320], tables: [], containers: [], groups: [], pairs: [],
        dialogs: [],
        elements: [element('button', 10, 10, {{ text: 'Save' }}),
          element('button', 60, 10, {{ text: '{second}' }}),
          element('button', 110, 10, {{ text: 'Copy' }}),
          element('field', 10, 60, {{ label: 'City', value: '{value}' }})],
        runs: [run('Save', 12, 12, 0, 1), run('{second}', 62, 12, 1, 2), run('Copy', 112, 12, 2, 3),
          run('City', 10, 46, -1, 4), run('{value}', 12, 62, 3, 5)] }}
      const asked = Array.from({{ length: 8 }}, (_, seed) => ask(shown, [], seed))
      console.log(JSON.stringify(asked.flat()))
    """

    def asked(self, second: str, value: str) -> dict[str, set[tuple[str, str]]]:
        out: dict[str, set[tuple[str, str]]] = {}
        for question in evaluated(self.CODE.format(second=second, value=value)):
            out.setdefault(question["family"], set()).add((question["text"], question["answer"]))
        return out

    def test_names_that_are_there_once(self) -> None:
        asked = self.asked("Open", "Paris")
        assert {text.split(" ", 1)[1] for text, _ in asked["text"]} == {"Save", "Open", "Copy"}
        assert asked["value"] == {("what does the field City say?", "Paris")}
        assert asked["field"] == {("click the field City", "")}
        assert asked["count"] == {("how many fields are there?", "1")}
        assert asked["neighbor"] <= {
            ("what is right of Save?", "Open"),
            ("what is left of Open?", "Save"),
            ("what is right of Open?", "Copy"),
            ("what is left of Copy?", "Open"),
        }
        assert asked["neighbor"]

    def test_names_that_are_there_twice_are_not_asked_for(self) -> None:
        asked = self.asked("Save", "Copy")
        assert "text" not in asked
        assert "neighbor" not in asked

    def test_an_empty_field_is_not_read(self) -> None:
        assert "value" not in self.asked("Open", "")


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                ("--split", "dev"),
                "--split dev does not exist: choose one of train, val, test, final, real.",
            ),
            (("--pages", "0"), "--pages must be a whole number from 1 to 10000000, got 0."),
            (("--tabs", "two"), "--tabs must be a whole number from 1 to 16, got two."),
            (("--colour", "red"), "Unknown option '--colour': use --split, --pages, --seed"),
        ],
    )
    def test_bad_options(self, options: tuple[str, ...], message: str, tmp_path: Path) -> None:
        done = node("render.mjs", "--out", str(tmp_path / "out"), *options)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert done.stderr.startswith(f"error: {message}")

    def test_no_chromium(self, tmp_path: Path) -> None:
        done = render(tmp_path / "out", CHROMIUM="/nowhere/chromium")
        assert done.returncode == 2
        assert done.stderr.startswith(
            "error: there is no chromium at /nowhere/chromium: install it (apt install chromium)"
        )

    def test_a_missing_package(self, tmp_path: Path) -> None:
        copy = tmp_path / "screens"
        shutil.copytree(RENDERER, copy, ignore=shutil.ignore_patterns("node_modules"))
        done = node("render.mjs", "--out", str(tmp_path / "out"), renderer=copy)
        assert done.returncode == 2
        assert done.stderr.startswith("error: node_modules has nothing of ")
        assert f"run npm install in {copy}." in done.stderr

    def test_a_folder_of_other_pages(self, folder: Path) -> None:
        before = pictures(folder)
        done = node("render.mjs", "--split", "val", "--pages", "1", "--out", str(folder))
        assert done.returncode == 2
        assert f"error: {folder} holds pages of other settings or versions" in done.stderr
        assert pictures(folder) == before

    def test_a_page_that_never_settles_is_reported_and_others_are_kept(
        self, tmp_path: Path
    ) -> None:
        """A chromium that does not answer in the time allowed: one stopped by its wrapper after a
        while."""
        code = """
          import { launch, Tab } from './lib/browser.mjs'
          import { serve } from './lib/serve.mjs'
          const endless = '<p>text</p><script>for (;;) {}</script>'
          const pages = new Map([['still', '<p>text</p>'], ['never', endless]])
          const served = await serve('node_modules', pages)
          const browser = await launch()
          const tab = await Tab.open(browser, 2)
          await tab.show(`${served.address}/page/still`, 320, 320, 1)
          const late = await tab.show(`${served.address}/page/never`, 320, 320, 1)
            .then(() => '', error => error.message)
          await browser.close()
          served.close()
          console.log(JSON.stringify(late))
        """
        assert "Timeout" in evaluated(code)
