"""Two ranks that take a case's steps for real, with every collective through gloo."""

import sys
from pathlib import Path

from strategies import runtime as processes
from strategies.matmul import Matmul
from tests.helpers.ranks import serve
from tests.simulated.cases import Case, comparable, real


def main(model: Path) -> None:
    runtime = processes.start("cpu", timeout_s=600, threads=1, matmul=Matmul.blas, shared_memory=False)
    serve(
        lambda *question: comparable(real(Case(*question[:-1]), model, runtime))
    )  # the last tells runs of a case apart
    processes.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]) / "llama")
