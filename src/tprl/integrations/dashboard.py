"""The project's workspace and report in W&B: our metrics over their axes (docs/metrics.md)."""

import argparse
from typing import Any, NamedTuple

from tprl.errors import UserError
from tprl.runtime.tracking import RATIO, SEEN, has_key


class Chart(NamedTuple):
    """A line plot of some metrics, or of all whose names match `regex`, over `axis`."""

    title: str
    metrics: tuple[str, ...] = ()
    axis: str = SEEN
    regex: str | None = None


CHARTS: dict[str, tuple[Chart, ...]] = {
    "Frontier": (
        Chart("accuracy", axis=RATIO, regex=r"^eval/[^/]+/(seed\d+/)?accuracy$"),
        Chart(
            "FLOPs relative to all tokens", axis=RATIO, regex=r"^eval/[^/]+/(seed\d+/)?flops_ratio$"
        ),
        Chart("tokens kept", axis=RATIO, regex=r"^eval/[^/]+/(seed\d+/)?kept_tokens$"),
    ),
    "PPO: what is learned": (
        Chart("accuracy: served on validation, sampled in training", ("ppo/served", "ppo/sampled")),
        Chart("log-probability of the answer", ("ppo/served/log_prob", "ppo/sampled_log_prob")),
        Chart("reward: the terms and their sum", regex="^reward/"),
        Chart("kept fraction", ("ppo/keep_ratio",)),
        Chart("FLOPs relative to all tokens", ("ppo/flops_ratio",)),
    ),
    "PPO: is it healthy?": (
        Chart("KL", ("ppo/kl",)),
        Chart("clip fraction", ("ppo/clip_fraction",)),
        Chart("entropy", ("ppo/entropy",)),
        Chart("losses", ("ppo/policy", "ppo/value", "ppo/total")),
        Chart("explained variance of the critic", ("ppo/explained_variance",)),
        Chart("epochs before the KL stop", ("ppo/update_epochs",)),
    ),
    "Speed": (
        Chart("prompts that the LVLM read, per second", ("ppo/evaluations_per_second",)),
        Chart("seconds of an iteration, by phase", regex="^time/"),
    ),
    "Before PPO": (
        Chart("autoencoder: relative error", ("autoencoder/mse", "autoencoder/val_mse")),
        Chart("imitation: loss", regex="^lfd/([^/]+/)?loss$"),
        Chart("imitation: accuracy served", regex="^lfd/([^/]+/)?served$"),
    ),
    "Instead of PPO: distillation": (
        Chart("accuracy: served on validation", ("distill/served",)),
        Chart("loss", ("distill/loss",)),
        Chart("gates: softness and temperature", ("distill/softness", "distill/temperature")),
    ),
    "How many tokens a question needs": (
        Chart("forecast: divergence", ("adapt/loss", "adapt/val_loss")),
    ),
}
PICTURES = ("ppo/overlays", "distill/overlays")


def workspace(entity: str, project: str) -> Any:
    """A saved view of the project: one section per group of charts, and the pictures of the kept
    tokens."""
    # A section per group of charts, in the order of the report.
    ws, wr = _library()
    sections = [
        ws.Section(name=name, panels=_plots(charts), is_open=True)
        for name, charts in CHARTS.items()
    ]
    media = wr.MediaBrowser(title="kept tokens", media_keys=list(PICTURES), num_columns=4)
    sections.append(ws.Section(name="Pictures", panels=[media], is_open=True))
    return ws.Workspace(entity=entity, project=project, name="TPRL", sections=sections)


def dashboard_report(entity: str, project: str) -> Any:
    """The same charts of all runs of the project, with a sentence on each group."""
    _, wr = _library()
    # A sentence per group; a new group of charts needs an entry here.
    about = {
        "Frontier": (
            "Every pruner over the kept fraction of the visual "
            "tokens; the table eval/results holds intervals."
        ),
        "PPO: what is learned": "What inference would score, beside the sampled episodes.",
        "PPO: is it healthy?": "Healthy ranges of every number are in docs/metrics.md.",
        "Speed": "Of PPO's iterations; validation is left out.",
        "Before PPO": "Stages count their own samples, from 0.",
        "Instead of PPO: distillation": "The stage distill: what reinforcement learning adds.",
        "How many tokens a question needs": "The stage adapt, on the policy that PPO left.",
    }
    blocks: list[Any] = [wr.TableOfContents()]
    for name, charts in CHARTS.items():
        # A run set without a project means the report's own.
        blocks += [
            wr.H1(name),
            wr.P(about[name]),
            wr.PanelGrid(runsets=[wr.Runset()], panels=_plots(charts)),
        ]
    title, description = "TPRL: learned visual-token pruning", "Made by `make dashboard`."
    return wr.Report(
        entity=entity, project=project, title=title, description=description, blocks=blocks
    )


def _plots(charts: tuple[Chart, ...]) -> list[Any]:
    """Three to a row of 24 columns."""
    _, wr = _library()
    return [
        wr.LinePlot(
            title=chart.title,
            x=chart.axis,
            y=list(chart.metrics),
            metric_regex=chart.regex,
            layout=wr.Layout(x=8 * (i % 3), y=6 * (i // 3), w=8, h=6),
        )
        for i, chart in enumerate(charts)
    ]


def create(project: str, entity: str | None = None) -> list[str]:
    """Make both in W&B; returns their addresses.

    Raises:
        UserError: no library, no key, or W&B did not take them.
    """
    _library()
    # Without a key wandb would ask on the terminal and wait.
    if not has_key():
        raise UserError(
            "make dashboard needs a W&B account: run `wandb login`, or set WANDB_API_KEY."
        )
    import wandb

    try:
        # W&B raises many kinds of errors: all become a single line with its words.
        owner = entity or str(wandb.Api().default_entity)
        pages = [
            dashboard_report(owner, project).save(),
            workspace(owner, project).save(),
        ]  # the report makes the project
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"W&B refused the dashboard of project {project} ({why}): check the project's name and "
            "your rights."
        ) from error
    return [page.url for page in pages]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Create the project's workspace and report in W&B."
    )
    parser.add_argument("--project", default="tprl")
    parser.add_argument("--entity", help="user or team; default: the account's own")
    options = parser.parse_args()
    try:
        print("\n".join(create(options.project, options.entity)))
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


def _library() -> tuple[Any, Any]:
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise UserError(
            "make dashboard needs wandb-workspaces: pip install 'tprl[dashboard]'."
        ) from error
    return ws, wr
