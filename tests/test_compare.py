"""The comparison command reads trainer logs and draws them, or says what is missing."""

import json
from pathlib import Path

import pytest

from axolotl_psft.compare import main, read_log

PNG = b"\x89PNG\r\n\x1a\n"


def write_run(folder: Path, steps: int, psft: bool = True) -> Path:
    history: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        entry: dict[str, float] = {"step": step, "loss": 1.0}
        if psft:
            entry |= {"psft/nll": 2.0, "psft/entropy": 1.0, "psft/clip_frac": 0.1}
        history.append(entry)
    history.append({"step": steps, "eval_loss": 2.5, "eval_psft/entropy": 1.1})
    checkpoint = folder / f"checkpoint-{steps}"
    checkpoint.mkdir(parents=True)
    state = {"global_step": steps, "log_history": history}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    return folder


def test_the_latest_checkpoint_is_read(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 9)
    write_run(tmp_path / "run", 10)
    assert max(entry["step"] for entry in read_log(tmp_path / "run")) == 10
    one = read_log(tmp_path / "run" / "checkpoint-9")
    assert max(entry["step"] for entry in one) == 9


def test_runs_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(write_run(tmp_path / name, 5)) for name in ("a", "b", "c")]
    output = tmp_path / "new" / "comparison.png"
    main([*runs, "--output", str(output)])
    assert output.read_bytes().startswith(PNG)
    assert str(output) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [("empty", "no trainer_state.json"), ("stock", "no psft metrics")],
)
def test_a_run_that_cannot_be_drawn_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "stock", 3, psft=False)
    with pytest.raises(SystemExit) as exit_info:
        main([str(tmp_path / name), "--output", str(tmp_path / "x.png")])
    assert exit_info.value.code == 1
    error = capsys.readouterr().err
    assert name in error and message in error
