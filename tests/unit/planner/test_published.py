"""Published throughputs: four rows set four constants, the others are predicted."""

import pytest

from tests.unit.planner.published import ROWS, Published


def test_four_rows_calibrate_four_constants() -> None:
    assert sum(bool(row.calibrates) for row in ROWS) == 4


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_predictions_are_within_15_percent_and_calibrated_rows_within_1(row: Published) -> None:
    assert abs(row.error()) < (0.01 if row.calibrates else 0.15)
