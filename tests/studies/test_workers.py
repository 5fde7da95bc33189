"""Processes that share the work of a study end with the one that started them, however it ends."""

import os
import signal
import subprocess
import sys
import time

import pytest

PARENT = """
import functools, pathlib, sys
from sharing import work
from book.studies.workers import share

if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    print(list(share(functools.partial(work, folder), range(4), 2)))
"""


def _running(group):
    listed = subprocess.run(["ps", "-A", "-o", "pgid=,stat="], capture_output=True, text=True, check=True)
    rows = (line.split() for line in listed.stdout.splitlines())
    return sum(int(of) == group and not state.startswith("Z") for of, state in rows)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["while workers start", "while they work"])
def test_workers_of_a_killed_parent_end(moment, tmp_path):
    (tmp_path / "sharing.py").write_text(
        "import time\n\ndef work(folder, task):\n    (folder / f'{task}.begun').touch()\n    time.sleep(600)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(command, env=environment, start_new_session=True) as parent:
        deadline = time.monotonic() + 120
        begun = 2 if moment == "while they work" else 0
        while _running(parent.pid) < 3 or len(list(tmp_path.glob("*.begun"))) < begun:
            assert time.monotonic() < deadline
            assert parent.poll() is None
            time.sleep(0.05)
        os.kill(parent.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while _running(parent.pid):
        assert time.monotonic() < deadline, "workers outlive the process that started them"
        time.sleep(0.05)
