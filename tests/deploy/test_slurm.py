"""The Slurm script: its syntax, its dry run, and that a notice reaches the driver."""

import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy" / "slurm.sh"


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An environment as inside a job of three nodes, with the three Slurm programs the script calls."""
    programs = {
        "scontrol": 'if [ "$1" = show ]; then printf "%s\\n" n1 n2 n3; else echo "scontrol $*" >> "$LOG"; fi',
        "srun": 'if [[ "$*" == *ip-address* ]]; then echo "10.0.0.1 fe80::1"; else echo "srun $*" >> "$LOG"; '
        'if [[ "$*" == *--block* ]]; then exec sleep 60; fi; fi',
        "sleep": 'if [ "$1" -ge 60 ]; then exec /bin/sleep "$1"; fi',  # waiting for Ray to come up takes no time here
    }
    (tmp_path / "bin").mkdir()
    (tmp_path / "env" / "bin").mkdir(parents=True)
    for name, body in programs.items():
        write_program(tmp_path / "bin" / name, body)
    return os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "BRAINENC_ENV": str(tmp_path / "env"),
        "LOG": str(tmp_path / "log"),
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "n[1-3]",
        "SLURM_CPUS_ON_NODE": "8",
        "SLURM_MEM_PER_NODE": "64000",
    }


def write_program(path: Path, body: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_syntax():
    subprocess.run(["bash", "-n", SCRIPT], check=True)


def test_notice_is_asked_for_in_time_for_a_checkpoint():
    assert "#SBATCH --signal=B:TERM@120" in SCRIPT.read_text()


def test_dry_run_names_every_node(slurm):
    env = slurm | {"DRY_RUN": "1"}
    command = ["bash", SCRIPT, "extract", "--store", "s"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr
    assert "--nodelist=n1" in done.stdout
    assert all(f"--nodelist={n} " in done.stdout for n in ("n2", "n3"))
    assert "brainenc extract --store s --address 10.0.0.1:20042" in done.stdout
    assert "--memory=65108864000" in done.stdout  # what Slurm gave, less what Ray itself takes


def test_without_a_command_it_says_how():
    done = subprocess.run(["bash", SCRIPT], capture_output=True, text=True)

    assert done.returncode == 2
    assert "usage:" in done.stderr


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (0, False), (1, False)])
def test_the_exit_code_is_the_drivers_and_75_requeues(slurm, tmp_path, code, requeued):
    write_program(tmp_path / "env" / "bin" / "brainenc", f"exit {code}")

    done = subprocess.run(["bash", SCRIPT, "train"], env=slurm, capture_output=True, text=True, timeout=60)

    assert done.returncode == code
    assert ("scontrol requeue 42" in (tmp_path / "log").read_text()) is requeued


def test_notice_reaches_the_driver_which_stops_safely(slurm, tmp_path):
    ready = tmp_path / "ready"
    write_program(
        tmp_path / "env" / "bin" / "brainenc",
        f'trap "sleep 0; exit 75" TERM; touch {ready}; while true; do /bin/sleep 0.1; done',
    )
    job = subprocess.Popen(["bash", SCRIPT, "train"], env=slurm, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not ready.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)

    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=30)

    assert job.returncode == 75
    assert "emergency checkpoint" in output
    assert "scontrol requeue 42" in (tmp_path / "log").read_text()
