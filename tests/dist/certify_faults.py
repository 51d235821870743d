"""Runs a certificate's processes under one fault. `python -m tests.dist.certify_faults JOBS.json`

The fault's name stands in MEDLLM_TEST_FAULT; the rest is `megatron_medllm.certify.host`.
"""

import os
import sys

from megatron_medllm.certify import host
from tests.dist import layout_faults, model_faults
from tests.dist.fault_table import FAULTS

__all__ = ["FAULTS", "VARIABLE", "layout_faults", "model_faults"]  # the two fill the table
VARIABLE = "MEDLLM_TEST_FAULT"

if __name__ == "__main__":
    with FAULTS[os.environ[VARIABLE]].inject():
        host.main(sys.argv[1])
