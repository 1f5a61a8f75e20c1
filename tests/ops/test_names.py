"""What a user imports."""

import ssmscan
from ssmscan import ops
from ssmscan.ops.cases import CASES


def test_every_operation_and_step_is_in_the_package_itself():
    names = {function.__name__ for case in CASES for function in (case.op, case.step) if function is not None}
    assert names <= set(ops.__all__) <= set(ssmscan.__all__)
    assert all(getattr(ssmscan, name) is getattr(ops, name) for name in ops.__all__)
