"""A stand-in for `trainer.run` in processes that a test starts: ranks meet over gloo, then do as STAND_IN says."""

STAND_IN = """
import os, signal, sys, time, types

def train_as_rank(config, run_dir, sha256, freeze):
    import torch, torch.distributed as dist
    from strategies.errors import ConfigError, Preempted
    from trainer.stopping.signals import StopRequest
    from trainer.reporting.status import write_status
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    what = os.environ["STAND_IN"]
    request = StopRequest().__enter__()
    if world > 1:
        dist.init_process_group("gloo")
    if os.path.isdir(run_dir):
        aside = os.path.join(run_dir, f"{rank}.writing")
        open(aside, "w").write(str(os.getpid()))
        os.rename(aside, os.path.join(run_dir, f"rank-{rank}.pid"))  # at once whole
    if what == "user" and rank == 1:
        raise ConfigError(["tuning.targets=nope: matches no module"])
    if what == "raise" and rank == 1:
        raise ValueError("the batch is bad")
    if what == "kill" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "stuck" and rank == 1:
        while True:
            time.sleep(60)
    for step in range(1, 400 if what in ("long", "kill", "raise", "user", "stuck") else 3):
        total = torch.ones(1)
        if world > 1:
            dist.all_reduce(total)
        if rank == 0:
            write_status(run_dir, "running", step=step)
        stop = torch.tensor([float(request.signal_name is not None)])
        if world > 1:
            dist.all_reduce(stop)
        if stop:
            if rank == 0:
                write_status(run_dir, "preempted", step=step)
            raise Preempted("asked to stop")
        if what in ("long", "stuck"):
            time.sleep(0.1)
    if rank == 0:
        open(os.path.join(run_dir, "environment"), "w").write(
            f"{world} {os.environ.get('OMP_NUM_THREADS')} {sha256}")
        write_status(run_dir, "done", step=step)
    if world > 1:
        dist.destroy_process_group()

module = types.ModuleType("trainer.run")
module.train_as_rank = train_as_rank
sys.modules["trainer.run"] = module
"""
