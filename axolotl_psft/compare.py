"""Compares runs: the paper's curves and a table from the logs of output directories.

Reads what the Trainer logged, of several seeds where there are any; trains and
evaluates nothing.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = dict[int, float]  # a metric of one run: {optimizer update: value}, in order
Log = dict[str, Series]  # all metrics of one run, by their names in the Trainer's log
Groups = Mapping[str, Sequence[Log]]  # the logs of each group's runs

PANELS = {
    "psft/nll": "NLL (nats a token)",
    "psft/entropy": "Entropy (nats a token)",
    "psft/clip_frac": "Clipped tokens (fraction)",
    "psft/approx_kl": "KL estimate (old policy; SFT-KL: initial)",
    "grad_norm": "Gradient norm",
}
EVAL_OF = {"psft/nll": "eval_loss", "psft/entropy": "eval_psft/entropy"}
# About the evaluation itself, or exp(eval_loss): a panel only where asked for.
_NO_PANEL = ("_runtime", "_per_second", "_time", "_ppl")
_SUFFIXES = (".png", ".svg", ".pdf")
_MAX_COLUMNS = 3


def read_log(run: Path) -> Log:
    """What a run logged; where it logged an update twice (resumed), the later value.

    Of a run without ``psft/nll``, one of plain Axolotl, ``loss`` is the NLL.

    Args:
        run: an Axolotl ``output_dir``, or a checkpoint folder in one. Of several
            checkpoints the one with most updates counts.

    Raises:
        FileNotFoundError: if neither holds a trainer_state.json.
        ValueError: if a trainer_state.json is damaged; names the file.
    """
    states = [run / "trainer_state.json", *run.glob("checkpoint-*/trainer_state.json")]
    logs = [_read_state(state) for state in states if state.is_file()]
    if not logs:
        raise FileNotFoundError(
            f"{run}: no trainer_state.json there or in a checkpoint folder. Give an "
            "output_dir of a run that saved one (save_strategy other than 'no')."
        )
    log = max(logs, key=lambda state: state[0])[1]
    if "loss" in log:
        log.setdefault("psft/nll", log["loss"])
    return log


def _read_state(path: Path) -> tuple[int, Log]:
    log: Log = {}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        for entry in sorted(state["log_history"], key=lambda entry: entry["step"]):
            for key in entry.keys() - {"step", "epoch"}:
                # A callback may log anything; a curve is made of numbers.
                if type(entry[key]) in (int, float):
                    log.setdefault(key, {})[entry["step"]] = float(entry[key])
        return state["global_step"], log
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: damaged ({type(error).__name__}: {error}). If the run is saving, "
            "try again; else delete the file or give another checkpoint folder."
        ) from error


def parse_groups(arguments: Sequence[str]) -> dict[str, list[Path]]:
    """The runs of each group, from ``NAME=DIR,DIR`` or ``DIR``.

    A bare DIR is named by its folder, and by its parents too as far as other bare ones
    of that name differ. A name given again adds to its group, as in the shell's
    ``PSFT=outputs/psft-{0,1}``.

    Raises:
        ValueError: if a name or directory is missing, or a directory given twice.
    """
    # '=' is also a character of folder names.
    bare = [t for t in arguments if t and ("=" not in t or Path(t).is_dir())]
    groups: dict[str, list[Path]] = {}
    for text in arguments:
        name, _, rest = text.partition("=")
        runs = [Path(part) for part in rest.split(",") if part]
        if text in bare:
            name, runs = _short_name(text, bare), [Path(text)]
        if not name or not runs:
            raise ValueError(f"{text!r}: name or directory missing. Use NAME=DIR,DIR.")
        groups[name] = groups.get(name, []) + runs
        if len({os.path.abspath(run) for run in groups[name]}) < len(groups[name]):
            raise ValueError(f"{text}: group {name!r} has a directory twice. Drop one.")
    return groups


def _short_name(run: str, runs: Sequence[str]) -> str:
    path, *others = (Path(os.path.abspath(text)) for text in (run, *runs))
    parents = {other.parent for other in others if other.name == path.name}
    return os.path.relpath(path, os.path.commonpath(parents))


def running_mean(series: Series, num_points: int) -> Series:
    """Each value as the mean of the last ``num_points`` logged (fewer at the start)."""
    if num_points < 1:
        raise ValueError(
            f"--smooth must be >= 1, got {num_points}. Use 1 for the log as it is."
        )
    values = list(series.values())
    return {
        step: fmean(values[max(0, end - num_points) : end])
        for end, step in enumerate(series, start=1)
    }


def draw_series(
    axis: "Axes",
    groups: Mapping[str, Sequence[Series]],
    *,
    smooth: int = 1,
    dots: bool = False,
) -> None:
    """Draw each group's mean and, for several runs, a band from minimum to maximum.

    Only at the updates that all its runs have: a group without any is left out. The
    legend is the caller's; the labels name the groups and the band.

    Args:
        axis: a matplotlib axis.
        groups: a series for each run of each group, {} for a run without. A group's
            colour is that of its place, so pass all groups to every axis.
        smooth: see :func:`running_mean`; taken in each run, before the mean over runs.
        dots: mark the points, for evaluations.
    """
    for i, (name, runs) in enumerate(groups.items()):
        if not (steps := _shared_steps(runs)):
            continue
        smoothed = [running_mean(series, smooth) for series in runs]
        points = [[series[step] for series in smoothed] for step in steps]
        style = "o--" if dots else "o-" if len(steps) == 1 else "-"
        means = [fmean(values) for values in points]
        axis.plot(
            steps, means, style, c=f"C{i}", ms=4, lw=1.2, label=_label(name, runs)
        )
        if len(runs) > 1:
            low, high = [min(p) for p in points], [max(p) for p in points]
            axis.fill_between(steps, low, high, color=f"C{i}", alpha=0.2, lw=0)


def _shared_steps(runs: Sequence[Series]) -> list[int]:
    return sorted(set.intersection(*map(set, runs))) if runs else []


def _label(name: str, runs: Sequence[object]) -> str:
    band = f" (mean of {len(runs)} runs, band: min to max)"
    return name + band if len(runs) > 1 else name


def choose_metrics(groups: Groups, names: Sequence[str] | None = None) -> list[str]:
    """The metrics that get a panel, by their names in the logs.

    Args:
        groups: the logs of each group's runs.
        names: any logged metrics, with or without ``psft/``. None: those of PANELS and
            the evaluation metrics, as far as at least one run logged them.

    Raises:
        ValueError: if a name was not logged (lists what was), or nothing was.
    """
    logged = {key for logs in groups.values() for log in logs for key in log}
    drawable = logged | {
        key for key, evaluated in EVAL_OF.items() if evaluated in logged
    }
    if names is None:
        names = [key for key in PANELS if key in drawable]
        names += sorted(
            key
            for key in logged - {*EVAL_OF.values()}
            if key.startswith("eval_") and not key.endswith(_NO_PANEL)
        )
    metrics = [name if name in drawable else f"psft/{name}" for name in names]
    unknown = [
        name for name, key in zip(names, metrics, strict=True) if key not in drawable
    ]
    if unknown:
        raise ValueError(
            f"--metrics: no run logged {', '.join(unknown)}. The logs have: "
            f"{', '.join(sorted(logged)) or 'nothing'}."
        )
    if not metrics:
        raise ValueError(f"{', '.join(groups)}: nothing to draw. Name --metrics.")
    return list(dict.fromkeys(metrics))


def draw(
    groups: Groups,
    output: Path,
    metrics: Sequence[str] | None = None,
    *,
    smooth: int = 1,
) -> "Figure":
    """Write and return a figure: a panel a metric, a colour a group.

    Args:
        groups: the logs of each group's runs.
        output: a .png, .svg or .pdf; its folder is made.
        metrics: see :func:`choose_metrics`.
        smooth: running mean of training curves over this many points.

    Raises:
        ModuleNotFoundError: without matplotlib.
        ValueError: for another suffix, an unknown metric, or nothing to draw.
    """
    if output.suffix.lower() not in _SUFFIXES:
        raise ValueError(
            f"--output: {output} ends in none of {', '.join(_SUFFIXES)}. Choose one."
        )
    # Not pyplot: a caller's own figures and backend stay as they are.
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    metrics = choose_metrics(groups, metrics)
    rows = math.ceil(len(metrics) / _MAX_COLUMNS)
    columns = math.ceil(len(metrics) / rows)
    figure = Figure(figsize=(4.6 * columns, 3.3 * rows + 0.6), layout="constrained")
    for i, metric in enumerate(metrics):
        first = figure.axes[0] if i else None
        axis = figure.add_subplot(rows, columns, i + 1, sharex=first)
        _draw_panel(axis, groups, metric, smooth)
    labels = [_label(name, logs) for name, logs in groups.items()]
    figure.legend(
        handles=[Patch(color=f"C{i}", label=label) for i, label in enumerate(labels)],
        title=f"lines: running mean of {smooth} logged points" if smooth > 1 else None,
        loc="outside lower center",
        ncols=columns,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)
    return figure


def _draw_panel(axis: "Axes", groups: Groups, metric: str, smooth: int) -> None:
    def draw_metric(key: str) -> None:
        series = {name: [log.get(key, {}) for log in groups[name]] for name in groups}
        dots = key.startswith("eval_")
        draw_series(axis, series, smooth=1 if dots else smooth, dots=dots)

    draw_metric(metric)
    title, num_lines = PANELS.get(metric, metric), len(axis.lines)
    if metric in EVAL_OF:
        draw_metric(EVAL_OF[metric])
    evaluated = len(axis.lines) > num_lines
    axis.set_title(f"{title}; dots: evaluation" if evaluated else title, fontsize=11)
    axis.set_xlabel("optimizer update")
    axis.locator_params(axis="x", integer=True, nbins=6)
    axis.grid(alpha=0.3)


def table(groups: Groups, *, smooth: int = 1) -> str:
    """A line a group, without the columns that no group has.

    Args:
        groups: the logs of each group's runs.
        smooth: the final values are means over this many logged points.
    """

    def final(series: Series) -> float:
        return [*running_mean(series, smooth).values()][-1]

    def best(series: Series) -> int:
        return min(
            series, key=lambda s: math.inf if math.isnan(series[s]) else series[s]
        )

    of = f" (mean of {smooth})" if smooth > 1 else ""
    picks: dict[str, tuple[str, Callable[[Series], float]]] = {
        f"final NLL{of}": ("psft/nll", final),
        f"final entropy{of}": ("psft/entropy", final),
        "mean clip_frac": ("psft/clip_frac", lambda series: fmean(series.values())),
        "best eval_loss": ("eval_loss", lambda series: series[best(series)]),
        "at update": ("eval_loss", best),
    }
    lines = [["group", "runs", "updates", *picks]]
    for name, logs in groups.items():
        updates = [max(map(max, log.values()), default=0) for log in logs]
        cells = [
            _spread([pick(log[key]) for log in logs if key in log], len(logs))
            for key, pick in picks.values()
        ]
        lines.append([name, str(len(logs)), _spread(updates, len(logs)), *cells])
    columns = [c for c in zip(*lines, strict=True) if {*c[1:]} != {"-"}]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        "  ".join(map(str.ljust, line, widths)).rstrip()
        for line in zip(*columns, strict=True)
    )


def _spread(values: Sequence[float], num_runs: int) -> str:
    """Updates as they are or their range, other values as mean and deviation."""
    if len(values) < num_runs:
        return "-"
    if all(isinstance(value, int) for value in values):
        return " to ".join(map(str, sorted({min(values), max(values)})))
    mean = fmean(values)
    if num_runs == 1:
        return f"{mean:.4f}"
    # statistics.stdev raises where a run diverged to NaN.
    variance = sum((value - mean) ** 2 for value in values) / (num_runs - 1)
    return f"{mean:.4f} ± {math.sqrt(variance):.4f}"


def _notes(groups: Groups, metrics: Sequence[str]) -> Iterator[str]:
    """What the figure's reader would not see."""
    logged = {key for logs in groups.values() for log in logs for key in log}
    keys = logged & {*metrics, *(EVAL_OF.get(metric) for metric in metrics)}
    for name, logs in groups.items():
        shared = {
            key: _shared_steps([log.get(key, {}) for log in logs]) for key in keys
        }
        if absent := sorted(key for key in keys if not shared[key]):
            why = (
                "no update that all its runs logged" if len(logs) > 1 else "not logged"
            )
            yield f"{name}: not drawn: {', '.join(absent)} ({why})."


@click.command()
@click.argument("runs", nargs=-1, required=True)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default="comparison.png",
    show_default=True,
    help="Figure to write: .png, .svg or .pdf.",
)
@click.option(
    "--metrics",
    metavar="A,B",
    help="Panels to draw: any logged metrics, such as entropy,grad_norm. Default: NLL, "
    "entropy, clip fraction, KL, gradient norm and all evaluation metrics.",
)
@click.option(
    "--smooth",
    type=int,
    default=1,
    metavar="N",
    help="Running mean of training curves, and of the table's final values, over N "
    "logged points. clip_frac is 0 in each window's first step: 8 evens that out at "
    "refresh_steps: 8.",
)
def compare(runs: Sequence[str], output: Path, metrics: str, smooth: int) -> None:
    """Draw the logs of training runs, and print a table of them.

    RUNS are output directories, or several under a name: NAME=DIR,DIR.

    \b
      axolotl psft-compare outputs/psft outputs/sft --smooth 8
      axolotl psft-compare PSFT=outputs/psft-0,outputs/psft-1 SFT=outputs/sft \\
          --metrics entropy,grad_norm,eval_loss --output entropy.pdf

    Several runs of a group are drawn as their mean with a band from their minimum to
    their maximum, at the updates that all of them logged. Dots are evaluations.

    The table: the last logged NLL and entropy, the mean of all logged clip fractions,
    the lowest eval_loss; of several runs the mean ± the sample standard deviation. '-':
    not every run of the group logged it.
    """
    try:
        paths = parse_groups(runs)
        groups = {name: [*map(read_log, group)] for name, group in paths.items()}
        names = metrics.replace(" ", "").split(",") if metrics else None
        chosen = choose_metrics(groups, names)
        click.echo(table(groups, smooth=smooth))
        for note in _notes(groups, chosen):
            click.echo(note, err=True)
        draw(groups, output, chosen, smooth=smooth)
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    except ModuleNotFoundError as error:
        remedy = "Get it with: pip install matplotlib"
        raise click.ClickException(f"{error}. {remedy}") from error
    click.echo(f"Wrote {output}")


if __name__ == "__main__":
    compare(prog_name="python -m axolotl_psft.compare")
