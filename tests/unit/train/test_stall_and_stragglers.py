"""Who is named: verdicts from heartbeats, and slow ranks from their own times."""

import sys

from megatron_medllm.processes import ProcessId
from megatron_medllm.train.stall import LEFT, Beat, Judge
from megatron_medllm.train.stragglers import Stragglers, spread
from megatron_medllm.train.watch import is_waiting, judging_ranks

PROCESSES = [ProcessId("n1", 11), ProcessId("n1", 12), ProcessId("n2", 13)]


def judge(timeout_s: float = 10.0) -> Judge:
    return Judge(PROCESSES, timeout_s=timeout_s, now=0.0, gap_s=timeout_s / 2)


def beat(count: int, *, moves: int, step: int = 4, phase: str = "forward_backward", waiting: bool = False) -> Beat:
    return Beat(count, step, phase, moves, waiting)


def watch_until(who: Judge, seconds: int, beats_at) -> tuple[int, object]:
    """The second of the first verdict, and the verdict."""
    for now in range(1, seconds + 1):
        verdict = who.look(float(now), beats_at(now))
        if verdict is not None:
            return now, verdict
    return seconds, None


def test_a_silent_rank_is_named_once_its_time_is_over():
    def beats(now):  # rank 1 is stopped after three seconds; the others wait for it, and go on beating
        return {rank: beat(min(now, 3) if rank == 1 else now, moves=3, waiting=rank != 1) for rank in range(3)}

    second, verdict = watch_until(judge(), 60, beats)
    assert (second, verdict.kind, verdict.ranks) == (14, "silent", (1,))
    assert verdict.reason == (
        "rank 1 (process 12 on n1) has not answered for 10 s, last seen in forward_backward of step 4"
    )
    assert verdict.as_row(PROCESSES)["ranks"] == [{"rank": 1, "host": "n1", "pid": 12, "started": 0}]


def test_a_rank_that_never_came_is_named():
    _, verdict = watch_until(judge(), 60, lambda now: {0: beat(now, moves=now), 1: beat(now, moves=now)})
    assert verdict.ranks == (2,) and "never seen in training" in verdict.reason


def test_of_ranks_that_all_answer_the_one_that_does_not_wait_is_stuck():
    def beats(now):
        return {rank: beat(now, moves=7, waiting=rank != 2) for rank in range(3)}

    second, verdict = watch_until(judge(), 60, beats)
    assert (second, verdict.kind, verdict.ranks) == (12, "stuck", (2,))


def test_where_all_wait_the_one_furthest_behind_is_named():
    def beats(now):
        phases = {0: "forward_backward", 1: "forward_backward", 2: "data"}
        return {rank: beat(now, moves=7, phase=phases[rank], waiting=True) for rank in range(3)}

    assert watch_until(judge(), 60, beats)[1].ranks == (2,)


def test_slow_steps_long_saves_and_ended_ranks_are_no_stall():
    def moving(now):  # one micro-batch in nine seconds
        return {rank: beat(now, moves=now // 9) for rank in range(3)}

    def saving(now):
        return {rank: beat(now, moves=1, phase="") for rank in range(3)}

    def ending(now):  # rank 2 has left the loop, the others are about to
        return {0: beat(now, moves=now), 1: beat(now, moves=now), 2: beat(1, moves=1, phase=LEFT)}

    assert [watch_until(judge(), 60, beats)[1] for beats in (moving, saving, ending)] == [None, None, None]


def test_a_suspended_job_stalls_nobody():
    who = judge()
    assert who.look(1.0, {rank: beat(1, moves=1) for rank in range(3)}) is None
    assert who.look(3600.0, {rank: beat(1, moves=1) for rank in range(3)}) is None  # everything stood still
    assert who.look(3601.0, {rank: beat(2, moves=2) for rank in range(3)}) is None


def test_a_rank_is_slow_by_the_median_of_its_steps():
    slow = Stragglers([0, 0, 0], factor=1.5, steps=5)
    for step in range(5):
        assert slow.slow() == {}, step
        slow.note([0.1, 0.1, 0.2])
    assert slow.slow() == {2: (0.2, 0.1)}
    for _ in range(3):
        slow.note([0.1, 0.1, 0.1])
    assert slow.slow() == {}  # it has recovered
    hiccup = Stragglers([0, 0], factor=1.5, steps=5)
    for own in ([0.1, 0.1], [0.1, 60.0], [0.1, 0.1], [0.1, 0.1], [0.1, 0.1]):
        hiccup.note(own)
    assert hiccup.slow() == {}


def test_ranks_are_compared_within_their_pipeline_stage():
    uneven = Stragglers([0, 0, 1, 1], factor=1.5, steps=1)
    uneven.note([0.1, 0.1, 0.4, 0.4])  # the last stage has the head: no rank is at fault
    assert uneven.slow() == {}
    uneven.note([0.1, 0.1, 0.4, 0.9])
    assert uneven.slow() == {3: (0.9, 0.4)}
    alone = Stragglers([0, 1], factor=1.5, steps=1)  # nobody to compare with but the other stage
    alone.note([0.1, 0.9])
    assert alone.slow() == {1: (0.9, 0.1)}
    tiny = Stragglers([0, 0], factor=1.5, steps=1)
    tiny.note([0.001, 0.009])
    assert tiny.slow() == {}


def test_the_spread_of_a_step():
    assert spread([0.3, 0.1, 0.2]) == {
        "own_time_min_s": 0.1,
        "own_time_median_s": 0.2,
        "own_time_max_s": 0.3,
        "slowest_rank": 0.0,
    }


def test_judges_are_few_and_far_apart():
    assert judging_ranks(1) == {0}
    assert judging_ranks(2) == {0, 1}
    assert judging_ranks(64) == {0, 21, 42, 63}


class _Handle:
    def wait(self):
        return sys._getframe(1)


def test_waiting_is_told_from_work_by_the_line_that_runs():
    handle = _Handle()
    assert is_waiting(handle.wait())
    assert not is_waiting(sys._getframe())


def test_a_process_is_known_by_more_than_its_number():
    own = ProcessId.own()
    assert own.is_here and own.lives()
    assert not ProcessId(own.host, own.pid, own.started + 1).lives()  # its number was given to another one
    assert ProcessId("elsewhere", 1, 1).lives()  # nobody can tell from here
