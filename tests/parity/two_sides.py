"""Encoder-decoder models under every strategy and in one process: part of the job of `features.py`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from strategies import runtime as processes
from strategies.base import ActivationCheckpointing, Fsdp2Config, StrategyConfig, StrategyName, ZeroConfig
from tests.helpers.building import (
    GLOBAL_BATCH,
    STRATEGIES,
    alone,
    model_dir,
    run_config,
    take_steps,
    trainer_for,
    two_sided_set,
)
from tests.helpers.seq2seq import seq2seq_dir
from trainer.build import build_engine
from trainer.config.run import RunConfig
from trainer.data.batches.loader import EvalShare
from trainer.data.config import DataConfig
from trainer.data.prepare import Prepared
from trainer.evaluation.base import GenerateConfig
from trainer.evaluation.generation import GenerationEvaluator
from trainer.model.loading import generation_config, load_tokenizer
from trainer.objectives.seq2seq import Seq2seqConfig

STEPS = 5
FULL, SELECTIVE = ActivationCheckpointing.full, ActivationCheckpointing.selective
CASES: dict[str, tuple[str, str, StrategyConfig]] = {
    **{
        f"{architecture} {tuning} {strategy}": (architecture, tuning, STRATEGIES[strategy])
        for architecture in ("t5", "bart")
        for tuning in ("full", "lora")
        for strategy in ("ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")
    },
    **{
        f"{architecture} full {strategy}": (architecture, "full", STRATEGIES[strategy])
        for architecture in ("t5_untied", "pegasus")
        for strategy in ("ddp", "fsdp2", "zero3")
    },
    "t5 full fsdp2 checkpointed": ("t5", "full", Fsdp2Config(activation_checkpointing=FULL)),
    "t5 lora fsdp2 checkpointed": ("t5", "lora", Fsdp2Config(activation_checkpointing=FULL)),
    "bart full fsdp2 checkpointed by choice": ("bart", "full", Fsdp2Config(activation_checkpointing=SELECTIVE)),
    "bart full zero3 checkpointed by choice": (
        "bart",
        "full",
        ZeroConfig(name=StrategyName.zero3, stage=3, activation_checkpointing=SELECTIVE),
    ),
    "t5 full zero2 checkpointed": ("t5", "full", ZeroConfig(activation_checkpointing=FULL)),
}


def compare(root: Path, runtime: processes.Runtime) -> dict:
    """Curves of all ranks beside those of `single`, which takes each step's documents in one micro-batch."""
    found, oracles = {}, {}
    for name, (architecture, tuning, strategy) in CASES.items():
        config = config_of(root, architecture, tuning, strategy)
        if (architecture, tuning) not in oracles:
            oracles[architecture, tuning] = alone_curve(config, root, runtime)
        curve = take_steps(trainer_for(config, two_sided_set(root), runtime), STEPS)
        found[name] = {"found": curve, "expected": oracles[architecture, tuning]}
    return found


def config_of(root: Path, architecture: str, tuning: str, strategy: StrategyConfig) -> RunConfig:
    """A run in which each rank takes two micro-batches a step."""
    config = run_config(seq2seq_dir(root, architecture), strategy, tuning, micro=4, steps=STEPS)
    config = replace(config, objective=Seq2seqConfig(max_target=64), data=DataConfig(max_length=64))
    return replace(config, optim=replace(config.optim, max_grad_norm=0.2))


def alone_curve(config: RunConfig, root: Path, runtime: processes.Runtime) -> list[list[float]]:
    """Loss and gradient norm of each step in this process alone, without any communication."""
    whole = replace(config, strategy=STRATEGIES["single"], batch={"global": GLOBAL_BATCH, "micro": GLOBAL_BATCH})
    trainer = trainer_for(whole, two_sided_set(root), alone(runtime))
    rows = []
    for batch in trainer.loader.steps(0, STEPS):
        record = trainer.train_step(batch)
        rows.append([float(record.local_sums["loss"]) / record.counts["loss"], float(record.result.grad_norm)])
    return rows


GENERATING = [
    f"{architecture} {strategy}"
    for architecture in ("bart", "t5", "llama")
    for strategy in ("ddp", "fsdp2", "hsdp", "zero2", "zero3")
]
NUM_ANSWERED = 13
"""Documents answered: no multiple of ranks times batch, so that one rank has a batch less."""


def generate(root: Path, runtime: processes.Runtime) -> dict:
    """Answers of all ranks beside those of plain transformers, one document at a time."""
    found, oracles = {}, {}
    settings = GenerateConfig(samples=NUM_ANSWERED, max_new_tokens=12)
    for case in GENERATING:
        architecture, strategy = case.split()
        if architecture == "llama":
            config = run_config(model_dir(root, architecture), STRATEGIES[strategy], "lora", micro=4, steps=STEPS)
        else:
            config = config_of(root, architecture, "lora", STRATEGIES[strategy])
        data = two_sided_set(root)
        tokenizer = load_tokenizer(config.model)
        engine, built, _ = build_engine(config, tokenizer, data, config.precision, runtime)
        if architecture not in oracles:
            oracles[architecture] = plain_answers(config, data, tokenizer, settings)
        evaluator = GenerationEvaluator(
            data.train,
            # One: ranks finish apart in every turn; three: rows are padded.
            EvalShare(1 if architecture == "bart" else 3, engine.dp_rank, engine.dp_size, NUM_ANSWERED),
            tokenizer,
            settings,
            generation_config=generation_config(
                config.model, built.config, built.two_sides.decoder_start if built.two_sides else None
            ),
            runtime=runtime,
        )
        answers = [[one.document, one.answer] for one in evaluator.answers(engine)]
        expected, lengths = oracles[architecture]
        values = dict(evaluator.run(engine))
        found[case] = {"found": answers, "expected": expected, "lengths": lengths, "values": values}
    return found


def plain_answers(
    config: RunConfig, data: Prepared, tokenizer: Any, settings: GenerateConfig
) -> tuple[list[list[Any]], list[int]]:
    """The same by `generate` of plain transformers, without padding; and how many tokens each has."""
    import transformers

    seq2seq = isinstance(config.objective, Seq2seqConfig)
    auto: Any = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(config.model.path, dtype=torch.float32).eval()
    answers: list[list[Any]] = []
    lengths = []
    for number in range(NUM_ANSWERED):
        sample = data.train.sample(number)
        prompt = torch.tensor(sample.input_ids[: sample.answer_begin()], dtype=torch.int64)[None]
        ids = model.generate(input_ids=prompt, do_sample=False, max_new_tokens=settings.max_new_tokens, pad_token_id=2)
        new = ids if seq2seq else ids[:, prompt.shape[1] :]
        answers.append([number, tokenizer.decode(new[0], skip_special_tokens=True).strip()])
        lengths.append(new.shape[1])
    return answers, lengths
