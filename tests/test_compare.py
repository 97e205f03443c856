"""The comparison command reads trainer logs and draws them, or says what is missing."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from axolotl_psft.compare import (
    choose_metrics,
    compare,
    draw,
    draw_series,
    parse_groups,
    read_log,
    running_mean,
    table,
)


def write_state(folder: Path, history: list[dict[str, Any]], steps: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "trainer_state.json"
    file.write_text(json.dumps({"global_step": steps, "log_history": history}))
    return file


def write_run(
    run: Path, *, steps: int = 4, psft: bool = True, nll: float = 2.0
) -> Path:
    """A run of round numbers that evaluates at half its updates and at the last."""
    history: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        entry: dict[str, Any] = {"step": step, "epoch": 0.5, "loss": 1.0}
        entry["grad_norm"] = 1.0 / step
        if psft:
            entry |= {"psft/nll": nll / step, "psft/entropy": 1.0}
            entry |= {"psft/clip_frac": 0.1 * (step - 1), "psft/approx_kl": 0.01}
        history.append(entry)
    for step, loss in ((steps // 2, 2 * nll), (steps, nll)):
        entry = {"step": step, "eval_loss": loss, "eval_psft/entropy": 1.1}
        entry |= {"eval_runtime": 3.0, "eval_ppl": 9.0, "eval_old/accuracy": 0.75}
        history.append(entry)
    write_state(run / f"checkpoint-{steps}", history, steps)
    return run


def run_main(
    capsys: pytest.CaptureFixture[str], *arguments: Any
) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the command."""
    status: Any = 0
    try:
        compare([str(argument) for argument in arguments])
    except SystemExit as exit_:
        status = exit_.code
    return status, *capsys.readouterr()


# ---- Reading ----


def test_the_latest_checkpoint_is_read(tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=9)
    write_run(tmp_path / "run", steps=10)
    assert max(read_log(tmp_path / "run")["loss"]) == 10
    assert max(read_log(tmp_path / "run" / "checkpoint-9")["loss"]) == 9


def test_a_log_is_read_in_order_and_its_later_values_count(tmp_path: Path) -> None:
    # A run that logged every other update to 4, was resumed from 2 and logged all.
    points = [(0, 9.0), (2, 2.0), (4, 4.0), (3, 33.0), (4, 44.0)]
    history = [{"step": step, "psft/nll": value} for step, value in points]
    write_state(tmp_path, history, 4)
    series = read_log(tmp_path)["psft/nll"]
    assert list(series.items()) == [(0, 9.0), (2, 2.0), (3, 33.0), (4, 44.0)]


def test_what_is_no_number_is_left_out(tmp_path: Path) -> None:
    entry = {"step": 1, "epoch": 0.1, "a": "text", "b": None, "c": [1.0], "d": True}
    write_state(tmp_path, [entry | {"nan": math.nan, "count": 3}], 1)
    log = read_log(tmp_path)
    assert log.keys() == {"nan", "count"}
    assert repr(log["count"]) == "{1: 3.0}"


@pytest.mark.parametrize(
    "text",
    ["", '{"global_step": 2, "log_hist', "{}", "[]", "\xff", '{"log_history": [{}]}'],
)
def test_a_damaged_state_is_an_error_that_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    run = write_run(tmp_path / "run")
    file = write_state(run / "checkpoint-2", [], 2)
    file.write_text(text, encoding="latin-1")
    status, _, error = run_main(capsys, run, "--output", tmp_path / "x.png")
    assert status == 1 and str(file) in error and "damaged" in error


# ---- Groups ----


def test_groups_are_parsed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1e-5").mkdir()
    groups = parse_groups(["PSFT=o/a,o/b", "o/sft/", "PSFT=o/c", "lr=1e-5", "."])
    assert groups == {
        "PSFT": [Path("o/a"), Path("o/b"), Path("o/c")],
        "sft": [Path("o/sft")],
        "lr=1e-5": [Path("lr=1e-5")],
        tmp_path.name: [Path(".")],
    }


def test_equal_folder_names_are_told_apart_by_their_parents() -> None:
    assert list(parse_groups(["x/a/run", "x/b/run", "x/c"])) == ["a/run", "b/run", "c"]
    assert list(parse_groups(["x/run", "x/run/run"])) == ["run", "run/run"]


@pytest.mark.parametrize("text", ["a=", "=b", "a=,", ""])
def test_a_group_needs_a_name_and_a_directory(text: str) -> None:
    with pytest.raises(ValueError, match=f"'{text}'.*Use NAME=DIR,DIR"):
        parse_groups(["x", text])


@pytest.mark.parametrize("texts", [["a=x,x/"], ["a=x", "a=y/../x"], ["x", "x"]])
def test_a_run_counts_once_in_its_group(texts: list[str]) -> None:
    with pytest.raises(ValueError, match="directory twice"):
        parse_groups(texts)


# ---- Drawing ----


def test_the_running_mean_is_over_logged_points() -> None:
    series = {8: 1.0, 16: 3.0, 24: 8.0, 40: 4.0}
    assert running_mean(series, 1) == series
    assert running_mean(series, 3) == {8: 1.0, 16: 2.0, 24: 4.0, 40: 5.0}
    with pytest.raises(ValueError, match="--smooth must be >= 1, got 0"):
        running_mean(series, 0)


def test_a_group_is_drawn_as_mean_and_band_where_all_its_runs_logged() -> None:
    axis = Figure().add_subplot()
    runs = [{1: 1.0, 2: 2.0, 3: 0.0}, {1: 3.0, 2: 2.0}, {1: 8.0, 2: 5.0, 4: 0.0}]
    groups = {"none": [{}, {1: 1.0}], "PSFT": runs, "SFT": [{2: 7.0, 4: 8.0}]}
    draw_series(axis, groups)
    psft, sft = axis.lines
    assert psft.get_xydata().tolist() == [[1, 4], [2, 3]]
    assert sft.get_xydata().tolist() == [[2, 7], [4, 8]]
    (band,) = axis.collections
    corners = {(x, y) for x, y in band.get_paths()[0].vertices.tolist()}
    assert corners == {(1, 1), (1, 8), (2, 2), (2, 5)}
    # The colour is that of the group's place, though one before was not drawn.
    assert [psft.get_color(), sft.get_color()] == ["C1", "C2"]
    assert to_rgba("C1", 0.2) == tuple(band.get_facecolor()[0])
    labels = [line.get_label() for line in axis.lines]
    assert labels == ["PSFT (mean of 3 runs, band: min to max)", "SFT"]


def test_runs_are_smoothed_before_they_are_joined() -> None:
    axis = Figure().add_subplot()
    # One run logged update 2 alone: it is in that run's running mean all the same.
    runs = [{1: 0.0, 2: 8.0, 3: 2.0}, {1: 1.0, 3: 3.0}]
    draw_series(axis, {"a": runs}, smooth=2)
    assert axis.lines[0].get_xydata().tolist() == [[1, 0.5], [3, (5 + 2) / 2]]


def test_evaluations_and_single_points_are_visible() -> None:
    axis = Figure().add_subplot()
    draw_series(axis, {"a": [{1: 1.0}], "b": [{1: 1.0, 2: 2.0}]})
    draw_series(axis, {"a": [{1: 1.0, 2: 1.0}]}, dots=True)
    assert [line.get_marker() for line in axis.lines] == ["o", "None", "o"]
    assert [line.get_linestyle() for line in axis.lines] == ["-", "-", "--"]


def test_what_was_logged_has_a_panel(tmp_path: Path) -> None:
    psft = read_log(write_run(tmp_path / "psft"))
    unlike = read_log(write_run(tmp_path / "plain", psft=False))
    figure = draw({"psft": [psft], "plain": [unlike]}, tmp_path / "x.svg", smooth=2)
    assert [axis.get_title() for axis in figure.axes] == [
        "NLL (nats a token); dots: evaluation",
        "Entropy (nats a token); dots: evaluation",
        "Clipped tokens (fraction)",
        "KL estimate (old policy; SFT-KL: initial)",
        "Gradient norm",
        "eval_old/accuracy",
    ]
    nll, *_, grad_norm, accuracy = figure.axes
    # Training curves are smoothed, evaluations are not.
    train, plain, *evaluations = (x.get_xydata().tolist() for x in nll.lines)
    assert train == [[1, 2], [2, 1.5], [3, (1 + 2 / 3) / 2], [4, (2 / 3 + 0.5) / 2]]
    # A run without psft/nll: its loss is the NLL.
    assert plain == [[1, 1], [2, 1], [3, 1], [4, 1]]
    assert evaluations == [[[2, 4], [4, 2]]] * 2
    assert [line.get_linestyle() for line in nll.lines] == ["-", "-", "--", "--"]
    assert [line.get_color() for line in nll.lines] == ["C0", "C1", "C0", "C1"]
    assert len(grad_norm.lines) == len(accuracy.lines) == 2
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["psft", "plain"]
    assert "running mean of 2" in legend.get_title().get_text()


def test_plain_runs_are_compared_by_what_they_logged(tmp_path: Path) -> None:
    log = read_log(write_run(tmp_path, psft=False))
    log.pop("eval_psft/entropy")
    metrics = ["psft/nll", "grad_norm", "eval_old/accuracy"]
    assert choose_metrics({"plain": [log]}) == metrics
    assert choose_metrics({"plain": [log]}, metrics) == metrics


@pytest.mark.parametrize(
    ("num_panels", "grid"), [(1, (1, 1)), (3, (1, 3)), (4, (2, 2)), (7, (3, 3))]
)
def test_at_most_three_panels_are_in_a_row(
    tmp_path: Path, num_panels: int, grid: tuple[int, int]
) -> None:
    log = {f"eval_{i}": {1: 1.0} for i in range(num_panels)}
    figure = draw({"a": [log]}, tmp_path / "x.png")
    assert len(figure.axes) == num_panels
    assert figure.axes[0].get_subplotspec().get_gridspec().get_geometry() == grid


@pytest.mark.parametrize("surrogate", [{}, {"psft/surrogate": -1.0}])
def test_the_nll_is_what_a_run_says_it_is(
    tmp_path: Path, surrogate: dict[str, float]
) -> None:
    # Before psft/surrogate the loss was the objective's value, and is the NLL with it.
    loss = 2.0 if surrogate else -1.0
    entry = {"step": 1, "loss": loss, "psft/nll": 2.0, **surrogate}
    write_state(tmp_path / "psft", [entry], 1)
    write_state(tmp_path / "plain", [{"step": 1, "loss": 2.5}], 1)
    logs = [read_log(tmp_path / run) for run in ("psft", "plain")]
    assert [log["psft/nll"] for log in logs] == [{1: 2.0}, {1: 2.5}]
    assert logs[0]["loss"] == {1: loss}
    lines = table({"psft": logs[:1], "plain": logs[1:]}).splitlines()
    assert [line.split()[-1] for line in lines] == ["NLL", "2.0000", "2.5000"]


def test_panels_are_chosen_by_name(tmp_path: Path) -> None:
    groups = {"a": [read_log(write_run(tmp_path))]}
    names = ["grad_norm", "entropy", "psft/nll", "eval_loss", "psft/entropy"]
    chosen = ["grad_norm", "psft/entropy", "psft/nll", "eval_loss"]
    assert choose_metrics(groups, names) == chosen
    figure = draw(groups, tmp_path / "x.pdf", names)
    assert len(figure.axes) == 4
    with pytest.raises(ValueError, match=r"logged acc\. .* have: .*eval_old/accuracy,"):
        choose_metrics(groups, ["nll", "acc"])


# ---- The table ----


def test_the_table_is_computed() -> None:
    def log(scale: float, **more: dict[int, float]) -> dict[str, dict[int, float]]:
        nll = {1: 9.0, 2: 2.0 * scale, 3: 1.0 * scale}
        clipped = {1: 0.0, 2: 0.1 * scale, 3: 0.2 * scale}
        return {"psft/nll": nll, "psft/clip_frac": clipped, **more}

    evals = {"eval_loss": {1: math.nan, 2: 0.5, 3: 0.75}}
    late = {"eval_loss": {2: 1.5, 3: 0.75, 6: 0.75}}
    groups = {
        "three": [log(1, **evals), log(2, **late), log(3, **evals)],
        "one": [log(1, **evals)],
        "partly": [log(1, **evals), log(2)],
    }
    head, *lines = [line.split("  ") for line in table(groups).splitlines()]
    head, *lines = [[cell.strip() for cell in line if cell] for line in (head, *lines)]
    assert head == [
        *("group", "runs", "updates", "final NLL"),
        *("mean clip_frac", "best eval_loss", "at update"),
    ]
    # Sample deviations of (1, 2, 3), (.1, .2, .3) and (.5, .75, .5).
    spread = ["2.0000 ± 1.0000", "0.2000 ± 0.1000", "0.5833 ± 0.1443"]
    assert lines[0] == ["three", "3", "3 to 6", *spread, "2 to 3"]
    assert lines[1] == ["one", "1", "3", "1.0000", "0.1000", "0.5000", "2"]
    assert lines[2][3:] == ["1.5000 ± 0.7071", "0.1500 ± 0.0707", "-", "-"]
    smoothed = table({"one": groups["one"]}, smooth=2)
    assert "final NLL (mean of 2)" in smoothed and "1.5000" in smoothed


def test_a_diverged_run_shows_in_the_table() -> None:
    logs = [{"psft/nll": {1: 1.0}}, {"psft/nll": {1: math.nan}}]
    assert "nan ± nan" in table({"a": logs})


# ---- The command ----


@pytest.mark.parametrize(
    ("name", "magic"), [("a.png", b"\x89PNG"), ("b.svg", b"<?xml"), ("c.PDF", b"%PDF")]
)
def test_the_command_draws_and_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, magic: bytes
) -> None:
    a, b, c = (write_run(tmp_path / run) for run in ("a", "bb", "c"))
    output = tmp_path / "new" / name
    status, out, error = run_main(capsys, f"X={a},{c}", b, "--output", output)
    assert status == 0 and error == ""
    assert output.read_bytes().startswith(magic)
    assert str(output) in out
    assert [line.split()[0] for line in out.splitlines()[1:3]] == ["X", "bb"]


def test_options_reach_the_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, output = write_run(tmp_path / "a"), tmp_path / "a.svg"
    _, out, _ = run_main(capsys, run, "--output", output)
    figure = output.read_text()  # a label's text is a comment beside its glyphs
    assert "Gradient norm" in figure and "running mean" not in figure
    assert "mean of" not in out
    options = ("--smooth", 3, "--metrics", "nll, entropy")
    _, out, _ = run_main(capsys, run, "--output", output, *options)
    figure = output.read_text()
    assert "Gradient norm" not in figure and "Entropy" in figure
    assert "running mean of 3 logged points" in figure
    assert "final NLL (mean of 3)" in out


def test_what_is_not_drawn_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    psft, plain = write_run(tmp_path / "psft"), write_run(tmp_path / "p", psft=False)
    metrics = ("--metrics", "clip_frac,nll,grad_norm", "--output", tmp_path / "x.png")
    _, _, error = run_main(capsys, psft, plain, *metrics)
    assert error == "p: not drawn: psft/clip_frac (not logged).\n"
    _, _, error = run_main(capsys, psft, f"both={psft},{plain}", *metrics)
    assert "both: not drawn: psft/clip_frac (no update that all" in error


def remove_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.patches"):
        monkeypatch.setitem(sys.modules, name, None)


def test_without_matplotlib_there_is_a_table_and_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    remove_matplotlib(monkeypatch)
    status, out, error = run_main(capsys, write_run(tmp_path / "a"))
    assert status == 1 and "pip install matplotlib" in error
    assert out.startswith("group")


def only_time(run: Path) -> None:
    write_state(run, [{"step": 1, "train_runtime": 2.0}], 1)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (Path.mkdir, [], "run: no trainer_state.json there"),
        (only_time, [], "run: nothing to draw. Name --metrics."),
        (
            only_time,
            ["--metrics", "nll"],
            "no run logged nll. The logs have: train_",
        ),
        (write_run, ["--smooth", "0"], "--smooth must be >= 1, got 0"),
        (write_run, ["--output", "x.jpg"], "x.jpg ends in none of .png, .svg, .pdf"),
        (write_run, ["--output", "x"], "x ends in none of .png, .svg, .pdf"),
        (write_run, ["--output", "run/checkpoint-4/trainer_state.json/x.png"], "json"),
    ],
)
def test_a_mistake_is_a_message_and_exit_status_1(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path], object],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    make(Path("run"))
    status, _, error = run_main(capsys, "run", *options)
    assert status == 1 and message in error
    assert not list(tmp_path.glob("*.*"))
