"""A pruned LVLM as a model of lmms-eval: what `python -m lmms_eval --model tprl` runs
(docs/lmms-eval.md)."""

import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.utils import Collator  # pyright: ignore[reportMissingImports]
from loguru import logger  # pyright: ignore[reportMissingImports]  # comes with lmms-eval
from omegaconf import OmegaConf
from PIL import Image
from tqdm import tqdm
from transformers import AutoConfig

from tprl.api import prune
from tprl.budget import check_keep_ratio
from tprl.build import build, choices, conf_dir, target_of
from tprl.data.images import BadImage, read_picture
from tprl.errors import UserError
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.loading import find_model
from tprl.lvlm.shapes import REFUSALS
from tprl.pruners.folder import ASSETS
from tprl.pruners.learned import LearnedPruner, load_pruner
from tprl.runtime.hub import within_reach
from tprl.types import Sample

IMAGE = "<image>"  # some tasks write it where an image goes
# of `lvlm.loading.Placement`
LOADING = ("dtype", "attention", "load_in", "placement", "offload_folder")
SAMPLING = ("temperature", "top_p", "top_k")
# handed to `generate` as they are
STOCK = ("num_beams", "repetition_penalty", "no_repeat_ngram_size")
READ = ("max_new_tokens", "until", "do_sample", *SAMPLING, *STOCK)


class PrunedModel(lmms):
    """A stock checkpoint whose `generate` prunes; all arguments come from `--model_args`,
    `--device`, `--batch_size`.

    Args:
        pretrained: a folder, a hub id, or the name of a model that ships (tiny_llava); by default
            that of `model`.
        pruner: a name of conf/pruner, or what `load_pruner` takes: a folder, a run directory, a hub
            id.
        keep_ratio: kept fraction of each image's visual tokens; keep_all needs none, nor a pruner
            with a threshold.
        model: a name of conf/model; by default found from the checkpoint's `model_type`.
        device: where the model lives; by default the GPU of this process, else the CPU.
        batch_size: prompts per `generate`.
        max_new_tokens: bound of an answer for tasks that set none.
        options: dtype, attention, load_in, placement, offload_folder (see docs/lvlms.md).

    Raises:
        UserError: a wrong argument.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        pruner: str | None = None,
        keep_ratio: float | int | str | None = None,  # what lmms-eval made of the text
        model: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_new_tokens: int = 1024,
        **options: Any,
    ) -> None:
        super().__init__()
        if unknown := sorted(options.keys() - set(LOADING)):
            known = "pretrained, pruner, keep_ratio, model, device, batch_size, max_new_tokens"
            raise UserError(
                f"{unknown[0]} is not an argument of the model "
                f"tprl: use {known}, {', '.join(LOADING)}."
            )
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(
                f"batch_size must be a positive integer, got {batch_size}; use e.g. --batch_size 8."
            )
        if pruner is None:
            raise UserError(
                "pruner is missing: give one of "
                f"{', '.join(choices('pruner'))}, or a pruner's folder."
            )
        self.accelerator = Accelerator()
        self._rank, self._world_size = (
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        place = self.accelerator.device if self._world_size > 1 else _place(device)
        self.batch_size, self.max_new_tokens = int(batch_size), max_new_tokens
        keep_ratio = 1.0 if pruner == "keep_all" and keep_ratio is None else keep_ratio
        ratio = None if keep_ratio is None else check_keep_ratio(keep_ratio)
        chosen = pruner_or_name(str(pruner))
        self.lvlm = load_lvlm(pretrained, model, device=str(place), **options)
        self.pruning = prune(self.lvlm.model, chosen, ratio, processor=self.lvlm.processor)
        self.device = self.lvlm.device
        self._ignored: set[str] = set()  # gen_kwargs that a warning has named

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> "PrunedModel":
        """What the command line calls; see `_in_one_sentence`."""
        with _in_one_sentence():
            return super().create_from_arg_string(arg_string, additional_config)

    # --- requests ---------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers in the order of the requests; requests with the same gen_kwargs share batches."""
        # Longest first: what does not fit into memory shows at once.
        order = Collator(
            [request.args for request in requests], lambda a: (-len(a[0]), a[0]), grouping=True
        )
        answers: list[str] = []
        read = total = 0
        with (
            _in_one_sentence(),
            tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding") as bar,
        ):
            for batch in order.get_batched(n=self.batch_size):
                answers += self._answer(batch)
                for image in chain.from_iterable(self.pruning.kept):
                    read, total = read + len(image.indices), total + image.total
                bar.update(len(batch))
        logger.info(
            "the first layer of the language model has read {} of {} visual tokens", read, total
        )
        return order.get_original(answers)

    def _answer(self, batch: Sequence[tuple[Any, ...]]) -> list[str]:
        samples = [self._sample(context, *where) for context, _, *where in batch]
        options: Mapping[str, Any] = batch[0][1]  # the same in the whole batch
        self._warn(options)
        nested = [list(sample.images) for sample in samples]
        images = nested if any(nested) else None
        texts = [self.lvlm.render(sample) for sample in samples]
        try:
            inputs = self.lvlm.processor(
                text=texts, images=images, padding=True, return_tensors="pt"
            ).to(self.device)
        except REFUSALS as error:
            self.lvlm.check_shapes(samples, error)
            raise
        out = self.lvlm.model.generate(**inputs, **settings(options, self.max_new_tokens))
        new = self.lvlm.tokenizer.batch_decode(
            out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return [cut(text, options.get("until")) for text in new]

    def _sample(
        self, context: str, doc_to_visual: Any, doc_id: int, task: str, split: str
    ) -> Sample:
        """A request as we know it: images, which stand before the text, and the text."""
        visuals = (
            doc_to_visual(self.task_dict[task][split][doc_id]) if doc_to_visual else None
        ) or []
        for visual in visuals:
            if not isinstance(visual, Image.Image):
                raise UserError(
                    f"{task} shows a {type(visual).__name__}, and "
                    "only images are pruned: leave the task out."
                )
        question = context.replace(IMAGE, "").strip() if IMAGE in context else context
        try:
            images = tuple(read_picture(image, max_pixels=None).image for image in visuals)
        except BadImage as bad:
            raise UserError(
                f"document {doc_id} of {task} has an image that cannot be read ({bad}): mend it, "
                "or leave it out with --limit or --samples."
            ) from bad
        sample = Sample(f"{task}/{doc_id}", images, question, ())
        if question and (refusal := self.lvlm.refusal(sample)) is not None:
            raise UserError(
                f"{sample.uid} cannot be asked, {refusal[0]}: "
                f"{refusal[1]}; leave it out with --limit or --samples."
            )
        return sample

    def _warn(self, options: Mapping[str, Any]) -> None:
        for name in sorted(options.keys() - set(READ) - self._ignored):
            self._ignored.add(name)
            logger.warning(
                "tprl does not read {} of gen_kwargs; it reads {}", name, ", ".join(READ)
            )

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refused: it would read the unpruned prompt."""
        with _in_one_sentence():
            raise _refusal(requests, "ranks given answers by their likelihood")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refused."""
        with _in_one_sentence():
            raise _refusal(requests, "holds a conversation of several rounds")

    def clean(self) -> None:
        """Free the model's memory; lmms-eval asks for it after the last answer, before a judge is
        loaded."""
        del self.pruning, self.lvlm
        super().clean()


def load_lvlm(pretrained: str | None, model: str | None, **options: Any) -> FrozenLVLM:
    """A checkpoint, with what the yaml of its family says of the rest.

    Raises:
        UserError: neither is given, or they are not there, or do not fit each other.
    """
    if model is None:
        if pretrained is None:
            raise UserError(
                "pretrained is missing: give a folder, a hub "
                "id, or tiny_llava, which ships with TPRL."
            )
        model = family(pretrained)
    known = [name for name in choices("model") if issubclass(target_of("model", name), FrozenLVLM)]
    if model not in known:
        raise UserError(f"model must be one of {', '.join(known)}, got {model}.")
    arguments = options if pretrained is None else options | {"pretrained": str(pretrained)}
    return build({**_yaml(model), **arguments})


def family(pretrained: str) -> str:
    """The name in conf/model: the one whose checkpoint this is, else the first of the same
    `model_type`.

    Raises:
        UserError: no checkpoint there, or of a type that none of them reads.
    """
    source = str(find_model(pretrained))
    try:
        if not within_reach(source):
            raise OSError("it is not a folder and not cached, and the hub does not answer")
        kind = AutoConfig.from_pretrained(source).model_type
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"pretrained={pretrained} is not a checkpoint ({reason}): give a "
            "downloaded folder, a hub id, or tiny_llava, which ships with TPRL."
        ) from error
    types = {
        name: getattr(target_of("model", name), "model_type", None) for name in choices("model")
    }
    fitting = [name for name, read in types.items() if read == kind]
    if not fitting:
        known = ", ".join(sorted({read for read in types.values() if read}))
        raise UserError(
            f"pretrained={pretrained} is a {kind}, which TPRL does not know how to prune; use one "
            f"of {known}."
        )
    return next((name for name in fitting if _yaml(name)["pretrained"] == pretrained), fitting[0])


def pruner_or_name(name: str) -> str | LearnedPruner:
    """A name of conf/pruner as it is, else the saved pruner.

    Raises:
        UserError: there is neither.
    """
    if name in choices("pruner"):
        return name
    if "/" not in name and not Path(name).exists() and not (ASSETS / name).exists():
        raise UserError(
            f"pruner={name} does not exist; choose one of: {', '.join(choices('pruner'))}, "
            "or give the folder, run directory or hub id of a trained one."
        )
    return load_pruner(name)


def settings(options: Mapping[str, Any], max_new_tokens: int) -> dict[str, Any]:
    """gen_kwargs of a task as arguments of `generate`.

    Greedy, unless the task gives a temperature above 0 or do_sample, and neither temperature=0 nor
    do_sample=False. What the task does not set stays as the checkpoint's own generation config has
    it, and one beam.
    """
    bound, temperature = options.get("max_new_tokens"), options.get("temperature")
    sample = bool(options.get("do_sample", temperature)) and temperature != 0
    chosen = {
        name: options[name]
        for name in (*STOCK, *(SAMPLING if sample else ()))
        if options.get(name) is not None
    }
    chosen |= {"max_new_tokens": max_new_tokens if bound is None else bound, "do_sample": sample}
    if not sample:
        chosen |= dict.fromkeys(SAMPLING)  # the checkpoint's own would only raise warnings
    return {"num_beams": 1} | chosen


def cut(text: str, until: Any) -> str:
    """The text before the first of the stop strings: none, one, or a list.

    Raises:
        UserError: `until` is neither a string nor a list of strings.
    """
    stops = [until] if isinstance(until, str) else until or []
    if not all(isinstance(stop, str) for stop in stops):
        raise UserError(
            f"until={until!r} of gen_kwargs is not a list of strings: write until: ['.']."
        )
    return min((text.split(stop)[0] for stop in stops if stop), key=len, default=text)


def _refusal(requests: Sequence[Any], deed: str) -> UserError:
    """What to do with the tasks that ask so."""
    # arguments end with task and split
    tasks = sorted({str(request.args[-2]) for request in requests})
    return UserError(
        f"{', '.join(tasks)} {deed}, and tprl answers prompts of one turn in words: "
        "leave it out of --tasks, or take a task with output_type: generate_until."
    )


@contextmanager
def _in_one_sentence() -> Generator[None, None, None]:
    """A UserError ends the process as in our own commands, in one line and with status 2: lmms-eval
    would print a traceback and exit with 0."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _place(device: str | None) -> str:
    """A device that is there.

    Raises:
        UserError: it is not.
    """
    if device is None:
        return "auto"
    try:
        return str(torch.empty(0, device=device).device)
    # an unknown name, or a build of torch without that kind
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"device={device} is not available ({reason}): use cpu, cuda or cuda:<number>."
        ) from error


def _yaml(model: str) -> dict[str, Any]:
    return {
        str(key): value
        for key, value in OmegaConf.load(conf_dir() / "model" / f"{model}.yaml").items()
    }
