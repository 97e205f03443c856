"""End to end on real text: tokenize, pack, train, eval, save, resume, reload, generate.

A tokenizer and a tiny model are made from the data itself; skipped where it is absent.
"""

import json
import shutil
from pathlib import Path

import pytest

from tests.tiny import column, config, run, train_logs, write_model

DATA = Path(__file__).parent.parent.parent / "shared" / "data" / "gsm8k"
if not DATA.is_dir():
    pytest.skip(f"needs the GSM8K samples in {DATA}", allow_module_level=True)

QUESTION_ANSWER = {
    "field_instruction": "question",
    "field_output": "answer",
    "format": "Question: {instruction}\nAnswer: ",
    "no_input_format": "Question: {instruction}\nAnswer: ",
}


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("gsm8k")
    rows = {
        name: (DATA / f"{name}.jsonl").read_text().splitlines()[:count]
        for name, count in (("train", 160), ("test", 32))
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    samples = [json.loads(line) for line in rows["train"]]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [f"{s['question']}\n{s['answer']}" for s in samples],
        vocab_size=1024,
        special_tokens=["<pad>", "<eos>"],
        show_progress=False,
    )
    bpe.save(str(folder / "bpe.json"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "bpe.json"), pad_token="<pad>", eos_token="<eos>"
    )
    tokenizer.save_pretrained(folder / "model")
    write_model(
        folder / "model",
        tokenizer,
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=128,
        head_dim=16,
        tie_word_embeddings=False,
    )
    return folder


def test_from_questions_to_generated_text(gsm8k: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {
        "datasets": [
            {"path": str(gsm8k / "train.jsonl"), "type": QUESTION_ANSWER},
        ],
        "test_datasets": [
            {
                "path": str(gsm8k / "test.jsonl"),
                "type": QUESTION_ANSWER,
                "split": "train",
            },
        ],
        "sequence_len": 512,
        "sample_packing": True,
        "eval_sample_packing": True,
        "micro_batch_size": 2,
        "optimizer": "adamw_torch",
        "learning_rate": 0.003,
        "num_epochs": 4,
        "max_steps": 30,
        "eval_steps": 10,
        # Inside a window of four: 10 and 30 are not multiples of it.
        "save_steps": 10,
        "save_strategy": None,
    }
    whole = run(config(gsm8k, tmp_path / "whole", **options))
    nll = column(whole, "psft/nll")
    assert nll[-1] < nll[0] - 0.5
    assert max(column(whole, "psft/clip_frac")) > 0.01
    evals = [e["eval_loss"] for e in whole.state.log_history if "eval_loss" in e]
    assert evals[-1] < evals[0] - 0.5

    checkpoint = tmp_path / "checkpoint-10"
    shutil.copytree(tmp_path / "whole" / "run" / "checkpoint-10", checkpoint)
    resumed = run(
        config(
            gsm8k,
            tmp_path / "resumed",
            resume_from_checkpoint=str(checkpoint),
            **options,
        )
    )
    keys = ["loss", "grad_norm", "psft/nll", "psft/entropy", "psft/clip_frac"]
    expected = [[e[key] for key in keys] for e in train_logs(whole)[10:]]
    assert [[e[key] for key in keys] for e in train_logs(resumed)[10:]] == expected

    saved = tmp_path / "resumed" / "run"
    model = AutoModelForCausalLM.from_pretrained(saved)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    prompt = tokenizer("Question: How many apples?\nAnswer: ", return_tensors="pt")
    output = model.generate(
        input_ids=prompt["input_ids"],
        attention_mask=prompt["attention_mask"],
        max_new_tokens=8,
        do_sample=False,
    )
    new_tokens = output[0, prompt["input_ids"].shape[1] :]
    assert len(new_tokens) > 0
    assert tokenizer.decode(new_tokens, skip_special_tokens=True).strip()
