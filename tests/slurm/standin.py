"""A stand-in for the trainer's worker: writes what a run writes and handles its signals, in 60 lines and one second.

Copied as `launch/train.py` into a directory where a job starts, so that scripts and signals are tested by themselves.
Counts steps; USR2 or TERM on any rank saves the step and ends with status "preempted"; the next start goes on. Where STANDIN_GATE
names a file, the last step is taken when that is there: a signal that is slow to come does not find the job over.
"""

import json
import os
import signal
import threading
import time
from pathlib import Path

SIGNALS = {signal.SIGUSR2, signal.SIGTERM}


def write(path: Path, value: dict) -> None:
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(value))
    aside.replace(path)


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    got: list[int] = []
    threading.Thread(target=lambda: got.append(signal.sigwait(SIGNALS)), daemon=True).start()

    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, host, run = dist.get_rank(), os.uname().nodename, Path(os.environ["SHARDTUNE_RUN_DIR"])
    saved, status = run / "step.json", run / "status.json"
    job_start_fields = {"job": os.environ["SLURM_JOB_ID"], "restart": int(os.environ.get("SLURM_RESTART_COUNT") or 0)}
    start = json.loads(saved.read_text())["step"] if saved.exists() else 0
    print(
        f"rank {rank} of {dist.get_world_size()} on {host}, threads {os.environ['OMP_NUM_THREADS']}, start {start}",
        flush=True,
    )
    total, gate = int(os.environ.get("STANDIN_STEPS", "20")), Path(os.environ.get("STANDIN_GATE", "/"))
    state, step = "done", start
    while step < total:
        flag = torch.tensor([float(bool(got)), float(rank), float(rank == 0 and gate.exists())])
        dist.all_reduce(flag)
        assert flag[1] == sum(range(dist.get_world_size()))
        if flag[0]:
            state = "preempted"
            break
        step += int(step < total - 1 or bool(flag[2]))
        if rank == 0:
            write(run / "beat.json", {"step": step})
        time.sleep(0.1)
    if rank == 0:
        write(saved, {"step": step})
        with (run / "starts.jsonl").open("a") as out:
            out.write(json.dumps({"from": start, "to": step, "state": state}) + "\n")
        write(status, {"state": state, "step": step, **job_start_fields})
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
