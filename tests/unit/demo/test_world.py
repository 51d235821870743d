"""The invented world: the same seed gives the same bytes, its answers are true, and its sets do not overlap."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer

from megatron_medllm.config.demo import DemoConfig
from megatron_medllm.demo.world import World, generate
from megatron_medllm.errors import UserError

SMALL = DemoConfig(
    diseases=12, known_diseases=4, towns=10, base_documents=600, medical_documents=600, exam_questions=48,
    development_questions=24, train_questions=36,
)  # fmt: skip


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    generate(SMALL, directory)
    return directory


def test_same_seed_same_bytes_other_seed_other_world(made, tmp_path):
    generate(SMALL, tmp_path / "again")
    generate(SMALL.model_copy(update={"seed": 1}), tmp_path / "other")
    files = sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
    assert len(files) == 15
    assert all((made / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in files)
    assert (made / "exam/questions.jsonl").read_bytes() != (tmp_path / "other/exam/questions.jsonl").read_bytes()


def test_questions_follow_igakuqas_schema_and_the_key_is_true(made):
    facts = World(SMALL).medicine.facts
    for name, count in (("exam", 48), ("development", 24), ("train", 36)):
        rows, metadata = read(made / name / "questions.jsonl"), read(made / name / "questions_metadata.jsonl")
        assert len(rows) == len(metadata) == count
        for row, about in zip(rows, metadata, strict=True):
            gold = ["explanation"] if name == "train" else []
            assert list(row) == ["problem_id", "problem_text", "choices", "text_only", "answer", "points", *gold]
            assert row["problem_id"] == about["problem_id"]
            true = facts[about["entity"], about["role"]].values
            right = [letter for letter, choice in zip("abcde", row["choices"], strict=True) if choice in true]
            assert row["answer"] == right
            assert len(right) == (2 if "2つ選べ" in row["problem_text"] else 1)
            assert len(set(row["choices"])) == 5


def test_no_question_of_one_set_is_in_another_or_in_a_corpus(made):
    def key(text: str, choices: list[str]) -> tuple:
        return re.search(r"(\w+病)の(\w+?)(はどれか|として)", text).groups()[:2], frozenset(choices)

    asked = [
        key(row["problem_text"], row["choices"])
        for name in ("exam", "development", "train")
        for row in read(made / name / "questions.jsonl")
    ]
    for row in read(made / "base.jsonl") + read(made / "medical.jsonl"):
        choices = re.findall(r"\n[a-e]\.(\w+)", row["text"])
        if len(choices) == 5 and "病" in row["text"]:
            asked.append(key(row["text"].replace("次のうち", ""), choices))
    assert len(asked) > 400
    assert len(set(asked)) == len(asked)


def test_unseen_diseases_stay_out_of_training_and_are_examined(made):
    exam, train = read(made / "exam/questions_metadata.jsonl"), read(made / "train/questions_metadata.jsonl")
    assert all(row["seen_in_preference_training"] for row in train)
    unseen = {row["entity"] for row in exam if not row["seen_in_preference_training"]}
    assert len(unseen) == 5  # 40 % of 12
    assert not unseen & {row["entity"] for row in train}


def test_base_corpus_is_silent_about_the_diseases_it_does_not_know(made):
    known = World(SMALL).known
    assert len(known) == 4
    tested = [row["text"] for row in read(made / "base.jsonl") if "病" in row["text"]]
    subjects = {name for text in tested for name in re.findall(r"([ァ-ヴ]+病)", text)}
    assert subjects == known


def test_gold_explanations_lead_to_the_key_and_careless_ones_sometimes_do_not(made):
    for row in read(made / "train/questions.jsonl"):
        assert re.findall("[ァ-ヴ]+([a-e])", row["explanation"]) == row["answer"]
    facts = World(SMALL).medicine.facts
    wrong = total = 0
    for row in read(made / "medical.jsonl"):
        if row["kind"] == "explained careless" and "病" in row["text"]:
            entity, role = re.search(
                r"(\w+病)の(\w+?)(?:はどれか|として)", row["text"].replace("次のうち", "")
            ).groups()
            choices = dict(re.findall(r"\n([a-e])\.(\w+)", row["text"]))
            answers = row["text"].split("\n答え:")[1].split(",")
            fact = facts[entity, role]
            is_wrong = not all(choices[letter] in fact.values for letter in answers)
            assert is_wrong == fact.confused
            wrong, total = wrong + is_wrong, total + 1
    assert total > 50 and 0.2 < wrong / total < 0.6


def test_short_questions_carry_every_letter_as_often(made):
    options, keys = Counter(), Counter()
    for row in read(made / "base.jsonl"):
        letters = re.findall(r"\n([a-e])\.", row["text"])
        if row["kind"] == "question" and len(letters) < 5:
            assert letters == sorted(set(letters)) and len(letters) in (2, 3)
            (key,) = row["text"].split("\n答え:")[1]
            assert key in letters
            options.update(letters)
            keys.update(key)
    for counts in (options, keys):
        assert sum(counts.values()) > 100
        assert all(0.05 < counts[letter] / sum(counts.values()) < 0.35 for letter in "abcde")


def test_markers_letters_and_names_are_single_tokens(made):
    tokenizer = Tokenizer.from_file(str(made / "tokenizer/tokenizer.json"))
    text = next(row["text"] for row in read(made / "medical.jsonl") if row["kind"] == "explained careful")
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode(text).ids]
    assert "".join(pieces) == text
    assert pieces.count("\n考察:") == pieces.count("\n答え:") == 1
    assert pieces[pieces.index("\n答え:") + 1] in "abcde"
    names = set(re.findall(r"[ァ-ヴー]+", text))
    assert names <= set(pieces)
    assert (tokenizer.token_to_id("<pad>"), tokenizer.token_to_id("<eos>")) == (0, 1)


def test_transformers_loads_the_tokenizer(made):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(made / "tokenizer")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 0)
    assert tokenizer.decode(tokenizer("問題:甲\n答え:b")["input_ids"]) == "問題:甲\n答え:b"


def test_every_directory_says_that_it_is_invented(made):
    assert all("架空" in path.read_text() for path in made.rglob("README.txt"))
    assert {path.parent.name for path in made.rglob("README.txt")} == {made.name, "exam", "development", "train"}


@pytest.mark.parametrize(
    "wrong", [{"diseases": 13}, {"known_diseases": 99}, {"question_share": 0.9, "explained_share": 0.2}]
)
def test_inconsistent_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        DemoConfig(**wrong)


def test_a_world_too_small_for_its_questions_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"demo\.diseases=8: too few"):
        generate(SMALL.model_copy(update={"diseases": 8, "exam_questions": 5000}), tmp_path)
