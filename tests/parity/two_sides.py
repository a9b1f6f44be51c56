"""Encoder-decoder models under every strategy and in one process: part of the parity job (`job.py`)."""

from dataclasses import asdict, replace
from typing import Any

import torch

from strategies.base import ActivationCheckpointing, Fsdp2Config, StrategyConfig, StrategyName, ZeroConfig
from tests.helpers import writing
from tests.helpers.building import STRATEGIES, alone, model_dir, run_config, take_steps, two_sided_set
from tests.helpers.seq2seq import seq2seq_dir
from tests.parity.base import Job
from tests.parity.methods import FEWER
from trainer.build.parts import build_engine
from trainer.config.run import RunConfig
from trainer.data.batches.loader import EvalShare
from trainer.data.config import DataConfig
from trainer.data.prepare import PreparedData
from trainer.evaluation import full_weights
from trainer.evaluation.base import DecodingConfig, GenerateConfig
from trainer.evaluation.generate import AnswerGenerator
from trainer.evaluation.generation import GenerationEvaluator
from trainer.model.loading import load_generation_config, load_tokenizer
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


def compare(job: Job, name: str) -> dict[str, Any]:
    """The curve of all ranks, that of `single`, which takes each step in one micro-batch; how far it learns."""
    architecture, tuning, strategy = CASES[name]
    config, data = config_of(job, architecture, tuning, strategy)
    key = architecture, tuning
    expected, far = job.oracle(("two sides", *key), lambda: job.lone_and_far(config, FEWER, data), elsewhere=([], 0.0))
    return {"found": job.curve(config, FEWER, data), "expected": expected, "learned": far}


def config_of(job: Job, architecture: str, tuning: str, strategy: StrategyConfig) -> tuple[RunConfig, PreparedData]:
    """A run in which each rank takes two micro-batches a step, and its data."""
    model, data = job.first_here(lambda: (seq2seq_dir(job.root, architecture), two_sided_set(job.root)))
    config = run_config(model, strategy, tuning, micro=4, steps=STEPS)
    config = replace(config, objective=Seq2seqConfig(max_target=64), data=DataConfig(max_length=64))
    return replace(config, optim=replace(config.optim, max_grad_norm=0.2)), data


GENERATING = [
    f"{architecture} {strategy}"
    for architecture in ("bart", "t5", "llama")
    for strategy in ("ddp", "fsdp2", "hsdp", "zero2", "zero3")
]
NUM_ANSWERED = 13
"""Documents answered: no multiple of ranks times batch, so that one rank has a batch less."""


def generate(job: Job, case: str) -> dict[str, Any]:
    """Answers of all ranks beside those of plain transformers, one document at a time."""
    settings = GenerateConfig(samples=NUM_ANSWERED, max_new_tokens=12)
    architecture, strategy = case.split()
    if architecture == "llama":
        model, data = job.first_here(lambda: (model_dir(job.root, architecture), two_sided_set(job.root)))
        config = run_config(model, STRATEGIES[strategy], "lora", micro=4, steps=STEPS)
    else:
        config, data = config_of(job, architecture, "lora", STRATEGIES[strategy])
    tokenizer = load_tokenizer(config.model)
    engine, built, _ = build_engine(config, tokenizer, data, config.precision, job.runtime)
    evaluator = GenerationEvaluator(
        data.train,
        # One: ranks finish apart in every turn; three: rows are padded.
        EvalShare(1 if architecture == "bart" else 3, engine.rank, engine.world_size, NUM_ANSWERED),
        tokenizer,
        settings,
        generation_config=load_generation_config(
            config.model, built.config, built.encoder_decoder.decoder_start if built.encoder_decoder else None
        ),
        runtime=job.runtime,
    )
    written, write = [], evaluator.answer_documents
    evaluator.answer_documents = lambda engine: written.extend(write(engine)) or written  # type: ignore[method-assign]
    values = dict(evaluator.run(engine))
    answers = [[one.document, one.answer] for one in written]
    expected, lengths = job.oracle(
        ("answers", architecture), lambda: plain_answers(config, data, tokenizer, settings), elsewhere=([], [])
    )
    return {"found": answers, "expected": expected, "lengths": lengths, "values": values}


def plain_answers(
    config: RunConfig, data: PreparedData, tokenizer: Any, settings: GenerateConfig
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


WRITING = [
    f"{architecture} {strategy} {how}"
    for architecture in ("llama", "qwen3_moe", "bart")
    for strategy in ("ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")
    for how in ("gathered", "by block")
]
GREEDY = DecodingConfig(max_new_tokens=4)
DRAWN = DecodingConfig(max_new_tokens=3, temperature=1.0, top_k=50, draws=2, seed=3, batch_tokens=80)


def write(job: Job, case: str) -> dict[str, Any]:
    """Answers, draws and likelihoods of all ranks, which gather weights as told, beside those of `single`."""
    architecture, strategy, how = case.split(maxsplit=2)
    prompts = writing.prompts(9)
    job.first_here(lambda: (writing.directory(job.root, architecture), two_sided_set(job.root)))

    def all_of(runtime: Any, strategy: Any) -> list[Any]:
        engine, writer = writing.made(job.root, architecture, runtime, strategy, batch=2)
        said = [[asdict(one) for one in writer.generate_answers(engine, prompts, asked)] for asked in (GREEDY, DRAWN)]
        assert writer.throughput is not None
        pairs = [(prompts[n], prompts[n - 1][:6]) for n in range(9)]
        scores = [one.logprob for one in writer.likelihoods(engine, pairs)]
        return [*said, scores, writer.throughput.gathering.sharded and writer.throughput.gathering.gathered_once]

    expected = job.oracle(
        ("written", architecture), lambda: all_of(alone(job.runtime), STRATEGIES["single"]), elsewhere=[[], [], [], 0]
    )
    share = full_weights.USABLE_MEMORY_SHARE
    try:
        full_weights.USABLE_MEMORY_SHARE = share if how == "gathered" else 0.0
        greedy, drawn, scores, whole = all_of(job.runtime, STRATEGIES[strategy])
    finally:
        full_weights.USABLE_MEMORY_SHARE = share
    apart: list[int] = []
    if job.runtime.is_main:
        plain = writing.plain(job.root, architecture)
        pairs = zip(prompts, greedy, expected[0], strict=True)
        apart = [n for n, (p, one, other) in enumerate(pairs) if writing.differ(plain, p, one["ids"], other["ids"])]
    return {"greedy": apart, "drawn": [drawn, expected[1]], "scores": [scores, expected[2]], "whole": whole}


def write_between_steps(job: Job, strategy: str) -> dict[str, Any]:
    """The curve of a run that writes, with weights gathered, before the first step and after it, beside that of `single`."""
    model = job.first_here(lambda: model_dir(job.root, "llama"))
    config = run_config(model, STRATEGIES[strategy], "full", micro=4, steps=STEPS)
    trainer, curve = job.trainer(config), []
    writer = AnswerGenerator(
        load_tokenizer(config.model), load_generation_config(config.model, None, None), job.runtime, batch=2
    )
    texts = []
    for _ in range(3):
        texts.append([one.ids for one in writer.generate_answers(trainer.engine, writing.prompts(5), GREEDY)])
        assert (
            writer.throughput is not None
            and writer.throughput.gathering.gathered_once
            and writer.throughput.gathering.sharded
        )
        curve += [list(pair) for pair in take_steps(trainer, 1)]
    return {"found": curve, "expected": job.lone(config, 3), "texts": texts}
