"""What the LLaVA backend refuses, and where it goes."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.lvlm.small import SAMPLES

from tprl.errors import UserError
from tprl.lvlm.llava import Llava
from tprl.lvlm.loading import Placement


def damage(folder: Path, target: Path, change: str) -> Path:
    """A copy of the model's folder with something wrong in its weights."""
    target.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    weights = target / "model.safetensors"
    match change:
        case "cut":
            weights.write_bytes(weights.read_bytes()[:-1000])
        case "garbage":
            weights.write_bytes(b"not a safetensors file at all" * 100)
        case "empty":
            weights.write_bytes(b"")
        case "absent tensor":
            tensors = load_file(weights)
            del tensors[next(name for name in sorted(tensors) if "lm_head" in name)]
            save_file(tensors, weights, {"format": "pt"})
        case "wrong shape":
            tensors = load_file(weights)
            name = next(name for name in sorted(tensors) if "lm_head" in name)
            tensors[name] = tensors[name][:-1].clone()
            save_file(tensors, weights, {"format": "pt"})
        case "gone":
            weights.unlink()
    return target


def one_sentence(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert len(message.splitlines()) == 1
    assert message.endswith(".")
    assert len(message) < 500
    return message


class TestBadWeights:
    @pytest.mark.parametrize("change", ["cut", "garbage", "empty", "absent tensor", "wrong shape"])
    def test_damaged_weights(self, folder: Path, tmp_path: Path, change: str) -> None:
        where = damage(folder, tmp_path / "copy", change)
        with pytest.raises(UserError, match="damaged") as caught:
            Llava(str(where), name="toy")
        message = one_sentence(caught)
        assert str(where) in message
        assert "copy the folder again" in message

    @pytest.mark.parametrize(
        "where", ["/nowhere/at/all", "llava-hf/llava-1.5-7b-hf", "no_such_asset"]
    )
    def test_missing_weights_name_both_ways_out(self, where: str) -> None:
        with pytest.raises(UserError, match="model=llava") as caught:
            Llava(where)
        message = one_sentence(caught)
        assert where in message
        assert "model.pretrained=/path/to/" in message
        assert "model=tiny_llava" in message

    @pytest.mark.parametrize("change", ["gone", "nothing"])
    def test_a_folder_without_weights_is_missing_weights_too(
        self, folder: Path, tmp_path: Path, change: str
    ) -> None:
        where = tmp_path / "copy"
        if change == "gone":
            damage(folder, where, change)
        else:
            where.mkdir()
        with pytest.raises(UserError, match=r"model\.pretrained") as caught:
            Llava(str(where))
        assert str(where) in one_sentence(caught)


class TestBadSamples:
    @pytest.mark.parametrize("count", [0, 2])
    def test_as_many_images_as_the_prompt_shows(self, folder: Path, count: int) -> None:
        lvlm = Llava(str(folder), name="toy", prompt="USER: <image>\n{question} ASSISTANT:")
        sample = SAMPLES[0]._replace(images=(Image.new("RGB", (96, 96)),) * count)
        with pytest.raises(UserError, match=rf"{sample.uid} has {count} images") as caught:
            lvlm.encode([SAMPLES[1], sample])
        one_sentence(caught)

    def test_no_chat_template(self, folder: Path) -> None:
        lvlm = Llava(str(folder), name="toy")
        lvlm.processor.chat_template = lvlm.tokenizer.chat_template = None
        with pytest.raises(
            UserError, match=r"toy has no chat template: set model\.prompt"
        ) as caught:
            lvlm.encode(SAMPLES[:1])
        one_sentence(caught)


@pytest.mark.parametrize(
    ("name", "gpu", "rank", "expected"),
    [
        ("auto", False, None, "cpu"),
        ("auto", True, None, "cuda:0"),
        ("auto", True, "3", "cuda:3"),
        ("cpu", True, "3", "cpu"),
    ],
)
def test_the_device_of_a_process(
    name: str, gpu: bool, rank: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert Placement("float32", name).device == torch.device(expected)


class TestPlacement:
    def test_out_of_memory_is_not_reported_as_damage(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*args: object, **kwargs: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")

        monkeypatch.setattr("tprl.lvlm.loading.AutoModelForImageTextToText.from_pretrained", full)
        with pytest.raises(
            UserError, match=r"cannot be loaded with these options: CUDA out of memory"
        ) as caught:
            Llava(str(folder))
        one_sentence(caught)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"placement": "spread"},
                r"model\.placement must be one of replicate, shard, got spread",
            ),
            ({"dtype": "fp16"}, r"model\.dtype must be float32, bfloat16 or float16, got fp16"),
            ({"load_in": "2bit"}, r"model\.load_in must be one of null, 8bit, 4bit, got 2bit"),
            (
                {"attention": "fast"},
                r"model\.attention must be one of null, sdpa, flash_attention_2, eager, got fast",
            ),
        ],
    )
    def test_unknown_values(self, folder: Path, options: dict[str, str], message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            Llava(str(folder), **options)
        one_sentence(caught)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"placement": "shard"}, r"needs the package accelerate: pip install 'tprl\[shard\]'"),
            ({"load_in": "4bit"}, r"needs the package bitsandbytes: pip install 'tprl\[quant\]'"),
        ],
    )
    def test_missing_packages(
        self, folder: Path, options: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tprl.runtime.packages.find_spec", lambda name: None)
        with pytest.raises(UserError, match=message) as caught:
            Llava(str(folder), **options)
        one_sentence(caught)

    def test_flash_attention_without_its_package(self, folder: Path) -> None:
        with pytest.raises(
            UserError, match=r"cannot be loaded with these options: FlashAttention2"
        ) as caught:
            Llava(str(folder), attention="flash_attention_2")
        one_sentence(caught)

    def test_one_copy_over_all_gpus_in_several_processes(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(
            UserError, match=r"set trainer\.devices=1, or model\.placement=replicate"
        ) as caught:
            Llava(str(folder), placement="shard")
        one_sentence(caught)

    def test_small_random_models_are_not_spread(self) -> None:
        with pytest.raises(
            UserError, match=r"model\.pretrained=null makes small random ones"
        ) as caught:
            Llava(None, placement="shard")
        one_sentence(caught)

    @pytest.mark.parametrize("pretrained", [True, False])
    def test_attention_is_what_was_asked_for(self, folder: Path, pretrained: bool) -> None:
        lvlm = Llava(str(folder) if pretrained else None, attention="eager")
        assert lvlm.model.config.text_config._attn_implementation == "eager"
        assert Llava(str(folder)).model.config.text_config._attn_implementation == "sdpa"

    @pytest.mark.parametrize(("load_in", "bits"), [("8bit", 8), ("4bit", 4)])
    def test_quantisation_is_passed_on(
        self, load_in: str, bits: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tprl.runtime.packages.find_spec", lambda name: True)
        result = Placement("bfloat16", "cpu", load_in=load_in).arguments()
        config = result["quantization_config"]
        assert (config.load_in_8bit, config.load_in_4bit) == (bits == 8, bits == 4)
        assert result["device_map"] == {"": torch.device("cpu")}
        assert bits == 8 or config.bnb_4bit_compute_dtype == torch.bfloat16


def test_braces_in_a_template_are_text_except_the_question() -> None:
    lvlm = Llava("tiny_llava", prompt='USER: <image> {question} as {json} {"a": {}} { ASSISTANT:')
    asked = lvlm.render(SAMPLES[0]._replace(question="which {color}?"))
    assert asked == 'USER: <image> which {color}? as {json} {"a": {}} { ASSISTANT:'
    with pytest.raises(UserError, match=r"model.prompt='<image> {questions}' has no {question}"):
        Llava("tiny_llava", prompt="<image> {questions}")
