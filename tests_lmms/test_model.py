"""Requests and arguments of the model `tprl` of lmms-eval, without its command line."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tests.lvlm.small import families, save_folder

from tprl.build import choices, load_component
from tprl.data.scenes import Scenes
from tprl.errors import UserError
from tprl.integrations import lmms_eval_model
from tprl.integrations.lmms_eval_model import PrunedModel, cut, settings
from tprl.pruners.learned import load_pruner

DATA = Scenes("test")
SAMPLES = [DATA[i] for i in range(10) if DATA[i].box is None]
GREEDY = {"max_new_tokens": 8, "temperature": 0, "until": ["\n\n"]}


def instance(**arguments: Any) -> PrunedModel:
    return PrunedModel(
        **{"pretrained": "tiny_llava", "pruner": "divprune", "keep_ratio": 0.33} | arguments
    )


def asked(
    model: PrunedModel,
    docs: Sequence[tuple[str, list[Any]]],
    gen_kwargs: dict[str, Any] | None = None,
) -> list[str]:
    """Answers to (text, images) documents."""
    model.task_dict["task"] = {"test": docs}
    look: Callable[[Any], list[Any]] = lambda doc: doc[1]  # noqa: E731
    rows = [
        (text, dict(gen_kwargs or GREEDY), look, i, "task", "test")
        for i, (text, _) in enumerate(docs)
    ]
    return model.generate_until([SimpleNamespace(args=row) for row in rows])


def documents() -> list[tuple[str, list[Any]]]:
    return [(sample.question, list(sample.images)) for sample in SAMPLES]


def truth() -> list[str]:
    return [sample.answers[0] for sample in SAMPLES]


class TestGenerate:
    def test_answers_come_in_the_order_of_the_requests(self) -> None:
        assert asked(instance(batch_size=3), documents()) == truth()

    def test_it_prunes(self) -> None:
        model = instance(batch_size=8)
        asked(model, documents())
        assert [len(image.indices) for prompt in model.pruning.kept for image in prompt] == [48] * 8

    def test_batches_mix_requests_of_several_gen_kwargs_without_changing_them(self) -> None:
        model = instance(batch_size=8)
        model.task_dict["task"] = {"test": documents()}
        wanted = [{"max_new_tokens": 8}, {"max_new_tokens": 8, "until": ["e", "o"]}]
        rows = [
            (text, wanted[i % 2], lambda doc: doc[1], i, "task", "test")
            for i, (text, _) in enumerate(documents())
        ]
        result = model.generate_until([SimpleNamespace(args=row) for row in rows])
        assert result == [
            answer if i % 2 == 0 else cut(answer, ["e", "o"]) for i, answer in enumerate(truth())
        ]
        assert wanted == [{"max_new_tokens": 8}, {"max_new_tokens": 8, "until": ["e", "o"]}]

    def test_max_new_tokens_bounds_the_answer(self) -> None:
        boxes = [
            (DATA[i].question, list(DATA[i].images)) for i in range(10) if DATA[i].box is not None
        ]
        whole, short = asked(instance(), boxes), asked(instance(), boxes, {"max_new_tokens": 2})
        assert all(
            len(text.split()) == 2 and full.startswith(text)
            for text, full in zip(short, whole, strict=True)
        )
        assert asked(instance(max_new_tokens=2), boxes, {"temperature": 0}) == short

    def test_beams_and_seeded_sampling_go_through(self) -> None:
        assert asked(instance(batch_size=4), documents(), GREEDY | {"num_beams": 3}) == truth()
        model, hot = instance(batch_size=4), GREEDY | {"temperature": 30.0, "top_p": 1.0}
        result = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            result.append(asked(model, documents(), hot))
        assert result[0] == result[1] != result[2]

    def test_what_is_not_read_is_named_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        output: list[str] = []
        monkeypatch.setattr(
            lmms_eval_model.logger,
            "warning",
            lambda text, *values: output.append(text.format(*values)),
        )
        asked(instance(), documents()[:2], GREEDY | {"image_aspect_ratio": "original"})
        assert len(output) == 1
        assert output[0].startswith(
            "tprl does not read image_aspect_ratio of gen_kwargs; it reads max_new_tokens, until"
        )

    def test_a_marker_in_the_text_is_no_second_image(self) -> None:
        marked = [(f"<image>\n{text}", images) for text, images in documents()]
        assert asked(instance(batch_size=8), marked) == truth()

    def test_a_question_without_images_passes_through(self) -> None:
        (answer,) = asked(instance(), [(SAMPLES[0].question, [])])
        assert answer
        assert instance()._sample("?", None, 0, "task", "test").images == ()

    def test_videos_are_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stop:
            asked(instance(), [("what happens?", ["clip.mp4"])])
        assert stop.value.code == 2
        assert capsys.readouterr().err.endswith(
            "error: task shows a str, and only images are pruned: leave the task out.\n"
        )

    @pytest.mark.parametrize("name", ["loglikelihood", "generate_until_multi_round"])
    def test_other_requests_are_refused(
        self, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        request = SimpleNamespace(args=("text", dict(GREEDY), None, 0, "mmstar", "test"))
        with pytest.raises(SystemExit) as stop:
            getattr(instance(), name)([request])
        assert stop.value.code == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: mmstar ")
        assert line.endswith(
            "leave it out of --tasks, or take a task with output_type: generate_until."
        )

    def test_clean_frees_the_model(self) -> None:
        model = instance()
        model.clean()
        assert not hasattr(model, "lvlm")
        assert model.device == torch.device("cpu")


@pytest.mark.parametrize("name", families())
def test_every_family_answers_ragged_batches_as_it_answers_alone(name: str, tmp_path: Path) -> None:
    save_folder(load_component("model", name, pretrained=None, dtype="float32"), tmp_path)
    images = [
        DATA[0].images[0],
        DATA[5].images[0].resize((64, 96)),
        Image.new("RGBA", (96, 60), (9, 99, 199, 255)),
    ]
    docs = [
        ("what is this ?", images[:1]),
        ("and these ?", images[1:]),
        ("who are you ?", []),
        ("?", images[2:]),
    ]
    result = {}
    for size in (1, 4):
        model = instance(pretrained=str(tmp_path), dtype="float32", batch_size=size, keep_ratio=0.4)
        assert model.lvlm.name == name
        result[size] = asked(model, docs)
    assert result[1] == result[4]
    assert any(result[1])  # random weights may end some answers at once


class TestArguments:
    @pytest.mark.parametrize("pruner", [n for n in choices("pruner") if "oracle" not in n])
    def test_every_pruner_answers(self, pruner: str) -> None:
        ratio = 1 / 3 if pruner.startswith("tprl") or pruner == "keyword_budget" else 0.6
        assert all(asked(instance(pruner=pruner, keep_ratio=ratio, batch_size=2), documents()[:2]))

    def test_a_saved_pruner_is_found_by_its_folder(self, tmp_path: Path) -> None:
        load_pruner("tprl_tiny_llava").save_pretrained(tmp_path)
        kept = []
        for pruner in ("tprl", str(tmp_path)):
            model = instance(pruner=pruner, keep_ratio=0.06, batch_size=8)
            asked(model, documents())
            kept.append(
                [image.indices.tolist() for prompt in model.pruning.kept for image in prompt]
            )
        assert kept[0] == kept[1]

    def test_model_and_dtype_can_be_given(self) -> None:
        model = PrunedModel(
            model="tiny_llava", pruner="keep_all", dtype="bfloat16", device="cpu", batch_size="2"
        )
        assert (model.lvlm.model.dtype, model.batch_size, model.rank, model.world_size) == (
            torch.bfloat16,
            2,
            0,
            1,
        )

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ("pruner=divprune,keep_ratio=1.7", "keep_ratio must be a number in (0, 1], got 1.7"),
            ("pruner=divprune,keep_ratio=1/3", "keep_ratio must be a number in (0, 1], got 1/3"),
            ("pruner=divprune", "divprune needs a kept fraction of the visual tokens"),
            (
                "pruner=divprun,keep_ratio=0.3",
                "pruner=divprun does not exist; choose one of: attention_color, ",
            ),
            (
                "pruner=./divprun,keep_ratio=0.3",
                "./divprun is neither a folder nor within reach on the hub",
            ),
            ("pruner=oracle,keep_ratio=0.3", "llava cannot provide ['region']"),
            ("keep_ratio=0.3", "pruner is missing: give one of attention_color, "),
            (
                "pruner=keep_all,pretrained=/nowhere/x",
                "pretrained=/nowhere/x is not a checkpoint (it is not a folder",
            ),
            ("pruner=keep_all,pretrained=/tmp", "pretrained=/tmp is not a checkpoint ("),
            (
                "pruner=keep_all,pretrained=tiny_llava/clip",
                "pretrained=tiny_llava/clip is a clip, which TPRL does not know how to prune",
            ),
            ("pruner=keep_all,model=qwen2_vl", "the weights "),
            ("pruner=keep_all,model=toy", "model must be one of gemma3, "),
            (
                "pruner=keep_all,prunr=divprune",
                "prunr is not an argument of the model tprl: use pretrained, ",
            ),
            (
                "pruner=keep_all,dtype=float8",
                "model.dtype must be float32, bfloat16 or float16, got float8.",
            ),
            ("pruner=keep_all,device=cuba", "device=cuba is not available ("),
            ("pruner=keep_all,batch_size=auto", "batch_size must be a positive integer, got auto"),
        ],
    )
    def test_a_wrong_one_is_one_sentence(
        self, options: str, sentence: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = options if "pretrained" in options else f"pretrained=tiny_llava,{options}"
        with pytest.raises(SystemExit) as stop:
            PrunedModel.create_from_arg_string(words)
        assert stop.value.code == 2
        (line,) = [
            line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")
        ]
        assert sentence in line

    def test_a_mean_that_is_not_calibrated_is_refused_when_it_is_needed(self) -> None:
        with pytest.raises(SystemExit):
            asked(instance(pruner="tprl_adaptive", keep_ratio=0.9), documents())


class TestSettings:
    @pytest.mark.parametrize(
        ("options", "sample"),
        [
            ({}, False),
            ({"temperature": 0}, False),
            ({"temperature": 0.7}, True),
            ({"do_sample": False, "temperature": 0.7}, False),
            ({"do_sample": True}, True),
            ({"do_sample": True, "temperature": 0}, False),
        ],
    )
    def test_greedy_unless_the_task_wants_draws(
        self, options: dict[str, Any], sample: bool
    ) -> None:
        assert settings(options, 5)["do_sample"] is sample

    def test_literal(self) -> None:
        assert settings({"temperature": 0, "top_p": 1.0, "num_beams": 2, "until": "."}, 5) == {
            "num_beams": 2, "max_new_tokens": 5, "do_sample": False, "temperature": None,
            "top_p": None, "top_k": None,
        }  # fmt: skip
        drawn = {"temperature": 0.5, "top_p": None, "top_k": 3, "max_new_tokens": 9}
        assert settings(drawn, 5) == {
            "num_beams": 1, "max_new_tokens": 9, "do_sample": True, "temperature": 0.5, "top_k": 3,
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("until", "left"),
        [
            (None, "a. b\n c"),
            (".", "a"),
            (["\n", "b", ""], "a. "),
            (["x"], "a. b\n c"),
            ([], "a. b\n c"),
        ],
    )
    def test_the_answer_ends_before_the_first_stop_string(self, until: Any, left: str) -> None:
        assert cut("a. b\n c", until) == left

    def test_until_must_be_text(self) -> None:
        with pytest.raises(UserError, match=r"until=\[3\] of gen_kwargs is not a list of strings"):
            cut("a", [3])
