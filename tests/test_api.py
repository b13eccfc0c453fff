"""`tprl.prune` on stock models: what goes in and what comes out is the stock `generate`'s."""

import inspect
from typing import Any

import pytest
import torch
from tests.helpers import untrained_policy
from tests.lvlm.test_families import SAMPLES
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

import tprl
from tprl.bench.parity import stock_inputs
from tprl.budget import budget
from tprl.build import load_component
from tprl.data.scenes import Scenes
from tprl.errors import UserError
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.layer_drop import LayerPlan
from tprl.lvlm.llava import Llava
from tprl.splice import keep_all, splice

TWO = SAMPLES[1]._replace(images=(SAMPLES[0].images[0], SAMPLES[2].images[0]))
MIXED = [SAMPLES[0], TWO, SAMPLES[3]._replace(images=()), SAMPLES[4]]
NEW = 6


@pytest.fixture(scope="module")
def llava() -> FrozenLVLM:
    return load_component("model", "llava", pretrained=None, dtype="float32", max_new_tokens=NEW)


class Collect:
    """A streamer that remembers."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.parts.append(value.clone())

    def end(self) -> None:
        self.ended = True


class WatchingProcessor(LogitsProcessor):
    """Remembers the ids it is shown."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(input_ids.clone())
        return scores


class WatchingCriterion(StoppingCriteria):
    """Remembers the ids it is shown, and never stops."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.seen.append(input_ids.clone())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class TestGenerate:
    """Everything else that the stock method can do."""

    def test_streamers_get_the_prompt_and_then_the_answer(self, llava: FrozenLVLM) -> None:
        batch, streamer = stock_inputs(llava, SAMPLES[:1]), Collect()
        with tprl.prune(llava.model, "random", keep_ratio=0.3):
            out = llava.model.generate(
                **batch, max_new_tokens=NEW, do_sample=False, streamer=streamer
            )
        assert torch.equal(streamer.parts[0], batch["input_ids"])
        assert torch.equal(torch.cat([part.flatten() for part in streamer.parts]), out[0])
        assert streamer.ended

    def test_processors_and_criteria_read_the_original_prompt(self, llava: FrozenLVLM) -> None:
        batch, watcher, stopper = (
            stock_inputs(llava, SAMPLES[:2]),
            WatchingProcessor(),
            WatchingCriterion(),
        )
        with tprl.prune(llava.model, "random", keep_ratio=0.3):
            llava.model.generate(
                **batch,
                max_new_tokens=3,
                do_sample=False,
                logits_processor=LogitsProcessorList([watcher]),
                stopping_criteria=StoppingCriteriaList([stopper]),
            )
        for seen in (watcher.seen, stopper.seen):
            assert torch.equal(seen[0][:, : batch["input_ids"].shape[1]], batch["input_ids"])

    def test_sampling_is_seeded_as_ever(self, llava: FrozenLVLM) -> None:
        batch = stock_inputs(llava, SAMPLES[:2])
        options: dict[str, Any] = {
            "max_new_tokens": NEW,
            "do_sample": True,
            "num_return_sequences": 3,
        }
        torch.manual_seed(3)
        expected = llava.model.generate(**batch, **options)
        with tprl.prune(llava.model, "keep_all", keep_ratio=1.0):
            torch.manual_seed(3)
            assert torch.equal(llava.model.generate(**batch, **options), expected)

    @pytest.mark.parametrize("how", ["argument", "config", "model"])
    def test_lengths_count_the_original_prompt(self, llava: FrozenLVLM, how: str) -> None:
        batch = stock_inputs(llava, SAMPLES[:2])
        length = batch["input_ids"].shape[1]
        stock_value = llava.model.generation_config
        options: dict[str, Any] = {"max_length": length + 4, "min_length": length + 4}
        with tprl.prune(llava.model, "random", keep_ratio=0.3):
            if how == "argument":
                out = llava.model.generate(**batch, do_sample=False, **options)
            elif how == "config":
                ids = {
                    "pad_token_id": stock_value.pad_token_id,
                    "eos_token_id": stock_value.eos_token_id,
                }
                out = llava.model.generate(
                    **batch, generation_config=GenerationConfig(do_sample=False, **options, **ids)
                )
            else:
                stock_value.update(**options)
                out = llava.model.generate(**batch, do_sample=False)
                stock_value.update(max_length=None, min_length=None)
        assert out.shape[1] == length + 4

    def test_a_dictionary_is_returned_on_demand(self, llava: FrozenLVLM) -> None:
        batch = stock_inputs(llava, SAMPLES[:2])
        with tprl.prune(llava.model, "random", keep_ratio=0.3):
            out = llava.model.generate(
                **batch,
                max_new_tokens=3,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        assert torch.equal(out.sequences[:, : batch["input_ids"].shape[1]], batch["input_ids"])
        assert len(out.logits) == out.sequences.shape[1] - batch["input_ids"].shape[1]
        kept = budget(0.3, 36)
        text = int((batch["input_ids"][0] != llava.image_token).sum())
        assert out.past_key_values.get_seq_length() < batch["input_ids"].shape[1]
        assert out.past_key_values.get_seq_length() <= text + kept + 3

    def test_a_static_cache(self, llava: FrozenLVLM) -> None:
        batch = stock_inputs(llava, SAMPLES[:3])
        options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
        with tprl.prune(llava.model, "random", keep_ratio=0.3):
            expected = llava.model.generate(**batch, **options)
            result = llava.model.generate(
                **batch, **options, cache_implementation="static", disable_compile=True
            )
        assert torch.equal(result, expected)

    def test_right_padding_answers_as_left_padding(self, llava: FrozenLVLM) -> None:
        """The stock method warns of right padding and reads the pad tokens; here they are moved out
        of the way."""
        two = [SAMPLES[0], SAMPLES[1]._replace(question="is it red or is it blue?")]
        left = stock_inputs(llava, two)
        right = dict(left)
        for row, count in enumerate(left["attention_mask"].sum(1).tolist()):
            for name in ("input_ids", "attention_mask"):
                right[name] = right[name].clone()
                right[name][row] = left[name][row].roll(count)
        assert not torch.equal(right["attention_mask"], left["attention_mask"])
        result = []
        for batch in (left, right):
            with tprl.prune(
                llava.model,
                untrained_policy(llava.width),
                keep_ratio=0.3,
                processor=llava.processor,
            ):
                out = llava.model.generate(**batch, max_new_tokens=NEW, do_sample=False)
            result.append(out[:, left["input_ids"].shape[1] :])
        assert torch.equal(*result)

    def test_positional_ids(self, llava: FrozenLVLM) -> None:
        batch = stock_inputs(llava, SAMPLES[:1])
        ids = batch.pop("input_ids")
        with tprl.prune(llava.model, "random", keep_ratio=0.3):
            expected = llava.model.generate(
                input_ids=ids, **batch, max_new_tokens=3, do_sample=False
            )
            assert torch.equal(
                llava.model.generate(ids, **batch, max_new_tokens=3, do_sample=False), expected
            )

    def test_text_passes_untouched(self, llava: FrozenLVLM) -> None:
        batch = stock_inputs(llava, [SAMPLES[0]._replace(images=())])
        expected = llava.model.generate(**batch, max_new_tokens=NEW, do_sample=False)
        with tprl.prune(llava.model, "random", keep_ratio=0.3) as pruning:
            assert torch.equal(
                llava.model.generate(**batch, max_new_tokens=NEW, do_sample=False), expected
            )
            assert pruning.kept == [[]]

    def test_compact_positions(self, llava: FrozenLVLM) -> None:
        policy, batch = untrained_policy(llava.width), stock_inputs(llava, SAMPLES[:2])
        with tprl.prune(
            llava.model, policy, keep_ratio=0.3, processor=llava.processor, positions="compact"
        ):
            result = llava.model.generate(**batch, max_new_tokens=NEW, do_sample=False)
        encoded = llava.encode(SAMPLES[:2])
        texts = llava.answer(splice(encoded, policy.select(encoded, 0.3), positions="compact"))
        new = result[:, batch["input_ids"].shape[1] :]
        assert llava.tokenizer.batch_decode(new, skip_special_tokens=True) == texts

    def test_half_precision(self) -> None:
        lvlm = load_component("model", "llava", pretrained=None, dtype="bfloat16")
        batch = stock_inputs(lvlm, SAMPLES[:2])
        with tprl.prune(
            lvlm.model, untrained_policy(lvlm.width), keep_ratio=0.3, processor=lvlm.processor
        ) as pruning:
            out = lvlm.model.generate(**batch, max_new_tokens=3, do_sample=False)
        assert torch.equal(out[:, : batch["input_ids"].shape[1]], batch["input_ids"])
        assert [len(images[0].indices) for images in pruning.kept] == [budget(0.3, 36)] * 2

    def test_a_threshold_decides_how_many(self, llava: FrozenLVLM) -> None:
        policy, batch = untrained_policy(llava.width), stock_inputs(llava, SAMPLES[:4])
        policy.calibrate([llava.encode(SAMPLES)], 0.3)
        before, counts = policy.serving.tau, []
        for threshold in (0.2, 0.5, 0.8):
            with tprl.prune(
                llava.model, policy, threshold=threshold, processor=llava.processor
            ) as pruning:
                llava.model.generate(**batch, max_new_tokens=1)
            counts.append([len(images[0].indices) for images in pruning.kept])
            encoded = llava.encode(SAMPLES[:4])
            x = policy.observe(encoded)
            likely = (policy.logits(x, 0.3).sigmoid() > threshold) & x.mask
            assert counts[-1] == likely.sum(1).clamp(min=1).tolist()
        assert sum(counts[0]) > sum(counts[1]) > sum(counts[2])
        assert policy.serving.tau == before

    def test_budgets_per_question_on_the_embedded_model(self) -> None:
        lvlm, data = Llava("tiny_llava"), Scenes("test")
        samples = [data[i] for i in range(20)]
        # its processor is found
        with tprl.prune(lvlm.model, "tprl_adaptive", keep_ratio=1 / 9) as pruning:
            lvlm.model.generate(**stock_inputs(lvlm, samples), max_new_tokens=1)
        counts = [len(images[0].indices) for images in pruning.kept]
        assert len(set(counts)) > 2
        encoded = lvlm.encode(samples)
        assert (
            counts
            == load_component("pruner", "tprl_adaptive").select(encoded, 1 / 9).count.tolist()
        )

    @pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "dart"])
    def test_methods_inside_the_language_model(self, llava: FrozenLVLM, name: str) -> None:
        batch = stock_inputs(llava, SAMPLES[:3])
        with tprl.prune(llava.model, name, keep_ratio=0.7):
            result = llava.model.generate(**batch, max_new_tokens=NEW, do_sample=False)
        encoded = llava.encode(SAMPLES[:3])
        plan = LayerPlan.of(load_component("pruner", name), 0.7, llava.layers)
        texts = llava.answer(splice(encoded, keep_all(encoded)), plan)
        new = result[:, batch["input_ids"].shape[1] :]
        assert llava.tokenizer.batch_decode(new, skip_special_tokens=True) == texts
        with pytest.raises(UserError, match="infeasible"):
            tprl.prune(llava.model, name, keep_ratio=0.3)

    def test_methods_that_make_new_tokens(self, llava: FrozenLVLM) -> None:
        with tprl.prune(llava.model, "pooling", keep_ratio=0.25) as pruning:
            llava.model.generate(**stock_inputs(llava, [TWO]), max_new_tokens=1)
        assert [len(item.indices) for item in pruning.kept[0]] == [
            budget(0.25, item.total) for item in pruning.kept[0]
        ]

    @pytest.mark.parametrize("name", ["cdpruner", "trim"])
    def test_a_processor_found_by_itself_also_reads_the_question_for_relevance(
        self, name: str
    ) -> None:
        lvlm, data = Llava("tiny_llava"), Scenes("test")
        samples = [data[i] for i in (0, 5)]
        encoded = lvlm.encode(samples, frozenset({"clip_relevance"}))
        selection = load_component("pruner", name).select(encoded, 0.25)
        if selection.extra_at is not None:
            selection.keep.scatter_(1, selection.extra_at, value=True)
        with tprl.prune(lvlm.model, name, keep_ratio=0.25) as pruning:
            lvlm.model.generate(**stock_inputs(lvlm, samples), max_new_tokens=2, do_sample=False)
        for row, kept in zip(selection.keep, pruning.kept, strict=True):
            assert kept[0].indices.tolist() == row.nonzero().squeeze(1).tolist()


class TestUndo:
    def test_leaves_nothing_behind(self, llava: FrozenLVLM) -> None:
        before = dict(vars(llava.model))
        with tprl.prune(llava.model, "random", keep_ratio=0.3) as pruning:
            assert llava.model.generate is pruning
            assert inspect.signature(llava.model.generate) == inspect.signature(pruning._stock)
        assert vars(llava.model) == before
        pruning.undo()
        assert vars(llava.model) == before

    def test_also_after_an_error(self, llava: FrozenLVLM) -> None:
        with (
            pytest.raises(RuntimeError, match="mine"),
            tprl.prune(llava.model, "random", keep_ratio=0.3),
        ):
            raise RuntimeError("mine")
        assert "generate" not in vars(llava.model)

    def test_a_method_of_ones_own_comes_back(self, llava: FrozenLVLM) -> None:
        stock_value = llava.model.generate
        llava.model.generate = stock_value
        with tprl.prune(llava.model, "random", keep_ratio=0.3):
            pass
        assert vars(llava.model)["generate"] is stock_value
        del llava.model.generate
