"""What constructors of stages name, made of a config: the served score and the cache."""

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from tprl.build import build
from tprl.commands.plan import no_answers
from tprl.commands.setup import plain
from tprl.commands.stages import class_of, in_one_table, needs
from tprl.data.base import BaseDataset
from tprl.lvlm.adapters import Adapter, read_adapter
from tprl.lvlm.base import BaseLVLM
from tprl.pruners.base import make_pruner
from tprl.runtime.store import Cache
from tprl.scoring.identity import of_dataset, of_lvlm, of_pruner
from tprl.scoring.lengths import check_lengths
from tprl.scoring.scorer import Reader
from tprl.scoring.validation import ServedScore


class Arguments:
    """The half of `runs.ModelRun` that makes what stages are built of."""

    cfg: DictConfig
    lvlm: BaseLVLM
    train_set: BaseDataset
    val_set: BaseDataset
    _lengths_checked: bool

    @cached_property
    def selector(self) -> Any:
        """The pruner of the group `pruner`, for stages that leave it as it is."""
        return make_pruner(self.cfg.pruner)

    def adapter_of(self, config: Any) -> Adapter | None:
        """The adapter that a stage goes on from."""
        source = config.get("init_from")
        return None if source is None else read_adapter(source)

    def extras_of(self, config: Any) -> frozenset[str]:
        """What the pruner that a stage serves reads beside the tokens."""
        return (
            frozenset(self.selector.extras)
            if "selector" in needs(class_of(config))
            else frozenset()
        )

    def _served(self, config: Any, **others: Any) -> ServedScore:
        """The validation score of a stage."""
        labels = self.check_labels(config)
        options = {**plain(config.served), **others}
        extras = self.extras_of(config)
        reader = self.reader_of(config)
        return ServedScore(
            self.lvlm, self.val_set, labels=labels, extras=extras, reader=reader, **options
        )

    def reader_of(self, config: Any) -> Reader | None:
        """Who reads prompts for a stage in place of the LVLM; None: the LVLM does."""
        return self._engine if "scorer" in needs(class_of(config)) else None

    @cached_property
    def _engine(self) -> Reader | None:
        """The reader of the group `scorer`, started once for all stages of a run."""
        return build(self.cfg.scorer, lvlm=self.lvlm) if self.cfg.get("scorer") else None

    def check_labels(self, config: Any) -> bool:
        """Whether a stage is scored by reference answers. Refuses, before anything is computed,
        those that it reads and that are not there or cannot be written.

        Raises:
            UserError: it reads answers, and the dataset has none.
        """
        kind = class_of(config)
        if "served" not in needs(kind):
            return False
        reward = build(self.cfg.reward) if "reward" in needs(kind) else None
        settings = in_one_table("stage", plain(config))
        # Labels that a stage does not need are not asked for: fidelity rewards read none.
        there = self.train_set.labelled
        reads = kind.reads_answers(reward, settings)
        if reads and not there:
            raise no_answers(config.name, self.train_set.name)
        if there and (reward is None or reads):
            self._check_lengths()
            return True
        return False

    def check_demonstrator(self, config: Any) -> None:
        """Refuse a demonstrator that reads what this LVLM does not have, before a stage that comes
        first is trained.

        Raises:
            UserError: the stage learns from one, and it does.
        """
        lvlm: Any = self.lvlm  # one of your own may have no extras to check
        if "demonstrator" in needs(class_of(config)) and hasattr(lvlm, "check_extras"):
            extras = frozenset(make_pruner(self.cfg.pruner).extras)
            lvlm.check_extras(extras, lvlm.known_extras | {"region"})

    def _check_lengths(self) -> None:
        """Once for all stages of a run: training and validation questions."""
        if not self._lengths_checked:
            self._lengths_checked = True
            check_lengths(self.lvlm, self.train_set, training=True)
            check_lengths(self.lvlm, self.val_set, training=True)

    @cached_property
    def cache(self) -> Cache | None:
        """Where other runs find what this one computes, if they have the same model and data."""
        if not self.cfg.get("cache"):
            return None
        # Keyed by all that decides what is stored: another model or dataset finds nothing.
        model, data = of_lvlm(self.lvlm, plain(self.cfg.model)), plain(self.cfg.dataset)
        return Cache(
            Path(self.cfg.cache),
            {"model": model, "data": of_dataset(self.train_set, data, "train")},
        )

    def _cache_of(self, config: Any) -> Cache | None:
        """The cache of a stage; what a demonstrator shows depends on that, too."""
        if self.cache is None or "demonstrator" not in needs(class_of(config)):
            return self.cache
        about = of_pruner(make_pruner(self.cfg.pruner), plain(self.cfg.pruner))
        return replace(self.cache, about={**self.cache.about, "demonstrator": about})
