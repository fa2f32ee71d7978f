"""A run of two workers under Ray, one of which leaks: started by the tests inside a real memory limit.

python leaking_run.py FOLDER MB_PER_S [HELD]

HELD: bytes that the driver holds from the start, so that a slow leak is not long on its way. MB_PER_S 0 is as fast
as the machine can.
"""

import json
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

MB = 1 << 20


def leak_when_told(trigger: str, mb_per_s: float) -> None:
    """In every process of Ray: a thread that leaks once the trigger is there, if this is rank 1 of a training."""
    kept = []

    def leak() -> None:
        while not Path(trigger).exists():
            time.sleep(0.02)
        dist = sys.modules.get("torch.distributed")
        if dist is None or not dist.is_initialized() or dist.get_rank() != 1:
            return
        start, done, piece = time.perf_counter(), 0, 8 * MB
        while True:
            kept.append(b"\1" * piece)
            done += piece
            if mb_per_s:
                time.sleep(max(0.0, start + done / (mb_per_s * MB) - time.perf_counter()))

    threading.Thread(target=leak, daemon=True).start()


def tell_at_step(metrics: Path, step: int, trigger: Path) -> None:
    """Set the leak off once the run has got so far."""
    while not (metrics.exists() and any(f'"step":{s},' in metrics.read_text() for s in range(step, step + 50))):
        time.sleep(0.05)
    trigger.touch()


def main() -> None:
    folder, rate = Path(sys.argv[1]), float(sys.argv[2])
    held = b"\1" * (int(sys.argv[3]) if len(sys.argv) > 3 else 0)
    sys.path.insert(0, str(Path(__file__).parents[2]))
    import ray

    from brainenc.train.launch import train
    from tests.train.conftest import _make

    small = _make(folder / "data", n_train=45, n_test=5)
    trigger = str(folder / "trigger")
    environment = {"worker_process_setup_hook": lambda: leak_when_told(trigger, rate)}
    # A short path: those of Ray's sockets end at 107 characters.
    scratch = tempfile.mkdtemp(prefix=f"leak{os.getpid()}-", dir="/tmp")
    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False,
        logging_level="ERROR", runtime_env=environment, _temp_dir=scratch,
    )  # fmt: skip
    config = small.config(folder / "run", workers="2", epochs=4000, guard={"on_critical": "stop"})
    teller = threading.Thread(target=tell_at_step, args=(folder / "run/metrics.jsonl", 10, Path(trigger)), daemon=True)
    teller.start()
    result = train(config)
    outcome = {"exit_code": result.exit_code, "status": result.status, "step": result.step, "held": len(held)}
    print(json.dumps({**outcome, "at": str(result.checkpoint)}))
    ray.shutdown()
    shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
