"""An invented three-year exam, and a scripted endpoint that answers it."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

QUESTIONS = [
    # problem_id, text, choices, answer, points, explanation
    (
        "900A1",
        "ソラ病の主症状はどれか。",
        ["咳", "熱", "疹", "痛", "眠"],
        ["b"],
        "1",
        "aは誤り。bは正しい。cは誤り。dは誤り。eは誤り。",
    ),
    (
        "900A2",
        "カゼ病の禁忌薬はどれか。2つ選べ。",
        ["甲薬", "乙薬", "丙薬", "丁薬", "戊薬"],
        ["a", "c"],
        "1",
        "aは正しい。bは誤り。cは正しい。dは誤り。eは誤り。",
    ),
    (
        "900B1",
        "誤っているのはどれか。",
        ["水は湿る", "火は冷たい", "木は燃える", "金は重い", "土は黒い"],
        ["b"],
        "3",
        "aは正しい。bは誤り。cは正しい。dは正しい。eは正しい。",
    ),
    (
        "901A1",
        "次の文を読み、1、2の問いに答えよ。老人が転んだ。正しい処置はどれか。",
        ["冷却", "固定", "放置", "歩行", "食事"],
        ["b"],
        "1",
        "転んだときは骨折を疑い、まず固定する。",
    ),
    (
        "901A2",
        "その後、痛みが増した。次に行うのはどれか。",
        ["撮影", "帰宅", "運動", "入浴", "飲酒"],
        ["a"],
        "1",
        "痛みの原因を調べるため、まず撮影する。",
    ),
    ("901B1", "体温を求めよ。解答：①②.③度", [], ["36.5"], "3", "計算すると三十六度五分である。"),
]


def write_exam(directory: Path) -> Path:
    """The invented exam in IgakuQA's layout: YEAR/NNN-S.jsonl with metadata beside one file."""
    for problem_id, text, choices, answer, points, explanation in QUESTIONS:
        year = {"900": "2001", "901": "2002"}[problem_id[:3]]
        path = directory / year / f"{problem_id[:3]}-{problem_id[3]}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        row = {
            "problem_id": problem_id,
            "problem_text": text,
            "choices": choices,
            "text_only": problem_id != "901A2",
            "answer": answer,
            "points": points,
            "explanation": explanation,
        }
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    metadata = {"problem_id": "900A2", "category": "薬理", "kinki": ["de"], "reason": "", "human_accuracy": "87.5"}
    (directory / "2001" / "900-A_metadata.jsonl").write_text(json.dumps(metadata, ensure_ascii=False) + "\n")
    return directory


class ScriptedEndpoint:
    """An OpenAI-compatible server on this machine whose answers a function decides.

    `script(body)` returns the text, or an int: the HTTP status to fail with. `calls` holds the bodies received.
    """

    finish_reason = "stop"

    def __init__(self, script: Callable[[dict], str | int]) -> None:
        finish_reason = self.finish_reason
        self.calls: list[tuple[str, dict]] = []
        calls = self.calls

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                calls.append((self.path, body))
                text = script(body)
                if isinstance(text, int):
                    self.send_error(text)
                    return
                choice = {"message": {"content": text}} if "messages" in body else {"text": text}
                usage = {"prompt_tokens": 7, "completion_tokens": len(text)}
                reply = json.dumps({"choices": [{**choice, "finish_reason": finish_reason}], "usage": usage}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> "ScriptedEndpoint":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
