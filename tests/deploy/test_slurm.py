"""The Slurm script: its syntax, its dry run, who is waited for, and that a notice reaches the driver."""

import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import click
import pytest

from brainenc.cli.main import COMMANDS, cli

SCRIPT = Path(__file__).parents[2] / "deploy" / "slurm.sh"


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An environment as inside a job of three nodes, with the three Slurm programs the script calls."""
    programs = {
        "scontrol": 'if [ "$1" = show ]; then printf "%s\\n" n1 n2 n3; else echo "scontrol $*" >> "$LOG"; fi',
        "srun": 'if [[ "$*" == *"hostname --ip"* ]]; then echo "10.0.0.1 fe80::1"; else echo "srun $*" >> "$LOG"; '
        'if [[ "$*" == *--block* ]]; then exec sleep 60; fi; fi',
        "sleep": 'if [ "$1" -ge 60 ]; then exec /bin/sleep "$1"; fi',  # looking again takes no time here
    }
    (tmp_path / "bin").mkdir()
    (tmp_path / "env" / "bin").mkdir(parents=True)
    for name, body in programs.items():
        write_program(tmp_path / "bin" / name, body)
    # How many nodes Ray knows: one more each time it is asked, and at first the head does not answer.
    python = 'echo "look $3" >> "$LOG"; n=$(grep -c ^look "$LOG"); if [ "$n" = 1 ]; then exit 1; fi; echo $((n - 1))'
    write_program(tmp_path / "env" / "bin" / "python", python)
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
    assert "--num-gpus=0 " in done.stdout
    assert "wait until 3 node(s) have joined" in done.stdout


def test_ray_is_told_the_gpus_that_slurm_gave(slurm):
    env = slurm | {"DRY_RUN": "1", "SLURM_GPUS_ON_NODE": "4"}
    done = subprocess.run(["bash", SCRIPT, "train"], env=env, capture_output=True, text=True, timeout=60)

    assert done.stdout.count("--num-gpus=4 ") == 3


@pytest.mark.parametrize("name", COMMANDS)
def test_the_address_goes_to_the_commands_that_take_one(slurm, name):
    """A command that gets or loses the option fails here, and then belongs into the script's `case`."""
    command = cli.get_command(click.Context(cli), name)
    takes_one = any("--address" in option.opts for option in command.params)
    env = slurm | {"DRY_RUN": "1"}
    done = subprocess.run(["bash", SCRIPT, name, "--json"], env=env, capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "/brainenc " in line]
    assert line.endswith(f"brainenc {name} --json" + (" --address 10.0.0.1:20042" if takes_one else ""))
    assert ("ray start" in done.stdout) is takes_one


def test_the_driver_begins_when_all_nodes_have_joined(slurm, tmp_path):
    write_program(tmp_path / "env" / "bin" / "brainenc", 'echo "driver $*" >> "$LOG"')

    done = subprocess.run(["bash", SCRIPT, "train"], env=slurm, capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr
    log = (tmp_path / "log").read_text().splitlines()
    seen = [line.partition(" ")[0] for line in log if not line.startswith("srun")]
    # The head does not answer, then is one; two nodes, then all three.
    assert seen == ["look", "look", "look", "look", "driver"]
    assert "look 10.0.0.1:20042" in log
    assert "driver train --address 10.0.0.1:20042" in log


def test_nodes_that_do_not_join_end_the_job(slurm, tmp_path):
    write_program(tmp_path / "env" / "bin" / "python", "echo 2")
    write_program(tmp_path / "env" / "bin" / "brainenc", 'echo "driver $*" >> "$LOG"')

    env = slurm | {"JOIN_S": "1"}
    done = subprocess.run(["bash", SCRIPT, "train"], env=env, capture_output=True, text=True, timeout=60)

    assert done.returncode == 1
    assert "2 of 3 nodes have joined after 1 s" in done.stderr
    log = (tmp_path / "log").read_text()
    assert "driver" not in log
    assert "rm -rf /tmp/ray-42" in log


def test_ray_that_ends_at_once_is_not_waited_for(slurm, tmp_path):
    write_program(tmp_path / "env" / "bin" / "python", "exit 1")
    write_program(tmp_path / "bin" / "srun", 'if [[ "$*" == *"hostname --ip"* ]]; then echo 10.0.0.1; else exit 1; fi')

    started = time.monotonic()
    done = subprocess.run(["bash", SCRIPT, "train"], env=slurm, capture_output=True, text=True, timeout=60)

    assert done.returncode == 1
    assert "Ray ended on a node" in done.stderr
    assert time.monotonic() - started < 30


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
