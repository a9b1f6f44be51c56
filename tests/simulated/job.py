"""Two ranks that take a case's steps for real, with every collective through gloo."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops, sync_ops
from torch.utils._python_dispatch import TorchDispatchMode

from strategies import runtime as processes
from strategies.matmul import Matmul
from tests.helpers.ranks import serve
from tests.simulated.cases import Case, DealtExperts, LongRows, comparable, real


class OneThread(dist.ProcessGroupGloo):
    """gloo with a single thread, which begins an exchange when it has let go of the tensors of the one before."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta, **_: Any) -> None:
        options = self._Options()  # later versions of torch tell more, none of which is asked for here
        options._devices = [self.create_default_device()]
        options._timeout, options._threads = timeout, 1
        super().__init__(store, rank, size, options)


class LetGo(TorchDispatchMode):
    """After each exchange a barrier in the same group: when it is over, no thread holds what was exchanged.

    By itself gloo lets go of an exchange when its threads come to it: of the tensors, and of what was thread-local when it was
    called, such as what checkpointing recomputes. The barrier is called from a thread that has nothing of the kind.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread = ThreadPoolExecutor(1)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in collective_ops and func not in sync_ops:
            group = CollectiveOp.get_process_group(func, args)
            self._thread.submit(lambda: group.barrier().wait()).result()
        return out


def main(place: Path) -> None:
    distributed_c10d.ProcessGroupGloo = OneThread  # type: ignore[misc]
    runtime = processes.join_job("cpu", timeout_s=600, threads=1, matmul=Matmul.blas, shared_memory=False)

    exchange = LetGo()

    def answer(_attempt: int, *case: Any) -> Any:
        (kind,) = (kind for kind in (Case, LongRows, DealtExperts) if len(case) == len(fields(kind)))
        with exchange:
            return comparable(real(kind(*case), kind(*case).model_in(place), runtime))

    serve(answer)
    processes.leave_job()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
