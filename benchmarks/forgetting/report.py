"""Tables and figures from the results, and their places in docs/evidence.md.

    python -m benchmarks.forgetting.report docs/evidence/results.json

draws them again. Nothing is measured here, and no number in the document is written by
another hand: a test renders the tables from results.json and compares.
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from axolotl_psft.compare import Log, draw
from benchmarks.forgetting import plan
from benchmarks.forgetting.plan import Scale
from benchmarks.forgetting.runs import Run
from benchmarks.forgetting.tasks import FAMILIES

Result = Mapping[str, Any]
# One value a seed.
Cell = Callable[[Sequence[Result]], Sequence[float]]

THRESHOLDS = (0.5, 0.6, 0.7, 0.8)
# Titles of panels.
_TITLES = {
    "in_domain": "target: right sampled answers",
    "earlier": "earlier skills: right answers",
    "entropy": "entropy, target (nats a token)",
    "nll": "NLL, target (nats a token)",
    "earlier_kl": "KL from the start, earlier skills",
    "reward": "reward (mean of 10 updates)",
    **{
        f"{source}/{key}": f"{title}: {what}"
        for source, title in (
            ("gsm8k", "GSM8K"),
            ("hh-rlhf", "dialogues"),
            ("math500", "mathematics"),
        )
        for key, what in (("nll", "NLL"), ("entropy", "entropy"))
    },
}
_DIGITS = 5


def compact(report: Mapping[str, Any], scale: Scale) -> dict[str, Any]:
    """What the document is rendered from: measured points and logs, rounded."""

    def rounded(value: Any) -> Any:
        if isinstance(value, float):
            return round(value, _DIGITS)
        if isinstance(value, dict):
            return {key: rounded(x) for key, x in value.items()}
        return [rounded(x) for x in value] if isinstance(value, list) else value

    results = {
        name: {key: rounded(result[key]) for key in ("points", "log")}
        for name, result in sorted(report["results"].items())
        if "points" in result  # not a base's training
    }
    minutes = sum(r["cpu_seconds"] for r in report["results"].values()) / 60
    return {
        "scale": asdict(scale),
        "lr": report["lr"],
        "text_lr": report["text_lr"],
        "cpu_minutes": round(minutes),
        "results": results,
    }


class Report:
    """Renders one ``results.json``."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        fields = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in data["scale"].items()
        }
        self.scale = Scale(**fields)
        self.lr, self.text_lr = data["lr"], data["text_lr"]
        self.results = data["results"]
        self.cpu_minutes = data["cpu_minutes"]

    # ---- Rows ----

    def methods(self) -> dict[str, list[Result]]:
        """The main comparison: a label and its runs, one a seed."""
        rows: dict[str, Run] = {}
        for rate in sorted({*self.lr.values()}):
            psft = Run("psft", rate, 0, self.scale.steps, self.scale.every)
            at = _variants(psft)
            if rate != self.lr["sft"]:
                del at["SFT-KL"]
            rows |= {f"{label}, lr {rate:g}": run for label, run in at.items()}
        return {
            label + self._tuned(run): self._seeds(run) for label, run in rows.items()
        }

    def _tuned(self, run: Run) -> str:
        # At the learning rate that was tuned for it, or for what it is a variant of.
        tuned = self.lr["psft" if run.method.startswith("psft") else "sft"]
        return " *" if run.lr == tuned else ""

    def at(self, rate: float) -> dict[str, list[Result]]:
        """The rows of :meth:`methods` at one learning rate."""
        part = f", lr {rate:g}"
        return {k: v for k, v in self.methods().items() if part in k}

    def lr_grid(self, *, text: bool = False) -> dict[str, list[Result]]:
        """SFT and PSFT at every learning rate; ``text``: on real text."""
        first = plan.grid(self.scale, text=text)[0]
        return {
            f"{method.upper()} {lr:g}": self._seeds(
                replace(first, method=method, lr=lr), "text-" if text else ""
            )
            for lr in (self.scale.text_lrs if text else self.scale.lrs)
            for method in plan.TUNED
        }

    def ablations(self) -> dict[str, list[Result]]:
        """PSFT with other clips and other windows."""
        rate = min(self.lr.values())
        psft = Run("psft", rate, 0, self.scale.steps, self.scale.every)
        epsilons = sorted({*self.scale.epsilons, psft.epsilon_high})
        refreshes = sorted({*self.scale.refreshes, psft.refresh_steps})
        rows = {f"epsilon {e:g}": replace(psft, epsilon_high=e) for e in epsilons}
        rows |= {f"refresh {n}": replace(psft, refresh_steps=n) for n in refreshes}
        return {label: self._seeds(run) for label, run in rows.items()}

    def text_methods(self) -> dict[str, list[Result]]:
        """The second experiment's comparison."""
        first = plan.grid(self.scale, text=True)[0]
        psft = replace(first, method="psft", lr=self.text_lr["psft"])
        rows = _variants(psft)
        for method in ("SFT", "SFT-KL"):
            rows[method] = replace(rows[method], lr=self.text_lr["sft"])
        if self.text_lr["sft"] != psft.lr:
            rows["SFT at PSFT's lr"] = replace(psft, method="sft")
        return {label: self._seeds(run, "text-") for label, run in rows.items()}

    def rl(self) -> dict[str, list[Result]]:
        """The GRPO stages, by what they started from."""
        rows: dict[str, list[Result]] = {}
        for stage in plan.stages(self.scale, self.lr):
            method, _, rest = stage.start.partition("-lr")
            label = f"after {method.upper()}, lr {rest.partition('-seed')[0]}"
            rows.setdefault(label, []).append(self.results[stage.name])
        return rows

    def _seeds(self, run: Run, prefix: str = "") -> list[Result]:
        names = [prefix + replace(run, seed=seed).name for seed in self.scale.seeds]
        return [self.results[name] for name in names]

    # ---- Tables ----

    def tables(self) -> dict[str, str]:
        """Markdown by the name of its place in the document."""
        methods = self.methods()
        tables = {
            "base": _table({"before": next(iter(methods.values()))}, _BASE, "base"),
            "final": _table(methods, {**_CLIP, **_main(_last)}, "method"),
            "best": _table(methods, {**_BEST_STEP, **_main(_best)}, "method"),
            "families": _table(methods, _FAMILIES, "method"),
            "matched": _table(methods, _MATCHED, "method"),
            "lr": _table(self.lr_grid(), _GRID, "method, lr"),
            "rl": _table(self.rl(), _RL, "GRPO"),
            "settings": self._settings(),
        }
        if self.scale.epsilons:
            tables["ablations"] = _table(self.ablations(), _GRID, "PSFT with")
        if self.text_lr is not None:
            texts = self.text_methods()
            tables["text"] = _table(texts, _text(_last), "method")
            tables["text-best"] = _table(texts, _text(_text_best), "method")
            tables["text-lr"] = _table(
                self.lr_grid(text=True), _TEXT_GRID, "method, lr"
            )
        return tables

    def _settings(self) -> str:
        rows = {
            "tuned learning rate, SFT": f"{self.lr['sft']:g}",
            "tuned learning rate, PSFT": f"{self.lr['psft']:g}",
            "seeds": str(len(self.scale.seeds)),
            "updates a run": str(self.scale.steps),
            "GRPO updates": str(self.scale.grpo_steps),
            "CPU minutes of all runs": str(self.cpu_minutes),
        }
        if self.text_lr is not None:
            rows["real text: tuned learning rate, SFT"] = f"{self.text_lr['sft']:g}"
            rows["real text: tuned learning rate, PSFT"] = f"{self.text_lr['psft']:g}"
            rows["real text: updates a run"] = str(self.scale.text_steps)
        return _markdown([["setting", "value"], *map(list, rows.items())])

    # ---- Figures ----

    def figures(self, folder: Path) -> None:
        """One PNG each, below ``folder``."""

        def panels(name: str, rows: Mapping[str, Sequence[Result]], keys: str) -> None:
            metrics = [_TITLES.get(key, key) for key in keys.split()]
            draw(_logs(rows), folder / name, metrics)

        keys = "in_domain earlier entropy nll earlier_kl psft/clip_frac"
        panels("same-learning-rate.png", self.at(self.lr["sft"]), keys)
        tuned = {k: v for k, v in self.methods().items() if k.endswith("*")}
        panels("tuned.png", tuned, keys)
        draw_frontier(self.lr_grid(), folder / "learning-rates.png")
        panels("rl.png", self.rl(), "reward in_domain earlier")
        if self.scale.epsilons:
            keys = "in_domain earlier psft/clip_frac"
            panels("ablations.png", self.ablations(), keys)
        if self.text_lr is not None:
            sources = ("gsm8k", "hh-rlhf", "math500")
            keys = " ".join(f"{s}/{k}" for k in ("nll", "entropy") for s in sources)
            panels("text.png", self.text_methods(), keys)


def _variants(psft: Run) -> dict[str, Run]:
    return {
        "SFT": replace(psft, method="sft"),
        "SFT-KL": replace(psft, method="sft_kl"),
        "PSFT": psft,
        "PSFT with warm-up": replace(psft, method="psft_warmup"),
        "PSFT without clip": replace(psft, method="psft_noclip"),
    }


def _logs(rows: Mapping[str, Sequence[Result]]) -> dict[str, list[Log]]:
    """Results as compare.py's logs: measured points and what the trainer logged."""

    def log(result: Result) -> Log:
        series: Log = {}
        for point in result["points"]:
            for key, value in point.items():
                name = _TITLES.get(key, key)
                series.setdefault(name, {})[int(point["step"])] = value
        logged = result["log"]
        steps = logged["step"]
        for key, values in logged.items():
            if key == "reward":
                # A reward is a mean over 128 answers: too jagged to read one by one.
                values = [
                    mean(values[max(0, i - 9) : i + 1]) for i in range(len(steps))
                ]
            if key != "step":
                series[_TITLES.get(key, key)] = dict(zip(steps, values, strict=True))
        return series

    return {label: [log(result) for result in runs] for label, runs in rows.items()}


def draw_frontier(rows: Mapping[str, Sequence[Result]], output: Path) -> None:
    """Earlier skills against the target domain, a line a learning rate over updates.

    A point is the mean over seeds at one measurement; a line starts at the base.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axis = figure.add_subplot()
    colours: dict[str, str] = {}
    for label, runs in rows.items():
        method, lr = label.split()
        colour = colours.setdefault(lr, f"C{len(colours)}")
        points = list(zip(*(run["points"] for run in runs), strict=True))
        x = [mean(p["in_domain"] for p in seeds) for seeds in points]
        y = [mean(p["earlier"] for p in seeds) for seeds in points]
        style = "o-" if method == "PSFT" else "s--"
        axis.plot(x, y, style, color=colour, ms=3, lw=1.2, label=f"{method}, lr {lr}")
    axis.set_xlabel("target domain, share of sampled answers that are right")
    axis.set_ylabel("earlier skills, mean accuracy")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(output, dpi=120)


# ---- Cells ----


def _last(result: Result) -> Mapping[str, float]:
    return result["points"][-1]


def _best(result: Result) -> Mapping[str, float]:
    """The best measured point in the target domain, on validation prompts."""
    return max(result["points"][1:], key=lambda point: point["validation"])


def _text_best(result: Result) -> Mapping[str, float]:
    return min(result["points"][1:], key=lambda point: point["validation/nll"])


def _of(key: str, pick: Callable[[Result], Mapping[str, float]]) -> Cell:
    return lambda results: [pick(result)[key] for result in results]


def _clip(results: Sequence[Result]) -> list[float]:
    return [mean(result["log"]["psft/clip_frac"]) for result in results]


def _first_reaching(threshold: float) -> Cell:
    def cell(results: Sequence[Result]) -> list[float]:
        found = []
        for result in results:
            points = result["points"][1:]
            good = [p for p in points if p["validation"] >= threshold]
            found += [good[0]["earlier"]] if good else []
        return found

    return cell


def _reward(part: slice) -> Cell:
    return lambda results: [mean(result["log"]["reward"][part]) for result in results]


def _start(result: Result) -> Mapping[str, float]:
    return result["points"][0]


def _columns(
    names: Mapping[str, str], pick: Callable[[Result], Mapping[str, float]]
) -> dict[str, Cell]:
    return {title: _of(key, pick) for title, key in names.items()}


def _main(pick: Callable[[Result], Mapping[str, float]]) -> dict[str, Cell]:
    names = {
        "target": "in_domain",
        "target, greedy": "in_domain_greedy",
        "earlier": "earlier",
        "entropy": "entropy",
        "NLL": "nll",
        "KL": "kl",
        "KL, earlier": "earlier_kl",
    }
    return _columns(names, pick)


def _text(pick: Callable[[Result], Mapping[str, float]]) -> dict[str, Cell]:
    return {
        **_columns({"update": "step"}, pick),
        **_columns(
            {
                f"{title} {what}": f"{source}/{what.lower()}"
                for source, title in (
                    ("gsm8k", "GSM8K"),
                    ("hh-rlhf", "HH"),
                    ("math500", "MATH"),
                )
                for what in ("NLL", "entropy")
            },
            pick,
        ),
    }


_CLIP: dict[str, Cell] = {"clip_frac": _clip}
_BEST_STEP: dict[str, Cell] = {"update": _of("step", _best)}
_BASE = _columns(
    {
        "target": "in_domain",
        "target, greedy": "in_domain_greedy",
        "earlier": "earlier",
        **{family: f"earlier/{family}" for family in FAMILIES},
    },
    _start,
)
_FAMILIES = _columns({f: f"earlier/{f}" for f in FAMILIES}, _last)
_MATCHED = {f"at target {x:.0%}": _first_reaching(x) for x in THRESHOLDS}
_GRID = {
    "clip_frac": _clip,
    "last: target": _of("in_domain", _last),
    "last: earlier": _of("earlier", _last),
    "last: entropy": _of("entropy", _last),
    "best: target": _of("in_domain", _best),
    "best: earlier": _of("earlier", _best),
    "best: update": _of("step", _best),
}
_RL = {
    "reward, first 10": _reward(slice(10)),
    "reward, last 10": _reward(slice(-10, None)),
    **_columns({"target before": "in_domain", "earlier before": "earlier"}, _start),
    **_columns({"target after": "in_domain", "earlier after": "earlier"}, _last),
    **_columns({"entropy before": "entropy"}, _start),
    **_columns({"entropy after": "entropy"}, _last),
}
_TEXT_GRID = {
    "clip_frac": _clip,
    "validation NLL, best": _of("validation/nll", _text_best),
    "best: update": _of("step", _text_best),
    "best: GSM8K NLL": _of("gsm8k/nll", _text_best),
    "best: HH NLL": _of("hh-rlhf/nll", _text_best),
    "last: HH NLL": _of("hh-rlhf/nll", _last),
    "last: GSM8K entropy": _of("gsm8k/entropy", _last),
}


# ---- Markdown ----


def _table(
    rows: Mapping[str, Sequence[Result]], columns: Mapping[str, Cell], first: str
) -> str:
    lines = [[first, "n", *columns]]
    for label, results in rows.items():
        cells = [_spread(cell(results), len(results)) for cell in columns.values()]
        lines.append([label, str(len(results)), *cells])
    return _markdown(lines)


def _spread(values: Sequence[float], num_runs: int) -> str:
    """Mean ± sample standard deviation; how many runs, where not all have a value."""
    if not values:
        return "never"
    text = f"{mean(values):.3f}"
    if all(value == int(value) and value > 1 for value in values):
        text = f"{mean(values):.0f}"
    if len(values) > 1:
        digits = 0 if "." not in text else 3
        text += f" ± {stdev(values):.{digits}f}"
    return text if len(values) == num_runs else f"{text} ({len(values)} of {num_runs})"


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|" + "---|" * len(lines[0]), *body])


def fill(document: str, tables: Mapping[str, str]) -> str:
    """The document with each ``<!-- table: NAME -->`` block replaced by its table.

    Raises:
        ValueError: for a block that no table belongs to.
    """

    def block(match: re.Match[str]) -> str:
        name = match[1]
        if name not in tables:
            raise ValueError(f"docs/evidence.md: there is no table named {name!r}.")
        return f"<!-- table: {name} -->\n{tables[name]}\n<!-- end -->"

    pattern = r"<!-- table: (\S+) -->\n.*?<!-- end -->"
    return re.sub(pattern, block, document, flags=re.DOTALL)


def write(target: Path, scale: Scale, report: Mapping[str, Any]) -> None:
    """``evidence/results.json``, the figures, and the tables in ``evidence.md``."""
    data = compact(report, scale)
    folder = target / "evidence"
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data, separators=(",", ":")).replace('},"', '},\n"')
    (folder / "results.json").write_text(text + "\n")
    render(folder / "results.json")


def render(results: Path) -> None:
    """Figures beside ``results``, tables into the ``evidence.md`` above it."""
    rendered = Report(json.loads(results.read_text()))
    rendered.figures(results.parent)
    tables = rendered.tables()
    document = results.parents[1] / "evidence.md"
    if document.is_file() and "<!-- table:" in document.read_text():
        document.write_text(fill(document.read_text(), tables))
    else:
        parts = (f"## {name}\n\n{table}\n" for name, table in tables.items())
        document.write_text("\n".join(parts))
    for name, table in tables.items():
        print(f"\n{name}\n{table}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.forgetting.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path)
    render(parser.parse_args().results)


if __name__ == "__main__":
    main()
