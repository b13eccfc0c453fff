"""Packed pretraining batches, and that the language model reads a pack as it reads single
prompts."""

from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.lvlm.small import small_parts
from tests.stages.plain import build_stage

from tprl.data import scenes
from tprl.data.crowd import CROWD, neighbors
from tprl.pretraining.packing import IGNORE, Pack, PackStream
from tprl.pretraining.reading import packed_mask, read_packed
from tprl.pretraining.stage import Pretrain
from tprl.pretraining.tiny_llava import DESCRIBE, PROMPT, TinyLlava, build

TEXT_FROM, CAPTION_UNTIL = 10, 20
PATCH = 16
TOKENS = (scenes.SIDE // PATCH) ** 2


@cache
def parts() -> TinyLlava:
    return small_parts()


def stream(
    start: int = 0, *, patch: int = PATCH, seed: int = 0, questions: int = 2, images: int = 2
) -> PackStream:
    return PackStream(
        parts().processor, start, 100, patch, TEXT_FROM, CAPTION_UNTIL, 3, images, questions, seed
    )


def equal(a: Pack, b: Pack) -> bool:
    return all(
        torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in zip(a, b, strict=True)
    )


def words(ids: torch.Tensor) -> str:
    return parts().processor.tokenizer.decode(ids)


class TestStream:
    def test_a_pack_is_a_function_of_seed_and_step(self) -> None:
        early, late = iter(stream(11)), iter(stream(13))
        packs = [next(early) for _ in range(4)]
        assert [pack.step for pack in packs] == [11, 12, 13, 14]
        assert equal(packs[2], next(late))
        assert equal(packs[3], next(late))
        assert not torch.equal(packs[0].pixels, packs[1].pixels)
        assert not torch.equal(packs[0].pixels, stream(seed=1).pack(11).pixels)

    def test_workers_take_turns_in_the_order_of_steps(self) -> None:
        loader = torch.utils.data.DataLoader(
            PackStream(parts().processor, 3, 8, PATCH, 99, 99, 1, 1), batch_size=None, num_workers=2
        )
        assert [pack.step for pack in loader] == [3, 4, 5, 6, 7]

    def test_before_the_language_phase_there_is_no_text(self) -> None:
        pack = stream().pack(TEXT_FROM - 1)
        assert pack.pixels.shape == (3, 3, 96, 96)
        assert pack.text.shape == pack.target.shape == (3, 0)
        assert stream().pack(TEXT_FROM).pixels.shape == (2, 3, 96, 96)

    def test_captions_come_with_every_early_pack_and_then_with_one_in_eight(self) -> None:
        caption = len(scenes.FAMILIES)
        described = {
            s: bool((stream().pack(s).family == caption).any())
            for s in (TEXT_FROM, 19, 20, 21, 24, 31, 32)
        }
        assert described == {
            TEXT_FROM: True,
            19: True,
            20: False,
            21: False,
            24: True,
            31: False,
            32: True,
        }

    def test_pixels_are_those_of_the_processor(self) -> None:
        pack = stream().pack(12)
        picture = Image.fromarray(scenes.scene_pixels(scenes.draw_scene("pretrain", 0, 12, 1)))
        processor: Any = parts().processor.image_processor
        expected = processor(picture, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(pack.pixels[1], expected)


class TestText:
    def test_segments_are_question_and_answer_of_the_scene(self) -> None:
        pack, tokenizer = stream().pack(12), parts().processor.tokenizer
        for row in range(2):
            scene = scenes.draw_scene("pretrain", 0, 12, row)
            last = int(pack.segment[row].max())
            assert last == 2 * len(scenes.FAMILIES) + 1
            for number in range(1, last + 1):
                at = pack.segment[row] == number
                text, answer = (
                    words(pack.text[row, at]),
                    words(pack.target[row, at & (pack.target[row] != IGNORE)]),
                )
                question = text.split(" ASSISTANT")[0]
                if number == last:
                    assert question == " ".join(DESCRIBE.replace(".", " .").split())
                    assert answer == f"{scenes.describe(scene)} </s>"
                else:
                    things = {t.color for t in scene.things}
                    assert (
                        not (set(question.split()) & (scenes.COLORS.keys() - things))
                        or answer == "0 </s>"
                    )
                    assert text.endswith(f"ASSISTANT : {answer.removesuffix('</s>')}".strip())
                assert pack.offset[row, at].tolist() == list(range(int(at.sum())))
                assert tokenizer.unk_token_id not in pack.text[row, at]

    def test_a_target_is_the_next_token_of_its_segment(self) -> None:
        pack, end = stream().pack(12), parts().processor.tokenizer.eos_token_id
        for text, target, segment in zip(pack.text, pack.target, pack.segment, strict=True):
            columns = range(len(text))
            for now, after in pairwise(columns):
                if target[now] != IGNORE and segment[now] == segment[after]:
                    assert target[now] == text[after]
                if target[now] == end:
                    assert segment[after] != segment[now]
            first = [
                i for i in columns if target[i] != IGNORE and (i == 0 or target[i - 1] == IGNORE)
            ]
            assert {words(text[i - 1 : i + 1]) for i in first} == {"ASSISTANT :"}
        assert (pack.target[pack.segment == 0] == IGNORE).all()

    def test_box_targets_are_the_four_numbers_of_grounding(self) -> None:
        pack, grounding = stream().pack(12), scenes.FAMILIES.index("grounding")
        for row in range(2):
            for number in range(1, int(pack.segment[row].max()) + 1):
                at = pack.segment[row] == number
                marked = pack.target[row, at & pack.is_box[row]]
                if pack.family[row, at][0] == grounding:
                    assert scenes.parse_box(words(marked)) is not None
                else:
                    assert len(marked) == 0

    def test_captions_of_the_text_tower_hold_every_object(self) -> None:
        pack = stream().pack(12)
        for row in range(2):
            scene = scenes.draw_scene("pretrain", 0, 12, row)
            text = words(pack.caption[row][pack.caption[row] > 0])
            assert text.startswith("<s> a photo with a ")
            assert text.endswith(" </s>")
            names = text.removeprefix("<s> a photo with ").removesuffix(" </s>").split(" and ")
            assert sorted(names) == sorted(f"a {t.size} {t.color} {t.shape}" for t in scene.things)


class TestMask:
    def test_against_the_rule_in_words(self) -> None:
        """A column sees itself and what is before it, if that is prefix or its own segment."""
        segment, prefix = torch.tensor([[1, 1, 2, 2, 2, 0], [1, 2, 3, 0, 0, 0]]), 2
        mask = packed_mask(segment, prefix)
        assert mask.shape == (2, 1, 8, 8)
        for b in range(2):
            names = ["prefix"] * prefix + segment[b].tolist()
            for i in range(8):
                for j in range(8):
                    expected = j <= i and (names[j] == "prefix" or names[j] == names[i])
                    assert bool(mask[b, 0, i, j]) == expected, (b, i, j)

    def test_questions_of_a_pack_never_meet(self) -> None:
        segment = stream().pack(12).segment
        mask = packed_mask(segment, 5)[:, 0, 5:, 5:]
        assert not (mask & (segment.unsqueeze(1) != segment.unsqueeze(2))).any()


class TestPackedForward:
    """The heart of packing: every question of a pack reads exactly as it does alone, through the
    stock model."""

    @pytest.mark.parametrize("kept", [TOKENS, 7])
    def test_logits_equal_those_of_single_prompts(self, kept: int) -> None:
        model_parts, pack = parts(), stream().pack(12)
        steps = {
            "vision_steps": TEXT_FROM,
            "language_steps": 90,
            "vision_batch": 3,
            "language_batch": 2,
        }
        module = build_stage(Pretrain, parts=model_parts, **steps)
        module.eval()
        order = torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(0)).argsort(1)
        at = order[:, :kept].sort(1).values
        with torch.no_grad():
            features = model_parts.llava.model.vision_tower(
                pack.pixels, output_hidden_states=True
            ).hidden_states[-2][:, 1:]
            tokens = model_parts.llava.model.multi_modal_projector(features)
            seen = tokens.gather(1, at.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
            hidden, (lower, upper) = read_packed(
                model_parts, module.looking, seen, at, pack, TOKENS
            )
            packed = model_parts.llava.lm_head(hidden)
        assert lower.shape == (2, 4, kept, kept)
        assert upper.shape == (2, 4, pack.text.shape[1], 1 + kept)
        for row in range(2):
            for number in range(1, int(pack.segment[row].max()) + 1):
                columns = pack.segment[row] == number
                expected = self.alone(pack, row, columns, at[row])
                assert expected.std() > 0.3  # else a wrong mask would pass
                assert torch.allclose(packed[row, columns], expected, atol=1e-4, rtol=0), (
                    row,
                    number,
                )

    @staticmethod
    def alone(pack: Pack, row: int, columns: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Logits of the segment's columns from the plain prompt and the picture; dropped tokens are
        masked out."""
        model_parts = parts()
        question, answer = words(pack.text[row, columns]).split(" ASSISTANT :")
        picture = Image.fromarray(
            scenes.scene_pixels(scenes.draw_scene("pretrain", 0, pack.step, row))
        )
        text = PROMPT.format(question=question) + answer
        processor: Any = model_parts.processor
        x = processor(text=text, images=picture, return_tensors="pt")
        image = (
            (x["input_ids"][0] == model_parts.llava.config.image_token_index).nonzero().squeeze(1)
        )
        mask = torch.ones_like(x["input_ids"])
        mask[0, image] = 0
        mask[0, image[kept]] = 1
        positions = torch.arange(mask.shape[1]).unsqueeze(0)
        with torch.no_grad():
            out = model_parts.llava(**{**x, "attention_mask": mask, "position_ids": positions})
        return out.logits[0, -int(columns.sum()) :]


class TestRegions:
    def test_a_segment_knows_the_patches_of_its_questions_objects(self) -> None:
        pack, per_family = stream().pack(12), 2
        assert pack.region.shape == (2, 2 + per_family * len(scenes.FAMILIES), TOKENS)
        for row in range(2):
            scene, draws = scenes.draw_scene("pretrain", 0, 12, row), pack.segment[row]
            assert not pack.region[row, 0].any()  # padding
            assert not pack.region[row, -1].any()  # the caption
            for number in range(1, per_family * len(scenes.FAMILIES) + 1):
                ids = pack.target[row, (draws == number) & (pack.target[row] != IGNORE)]
                owners = set(pack.owner[row, pack.region[row, number]].tolist())
                family = scenes.FAMILIES[int(pack.family[row, draws == number][0])]
                if family == "grounding":
                    (thing,) = [
                        i
                        for i, t in enumerate(scene.things, 1)
                        if words(ids) == f"{scenes.corners_text(t.box)} </s>"
                    ]
                    assert owners <= {thing}
                    assert torch.equal(pack.region[row, number], pack.owner[row] == thing)
                if family == "count":
                    assert len(owners) <= (int(words(ids[:1])) or len(scene.things))
                assert 0 not in owners

    def test_without_text_no_region(self) -> None:
        assert not stream().pack(TEXT_FROM - 1).region.any()


class TestPatchLabels:
    def test_a_literal_scene(self) -> None:
        things = (
            scenes.Thing("red", "square", "small", 16, 16, 8),  # fills cells 1-2 of both axes
            scenes.Thing("cyan", "square", "small", 46, 46, 6),  # 40..52: a quarter of cell (6, 6)
            # 70..80 x 10..20: 12 pixels of (1, 8), 8 of (2, 8)
            scenes.Thing("blue", "square", "large", 75, 15, 5),
        )
        label = stream(patch=8)._patch_labels(scenes.Scene(("k",), things))
        expected = torch.zeros(12, 12, dtype=torch.long)
        expected[1:3, 1:3] = 1
        expected[5:7, 5:7] = 2
        expected[1, 8] = expected[1, 9] = expected[2, 9] = 3
        assert torch.equal(label["owner"].reshape(12, 12), expected)
        colors, sizes = [0, 1, 6, 3], [0, 1, 1, 2]
        assert torch.equal(label["color"], torch.tensor(colors)[label["owner"]])
        assert torch.equal(label["shape"], (label["owner"] > 0).long() * 2)
        assert torch.equal(label["size"], torch.tensor(sizes)[label["owner"]])
        assert label["box"][12 + 9].tolist() == [70, 10, 80, 20]
        assert label["box"][0].tolist() == [IGNORE] * 4
        looks = {(0, 1), (5, 1), (2, 1)}
        assert {divmod(i, 4) for i in label["present"].nonzero().squeeze(1).tolist()} == looks

    def test_the_owner_has_most_pixels_and_a_sixth_at_least(self) -> None:
        for key in range(6):
            scene = scenes.draw_scene("owners", key)
            owner = stream(patch=8)._patch_labels(scene)["owner"].reshape(12, 12)
            masks = [scenes.pixels_inside(thing) for thing in scene.things]
            for i in range(12):
                for j in range(12):
                    pixels = [int(m[8 * i : 8 * i + 8, 8 * j : 8 * j + 8].sum()) for m in masks]
                    best = int(np.argmax(pixels))
                    assert int(owner[i, j]) == (best + 1 if pixels[best] >= 64 / 6 else 0)


class TestCrowd:
    def test_labels_regions_and_captions_of_a_crowd(self) -> None:
        crowd = build(
            "crowd",
            vision_width=32,
            vision_layers=2,
            width=48,
            layers=2,
            heads=4,
            ffn=64,
            clip_width=16,
        )
        packs = PackStream(crowd.processor, 0, 9, 8, 0, 0, 3, 2, 1, world=CROWD, caption_every=0)
        pack = packs.pack(8)
        assert pack.pixels.shape[2:] == (128, 128)
        assert pack.owner.shape == (2, 256)
        assert int(pack.owner.max()) >= 24
        assert pack.caption.shape[1] <= 77
        assert int(pack.segment.max()) == len(CROWD.families)
        for row in range(2):
            scene = CROWD.draw("pretrain", 0, 8, row)
            for number, (other, _) in enumerate(neighbors(scene.things), 1):
                patches = pack.owner[row] == number
                assert {scene.things[i - 1] for i in pack.next[row][patches].tolist()} <= {other}
                assert set(pack.next_color[row][patches].tolist()) <= {
                    [*scenes.COLORS].index(other.color) + 1
                }
                assert set(pack.next_shape[row][patches].tolist()) <= {
                    scenes.SHAPES.index(other.shape) + 1
                }
