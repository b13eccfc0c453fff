"""How `tiny_screens` is made: labels, sheets, packs, the two phases, and that a resumed run is the
same run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from experiments.screens.tiny import labels, pages, readings, sheets, train
from experiments.screens.tiny.blueprint import (
    CELLS,
    SIDE,
    SPACE,
    build,
    build_tokenizer,
    position_codes,
    turned,
)
from experiments.screens.tiny.optimizing import rate
from experiments.screens.tiny.packs import PROMPT, Packer, region
from experiments.screens.tiny.run import Plan, Run
from experiments.screens.tiny.train import Training
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tprl.data.screens import Screens
from tprl.errors import UserError

SMALL = {
    "vision_width": 64, "vision_layers": 3, "vision_heads": 2, "vision_ffn": 64, "width": 64,
    "layers": 4, "heads": 2, "ffn": 64, "clip_width": 16,
}  # fmt: skip


def tokens(text: str) -> list[str]:
    tokenizer = build_tokenizer()
    return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids)


class TestBlueprint:
    def test_the_budget_of_parameters_and_tokens(self) -> None:
        parts = build()
        assert sum(p.numel() for p in parts.llava.parameters()) <= train.LIMIT
        assert 2 * sum(p.numel() for p in parts.llava.parameters()) <= 18 * 2**20
        with torch.no_grad():
            seen: Any = parts.llava.get_image_features(torch.zeros(1, 3, SIDE, SIDE))
        assert seen.pooler_output[0].shape == (400, parts.llava.config.text_config.hidden_size)

    def test_coordinates_are_tokens_and_other_numbers_are_read_digit_by_digit(self) -> None:
        assert tokens("12 40 80 6") == [f"{SPACE}{n}" for n in (12, 40, 80, 6)]
        assert tokens("what number has Sales? ASSISTANT: 482")[-3:] == [f"{SPACE}4", "8", "2"]
        assert tokens("Save") == [f"{SPACE}save"]
        assert tokens("Zq7") == [f"{SPACE}z", "q", "7"]

    @pytest.mark.parametrize(
        "text", ["learn more", "12 40 80 6", "482", "zanzibar's 4", "are you sure?"]
    )
    def test_decoding_gives_the_text_again(self, text: str) -> None:
        tokenizer = build_tokenizer()
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text

    def test_every_question_and_answer_that_ships_can_be_written(self) -> None:
        tokenizer = build_tokenizer()
        for split in ("val", "test"):
            data = Screens(split, bare=True)
            for sample in (data[at] for at in range(0, len(data), 7)):
                ids = tokenizer(
                    sample.question + sample.answers[0], add_special_tokens=False
                ).input_ids
                assert tokenizer.unk_token_id not in ids
                answer = tokenizer(sample.answers[0], add_special_tokens=False).input_ids
                assert tokenizer.decode(answer) == sample.answers[0].lower()

    def test_position_codes_tell_offsets(self) -> None:
        """A code turned by an offset is the code of the place that far away."""
        codes = position_codes().view(CELLS, CELLS, -1)
        turn = torch.block_diag(turned(-1), turned(2))
        assert torch.allclose(turn @ codes[7, 5], codes[6, 7], atol=1e-5)

    def test_a_head_begins_by_looking_at_a_neighbor(self) -> None:
        tower = build().llava.model.vision_tower
        tower.set_attn_implementation("eager")
        weights: list[torch.Tensor] = []
        tower.encoder.layers[0].self_attn.register_forward_hook(
            lambda m, i, out: weights.append(out[1])
        )
        picture = np.asarray(Screens("val")[0].images[0].convert("RGB"))
        shown = {"runs": [], "elements": [], "containers": []}
        with torch.no_grad():
            batch = pages.views([pages.item(picture, shown, [], 0, 0)])
            tower(pages.scaled(batch.pictures))
        here = 10 * CELLS + 10
        looked = weights[0][0, :4, 1 + here, 1:].argmax(-1).tolist()
        assert looked == [here - 1, here + 1, here - CELLS, here + CELLS]


PAGE: dict[str, Any] = {
    "runs": [
        {
            "text": "Save 42",
            "xs": [16, 24, 32, 40, 48, 52, 60, 68],
            "y1": 17,
            "y2": 31,
            "owner": 0,
            "covered": False,
            "cut": False,
        },
    ],
    "elements": [
        {
            "role": "button",
            "box": [10, 14, 74, 34],
            "icons": [],
            "label": "",
            "text": "Save 42",
            "checked": None,
            "active": False,
            "covered": False,
            "cut": False,
        },
    ],
    "containers": [{"key": "Mona", "clear": True, "elements": [0]}],
}


class TestLabels:
    def test_characters_words_and_the_element_of_a_patch(self) -> None:
        made = labels.labels(PAGE)
        row = made.characters.reshape(CELLS, -1)[1]
        read = "".join((" " + labels.CHARACTERS)[at] for at in row[8:34])
        assert read == "ssssaaaavvvveeee  44442222"  # a point every two pixels
        first, other = CELLS + 1, CELLS + 3
        assert made.word[first] == labels.WORDS["save"]
        assert made.number[other].tolist() == [5, 3, 0, 0, 0]
        assert made.number[first].tolist() == [labels.IGNORE] * 5
        assert labels.ROLES[made.role[first] - 1] == "button"
        assert made.box[first].tolist() == [10, 14, 74, 34]
        assert made.name[first, 0] == labels.WORDS["save"]
        assert made.owner[0] == made.word[0] == made.role[0] == 0

    def test_a_shift_moves_them(self) -> None:
        still, moved = labels.labels(PAGE), labels.labels(PAGE, 16, 16)
        assert np.array_equal(
            still.characters.reshape(CELLS, CELLS, -1)[:-1, :-1],
            moved.characters.reshape(CELLS, CELLS, -1)[1:, 1:],
        )
        assert moved.box[2 * CELLS + 2].tolist() == [26, 30, 90, 50]

    def test_what_is_covered_is_not_taught(self) -> None:
        hidden = PAGE | {"runs": [PAGE["runs"][0] | {"covered": True}]}
        made = labels.labels(hidden)
        assert (made.characters.reshape(CELLS, -1)[1, 8:34] == labels.IGNORE).all()
        assert made.word[CELLS + 1] == labels.IGNORE

    def test_a_question_that_a_shift_cuts_is_not_asked(self) -> None:
        picture = np.zeros((SIDE, SIDE, 3), np.uint8)
        asked = [{"bbox": [2, 2, 20, 20], "region": []}, {"bbox": [50, 2, 70, 20], "region": []}]
        moved = pages.item(picture, PAGE, asked, -8, 0)
        assert [row["bbox"] for row in moved.questions] == [(42, 2, 62, 20)]


class TestSheets:
    def test_lines_of_an_aligned_sheet_are_in_the_middle_of_rows(self) -> None:
        _, shown = sheets.draw(np.random.default_rng(0), aligned=True)
        middles = {(run["y1"] + run["y2"]) / 2 % 16 for run in shown["runs"]}
        assert middles == {8.0}
        _, loose = sheets.draw(np.random.default_rng(0))
        assert len({(run["y1"] + run["y2"]) / 2 % 16 for run in loose["runs"]}) > 4

    def test_a_step_has_a_picture_of_its_own_and_always_the_same(self) -> None:
        first, again, other = (pages.draw(None, 0, 0, 1.0, 0, step, 0) for step in (5, 5, 6))
        assert np.array_equal(first.picture, again.picture)
        assert not np.array_equal(first.picture, other.picture)
        assert np.array_equal(first.labels.word, again.labels.word)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as render.mjs writes it, of sheets."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "images/00000").mkdir(parents=True)
    for number in range(train.FEW + 10):
        write_page(folder, number)
    return folder


def write_page(folder: Path, number: int) -> None:
    picture, shown = sheets.draw(np.random.default_rng(number))
    Image.fromarray(picture).save(folder / f"images/00000/{number:08d}.png")
    buttons = [e for e in shown["elements"] if e["text"] and not e["cut"]][:2]
    rows = [
        {
            "page": number,
            "of": len(buttons) + 1,
            "instruction": f"click {e['text']}",
            "answer": "",
            "family": "text",
            "bbox": e["box"],
            "region": [e["box"]],
        }
        for e in buttons
    ]
    box = [100, 100, 130, 120]
    rows.append(
        {
            "page": number,
            "of": len(buttons) + 1,
            "instruction": "what number has Sales?",
            "answer": "42",
            "family": "value",
            "bbox": box,
            "region": [box],
        }
    )
    with (folder / "elements.jsonl").open("a") as stream:
        stream.write(json.dumps({"page": number, **shown}) + "\n")
    with (folder / "questions.jsonl").open("a") as stream:
        stream.write("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module", autouse=True)
def _fonts() -> None:
    if not sheets.MODULES.is_dir():
        pytest.skip(f"the fonts are not installed: cd {sheets.MODULES.parent} && npm install.")


def plan(**fields: Any) -> Plan:
    sizes = {
        "tower_steps": 4,
        "reader_steps": 4,
        "tower_batch": 2,
        "reader_batch": 2,
        "questions": 3,
    }
    return Plan(**(sizes | {"sizes": SMALL} | fields))


def losses(training: Training, steps: int) -> list[float]:
    return [float(training.advance()["loss"]) for _ in range(steps)]


class TestTraining:
    def test_both_phases_learn(self, tmp_path: Path, rendered: Path) -> None:
        training = Training(
            Run(
                tmp_path / "run",
                plan(tower_steps=24, reader_steps=24, lr=4e-3, muon=4e-3, reader_lr=4e-3),
            ),
            rendered,
        )
        curve = losses(training, 48)
        assert np.mean(curve[18:24]) < 0.95 * np.mean(curve[:6])
        assert np.mean(curve[42:]) < 0.9 * np.mean(curve[24:30])

    @pytest.mark.parametrize("cut", [2, 4, 6])
    def test_a_resumed_run_is_the_same_run(self, tmp_path: Path, rendered: Path, cut: int) -> None:
        whole = losses(Training(Run(tmp_path / "whole", plan()), rendered), 8)
        first = Training(Run(tmp_path / "cut", plan()), rendered)
        start = losses(first, cut)
        first.save()
        second = Training(Run(tmp_path / "cut", plan()), rendered)
        assert start + losses(second, 8 - cut) == whole

    def test_pages_rendered_since_are_used_after_a_checkpoint_only(
        self, tmp_path: Path, rendered: Path
    ) -> None:
        training = Training(Run(tmp_path, plan()), rendered)
        before = training.count
        number = 1000 + before
        write_page(rendered, number)
        assert training.count == before
        train.checkpoint(training)
        assert training.count == before + 1
        assert Training(Run(tmp_path, plan()), rendered).count == before + 1

    def test_another_plan_is_refused(self, tmp_path: Path) -> None:
        Run(tmp_path, plan())
        with pytest.raises(UserError, match="another plan"):
            Run(tmp_path, plan(seed=1))

    def test_a_model_that_is_too_large_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="make it smaller"):
            Training(Run(tmp_path, plan(sizes={"width": 512})), None)

    def test_the_rate_rises_stays_and_falls(self) -> None:
        assert [rate(step, 10_000) for step in (0, 199, 5000, 7000)] == [0.005, 1, 1, 1]
        assert rate(8500, 10_000) == pytest.approx(0.5)


class TestPrompt:
    def test_a_pack_and_the_stock_model_agree(self, tmp_path: Path, rendered: Path) -> None:
        """The same tokens, and the same loss of the answer, as the exported folder with the stock
        classes."""
        training = Training(Run(tmp_path / "run", plan()), rendered)
        losses(training, 8)
        picture, shown, asked = training.source.folder.page(3)
        one = pages.item(picture, shown, asked[:1], 0, 0)
        pack = training.packer.pack([one], 0, 0)
        row = training.packer.segment(asked[0])
        with torch.no_grad():
            terms = training.read(readings.reading(pack, torch.arange(400)[None]))
        train.export(training, tmp_path / "model")
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.float32)
        processor = AutoProcessor.from_pretrained(tmp_path / "model")
        text = PROMPT.format(question=asked[0]["instruction"])
        inputs = processor(text=text, images=Image.fromarray(picture), return_tensors="pt")
        answer = torch.tensor([row["answer"]])
        ids = torch.cat([inputs.input_ids, answer], 1)
        prompt = training.packer.before() + [processor.image_token_id] * 400 + row["question"]
        assert inputs.input_ids[0].tolist() == prompt
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=inputs.pixel_values).logits
        picked = logits[0, len(prompt) - 1 : -1]
        place = torch.tensor(row["place"], dtype=torch.float32)
        points = torch.arange(4)  # the coordinates; the end follows
        ours = training.reader.answer_loss(picked, answer[0], place, points)
        assert float(ours.mean()) == pytest.approx(float(terms["loss/answer"]), rel=2e-2)

    def test_where_the_answer_is(self) -> None:
        box = [33.0, 33.0, 47.0, 47.0]
        assert np.flatnonzero(
            region({"family": "text", "bbox": box, "region": [box]})
        ).tolist() == [2 * CELLS + 2]

    def test_questions_of_different_families_come_first(self) -> None:
        packer = Packer(build(**SMALL).processor, questions=2)
        asked = [{"family": name} for name in ("text", "text", "text", "icon")]
        for seed in range(5):
            chosen = packer.chosen(asked, np.random.default_rng(seed))
            assert {row["family"] for row in chosen} == {"text", "icon"}
