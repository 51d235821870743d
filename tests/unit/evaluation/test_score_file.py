import json
from pathlib import Path

import pytest

from megatron_medllm.errors import UserError
from megatron_medllm.evaluation.compare import published_rows
from megatron_medllm.evaluation.score_file import score_markdown, score_predictions
from megatron_medllm.exams.loading import load_exam


def write(path: Path, predictions: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps({"problem_id": k, "prediction": v}) + "\n" for k, v in predictions.items()))
    return path


def test_literal_sheet(exam_dir: Path, tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", {"900A1": "b", "900A2": "c,a", "900B1": "b"})
    second = write(tmp_path / "b.jsonl", {"901A1": "ｂ", "901A2": "a", "901B1": "36.5"})
    strict = score_predictions("invented", [exam_dir], [first, second])
    assert {k: strict[k] for k in ("n", "correct", "points", "possible", "accuracy", "malformed", "missing")} == {
        "n": 6,
        "correct": 5,
        "points": 9,
        "possible": 10,
        "accuracy": 5 / 6,
        "malformed": 1,
        "missing": 0,
    }
    assert strict["by_year"]["2002"]["points"] == 4
    lenient = score_predictions("invented", [exam_dir], [first, second], parser="lenient")
    assert (lenient["correct"], lenient["malformed"]) == (6, 0)
    text_only = score_predictions("invented", [exam_dir], [first, second], text_only=True)
    assert (text_only["n"], text_only["correct"]) == (5, 4)


def test_missing_predictions_are_told(exam_dir: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"900A1": "b"})
    result = score_predictions("invented", [exam_dir], [path])
    assert (result["n"], result["missing"], result["missing_first"]) == (1, 2, ["900A2", "900B1"])
    text = score_markdown(result)
    assert "| 2001 | 1/1 | 1/1 | 0/0 | 1/1 | 0 | – |" in text
    assert text.endswith("0 malformed (strict parser); 2 questions have no prediction (first: 900A2, 900B1)\n")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('{"problem_id": "900A1"}\n', "1: expected a string field 'prediction', found None"),
        ('{"problem_id": "900A1", "prediction": ["b"]}\n', "1: expected a string field 'prediction'"),
        ('{"problem_id": "777", "prediction": "b"}\n', "1: problem_id '777' is not a question of the exam"),
        ('{"problem_id": "900A1", "prediction": "b"}\n' * 2, "2: problem_id '900A1' was predicted before"),
        ("{broken\n", "1: not JSON"),
        ("", "no prediction for the selected questions"),
    ],
)
def test_bad_prediction_files(exam_dir: Path, tmp_path: Path, rows: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(rows)
    with pytest.raises(UserError, match=message) as error:
        score_predictions("invented", [exam_dir], [path])
    assert str(path) in str(error.value)


def test_all_of_igakuqa_answered_right(shared_data: Path, tmp_path: Path) -> None:
    """The key itself as predictions, in the published schema: every point, every year passed."""
    data = [shared_data / "igakuqa"]
    gold = {
        q.problem_id: "a" if q.problem_id == "112B30" else ",".join(q.answer)
        for q in load_exam("igakuqa", data).questions
    }
    gold["116A71"] = "x"  # everyone is credited
    result = score_predictions("igakuqa", data, [write(tmp_path / "gold.jsonl", gold)])
    assert (result["n"], result["correct"], result["points"], result["possible"]) == (2000, 2000, 2485, 2485)
    assert [year["passed"] for year in result["by_year"].values()] == [True] * 5
    assert [year["possible"] for year in result["by_year"].values()] == [499, 496, 496, 500, 494]
    text_only = score_predictions("igakuqa", data, [tmp_path / "gold.jsonl"], text_only=True)
    assert (text_only["n"], text_only["points"], text_only["missing"]) == (1471, 1864, 0)
    assert [year["passed"] for year in text_only["by_year"].values()] == [None] * 5


def test_published_rows_add_up() -> None:
    rows = {row["name"]: row for row in published_rows("igakuqa")}
    ours = rows["Preferred-MedLLM-Qwen-72B (published)"]
    assert (ours["points"], ours["possible"]) == (2156, 2485)
    assert ours["points_rate"] == pytest.approx(0.868, abs=5e-4)
    assert rows["GPT-4o (published)"]["points_rate"] == pytest.approx(0.866, abs=5e-4)
