"""The folder that vLLM serves: names of weights, keys of the config, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from tprl.build import load_component
from tprl.data.scenes import Scenes
from tprl.errors import UserError
from tprl.lvlm.frozen import FrozenLVLM
from tprl.pruners.tprl import TPRL
from tprl.serving.folder import check_wording, settings_for, write_folder
from tprl.serving.names import INDEX, rename_weights, with_vision_model
from tprl.serving.settings import Settings

DIVPRUNE = {"_target_": "tprl.pruners.divprune.DivPrunePruner"}


@pytest.fixture(scope="module")
def lvlm() -> FrozenLVLM:
    return load_component("model", "tiny_llava")


@pytest.fixture(scope="module")
def folder(lvlm: FrozenLVLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place, pruner = tmp_path_factory.mktemp("export"), load_component("pruner", "tprl")
    write_folder(lvlm, pruner, settings_for(pruner, {}, 1 / 9, "keep"), place)
    return place


class TestNames:
    @pytest.mark.parametrize(
        ("name", "renamed"),
        [
            ("model.vision_tower.embeddings.x", "model.vision_tower.vision_model.embeddings.x"),
            ("vision_tower.encoder.x", "vision_tower.vision_model.encoder.x"),
            ("vision_tower.vision_model.encoder.x", "vision_tower.vision_model.encoder.x"),
            ("model.language_model.vision_tower.x", "model.language_model.vision_tower.x"),
            ("multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_1.weight"),
        ],
    )
    def test_only_a_tower_that_lacks_it(self, name: str, renamed: str) -> None:
        assert with_vision_model(name) == renamed

    def test_shards_and_their_index(self, tmp_path: Path) -> None:
        shards = {"a.safetensors": "vision_tower.x", "b.safetensors": "lm_head.y"}
        for file, name in shards.items():
            save_file({name: torch.arange(3.0)}, tmp_path / file, metadata={"format": "pt"})
        index = {
            "metadata": {"total_size": 24},
            "weight_map": {name: file for file, name in shards.items()},
        }
        (tmp_path / INDEX).write_text(json.dumps(index))
        assert rename_weights(tmp_path, with_vision_model) == 1
        written = json.loads((tmp_path / INDEX).read_text())
        assert written["weight_map"] == {
            "vision_tower.vision_model.x": "a.safetensors",
            "lm_head.y": "b.safetensors",
        }
        assert written["metadata"] == index["metadata"]
        with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert torch.equal(file.get_tensor("vision_tower.vision_model.x"), torch.arange(3.0))


class TestFolder:
    def test_transformers_loads_it_bit_equal(self, lvlm: FrozenLVLM, folder: Path) -> None:
        loaded, info = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        ours = lvlm.model.state_dict()
        loaded_weights = loaded.state_dict()
        assert ours.keys() == loaded_weights.keys()
        assert all(torch.equal(ours[name], loaded_weights[name]) for name in ours)

    def test_it_says_how_it_prunes(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        assert config["architectures"] == ["TPRLLlavaForConditionalGeneration"]
        assert config["model_type"] == "llava"
        settings = Settings(
            **{name: config[f"tprl_{name}"] for name in ("keep_ratio", "positions", "pruner")}
        )
        assert settings == Settings(1 / 9)
        assert settings.load(folder).name == "tprl"

    def test_its_processor_writes_one_bos(self, lvlm: FrozenLVLM, folder: Path) -> None:
        processor = AutoProcessor.from_pretrained(folder)
        content = [{"type": "image"}, {"type": "text", "text": "is there a circle?"}]
        turns: Any = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids.count(processor.tokenizer.bos_token_id) == 1
        assert ids == lvlm.tokenizer("USER: <image>\nis there a circle? ASSISTANT:")["input_ids"]

    def test_our_own_view_of_it_reads_one_bos(self, lvlm: FrozenLVLM, folder: Path) -> None:
        """Its chat template writes the BOS, which our tokenizer adds to every text."""
        sample = Scenes("test")[0]
        exported = load_component("model", "tiny_llava", pretrained=str(folder))
        assert exported.render(sample) == lvlm.render(sample)
        assert torch.equal(exported.encode([sample]).input_ids, lvlm.encode([sample]).input_ids)


class TestRefusals:
    def refused(self, lvlm: Any, pruner: Any, place: Path, **settings: Any) -> str:
        with pytest.raises(UserError) as caught:
            write_folder(lvlm, pruner, Settings(1 / 9, pruner=DIVPRUNE, **settings), place)
        assert not list(place.iterdir())
        return str(caught.value)

    def test_another_family(self, tmp_path: Path) -> None:
        lvlm = load_component("model", "smolvlm2", pretrained=None, dtype="float32")
        pruner = load_component("pruner", "divprune")
        assert "is a smolvlm, and target=vllm serves llava" in self.refused(lvlm, pruner, tmp_path)

    def test_a_pruner_of_another_model_or_kind(self, lvlm: FrozenLVLM, tmp_path: Path) -> None:
        other = TPRL(48, code_width=8, hidden=16, trained_on={"family": "qwen2_vl", "model": "x"})
        assert "trained for a qwen2_vl" in self.refused(lvlm, other, tmp_path)
        assert "tokens of width 48, and those of tiny_llava have 192" in self.refused(
            lvlm, TPRL(48, code_width=8, hidden=16), tmp_path
        )
        assert "reads cls_attention" in self.refused(
            lvlm, load_component("pruner", "cls_attention"), tmp_path
        )

    def test_a_rope_without_places(self, tmp_path: Path) -> None:
        lvlm = load_component("model", "llava", pretrained=None, dtype="float32")
        rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
        lvlm.model.config.text_config.rope_parameters = rope
        pruner = load_component("pruner", "divprune")
        output = self.refused(lvlm, pruner, tmp_path)
        assert output.startswith("the language model of llava turns by rope_type=linear")
        assert output.endswith("use positions=compact.")
        write_folder(lvlm, pruner, Settings(1 / 9, "compact", DIVPRUNE), tmp_path)
        assert (tmp_path / "config.json").is_file()


def test_a_template_that_words_prompts_otherwise_is_said(caplog: pytest.LogCaptureFixture) -> None:
    lvlm = load_component("model", "tiny_llava", prompt="<image> Q: {question} A:")
    check_wording(lvlm, lvlm.processor.chat_template)
    assert "the server words prompts by the chat template, not by model.prompt" in caplog.text
