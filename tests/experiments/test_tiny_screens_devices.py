"""`tiny_screens` on a GPU that is not there, with pages drawn by other processes, and by the
clock."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from experiments.screens.tiny import sheets
from experiments.screens.tiny.optimizing import BatchedMuon, grown
from experiments.screens.tiny.pace import Pace
from experiments.screens.tiny.run import Plan, Run
from experiments.screens.tiny.train import export
from experiments.screens.tiny.training import Training
from PIL import Image
from tests.devices import Machine
from torch import nn

from tprl.errors import UserError

SMALL = {
    "vision_width": 64, "vision_layers": 4, "vision_heads": 2, "vision_ffn": 64, "width": 64,
    "layers": 4, "heads": 2, "ffn": 64, "clip_width": 16,
}  # fmt: skip
PLAN: dict[str, Any] = {
    "tower_steps": 2, "reader_steps": 2, "tower_batch": 1, "reader_batch": 2, "questions": 2,
    "sizes": SMALL,
}  # fmt: skip


class TestMuon:
    def test_together_the_matrices_move_as_one_by_one(self) -> None:
        """Within what bfloat16 rounds: standing and lying matrices, of two sizes."""
        torch.manual_seed(0)
        shapes = [(32, 96), (96, 32), (32, 32), (32, 96)]
        start = [torch.randn(shape) for shape in shapes]
        moved = []
        for kind in (torch.optim.Muon, BatchedMuon):
            weights = [nn.Parameter(value.clone()) for value in start]
            optimizer = kind(weights, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
            for step in range(3):
                generator = torch.Generator().manual_seed(step)
                for weight in weights:
                    weight.grad = torch.randn(weight.shape, generator=generator)
                optimizer.step()
            moved.append(
                [weight.detach() - old for weight, old in zip(weights, start, strict=True)]
            )
        for one, other in zip(*moved, strict=True):
            assert float((one - other).norm() / one.norm()) < 0.01

    def test_the_rate_grows_with_the_root_of_the_batch(self) -> None:
        assert [grown(batch) for batch in (2, 8, 18, 32, 512)] == [1, 1, 1.5, 2, 2]


class TestPace:
    def test_by_steps_what_is_ahead_is_known(self) -> None:
        pace = Pace(Plan(tower_steps=4, reader_steps=2))
        assert [pace.when(ahead, 0).tower for ahead in (3, 4)] == [True, False]
        assert pace.when(5, 0).at == 1
        ended = [pace.advance(9.0) for _ in range(6)]
        assert ended == [False, False, False, True, False, False]
        assert pace.over

    def test_by_the_clock_a_phase_ends_with_its_minutes_and_its_rate_has_fallen(self) -> None:
        pace = Pace(Plan(minutes=2, tower_share=0.25))
        assert not pace.advance(20)
        assert pace.at / pace.steps == pytest.approx(2 / 3)
        pace.advance(9.9)
        assert pace.rate() < 0.02
        assert pace.advance(1)
        again = Pace(Plan(minutes=2, tower_share=0.25))
        again.load(pace.state())
        assert (again.tower, again.at, again.done) == (False, 0, 3)
        again.advance(90)
        assert again.over


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """51 pages as render.mjs writes them, all alike; a sheet beside them needs fonts."""
    if not sheets.MODULES.is_dir():
        pytest.skip(f"the fonts are not installed: cd {sheets.MODULES.parent} && npm install.")
    folder = tmp_path_factory.mktemp("pages")
    (folder / "images/00000").mkdir(parents=True)
    picture, shown = sheets.draw(np.random.default_rng(0))
    button = next(e for e in shown["elements"] if e["text"] and not e["cut"])
    click = {"instruction": f"click {button['text']}", "answer": "", "family": "text"}
    value = {"instruction": "what number has Sales?", "answer": "42", "family": "value"}
    place = {"of": 2, "bbox": button["box"], "region": [button["box"]]}
    Image.fromarray(picture).save(folder / "images/00000/first.png")
    with (
        (folder / "elements.jsonl").open("w") as pages,
        (folder / "questions.jsonl").open("w") as q,
    ):
        for page in range(1, 53):
            (folder / f"images/00000/{page:08d}.png").symlink_to("first.png")
            pages.write(json.dumps({"page": page, **shown}) + "\n")
            q.writelines(
                json.dumps({"page": page, **place, **row}) + "\n" for row in (click, value)
            )
    return folder


def losses(training: Training) -> list[float]:
    return [float(training.advance()["loss"]) for _ in range(4)]


@pytest.mark.slow
class TestDevices:
    def test_pages_drawn_by_other_processes_are_the_same_pages(
        self, tmp_path: Path, rendered: Path
    ) -> None:
        alone = Training(Run(tmp_path / "alone", Plan(**PLAN)), rendered)
        helped = Training(Run(tmp_path / "helped", Plan(**PLAN)), rendered, workers=2)
        assert losses(alone) == losses(helped)
        helped.feed.close()

    def test_what_a_process_cannot_draw_is_raised_by_the_training(
        self, tmp_path: Path, rendered: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("experiments.screens.tiny.feed.PAGE_BYTES", 0)
        monkeypatch.setattr("experiments.screens.tiny.feed.MORE_BYTES", 1000)
        helped = Training(Run(tmp_path, Plan(**PLAN)), rendered, workers=1)
        with pytest.raises(RuntimeError, match="takes more than 1,000 bytes"):
            helped.advance()
        helped.feed.close()

    def test_a_step_on_a_gpu_does_not_wait_for_it(
        self, tmp_path: Path, rendered: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Both phases, mixing no devices; but CLIP's text tower, every eighth step, asks about its
        mask, and the emulation's clip_grad_norm_ asks once where gradients truly are."""
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        waits = []
        with Machine() as machine:
            training = Training(Run(tmp_path, Plan(**PLAN)), rendered, "cuda")
            for _ in range(4):
                before = machine.waits.total()
                terms = training.advance()
                waits.append(machine.waits.total() - before)
                assert all(x.device.type == "cuda" for x in terms.values() if torch.is_tensor(x))
            training.save()
        assert waits[1:] == [1, 1, 1]
        assert Training(Run(tmp_path, Plan(**PLAN)), rendered).done == 4  # a CPU goes on

    def test_what_was_drawn_ahead_is_forgotten_and_drawn_anew(
        self, tmp_path: Path, rendered: Path
    ) -> None:
        alone = Training(Run(tmp_path / "alone", Plan(**PLAN)), rendered)
        helped = Training(Run(tmp_path / "helped", Plan(**PLAN)), rendered, workers=1)
        first = helped.feed.take(helped.pace, helped.count)
        helped.feed.forget()
        again = helped.feed.take(helped.pace, helped.count)
        helped.feed.close()
        wanted = alone.feed.take(alone.pace, alone.count)
        for batch in (first, again):
            assert torch.equal(batch.pictures, wanted.pictures)
            assert torch.equal(batch.words["word"].at, wanted.words["word"].at)


@pytest.mark.slow
class TestBeginning:
    def test_a_run_begins_with_the_weights_of_an_exported_model(
        self, tmp_path: Path, rendered: Path
    ) -> None:
        old = Training(Run(tmp_path / "old", Plan(**PLAN)), rendered)
        losses(old)
        export(old, tmp_path / "model")
        new = Plan(**PLAN | {"tower_steps": 0, "init": str(tmp_path / "model")})
        begun = Training(Run(tmp_path / "new", new), rendered)
        for name, value in begun.parts.llava.state_dict().items():
            assert torch.equal(value.half(), old.parts.llava.state_dict()[name])

    def test_a_folder_without_a_model_is_refused(self, tmp_path: Path) -> None:
        plan = Plan(**PLAN | {"init": str(tmp_path / "none")})
        with pytest.raises(UserError, match=r"--init .*none holds no model of these sizes .*\.$"):
            Training(Run(tmp_path / "new", plan), None)
