"""The table of docs/baselines.md."""

from pathlib import Path

from tprl.bench import selectors
from tprl.build import choices

ROOT = Path(__file__).parents[2]
UNTIMED = {"keep_all", "mlp", "tprl", "tprl_adaptive", "keyword_budget", "scorer_mmr"}
UNTIMED |= {"core_focus"}


def test_it_lists_every_method_with_its_budget_and_its_test() -> None:
    lines = selectors.measure_selectors(batches=(1,), repeats=1)
    assert {line.name for line in lines} == set(choices("pruner")) - UNTIMED
    assert all(line.exact in ("yes", "at most", "mean over layers") for line in lines)
    for line in lines:
        assert (ROOT / line.evidence.strip("`")).is_file(), line.name
        assert isinstance(line.milliseconds, str) or all(
            low <= middle <= high for middle, low, high in line.milliseconds
        )


def test_the_docs_list_the_same_methods() -> None:
    text = (ROOT / "docs" / "baselines.md").read_text()
    assert all(f"| `{name}` |" in text for name in set(choices("pruner")) - UNTIMED)
