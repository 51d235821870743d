from megatron_medllm.data.ledger import Ledger


def test_cut_forgets_later_steps_and_a_line_cut_by_a_crash(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for step in (1, 2, 3):
        ledger.append(step, [[step, 0]])
    with open(ledger.path, "ab") as stream:
        stream.write(b'{"step": 4, "cons')
    ledger.cut(2)
    assert list(ledger) == [{"step": 1, "consumed": [[1, 0]]}, {"step": 2, "consumed": [[2, 0]]}]
    Ledger(tmp_path / "none.jsonl").cut(0)
