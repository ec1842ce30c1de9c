"""The command line sets how threads wait before torch reads it, and leaves the user's choice alone."""

import os
import subprocess
import sys

import pytest

CODE = """
import sys
import finescale.cli.main as entry
from finescale.environment import wait_without_spinning
assert "torch" not in sys.modules, "torch is loaded before the policy can be set"
wait_without_spinning()
import os
print(os.environ["OMP_WAIT_POLICY"])
"""


@pytest.mark.parametrize(("before", "after"), [(None, "passive"), ("active", "active")])
def test_threads_wait_as_the_user_or_else_we_say(before, after):
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)} | ({"OMP_WAIT_POLICY": before} if before else {})
    answer = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == after
