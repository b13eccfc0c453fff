"""The whole chain on the embedded LVLM, from a typed option to the files on disk, and what is
evaluated of it."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tests.commands.calls import FAST, call, refused

from tprl.commands.evaluate import evaluate
from tprl.commands.train import train
from tprl.evaluation.entries import trained_entries
from tprl.evaluation.results import COLUMNS, read_results
from tprl.pruners.folder import CONFIG, WEIGHTS
from tprl.pruners.learned import load_pruner
from tprl.runtime.files import write_sealed
from tprl.stages.calibrate import FADES

Call = Callable[..., Path]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return call("train", train, tmp_path_factory.mktemp("runs") / "all", *FAST)


class TestTheChain:
    def test_leaves_config_weights_logs_and_report(self, run: Path) -> None:
        names = [
            "config.yaml",
            "results.csv",
            "samples.jsonl",
            "report.html",
            "paired.json",
            "done.json",
        ]
        assert all((run / name).is_file() for name in names)
        assert all(
            (run / stage / WEIGHTS).is_file() for stage in ("autoencoder", "lfd", "mlp", "pruner")
        )
        assert "samples_seen" in (run / "metrics.csv").read_text().splitlines()[0]

    def test_the_report_follows_every_stage_and_says_how_it_was_made(self, run: Path) -> None:
        page = (run / "report.html").read_text()
        plots = re.findall(r'<svg role="img" aria-label="(.*?)"', page)
        for words in (
            ("autoencoder, share of variance lost: ", "training from ", "held out from "),
            ("lfd, accuracy: ", "served from "),
            ("ppo, return of an episode: ",),
            ("ppo, accuracy: ", "served from "),
            ("adapt, divergence in nats: ",),
        ):
            assert any(all(word in plot for word in words) for plot in plots), words
        assert f"python -m src.train debug=fast logger=csv hydra.run.dir={run}" in page
        assert "<dt>versions</dt><dd>Python 3." in page

    def test_the_table_holds_every_pruner_and_column(self, run: Path) -> None:
        with (run / "results.csv").open() as file:
            assert tuple(csv.DictReader(file).fieldnames or ()) == COLUMNS
        rows = read_results(run / "results.csv")
        assert {row.pruner for row in rows} == {
            "keep_all",
            "tprl",
            "tprl_adaptive",
            "tprl_lfd",
            "mlp",
            "random",
        }
        accuracy = [row for row in rows if row.metric == "accuracy" and row.pruner == "tprl"]
        assert [row.kept_tokens for row in accuracy] == [48, 16, 8, 4]
        assert all(row.flops_ratio < 1 for row in accuracy)

    def test_the_pruner_says_what_it_was_trained_on(self, run: Path) -> None:
        about = json.loads((run / "pruner" / CONFIG).read_text())
        assert about["trained_on"]["stages"] == ["autoencoder", "lfd", "ppo", "adapt"]
        assert about["trained_to"] == 0.1111
        assert about["fade"] in FADES
        assert all(
            about["budgets"][0] <= mean <= about["budgets"][-1] for mean, _ in about["prices"]
        )
        assert about["prices"]

    def test_evaluating_the_run_gives_the_same_numbers(
        self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        again = call(
            "eval",
            evaluate,
            tmp_path,
            f"run={run}",
            "pruners=[random]",
            "keep_ratios=[0.1111]",
            "limit=12",
        )
        before = {
            (r.pruner, r.metric, r.value)
            for r in read_results(run / "results.csv")
            if r.keep_ratio == 0.1111
        }
        after = {
            (r.pruner, r.metric, r.value)
            for r in read_results(again / "results.csv")
            if r.keep_ratio == 0.1111
        }
        assert before
        assert before == after
        output = re.findall(r"^(\w+) +\[#{20}\] (\d+)/\2 ", capsys.readouterr().out, re.MULTILINE)
        # never silent for long
        assert [name for name, _ in output] == ["evaluate", "questions", "pictures"]
        commands = (
            (again / "report.html")
            .read_text()
            .partition('<pre class="commands"><code>')[2]
            .splitlines()[:2]
        )
        assert commands[0] == "python -m src.train debug=fast logger=csv"
        assert commands[1].startswith(f"python -m src.eval run={run} ")
        plots = " ".join(
            re.findall(r'<svg role="img" aria-label="(.*?)"', (again / "report.html").read_text())
        )
        assert all(
            part in plots for part in ("lfd, accuracy: ", "ppo, return", "adapt, divergence")
        )

    @pytest.mark.slow
    def test_batch_size_changes_no_selection_and_no_score(self, run: Path, tmp_path: Path) -> None:
        options = (
            f"run={run}",
            "pruners=[random,divprune]",
            "keep_ratios=[0.1111]",
            "limit=9",
            "logger=csv",
        )
        tables = [
            (
                call("eval", evaluate, tmp_path / str(size), *options, f"batch_size={size}")
                / "samples.jsonl"
            ).read_text()
            for size in (9, 4)
        ]
        assert sorted(tables[0].splitlines()) == sorted(tables[1].splitlines())
        assert len(tables[0].splitlines()) > 9 * 5

    def test_arms_of_a_study_go_by_their_names(self, run: Path, tmp_path: Path) -> None:
        options = ("logger=none", "keep_ratios=[0.1111]", "limit=10")
        table = call(
            "eval", evaluate, tmp_path, f"runs={{best: [{run}], start: {run}/lfd}}", *options
        )
        names = {row.pruner for row in read_results(table / "results.csv")}
        assert names == {"best", "best_adaptive", "start", "keep_all"}
        pairs = {
            (record["pruner"], record["other"])
            for record in json.loads((table / "paired.json").read_text())
        }
        assert pairs == {
            *(("best", other) for other in ("start", "best_adaptive")),
            *(("best_adaptive", other) for other in ("start", "best")),
        }

    def test_an_adaptive_pruner_leaves_out_the_means_it_cannot_reach(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        options = ("pruner=tprl_adaptive", "limit=5", "logger=none")
        table = call("eval", evaluate, tmp_path / "some", *options, "keep_ratios=[0.5,0.1111]")
        assert {row.keep_ratio for row in read_results(table / "results.csv")} == {1.0, 0.1111}
        assert (
            "not calibrated for a mean keep ratio of 0.5: left out"
            in (table / "eval.log").read_text()
        )
        assert "calibrated for mean keep ratios from" in refused(
            capsys, "eval", tmp_path / "none", *options, "keep_ratios=[0.9]"
        )

    @pytest.mark.parametrize(
        ("arms", "sentence"),
        [
            ("{{a: [{run}, {run}]}}", "a with seed 0 occurs 2 times"),
            ("{{random: {run}}}", "random with seed 0 occurs 2 times"),
            ("{run}", "names no arms"),
        ],
    )
    def test_ambiguous_arms_are_refused(
        self,
        arms: str,
        sentence: str,
        run: Path,
        capsys: pytest.CaptureFixture[str],
        tmp_path: Path,
    ) -> None:
        argument = arms.format(run=run)
        assert sentence in refused(
            capsys, "eval", tmp_path, f"runs={argument}", "pruners=[random]", "logger=none"
        )

    def test_arms_are_evaluated_where_they_were_trained(
        self, run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        config = OmegaConf.load(run / "config.yaml")
        config.dataset._target_ = "tprl.data.crowd.Crowd"
        config.model.pretrained = "tiny_crowd"
        elsewhere = tmp_path / "elsewhere"
        shutil.copytree(run, elsewhere)
        write_sealed(elsewhere / "config.yaml", OmegaConf.to_yaml(config))
        options = ("logger=none", "keep_ratios=[0.1111]", "limit=6")
        arms = f"runs={{moved: {elsewhere}/lfd}}"
        table = call("eval", evaluate, tmp_path / "out", *options, arms)
        assert {row.dataset for row in read_results(table / "results.csv")} == {"crowd"}
        both = f"runs={{moved: {elsewhere}, here: {run}}}"
        assert "different settings of model" in refused(capsys, "eval", tmp_path, *options, both)

    def test_rows_of_a_run_carry_its_training_seed(
        self, run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        other = tmp_path / "other"
        shutil.copytree(run, other)
        for about in other.glob("*/config.json"):
            write_sealed(about, about.read_text().replace('"seed": 0', '"seed": 3'))
        seeds = {
            (entry.name, entry.seed) for entry in trained_entries(other, {"keep_ratios": [0.1111]})
        }
        assert seeds == {(name, 3) for name in ("tprl", "tprl_adaptive", "tprl_lfd", "mlp")}
        output = refused(
            capsys, "eval", tmp_path / "eval", f"run={other}", "pruners=[tprl]", "logger=none"
        )
        assert "tprl occurs 2 times" in output

    def test_what_was_calibrated_ends_with_the_weights_and_a_threshold_is_evaluated(
        self, run: Path, tmp_path: Path
    ) -> None:
        assert json.loads((run / "pruner" / CONFIG).read_text())["prices"]
        small = (
            "stage.iterations=1",
            "stage.prompts=2",
            "stage.group=2",
            "stage.served.limit=5",
            "stage.calibrate=null",
        )
        options = (
            "stage=ppo",
            f"stage.init_from={run}",
            "stage.budget=lagrange",
            "policy.select=topk",
            "stage.keep_ratio=0.2",
            "logger=none",
        )
        after = call("train", train, tmp_path, *options, *small)
        about = json.loads((after / "pruner" / CONFIG).read_text())
        assert (about["fade"], about["trained_to"], about["prices"]) == (0.0, 1.0, [])
        assert 0 < about["tau"] < 1
        entries = trained_entries(after, {"keep_ratios": [0.2]})
        assert [(entry.name, entry.keep_ratios) for entry in entries] == [
            ("tprl", (0.2,)),
            ("tprl_threshold", (None,)),
        ]

    @pytest.mark.slow
    def test_the_same_seed_gives_the_same_table(self, run: Path, tmp_path: Path) -> None:
        again = call("train", train, tmp_path, *FAST)
        assert (again / "results.csv").read_text() == (run / "results.csv").read_text()
        other = call("train", train, tmp_path / "other", *FAST, "seed=1")
        assert (other / "pruner" / WEIGHTS).read_bytes() != (run / "pruner" / WEIGHTS).read_bytes()

    @pytest.mark.slow
    def test_stages_hand_weights_on(self, tmp_path: Path) -> None:
        short = "stage.epochs=1"
        codes = call(
            "train",
            train,
            tmp_path / "a",
            "stage=autoencoder",
            "logger=csv",
            "stage.images=20",
            short,
        )
        lfd = call(
            "train", train, tmp_path / "b", "stage=lfd", "logger=csv", f"stage.init_from={codes}",
            short, "stage.demonstrations=50", "stage.served.limit=5",
        )  # fmt: skip
        first, second = load_pruner(codes), load_pruner(lfd)
        assert first.autoencoder is not None
        assert second.autoencoder is not None
        pairs = zip(first.autoencoder.parameters(), second.autoencoder.parameters(), strict=True)
        assert all((a == b).all() for a, b in pairs)
        assert second.trained_on["stages"] == ["autoencoder", "lfd"]


class TestWeightsThatDoNotFit:
    def test_a_pruner_of_another_width(
        self, run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        options = ("stage=ppo", f"stage.init_from={run}", "policy.width=32")
        assert "does not fit this policy" in refused(capsys, "train", tmp_path, *options)

    def test_damaged_weights(
        self, run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        broken = tmp_path / "broken"
        broken.mkdir()
        (broken / CONFIG).write_text((run / "pruner" / CONFIG).read_text())
        (broken / WEIGHTS).write_bytes((run / "pruner" / WEIGHTS).read_bytes()[:1000])
        sentence = refused(
            capsys, "eval", tmp_path / "out", "pruner=tprl", f"pruner.pretrained={broken}"
        )
        assert "is damaged" in sentence
