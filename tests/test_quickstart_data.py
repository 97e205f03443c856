"""The quickstart's data makers: skills, splits, tokenizer. Nothing is trained here."""

import random
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"
sys.path.insert(0, str(QUICKSTART))

import prepare  # noqa: E402
import skill_data  # noqa: E402

ALL_SKILLS = (*skill_data.BASE_SKILLS, skill_data.NEW_SKILL)
LETTERS = ("d", "a", "c")


@pytest.mark.parametrize("skill", ALL_SKILLS, ids=lambda skill: skill.name)
def test_answers_are_checkable(skill):
    for sample in skill_data.make_samples(skill, 40, seed=0, held_out=False):
        assert skill.check(sample.letters, sample.answer)
        assert not skill.check(sample.letters, sample.answer[:-1])
        assert not skill.check(sample.letters, (*sample.answer, sample.answer[-1]))
        assert not skill.check(sample.letters, ())


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("copy", "d a c"),
        ("reverse", "c a d"),
        ("sort", "a c d"),
        ("swap", "c a d"),
        ("next", "e b d"),
        ("dash sort", "a - c - d"),
        ("star next", "e * b * d"),
    ],
)
def test_answers_worked_by_hand(name, answer):
    skill = next(s for s in ALL_SKILLS if s.name == name)
    assert skill.solve(LETTERS, random.Random(0)) == answer.split()


def test_new_skill_accepts_every_mix_of_marks_and_nothing_else():
    check = skill_data.NEW_SKILL.check
    marks = tuple(skill_data.SEPARATORS.values())
    assert all(check(LETTERS, ("a", x, "c", y, "d")) for x in marks for y in marks)
    assert not check(LETTERS, ("d", "+", "a", "+", "c"))
    assert not check(LETTERS, ("a", "b", "c", "+", "d"))
    assert not check(LETTERS, ("a", "c", "d"))


def test_new_skill_has_real_spread():
    """Each mark appears about a quarter of the time: 4 sigma of a fair draw."""
    samples = skill_data.make_samples(skill_data.NEW_SKILL, 512, 0, held_out=False)
    drawn = [mark for sample in samples for mark in sample.answer[1::2]]
    for mark in skill_data.SEPARATORS.values():
        share = drawn.count(mark) / len(drawn)
        assert abs(share - 0.25) < 4 * (0.25 * 0.75 / len(drawn)) ** 0.5


def test_train_and_test_are_disjoint_across_skills():
    """A test prompt's letters were never trained on, whatever the skill."""
    seen, unseen = (
        {
            sample.letters
            for skill in ALL_SKILLS
            for sample in skill_data.make_samples(skill, 50, 0, held_out=held_out)
        }
        for held_out in (False, True)
    )
    assert seen
    assert unseen
    assert not seen & unseen


def test_prompts_of_one_set_are_different():
    samples = skill_data.make_samples(skill_data.NEW_SKILL, 512, 0, held_out=False)
    assert len({sample.instruction for sample in samples}) == 512


def test_samples_depend_on_the_seed_only():
    make = skill_data.make_samples
    skill = skill_data.NEW_SKILL
    assert make(skill, 30, 7, held_out=False) == make(skill, 30, 7, held_out=False)
    assert make(skill, 30, 7, held_out=False) != make(skill, 30, 8, held_out=False)


def test_every_text_is_in_the_vocabulary_and_survives_a_round_trip(tmp_path):
    skill_data.make_tokenizer().save_pretrained(tmp_path)
    prepare.make_model(0).config.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.eos_token == skill_data.EOS
    assert tokenizer.pad_token == skill_data.PAD
    assert len(tokenizer) == len(skill_data.vocabulary())
    for skill in ALL_SKILLS:
        for sample in skill_data.make_samples(skill, 20, seed=0, held_out=True):
            for text in (sample.instruction, sample.output):
                ids = tokenizer.encode(text)
                assert tokenizer.unk_token_id not in ids
                assert tokenizer.decode(ids) == text


def test_collate_supervises_the_answer_and_its_eos_only():
    tokenizer = skill_data.make_tokenizer()
    skill = skill_data.NEW_SKILL
    samples = skill_data.make_samples(skill, 16, seed=0, held_out=False)
    ids, labels = prepare.collate(samples, tokenizer)
    for sample, id_row, label_row in zip(samples, ids, labels, strict=True):
        supervised = label_row != prepare.IGNORE_INDEX
        kept = tokenizer.convert_ids_to_tokens(label_row[supervised].tolist())
        assert kept == [*sample.answer, skill_data.EOS]
        assert id_row[supervised].tolist() == label_row[supervised].tolist()


def test_recipe_version_tells_seeds_apart():
    assert prepare.recipe_version(0) == prepare.recipe_version(0)
    assert prepare.recipe_version(0) != prepare.recipe_version(1)
