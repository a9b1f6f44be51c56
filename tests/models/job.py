"""One architecture at a time, through the trainer's own path: `tests/helpers/ranks.py` starts `serve` in each rank.

A question names the architecture and the case; the answer says what came of it. Errors of the product are answers too; what
ends the process, or takes too long, is seen by whoever asked.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from strategies import runtime as processes
from strategies.errors import ShardtuneError
from strategies.matmul import Matmul
from strategies.parameters import named_parameters
from tests.helpers.building import alone, built_trainer, run_config
from tests.helpers.exports import model_of
from tests.helpers.ranks import serve
from tests.helpers.stores import write
from tests.helpers.tokenizers import tiny_tokenizer
from tests.models import stock, tiny
from tests.models.gradients import TOLERANCE, Differs, compare, compare_gradients, rounding
from tests.models.own import ONE_AT_A_TIME
from trainer.data.config import Layout
from trainer.data.prepare import PreparedData
from trainer.data.store.sequences import TokenDataset
from trainer.export.config import ExportConfig
from trainer.export.verify import DriftError, compute_probe_reference
from trainer.export.write import write_export
from trainer.model.config import ModelConfig
from trainer.model.layout import AttentionLayout
from trainer.model.loading import load_tokenizer
from trainer.reporting.documents.facts import ModelFacts
from trainer.reporting.run_record import RunRecord

GAP = 1e-4
"""Least relative distance between what a router chooses and what it passes over: twice the rounding of its scores by far."""
SEEDS = 6
"""Models that are drawn until routers decide clearly."""
ROOMS = ("/trainer/", "/strategies/")


class Tie(AssertionError):
    """A router decides too closely, or gradients cancel too nearly, to compare what follows: another model can tell."""


def sequence_word(arrangement: AttentionLayout) -> str:
    """Whether ranks can share a row of an architecture, for the table: `proven`, `padded`, or the reason without figures."""
    if arrangement.sequence_problem is None:
        return "proven"
    if arrangement.layout is Layout.padded:
        return "padded"
    return arrangement.sequence_problem.partition(" (")[0]


class Job:
    """One rank, the data, and the models that were made in it."""

    def __init__(self, root: Path, runtime: processes.Runtime) -> None:
        self.root, self.runtime = root, runtime
        self.samples = stock.documents()
        self._curves: dict[str, tuple[list[tuple[float, float]], float]] = {}
        if runtime.is_main and not (root / "data" / "manifest.json").exists():
            write(
                root / "data", self.samples, lambda s: {"loss": int(s.supervised[1:].sum())}, {"fingerprint": "models"}
            )
        processes.barrier(runtime)
        opened = TokenDataset.open(root / "data")
        self.data = PreparedData(train=opened, evaluation=opened, directory=root / "data", report={}, label_names=None)

    def single(self, model_type: str) -> dict[str, Any]:
        """What the architecture is, and how it trains whole and with LoRA in one process; of a model that decides clearly."""
        directory = self.root / model_type
        for seed in range(SEEDS):
            try:
                answer = self._single(model_type, directory, seed)
            except Tie as tie:
                answer = {"outcome": "tie", "reason": f"in each of {SEEDS} models: {tie}"}
            except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer
                answer = {
                    "outcome": "unmade",
                    "reason": _first_line(error),
                    "frame": _frame(error, ("/transformers/",)),
                }
            shutil.rmtree(directory, ignore_errors=True)
            if answer["outcome"] != "tie":
                break
        return answer

    def _single(self, model_type: str, directory: Path, seed: int) -> dict[str, Any]:
        what = made(model_type, directory, seed)
        oracle = stock.compute(directory, self.samples)
        if oracle.gap < GAP:
            raise Tie(f"decides by {oracle.gap:.1e}, at least {GAP} is clear")
        answer = {"outcome": "made", **what, "notes": oracle.notes}
        for tuning in ("full", "lora"):
            answer[tuning] = outcome_of(partial(self._trained, directory, tuning, oracle))
        answer["sequence"] = answer["full"].get("sequence", "-")
        return answer

    def _config(self, directory: Path, strategy: str, tuning: str) -> Any:
        micro = stock.DOCUMENTS // 2 // (1 if strategy == "single" else self.runtime.world_size)
        if directory.name.rpartition("-")[0] in ONE_AT_A_TIME or directory.name in ONE_AT_A_TIME:
            micro = 1
        config = run_config(directory, strategy, tuning, micro=micro, steps=2)
        evaluation = replace(config.evaluation, batch=micro)
        return replace(config, batch={"global": stock.DOCUMENTS, "micro": micro}, evaluation=evaluation)

    def _trained(self, directory: Path, tuning: str, oracle: stock.Stock) -> dict[str, Any]:
        """Two steps of `single` and an export, each compared with plain transformers; raises `Differs`."""
        trainer, built = built_trainer(self._config(directory, "single", tuning), self.data, alone(self.runtime))
        gradients: dict[str, torch.Tensor] = {}
        take = trainer.engine.step

        def look(*given: Any) -> Any:
            if not gradients:
                for name, parameter in named_parameters(built.step_module):
                    if parameter.requires_grad:
                        gradients[name] = torch.zeros(()) if parameter.grad is None else parameter.grad.clone()
            return take(*given)

        trainer.engine.step = look  # type: ignore[method-assign]
        values = {name: p.detach().clone() for name, p in named_parameters(built.step_module)}
        losses = [loss for loss, _ in _steps(trainer, 2)]
        compare("loss", losses[0], oracle.loss)
        try:
            worst = compare_gradients(gradients, values, oracle, built)
        except Differs as error:
            own = rounding(directory, self.samples, oracle)
            if own > TOLERANCE / 2:
                raise Tie(f"{error}; plain transformers itself rounds by {own:.1e}") from error
            raise
        if not all(map(_is_finite, losses)):
            raise Differs(f"losses {losses}")
        self._export(trainer, built, directory, tuning)
        answer = {"layout": str(built.layout), "attention": built.attention, "worst": worst, "losses": losses}
        return answer | {"sequence": sequence_word(built.attention_layout)}

    def _export(self, trainer: Any, built: Any, directory: Path, tuning: str) -> None:
        """Write the export and compare its logits, reloaded by plain transformers and peft, with the trained model's."""
        with stock.Choices() as choices:
            try:
                tokenizer = load_tokenizer(ModelConfig(path=str(directory)))
                runtime = alone(self.runtime)
                reference = compute_probe_reference(trainer.engine, built, tokenizer, runtime)
                checkpoint = directory / f"checkpoint-{tuning}"
                write_export(
                    model_of(trainer.engine, built, tokenizer, directory, checkpoint),
                    destination=directory / f"export-{tuning}",
                    config=ExportConfig(verify=True),
                    facts=ModelFacts(run=RunRecord(tuning=tuning)),
                    runtime=runtime,
                    reference=reference,
                )
            except DriftError as error:
                if choices.gap < GAP:
                    raise Tie(f"the trained model decides by {choices.gap:.1e}, at least {GAP} is clear") from error
                raise

    def ranks(self, model_type: str, strategy: str, tuning: str) -> dict[str, Any]:
        """Two steps under a strategy on all ranks, against `single` in the first of them. All ranks must call."""
        answer: dict[str, Any] = {}
        for seed in range(SEEDS):
            directory = self.root / f"{model_type}-{seed}"
            if self.runtime.is_main and not directory.exists():
                for other in self.root.glob("*-[0-9]"):
                    shutil.rmtree(other)
                made(model_type, directory, seed)
            processes.barrier(self.runtime)
            try:
                return outcome_of(partial(self._together, directory, strategy, tuning))
            except Tie as tie:  # on every rank: each compares the same numbers
                answer = {"outcome": "tie", "reason": f"in each of {SEEDS} models: {tie}"}
        return answer

    def _together(self, directory: Path, strategy: str, tuning: str) -> dict[str, Any]:
        trainer, built = built_trainer(self._config(directory, strategy, tuning), self.data, self.runtime)
        found = _steps(trainer, 2)
        expected, gap = processes.broadcast_object(
            self._lone(directory, tuning) if self.runtime.is_main else None, self.runtime
        )
        try:
            for step, ((loss, norm), (right_loss, right_norm)) in enumerate(zip(found, expected, strict=True), 1):
                compare(f"step {step}: loss", loss, right_loss)
                compare(f"step {step}: norm of the gradient", norm, right_norm)
        except Differs as error:
            if gap < GAP:
                raise Tie(f"decides by {gap:.1e}, at least {GAP} is clear") from error
            raise
        return {"layout": str(built.layout), "attention": built.attention}

    def _lone(self, directory: Path, tuning: str) -> tuple[list[tuple[float, float]], float]:
        """The curve of `single`, and how clearly it chose; asked again, the same."""
        key = f"{directory} {tuning}"
        if key not in self._curves:
            lone = self._config(directory, "single", tuning)
            with stock.Choices() as choices:
                curve = _steps(built_trainer(lone, self.data, alone(self.runtime))[0], 2)
            self._curves = {key: (curve, choices.gap)}
        return self._curves[key]


def made(model_type: str, directory: Path, seed: int) -> dict[str, Any]:
    """Save a tiny model with its tokenizer; what it is."""
    shutil.rmtree(directory, ignore_errors=True)
    model = tiny.tiny_model(model_type, seed=seed)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return {"parameters": sum(p.numel() for p in model.parameters()), "kinds": tiny.kinds(model)}


def _steps(trainer: Any, num: int) -> list[tuple[float, float]]:
    """(loss, norm of the gradient) of `num` steps, of all ranks or of a lone one, without any communication."""
    rows = []
    for batch in trainer.loader.steps(trainer.progress.samples, num):
        record = trainer.train_step(batch)
        if trainer.meter.runtime.world_size > 1:
            trainer.meter.add(record)
        else:
            rows.append((float(record.local_sums["loss"]) / record.counts["loss"], float(record.result.grad_norm)))
    return rows or [(row["loss"], row["grad_norm"]) for row in trainer.meter.flush()]


def _is_finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def outcome_of(run: Any) -> dict[str, Any]:
    """What came of a run of the product, in one word and one line."""
    try:
        found = run()
    except Tie:
        raise
    except ShardtuneError as error:
        word = "refused" if type(error).__name__ == "ConfigError" else "differs"
        return {"outcome": word, "reason": _first_line(error), "frame": _frame(error, ROOMS)}
    except Differs as error:
        return {"outcome": "differs", "reason": str(error), "frame": ""}
    except Exception as error:  # noqa: BLE001 - a defect, whatever it is
        return {"outcome": "traceback", "reason": _first_line(error), "frame": _frame(error, ROOMS)}
    return {"outcome": "padding-free" if found["layout"] == str(Layout.padding_free) else "padded", **found}


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:400]}"


def _frame(error: BaseException, rooms: tuple[str, ...]) -> str:
    """The innermost place in these directories that the error came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if any(room in f.filename for room in rooms)]
    frames = [f for f in frames if "/site-packages/" not in f.filename or rooms != ROOMS]
    return f"{'/'.join(Path(frames[-1].filename).parts[-3:])}:{frames[-1].lineno}" if frames else ""


def main(directory: Path) -> None:
    """Answer `(question, *arguments)` until nobody asks any more."""
    import transformers

    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    runtime = processes.join_job("cpu", timeout_s=600, threads=1, matmul=Matmul.blas)
    job = Job(directory, runtime)

    def answer(question: str, *arguments: str) -> Any:
        found = json.dumps({"single": job.single, "ranks": job.ranks}[question](*arguments))
        return json.loads(found.replace(f"{directory}/", ""))  # no sentence tells where it was tried

    serve(answer)
    processes.leave_job()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(Path(sys.argv[1]))
