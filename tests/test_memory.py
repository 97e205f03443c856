"""No tensor of a real run is as large as a micro-batch's logits."""

from pathlib import Path
from typing import Any

import pytest

from tests.reference import Watch
from tests.tiny import config, eval_data, run, write_dataset, write_model

NUM_TOKENS = 512
VOCAB_SIZE = 16384


@pytest.fixture(scope="module")
def large_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    write_model(folder / "model", vocab_size=VOCAB_SIZE)
    write_dataset(folder / "train.jsonl", num_samples=300, seed=0)
    write_dataset(folder / "test.jsonl", num_samples=60, seed=1)
    return folder


def largest_tensor(folder: Path, output: Path, **overrides: Any) -> int:
    """Elements of the largest float tensor made by a run that trains and evaluates."""
    options = {
        "sample_packing": True,
        "sequence_len": NUM_TOKENS,
        "micro_batch_size": 1,
        # Every token is supervised: dropping rows saves nothing here.
        "train_on_inputs": True,
        **eval_data(folder),
        "eval_steps": 2,
        "save_steps": 2,
        "save_strategy": None,
        "max_steps": 2,
        **overrides,
    }
    with Watch() as watch:
        run(config(folder, output, **options))
    return max(n for dtype, n in watch.largest.items() if dtype.is_floating_point)


def test_training_scoring_and_eval_make_no_logits(
    large_vocabulary: Path, tmp_path: Path
) -> None:
    # Packing fills a row to nine tenths at least.
    logits = int(0.9 * NUM_TOKENS) * VOCAB_SIZE
    stock = largest_tensor(
        large_vocabulary, tmp_path / "stock", psft=None, plugins=None
    )
    psft = largest_tensor(
        large_vocabulary, tmp_path / "psft", psft={"refresh_steps": 2}
    )
    assert stock >= logits
    # A tile of 512 tokens x 4096 of the vocabulary is the largest there should be.
    assert psft <= NUM_TOKENS * 4096 < logits
