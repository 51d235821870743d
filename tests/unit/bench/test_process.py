"""What the benchmarks read of their own process."""

import time

import numpy as np

from megatron_medllm.bench.process import cpu_model, cpu_seconds, peak_mib, reset_peak, resident_mib, system_seconds


def test_memory_is_counted_and_its_peak_is_kept_until_it_is_reset():
    reset_peak()
    before = resident_mib()
    block = np.ones(64 * 2**20, dtype=np.uint8)
    assert 60 < resident_mib() - before < 90
    del block
    assert peak_mib() - before > 60 and resident_mib() - before < 30
    reset_peak()
    assert peak_mib() - before < 30


def test_cpu_time_is_work_not_waiting():
    before, system = cpu_seconds(), system_seconds()
    time.sleep(0.2)
    assert cpu_seconds() - before < 0.1
    total = sum(i * i for i in range(2_000_000))
    assert total > 0 and cpu_seconds() - before > 0.02
    assert system_seconds() - system < cpu_seconds() - before


def test_the_processor_has_a_name():
    assert cpu_model()
