"""Faults of one process, each of them real: what the run says, and that it goes on.

Several ranks are in distributed/test_faults.py. `pytest --soak` has the long form.
"""

import contextlib
import hashlib
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from axolotl_psft import checkpoints, failures
from axolotl_psft.files import FileError
from axolotl_psft.resume import window_path
from tests.distributed.launch import Processes, run_alone
from tests.faults import (
    NUM_STEPS,
    PHASES,
    Logs,
    at_step,
    disturbed_config,
    fill,
    kill_at_random,
    mount,
    mounted,
    train,
    write_files,
)
from tests.tiny import PROMPT, load, run, write_model

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("files"))


class Undisturbed:
    """The runs that nothing happened to, each made once."""

    def __init__(self, files: Path, output: Path) -> None:
        self.files = files
        self.output = output
        self._logs: dict[bool, Logs] = {}

    def __getitem__(self, packed: bool) -> Logs:
        if packed not in self._logs:
            cfg = disturbed_config(self.files, self.folder(packed), packed)
            cfg["save_total_limit"] = 100
            self._logs[packed] = train(cfg)
            assert [entry["step"] for entry in self._logs[packed]] == [
                *range(1, NUM_STEPS + 1)
            ]
            assert max(entry["psft/clip_frac"] for entry in self._logs[packed]) > 0.05
        return self._logs[packed]

    def folder(self, packed: bool) -> Path:
        return self.output / ("packed" if packed else "unpacked")

    def copy(self, packed: bool, step: int, folder: Path) -> Path:
        """Its checkpoint of that step, to be spoilt."""
        assert self[packed]
        source = self.folder(packed) / "run" / f"checkpoint-{step}"
        return Path(shutil.copytree(source, folder / source.name))


@pytest.fixture(scope="module")
def undisturbed(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(files, tmp_path_factory.mktemp("undisturbed"))


def error_of(cfg: dict[str, Any], kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        run(cfg)
    return str(caught.value)


# ---- kill -9 ----


def seeds(short: int, long: int) -> list[Any]:
    """Numbers below ``long``; from ``short`` on for the soak only."""
    return [
        pytest.param(i, marks=[pytest.mark.soak] if i >= short else [])
        for i in range(long)
    ]


@pytest.mark.parametrize("seed", seeds(3, 20))
def test_killed_anywhere_and_resumed(
    seed: int, files: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    packed = seed % 2 == 1
    cfg = disturbed_config(files, tmp_path, packed)
    # The run that resumes may be killed, too.
    for phase in [list(PHASES)[seed % 3], rng.choice(list(PHASES))][: 1 + seed % 2]:
        kill_at_random(rng, phase, tmp_path / "phases", cfg)
    assert run_alone(train, cfg) == undisturbed[packed]
    assert not list(tmp_path.rglob("*.partial"))


def test_killed_while_old_checkpoints_are_deleted(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    folder = undisturbed.copy(True, 6, tmp_path)
    (folder / "optimizer.pt").unlink()
    cfg = disturbed_config(undisturbed.files, tmp_path, True)
    cfg["resume_from_checkpoint"] = str(folder)
    message = error_of(cfg, ValueError)
    assert "checkpoint-6 lacks optimizer.pt: a part of it was deleted" in message


@pytest.mark.parametrize("name", ["trainer_state.json", "psft_files.json"])
def test_auto_resume_takes_the_newest_complete_checkpoint(
    name: str, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    cfg = disturbed_config(undisturbed.files, tmp_path, True)
    for step in (5, 6, 7):
        undisturbed.copy(True, step, tmp_path / "run")
    # Killed while it wrote this file, and, later, before it did.
    file = tmp_path / "run" / "checkpoint-6" / name
    file.write_text(file.read_text()[:-9])
    (tmp_path / "run" / "checkpoint-7" / "trainer_state.json").unlink()
    phases = tmp_path / "phases"
    assert run_alone(train, cfg, phases) == undisturbed[True]
    # One after each step that was left.
    assert phases.read_text().split().count("saving") == NUM_STEPS - 5


def test_without_a_complete_checkpoint_a_run_begins_anew(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    folder = undisturbed.copy(True, 6, tmp_path / "run")
    (folder / "trainer_state.json").write_text("")
    (folder / "rng_state_3.pth").write_text("of a larger run before")
    cfg = disturbed_config(undisturbed.files, tmp_path, True, save_total_limit=100)
    assert train(cfg) == undisturbed[True]
    # Written over, and nothing of the earlier run is left in it.
    assert checkpoints.flaw(folder) is None
    assert not (folder / "rng_state_3.pth").exists()


def test_a_checkpoint_is_not_complete_while_it_is_written_over(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    for step in (1, 2):
        undisturbed.copy(True, step, tmp_path / "run")
    cfg = disturbed_config(undisturbed.files, tmp_path, True, max_steps=2)
    cfg["auto_resume_from_checkpoints"] = False
    flaws = run_alone(flaws_while_saving, cfg)
    assert len(flaws) == 2 * 3
    for flaw in flaws:
        assert flaw and "has no trainer_state.json" in flaw


def flaws_while_saving(cfg: dict[str, Any]) -> list[str | None]:
    """What each checkpoint lacks before each part of it is written."""
    from transformers import Trainer

    flaws = []

    def watched(name: str) -> None:
        original = getattr(Trainer, name)

        def method(self: Any, folder: Any, *args: Any, **kwargs: Any) -> Any:
            if "checkpoint" in str(folder):
                flaws.append(checkpoints.flaw(Path(folder)))
            return original(self, folder, *args, **kwargs)

        setattr(Trainer, name, method)

    for name in ("save_model", "_save_optimizer_and_scheduler", "_save_rng_state"):
        watched(name)
    run(cfg)
    return flaws


# ---- Disks ----


def disk_full(trainer: Any, share: float) -> None:
    """Leave room for a share of a checkpoint: it ends in another file each time."""
    output = Path(trainer.args.output_dir)
    sizes = [path.stat().st_size for path in output.glob("checkpoint-4/*")]
    fill(output, leave=int(sum(sizes) * share))


def files_limited(trainer: Any, share: float) -> None:
    """The same without a disk of its own: no file may grow beyond some bytes."""
    sizes = Path(trainer.args.output_dir).glob("checkpoint-4/*")
    limit = int(max(path.stat().st_size for path in sizes) * share)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def train_on_a_full_disk(cfg: dict[str, Any], disturb: Any, share: float) -> str:
    at_step(7, "_save_checkpoint", lambda trainer: disturb(trainer, share))
    try:
        run(cfg)
    except checkpoints.CheckpointError as error:
        return str(error)
    finally:
        limits = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return "no error"


@pytest.mark.parametrize(
    "disturb, share",
    [
        (disk_full, 0.5),
        (files_limited, 0.0),
        *(
            pytest.param(disturb, share, marks=pytest.mark.soak)
            for disturb in (disk_full, files_limited)
            for share in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99)
        ),
    ],
)
def test_disk_full_while_saving(
    disturb: Any, share: float, files: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    disk: Any = contextlib.nullcontext(tmp_path)
    if disturb is disk_full:
        disk = mounted(tmp_path / "disk", megabytes=8)
    with disk as folder:
        cfg = disturbed_config(files, folder, True, save_steps=2)
        message = run_alone(train_on_a_full_disk, cfg, disturb, share)
        output = folder / "run"
        assert f"checkpoint-6 could not be written to {output}: " in message
        assert "MB are free there. Make room" in message
        assert f"the newest complete one is {output / 'checkpoint-4'}" in message
        assert not (output / "checkpoint-6").exists()
        assert not list(folder.rglob("*.partial"))
        (output / "filler").unlink(missing_ok=True)
        assert run_alone(train, cfg) == undisturbed[True]


def make_read_only(folder: Path) -> None:
    """By what also binds this user."""
    if os.geteuid() == 0:
        assert mount("-o", "remount,ro", str(folder)) == 0
    else:
        folder.chmod(0o555)


def make_writable(folder: Path) -> None:
    if os.geteuid() == 0:
        assert mount("-o", "remount,rw", str(folder)) == 0
    else:
        folder.chmod(0o755)


def writable_disk(folder: Path) -> Any:
    """A disk that :func:`make_read_only` works on."""
    folder.mkdir()
    if os.geteuid() == 0:
        return mounted(folder, megabytes=8)
    return contextlib.nullcontext(folder)


def test_a_read_only_output_folder_stops_before_the_model_is_read(
    files: Path, tmp_path: Path
) -> None:
    with writable_disk(tmp_path / "disk") as disk:
        make_read_only(disk)
        cfg = disturbed_config(files, disk, True, base_model="there is no such model")
        with pytest.raises(ValueError) as caught:
            load(cfg)
        make_writable(disk)
    message = str(caught.value)
    assert f"output_dir: {disk / 'run'} cannot be written to (" in message
    assert "Set output_dir to a folder that" in message


def test_an_output_folder_below_a_file_is_refused(files: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output_dir: .*file/run cannot .*directory"):
        load(disturbed_config(files, tmp_path / "file", True))


def test_a_disk_that_becomes_read_only(
    files: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    with writable_disk(tmp_path / "disk") as disk:
        cfg = disturbed_config(files, disk, True)
        message = run_alone(train_on_a_disk_gone_read_only, cfg, disk)
        assert "checkpoint-6 could not be written" in message
        assert f"the newest complete one is {disk / 'run' / 'checkpoint-5'}" in message
        make_writable(disk)
        assert run_alone(train, cfg) == undisturbed[True]


def train_on_a_disk_gone_read_only(cfg: dict[str, Any], disk: Path) -> str:
    # Axolotl's log is open for writing there, and such a disk is not remounted.
    os.environ["AXOLOTL_TEE_STDOUT"] = "0"

    def disturb(trainer: Any) -> None:
        from axolotl.utils.tee import close_debug_log

        close_debug_log()
        for callback in trainer.callback_handler.callbacks:
            if writer := getattr(callback, "tb_writer", None):
                writer.close()
        folder = disk if os.geteuid() == 0 else disk / "run"
        make_read_only(folder)

    at_step(7, "_save_checkpoint", disturb)
    try:
        run(cfg)
    except checkpoints.CheckpointError as error:
        return str(error)
    return "no error"


# ---- Window files ----


@pytest.mark.parametrize("auto", [False, True])
def test_a_spoilt_window_is_refused_by_name(
    auto: bool,
    undisturbed: Undisturbed,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """By whole runs; the file alone, byte by byte, is in test_old_policy.py."""
    folder = undisturbed.copy(True, 7, tmp_path / "run")
    cfg = disturbed_config(undisturbed.files, tmp_path, True)
    if not auto:
        cfg["resume_from_checkpoint"] = str(folder)
    window = window_path(folder, 0)
    intact = window.read_bytes()
    rng = random.Random(int(auto))
    for i in range(40 if request.config.getoption("--soak") else 2):
        spoilt = bytearray(intact)
        # Log-probs and header; the latter ends in spaces.
        spoilt[rng.randrange(8, len(intact))] ^= 1 << rng.randrange(8)
        length = [0, 8, len(intact) // 2, len(intact) - 1, rng.randrange(len(intact))]
        for content in (bytes(spoilt), intact[: length[i % 5]]):
            if content.replace(b" ", b"") == intact.replace(b" ", b""):
                continue
            window.write_bytes(content)
            message = error_of(cfg, FileError)
            assert f"{window}: truncated, damaged" in message
            assert "Resume from another checkpoint" in message
    window.unlink()
    assert f"{window}: not found" in error_of(cfg, FileError)
    assert checkpoints.in_folder(tmp_path / "run") == [folder], "nothing was trained"


# ---- Data loader ----


def test_what_tells_that_a_worker_ended() -> None:
    """Its connection breaks now and then before torch has seen that it ended."""

    def raised(error: Exception, *modules: str) -> Exception:
        def call(error: Exception, *modules: str) -> None:
            if not modules:
                raise error
            source = "def through(call, *args): call(*args)"
            names: dict[str, Any] = {"__name__": modules[0]}
            exec(source, names)
            names["through"](call, error, *modules[1:])

        with pytest.raises(type(error)) as caught:
            call(error, *modules)
        return caught.value

    is_worker = failures.is_of_data_worker
    taking = ("torch.utils.data.dataloader", "multiprocessing.connection")
    assert is_worker(RuntimeError("DataLoader worker (pid 7) is killed by signal: 9"))
    assert is_worker(raised(ConnectionResetError(), *taking))
    assert is_worker(raised(EOFError(), *taking))
    # What a data set raises in a worker comes through the first alone; others' too.
    assert not is_worker(raised(FileNotFoundError(), taking[0]))
    assert not is_worker(raised(ConnectionResetError(), taking[1]))
    assert not is_worker(raised(ValueError(), *taking))


def test_what_tells_that_a_connection_broke() -> None:
    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] "
    for text in (
        gloo + "Connection closed by peer [127.0.0.1]:4711",
        gloo + "Timed out waiting 30000ms for recv operation to complete",
        "Application timeout caused pair closure",
    ):
        assert failures.is_of_connection(RuntimeError(text))
    for error in (
        RuntimeError("/data/igloo/train.jsonl: row 3 has no text"),
        FileNotFoundError("/third_party/gloo/data.jsonl"),
    ):
        assert not failures.is_of_connection(error)


@pytest.mark.parametrize("seed", seeds(1, 6))
def test_a_data_loader_worker_is_killed(
    seed: int, files: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    # While the epoch has micro-batches left to load.
    methods = {"training_step": 4, "score": 2, "_save_checkpoint": 3}
    method, step = list(methods.items())[seed % 3]
    packed = method == "score"
    # Workers take seconds to end, at each epoch's end.
    cfg = disturbed_config(files, tmp_path, packed, max_steps=6)
    cfg["dataloader_num_workers"] = 2
    with Processes(train_without_a_worker, None, cfg, step, method) as processes:
        processes.wait(60)
        (error,) = processes.errors()
    assert "DataWorkerError: dataloader_num_workers: 2: one of them has ended" in error
    newest, _ = checkpoints.newest_complete(tmp_path / "run")
    assert newest is not None
    assert f"the newest complete one is {newest}" in error
    assert run_alone(train, cfg) == undisturbed[packed][:6]


def train_without_a_worker(cfg: dict[str, Any], step: int, method: str) -> None:
    def kill(trainer: Any) -> None:
        worker = multiprocessing.active_children()[0]
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)

    at_step(step, method, kill)
    run(cfg)


# ---- Another run ----

STEPS = [5, 7]  # the end of a window, and the middle of one


def reordered(files: Path, edit: Any) -> list[dict[str, Any]]:
    """The data set's entry with its rows edited, under a name of its own."""
    rows = (files / "train.jsonl").read_text().splitlines()
    text = "\n".join(edit(rows)) + "\n"
    path = files / f"{hashlib.sha256(text.encode()).hexdigest()[:9]}.jsonl"
    path.write_text(text)
    return [{"path": str(path), "type": PROMPT}]


def other_tokenizer(files: Path, **specials: str) -> str:
    """With two words exchanged, or with other special tokens."""
    from transformers import AutoTokenizer

    folder = files / f"tokenizer{len(specials)}"
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    for name, token in specials.items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(folder)
    if not specials:
        path = folder / "tokenizer.json"
        text = path.read_text()
        for old, new in (("w7", "swap"), ("w8", "w7"), ("swap", "w8")):
            text = text.replace(f'"{old}"', f'"{new}"')
        path.write_text(text)
    return str(folder)


def other_model(files: Path, name: str, **options: Any) -> str:
    folder = files / name
    options = {"attention_dropout": 0.1, "vocab_size": 64, **options}
    return str(write_model(folder, **options))


PSFT = {"epsilon_high": 0.05, "refresh_steps": 4, "sft_warmup_steps": 1}
OTHERS: dict[str, tuple[Any, str]] = {
    "psft": (
        lambda _: {"psft": {**PSFT, "epsilon_high": 0.06}},
        r"psft\.epsilon_high was 0\.05 .* is 0\.06 now",
    ),
    "seed": (lambda _: {"seed": 8}, r"seed was 7 .* is 8 now"),
    "length": (
        lambda _: {"sequence_len": 63},
        r"sequence_len was 64 .* is 63 now",
    ),
    "unpacked": (
        lambda _: {"sample_packing": False},
        r"sample_packing was True .* is False now",
    ),
    "micro-batch": (
        lambda _: {"micro_batch_size": 2, "gradient_accumulation_steps": 1},
        r"micro_batch_size was 1 .* is 2 now; "
        r"gradient_accumulation_steps was 2 .* is 1 now",
    ),
    "a row less": (
        lambda files: {"datasets": reordered(files, lambda rows: rows[:-1])},
        r"datasets: contents was 60 with digest \w+ .* is 59 with digest \w+ now",
    ),
    "rows in another order": (
        lambda files: {"datasets": reordered(files, lambda rows: rows[::-1])},
        r"datasets: contents was 60 with digest \w+ .* is 60 with digest \w+ now",
    ),
    "a word": (
        lambda files: {
            "datasets": reordered(
                files, lambda rows: [*rows[:9], rows[9].replace("w", "w1"), *rows[10:]]
            )
        },
        r"datasets: contents was 60 with digest \w+ .* is 60 with digest \w+ now",
    ),
    "what is trained": (
        lambda _: {"train_on_inputs": True},
        r"datasets: contents was 60 with digest \w+ .* is 60 with digest \w+ now",
    ),
    "model family": (
        lambda files: {
            "base_model": other_model(files, "qwen2", model_type="qwen2"),
            # transformers makes a Qwen2's tokenizer out of any file beside a Qwen2.
            "tokenizer_config": str(files / "model"),
        },
        r"base_model: model_type was qwen3 .* is qwen2 now",
    ),
    "model size": (
        lambda files: {"base_model": other_model(files, "big", intermediate_size=96)},
        r"base_model: intermediate_size was 64 .* is 96 now",
    ),
    "vocabulary": (
        lambda files: {"tokenizer_config": other_tokenizer(files)},
        r"tokenizer: vocabulary was 63 with digest \w+ .* is 63 with digest \w+ now",
    ),
    "special tokens": (
        lambda files: {"tokenizer_config": other_tokenizer(files, pad_token="w0")},
        r"tokenizer: special tokens was .*<pad>.* is .*w0.* now",
    ),
}


@pytest.mark.parametrize(
    "step", [STEPS[0], pytest.param(STEPS[1], marks=pytest.mark.soak)]
)
@pytest.mark.parametrize("name", OTHERS)
def test_another_run_is_refused_by_name(
    name: str, step: int, files: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    assert undisturbed[True]
    change, message = OTHERS[name]
    checkpoint = undisturbed.folder(True) / "run" / f"checkpoint-{step}"
    cfg = disturbed_config(files, tmp_path, True, **change(files))
    with pytest.raises(FileError, match=message) as caught:
        run({**cfg, "resume_from_checkpoint": str(checkpoint)})
    assert "Restore what was changed, or start a new run" in str(caught.value)


def test_what_changes_no_step_may_change(
    files: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    assert undisturbed[True]
    for step in STEPS:
        checkpoint = undisturbed.folder(True) / "run" / f"checkpoint-{step}"
        cfg = disturbed_config(
            files,
            tmp_path / str(step),
            True,
            resume_from_checkpoint=str(checkpoint),
            psft={**PSFT, "epsilon": 0.1},
            max_steps=NUM_STEPS - 2,
            num_epochs=8,
            save_steps=3,
            save_total_limit=1,
            dataloader_num_workers=1,
            base_model=other_model(files, "moved"),
        )
        assert train(cfg) == undisturbed[True][: NUM_STEPS - 2]


def test_another_base_under_an_adapter_is_refused(files: Path, tmp_path: Path) -> None:
    lora: dict[str, Any] = {
        "adapter": "lora",
        # Axolotl would patch the model's class, for the tests after this one, too.
        "lora_mlp_kernel": False,
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_modules": ["q_proj", "v_proj"],
        # Axolotl's LoRA kernels are for GPUs, and stay in the model's class.
        **{f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")},
        "max_steps": 3,
    }
    whole = train(disturbed_config(files, tmp_path / "a", True, **lora))
    lora["resume_from_checkpoint"] = str(tmp_path / "a" / "run" / "checkpoint-1")
    assert train(disturbed_config(files, tmp_path / "b", True, **lora)) == whole

    def refused(**changes: Any) -> str:
        cfg = disturbed_config(files, tmp_path / "c", True, **{**lora, **changes})
        return error_of(cfg, FileError)

    # A few values of each tensor are looked at: fine-tuning changes all of them.
    base = Path(shutil.copytree(files / "model", tmp_path / "tuned"))
    weights = load_file(base / "model.safetensors")
    tuned = {name: weight * 1.001 for name, weight in weights.items()}
    save_file(tuned, base / "model.safetensors", metadata={"format": "pt"})
    message = refused(base_model=str(base))
    assert re.search(r"base_model: frozen weights was \d+ with digest", message)
    assert "adapter: r was 4 when" in refused(lora_r=8)
    message = refused(lora_target_modules=["q_proj"])
    assert "adapter: target_modules was ['q_proj', 'v_proj'] when" in message
