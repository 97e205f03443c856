"""Compares runs: draws NLL, entropy and clip fraction of any output directories.

`python -m axolotl_psft.compare outputs/psft outputs/sft --output comparison.png`
Reads what the Trainer logged; trains and evaluates nothing.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PANELS = {
    "psft/nll": "NLL (nats a token)",
    "psft/entropy": "Entropy (nats a token)",
    "psft/clip_frac": "Clipped tokens (fraction)",
}


def read_log(run: Path) -> list[dict[str, Any]]:
    """The Trainer's log of a run, in order of steps.

    Args:
        run: an Axolotl ``output_dir``, or a checkpoint folder in one.

    Raises:
        FileNotFoundError: if neither holds a trainer_state.json.
        ValueError: if its log has no psft metrics.
    """
    states = [run / "trainer_state.json", *run.glob("checkpoint-*/trainer_state.json")]
    logs = [json.loads(state.read_text()) for state in states if state.is_file()]
    if not logs:
        raise FileNotFoundError(
            f"{run}: no trainer_state.json there or in a checkpoint folder. Give an "
            "output_dir of a run that saved one (save_strategy other than 'no')."
        )
    history = max(logs, key=lambda state: state["global_step"])["log_history"]
    if not any("psft/nll" in entry for entry in history):
        raise ValueError(
            f"{run}: the log has no psft metrics. Run the baseline with "
            "`psft: {objective: sft}`, which logs them all."
        )
    return history


def draw(runs: Sequence[Path], output: Path) -> None:
    """Write a PNG with one panel a metric and one line a run.

    Evaluation points are drawn as dots, where the run evaluated.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(5 * len(PANELS), 4))
    eval_keys = {"psft/nll": "eval_loss", "psft/entropy": "eval_psft/entropy"}
    for i, run in enumerate(runs):
        history, colour = read_log(run), f"C{i}"
        for axis, (metric, title) in zip(axes, PANELS.items(), strict=True):
            axis.set_title(title)
            axis.set_xlabel("optimizer step")
            axis.plot(*_points(history, metric), color=colour, label=run.name)
            key = eval_keys.get(metric)
            if key and any(key in entry for entry in history):
                steps, values = _points(history, key)
                axis.plot(steps, values, "o--", color=colour, label=f"{run.name} eval")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)
    pyplot.close(figure)


def _points(history: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    entries = [entry for entry in history if key in entry]
    return [e["step"] for e in entries], [e[key] for e in entries]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m axolotl_psft.compare", description=__doc__
    )
    parser.add_argument("runs", type=Path, nargs="+", help="output directories")
    parser.add_argument("--output", type=Path, default=Path("comparison.png"))
    options = parser.parse_args(arguments)
    try:
        draw(options.runs, options.output)
    except (FileNotFoundError, ValueError) as error:
        parser.exit(1, f"{error}\n")
    print(f"Wrote {options.output}")


if __name__ == "__main__":
    main()
