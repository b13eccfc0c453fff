"""The embedded LVLM's blueprint: it fits its budget, loads with the stock Auto classes and knows
every word."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, CLIPModel

from tprl.data import scenes
from tprl.data.crowd import CROWD
from tprl.pretraining.tiny_llava import (
    DESCRIBE,
    PROMPT,
    TinyLlava,
    build,
    build_tokenizer,
    carried_over,
    save,
    vocabulary,
)


@pytest.fixture(scope="module")
def parts() -> TinyLlava:
    return build()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TinyLlava]:
    folder, trained = tmp_path_factory.mktemp("tiny") / "llava", build()
    save(folder, trained)
    return folder, trained


def asked(processor: Any, question: str) -> Any:
    """Inputs for a question about the first scene of the tests."""
    picture = Image.fromarray(scenes.scene_pixels(scenes.draw_scene("t", 0)))
    return processor(text=PROMPT.format(question=question), images=picture, return_tensors="pt")


class TestBuild:
    def test_the_budget_of_parameters_and_tokens(self, parts: TinyLlava) -> None:
        assert sum(p.numel() for p in parts.llava.parameters()) <= 6_000_000
        with torch.no_grad():
            seen: Any = parts.llava.get_image_features(torch.zeros(1, 3, 96, 96))
        assert seen.pooler_output[0].shape == (144, 192)
        assert parts.llava.config.vision_feature_layer == -2
        assert parts.llava.config.vision_feature_select_strategy == "default"

    def test_the_seed_decides_the_weights(self, parts: TinyLlava) -> None:
        again, other = build(), build(seed=1)
        pairs = list(
            zip(
                parts.llava.parameters(),
                again.llava.parameters(),
                other.llava.parameters(),
                strict=True,
            )
        )
        assert all(torch.equal(a, b) for a, b, _ in pairs)
        assert not all(torch.equal(a, c) for a, _, c in pairs)

    def test_the_image_token_and_the_ends_are_the_tokenizers(self, parts: TinyLlava) -> None:
        tokenizer, generation = parts.processor.tokenizer, parts.llava.generation_config
        assert parts.llava.config.image_token_index == tokenizer.convert_tokens_to_ids("<image>")
        ends = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert (
            ends
            == (generation.pad_token_id, generation.bos_token_id, generation.eos_token_id)
            == (0, 1, 3)
        )
        assert parts.llava.lm_head.out_features == len(tokenizer) == len(vocabulary())

    def test_a_patch_knows_its_place_from_the_start(self, parts: TinyLlava) -> None:
        """Position embeddings of neighbors are alike, of far patches are not; no two are equal."""
        weight = parts.llava.model.vision_tower.embeddings.position_embedding.weight[1:].detach()
        alike = torch.nn.functional.cosine_similarity(
            weight.unsqueeze(1), weight.unsqueeze(0), dim=-1
        )
        corner = alike[0].reshape(12, 12)
        assert corner[0, 1] == pytest.approx(float(corner[1, 0]))
        assert corner[0, 1] > corner[0, 4] + 0.1
        assert (alike - 2 * torch.eye(144)).max() < 0.999


class TestFolder:
    def test_it_is_small(self, saved: tuple[Path, TinyLlava]) -> None:
        size = sum(path.stat().st_size for path in saved[0].rglob("*") if path.is_file())
        assert size <= 12 * 2**20
        assert list(saved[0].glob("*.safetensors"))

    def test_the_auto_classes_load_the_same_weights(self, saved: tuple[Path, TinyLlava]) -> None:
        folder, trained = saved
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float16)
        assert type(model) is type(trained.llava)
        loaded, original = model.state_dict(), trained.llava.state_dict()
        assert loaded.keys() == original.keys()
        assert all(torch.equal(loaded[name], original[name]) for name in loaded)

    def test_the_processor_gives_144_image_tokens_and_normalized_pixels(
        self, saved: tuple[Path, TinyLlava]
    ) -> None:
        processor = AutoProcessor.from_pretrained(saved[0])
        x = asked(processor, "how many objects are there?")
        assert (
            int((x["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<image>")).sum())
            == 144
        )
        assert x["pixel_values"].shape == (1, 3, 96, 96)
        mean, std = (
            torch.tensor(processor.image_processor.image_mean),
            torch.tensor(processor.image_processor.image_std),
        )
        back = (x["pixel_values"][0] * std.view(3, 1, 1) + mean.view(3, 1, 1)) * 255
        expected = (
            torch.from_numpy(scenes.scene_pixels(scenes.draw_scene("t", 0)))
            .permute(2, 0, 1)
            .float()
        )
        assert torch.allclose(back, expected, atol=0.01)  # no resize, no crop

    def test_a_saved_model_answers(self, saved: tuple[Path, TinyLlava]) -> None:
        model: Any = AutoModelForImageTextToText.from_pretrained(saved[0], dtype=torch.float32)
        processor = AutoProcessor.from_pretrained(saved[0])
        x = asked(processor, "is there a red cross?")
        out = model.generate(**x, max_new_tokens=3, do_sample=False)
        assert x["input_ids"].shape[1] < out.shape[1] <= x["input_ids"].shape[1] + 3

    def test_clip_is_llavas_vision_tower_and_a_text_tower(
        self, saved: tuple[Path, TinyLlava]
    ) -> None:
        clip = CLIPModel.from_pretrained(saved[0] / "clip")
        llava = AutoModelForImageTextToText.from_pretrained(saved[0])
        clip_weights, tower_weights = (
            clip.vision_model.state_dict(),
            llava.model.vision_tower.state_dict(),
        )
        assert clip_weights.keys() == tower_weights.keys()
        assert all(torch.equal(clip_weights[name], tower_weights[name]) for name in clip_weights)
        texts = clip.text_model.state_dict()
        assert all(
            torch.equal(texts[name], value)
            for name, value in saved[1].clip.text_model.state_dict().items()
        )

    def test_clip_reads_a_caption_at_its_end_token(self, saved: tuple[Path, TinyLlava]) -> None:
        """Captions end in </s>, are padded on the right, and what is behind the end does not
        matter."""
        clip = CLIPModel.from_pretrained(saved[0] / "clip", dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(saved[0] / "clip")
        texts = [
            "<s> a photo with a small red circle </s>",
            "<s> a photo with a small blue circle </s>",
        ]
        ids = tokenizer(texts, add_special_tokens=False, return_tensors="pt")["input_ids"]
        assert tokenizer.convert_tokens_to_ids("<unk>") not in ids
        padded = torch.nn.functional.pad(ids, (0, 5))
        with torch.no_grad():
            out = clip.text_model(input_ids=ids, attention_mask=torch.ones_like(ids))
            more = clip.text_model(
                input_ids=padded, attention_mask=(padded > 0).long()
            ).pooler_output
        assert torch.allclose(out.pooler_output, out.last_hidden_state[:, -1], atol=1e-5)
        assert torch.allclose(out.pooler_output, more, atol=1e-5)
        assert not torch.allclose(more[0], more[1], atol=1e-4)


class TestAnotherWorld:
    """The embedded model goes on in a world with larger pictures and more words."""

    def test_weights_are_carried_over(self) -> None:
        sizes: dict[str, Any] = {
            "vision_width": 32,
            "vision_layers": 2,
            "width": 32,
            "layers": 2,
            "heads": 2,
            "ffn": 48,
        }
        old, new = build(**sizes, clip_width=16), build("crowd", **sizes, clip_width=16, seed=1)
        drawn = new.llava.lm_head.weight.detach().clone()
        carried = carried_over(old, new)
        ids, before = carried.processor.tokenizer.get_vocab(), old.processor.tokenizer.get_vocab()
        for word in ("<s>", "red", "96", "."):
            assert torch.equal(
                carried.llava.lm_head.weight[ids[word]], old.llava.lm_head.weight[before[word]]
            )
        for word in ("next", "97", "128"):
            assert word not in before
            assert torch.equal(carried.llava.lm_head.weight[ids[word]], drawn[ids[word]])
        layers = [
            parts.llava.model.language_model.layers[1].mlp.up_proj.weight
            for parts in (old, carried)
        ]
        assert torch.equal(*layers)
        tables = [
            p.llava.model.vision_tower.embeddings.position_embedding.weight for p in (old, carried)
        ]
        assert tables[1].shape[0] == 257
        # Corners stay where they were: the first and the last patch of a row.
        assert torch.allclose(tables[1][[0, 1, 16, 256]], tables[0][[0, 1, 12, 144]], atol=1e-5)

    def test_every_word_of_the_crowd_is_known(self) -> None:
        tokenizer, texts = build_tokenizer(CROWD), []
        for i in range(20):
            things = CROWD.draw("words", i).things
            asked = [ask(things, scenes.Stream("words", i)) for ask in CROWD.ask.values()]
            texts += [text for question in asked for text in (question.text, question.answer)]
        assert not any(tokenizer.unk_token_id in row for row in tokenizer(texts)["input_ids"])


class TestTokenizer:
    def test_every_word_of_2000_questions_captions_and_answers_is_known(self) -> None:
        texts = [DESCRIBE]
        for i in range(400):
            scene = scenes.draw_scene("words", i)
            asked = [
                ask(scene.things, scenes.Stream("words", i)) for ask in scenes.SCENES.ask.values()
            ]
            texts += [text for question in asked for text in (question.text, question.answer)]
            texts.append(scenes.describe(scene))
            texts.append(
                "a photo with "
                + " and ".join(f"a {t.size} {t.color} {t.shape}" for t in scene.things)
            )
        tokenizer = build_tokenizer()
        ids = tokenizer(texts + [PROMPT.format(question=text) for text in texts])["input_ids"]
        assert len(texts) == 400 * 12 + 1
        assert not any(tokenizer.unk_token_id in row for row in ids)

    def test_every_number_is_one_token(self) -> None:
        tokenizer = build_tokenizer()
        for box in ("46 43 56 53", "0 0 20 96", "5 37 27 59"):
            ids = tokenizer(box, add_special_tokens=False)["input_ids"]
            assert len(ids) == 4
            assert tokenizer.decode(ids) == box
        numbers = [tokenizer.get_vocab()[str(i)] for i in range(97)]
        assert numbers == sorted(numbers)  # the loss on coordinates looks them up by bisection
        assert len(set(numbers)) == 97

    def test_special_tokens_in_a_text_are_special(self) -> None:
        tokenizer = build_tokenizer()
        assert (
            tokenizer("red </s>", add_special_tokens=False)["input_ids"][-1]
            == tokenizer.eos_token_id
        )
        assert tokenizer("USER: <image>\nred")["input_ids"][0] == tokenizer.bos_token_id
        assert tokenizer.image_token == "<image>"
        assert tokenizer.convert_ids_to_tokens(
            tokenizer("a zebra", add_special_tokens=False)["input_ids"]
        ) == [
            "a",
            "<unk>",
        ]
        assert tokenizer.padding_side == "left"
