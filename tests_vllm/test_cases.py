"""Where caches, chunks and several images could go wrong."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests_vllm.engines import (
    Answer,
    ask,
    chat,
    compare,
    engine,
    export,
    model_of,
    questions,
    reference,
)
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from tprl.build import load_component
from tprl.errors import UserError
from tprl.lvlm.frozen import FrozenLVLM
from tprl.types import Sample

GREEDY = SamplingParams(temperature=0, max_tokens=16)
HALF = 1 / 2  # 72 of 144 tokens: more than four blocks of the cache


@pytest.fixture(scope="module")
def lvlm() -> FrozenLVLM:
    return load_component("model", "tiny_llava")


@dataclass
class Spy:
    """What the model was given of every chunk with an image: tokens computed before, embeddings."""

    chunks: list[tuple[int, int]]

    @classmethod
    def on(cls, model: Any) -> "Spy":
        spy, stock = cls([]), model.recompute_mrope_positions

        def watched(**kwargs: Any) -> Any:
            parts: Sequence[Any] = kwargs["multimodal_embeddings"]
            if len(parts):
                spy.chunks.append((kwargs["num_computed_tokens"], sum(map(len, parts))))
            return stock(**kwargs)

        object.__setattr__(model, "recompute_mrope_positions", watched)
        return spy


class TestBatches:
    @pytest.fixture(scope="class")
    def llm(self, lvlm: FrozenLVLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
        folder: Path = tmp_path_factory.mktemp("tprl")
        with engine(export(folder, lvlm, "tprl", 1 / 9)) as llm:
            yield llm

    def test_two_questions_about_one_image_twice(self, lvlm: FrozenLVLM, llm: Any) -> None:
        pair = questions(5, 5)[:4:2]
        assert pair[0].images[0] is pair[1].images[0]
        answers = reference(lvlm, pair, "tprl", 1 / 9)
        assert answers[0].ids != answers[1].ids
        before = model_of(llm).pruner_calls
        for _ in range(2):
            assert not compare(answers, ask(llm, pair)).wrong
        assert model_of(llm).pruner_calls - before == 2

    def test_texts_between_images(self, lvlm: FrozenLVLM, llm: Any) -> None:
        pair = questions(2, 20)
        texts = [
            Sample("t", (), "is there a circle?", ()),
            Sample("u", (), "how many objects are there?", ()),
        ]
        alone = ask(llm, texts)
        mixed = ask(llm, [texts[0], pair[0], texts[1], pair[1]])
        assert mixed[0::2] == alone
        assert not compare(reference(lvlm, pair, "tprl", 1 / 9), mixed[1::2]).wrong

    def test_a_second_image_is_refused_and_the_engine_lives(
        self, lvlm: FrozenLVLM, llm: Any
    ) -> None:
        (first, other) = questions(6, 25)[::5]
        both = first._replace(images=(*first.images, *other.images))
        with pytest.raises(VLLMValidationError, match="At most 1 image"):
            ask(llm, [both])
        assert not compare(reference(lvlm, [first], "tprl", 1 / 9), ask(llm, [first])).wrong

    def test_a_placeholder_in_a_question_is_refused(self, llm: Any) -> None:
        sample = questions(1)[0]._replace(question="what is <image> ?")
        with pytest.raises(VLLMValidationError, match="2 image placeholders for 1 image:"):
            ask(llm, [sample])

    def test_a_client_cannot_give_the_question_itself(self, lvlm: FrozenLVLM, llm: Any) -> None:
        (sample,) = questions(1, 31)
        out = llm.chat(
            chat(sample), GREEDY, use_tqdm=False, mm_processor_kwargs={"tprl_question": [5, 6]}
        )
        assert not compare(
            reference(lvlm, [sample], "tprl", 1 / 9), [list(out[0].outputs[0].token_ids)]
        ).wrong


class TestSeveralImages:
    def pairs(self) -> list[Sample]:
        singles = questions(60)
        return [
            singles[number]._replace(images=(*singles[number].images, *singles[number + 5].images))
            for number in range(0, 50, 5)
        ]

    def test_each_is_pruned_alone_and_stands_at_its_place(
        self, lvlm: FrozenLVLM, tmp_path: Path
    ) -> None:
        pairs = self.pairs()
        answers = two_images(lvlm, pairs, "divprune", 1 / 3)
        with engine(export(tmp_path, lvlm, "divprune", 1 / 3)) as llm:
            assert not compare(answers, ask(llm, pairs)).wrong


def two_images(
    lvlm: FrozenLVLM, samples: Sequence[Sample], pruner: str, ratio: float
) -> list[Answer]:
    """The reference, for prompts with two images."""
    prompt = lvlm.prompt
    lvlm.prompt = "USER: <image>\n<image>\n{question} ASSISTANT:"
    try:
        return reference(lvlm, samples, pruner, ratio)
    finally:
        lvlm.prompt = prompt


class TestChunks:
    def test_a_chunk_may_cut_an_image(self, lvlm: FrozenLVLM, tmp_path: Path) -> None:
        samples = questions(20, 40)
        answers = reference(lvlm, samples, "tprl", HALF)
        options = {"max_num_batched_tokens": 32, "max_num_seqs": 4, "max_model_len": 256}
        with engine(
            export(tmp_path, lvlm, "tprl", HALF), enable_chunked_prefill=True, **options
        ) as llm:
            spy = Spy.on(model_of(llm))
            assert not compare(answers, ask(llm, samples)).wrong
        assert any(start > 10 for start, _ in spy.chunks)  # began within an image
        assert all(count < 72 for _, count in spy.chunks)

    def test_a_prompt_that_lost_its_blocks_starts_again(
        self, lvlm: FrozenLVLM, tmp_path: Path
    ) -> None:
        samples = [sample for sample in questions(60, 60) if sample.family == "grounding"]
        ratio = 84 / 144
        answers = reference(lvlm, samples, "tprl", ratio)
        # Prompts of 95 tokens take three blocks of 32 and need a fourth for their answers of five:
        # four of them fill all 12 blocks that there are beside vLLM's own.
        options = {
            "num_gpu_blocks_override": 13,
            "block_size": 32,
            "max_model_len": 256,
            "max_num_seqs": 12,
        }
        with engine(
            export(tmp_path, lvlm, "tprl", ratio),
            disable_log_stats=False,
            enable_prefix_caching=False,
            **options,
        ) as llm:
            assert not compare(answers, ask(llm, samples)).wrong
            counted = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
        assert counted["vllm:num_preemptions"] > 0


class TestCompiled:
    """As a server starts without `--enforce-eager`, which all other tests give."""

    @pytest.mark.parametrize("positions", ["keep", "compact"])
    def test_ids_are_equal(self, lvlm: FrozenLVLM, tmp_path: Path, positions: str) -> None:
        samples = questions(20, 20)
        answers = reference(lvlm, samples, "tprl", 1 / 9, positions)
        # Traced as by default, and computed as it was traced: Inductor would take minutes.
        options = {"enforce_eager": False, "compilation_config": {"mode": 3, "backend": "eager"}}
        with engine(export(tmp_path, lvlm, "tprl", 1 / 9, positions), **options) as llm:
            assert model_of(llm).get_language_model().model.compiled
            assert not compare(answers, ask(llm, samples)).wrong


class TestRefusals:
    """At the start, before weights are read, in one sentence."""

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            (
                {"hf_overrides": {"tprl_keep_ratio": 1.7}},
                r"keep_ratio must be a number in \(0, 1\], got 1\.7",
            ),
            ({"hf_overrides": {"tprl_positions": "some"}}, "positions=some is unknown"),
            (
                {
                    "hf_overrides": {
                        "tprl_pruner": {"_target_": "tprl.pruners.cls_attention.ClsAttentionPruner"}
                    }
                },
                "pruner cls_attention reads cls_attention of the vision tower",
            ),
            ({"enable_mm_embeds": True}, "would let embeddings past the pruner"),
            (
                {
                    "speculative_config": {
                        "method": "ngram",
                        "num_speculative_tokens": 2,
                        "prompt_lookup_max": 2,
                    }
                },
                "speculative decoding drafts with positions of the unpruned prompt",
            ),
        ],
    )
    def test_what_cannot_be_served(
        self, lvlm: FrozenLVLM, tmp_path: Path, options: dict[str, Any], sentence: str
    ) -> None:
        folder = export(tmp_path, lvlm, "divprune", 1 / 3)
        with pytest.raises((UserError, ValueError), match=sentence), engine(folder, **options):
            pass

    def test_a_version_that_was_not_tried(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from tprl.serving import versions

        versions.check_vllm()
        monkeypatch.setattr(versions, "VLLM", ("0.9.1",))
        with pytest.raises(UserError, match=r"vLLM 0\.32\.0 was not tried"):
            versions.check_vllm()

    def test_a_ratio_of_the_command_line(self, lvlm: FrozenLVLM, tmp_path: Path) -> None:
        """`--hf-overrides` serves one folder at another ratio."""
        samples = questions(10, 90)
        answers = reference(lvlm, samples, "divprune", 1 / 3)
        folder = export(tmp_path, lvlm, "divprune", 1 / 9)
        with engine(folder, hf_overrides={"tprl_keep_ratio": 1 / 3}) as llm:
            assert not compare(answers, ask(llm, samples)).wrong
