"""Writers around tiny models, and what plain transformers writes and scores with the same files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from strategies.base import Engine
from strategies.runtime import Runtime
from tests.helpers.building import model_dir, run_config, two_sided_set
from tests.helpers.seq2seq import seq2seq_dir
from trainer.build.parts import build_engine
from trainer.data.config import DataConfig
from trainer.evaluation.generate import AnswerGenerator
from trainer.model.loading import load_generation_config, load_tokenizer
from trainer.objectives.seq2seq import Seq2seqConfig

TWO_SIDED = ("bart", "t5")
CLOSE = 1e-4
"""Logits that lie closer than this may change places by rounding."""


def directory(root: Path, architecture: str) -> Path:
    """The model's files; made once."""
    return seq2seq_dir(root, architecture) if architecture in TWO_SIDED else model_dir(root, architecture)


def made(
    root: Path, architecture: str, runtime: Runtime, strategy: Any = "single", **words: Any
) -> tuple[Engine, AnswerGenerator]:
    """The engine of a model in `root / architecture`, and its writer. All ranks must call."""
    both = architecture in TWO_SIDED
    model = directory(root, architecture)
    sides = {"objective": Seq2seqConfig(max_target=64), "data": DataConfig(max_length=64)} if both else {}
    config = run_config(model, strategy, "lora", micro=4, **sides)
    tokenizer = load_tokenizer(config.model)
    engine, built, _ = build_engine(config, tokenizer, two_sided_set(root), config.precision, runtime)
    start = built.encoder_decoder.decoder_start if built.encoder_decoder else None
    return engine, AnswerGenerator(
        tokenizer, load_generation_config(config.model, built.config, start), runtime, **words
    )


def plain(root: Path, architecture: str) -> Any:
    """The model as transformers loads it."""
    import transformers

    both = architecture in TWO_SIDED
    auto: Any = transformers.AutoModelForSeq2SeqLM if both else transformers.AutoModelForCausalLM
    return auto.from_pretrained(root / architecture, dtype=torch.float32, attn_implementation="eager").eval()


def prompts(num: int, *, vocab: int = 300) -> list[list[int]]:
    """Random prompts of 1 to 30 tokens."""
    made = torch.Generator().manual_seed(11)
    return [torch.randint(3, vocab, (1 + (7 * n) % 30,), generator=made).tolist() for n in range(num)]


def logits_after(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """`[len(answer), V]`: what plain transformers says of each token of an answer."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            begun = torch.tensor([[model.generation_config.decoder_start_token_id, *answer[:-1]]])
            return model(input_ids=torch.tensor([[*prompt]]), decoder_input_ids=begun).logits[0]
        return model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]


def differ(model: Any, prompt: Sequence[int], one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two greedy answers differ for another reason than the two best logits lying within `CLOSE`."""
    if [*one] == [*other]:
        return False
    place = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    if place >= min(len(one), len(other)):
        return True
    best = logits_after(model, prompt, [*one][: place + 1])[-1].topk(2).values
    return bool(best[0] - best[1] > CLOSE)
