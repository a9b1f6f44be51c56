"""The data of the benchmark: seeded conversations of invented words, and a BPE tokenizer trained on them."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

SEED = 7
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}BEGIN{{ message['content'] + '<|im_end|>' }}END"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML; BEGIN and END become the generation block that TRL and `datasets` need for their masks, or nothing."""
TEMPLATES = {
    "plain": CHATML.replace("BEGIN", "").replace("END", ""),
    "generation": CHATML.replace("BEGIN", "{% generation %}").replace("END", "{% endgeneration %}"),
}


def conversations(count: int) -> Iterator[dict[str, Any]]:
    """`count` instruction conversations of invented words, 1 or 2 exchanges each, 30 % with a system turn."""
    draw = random.Random(SEED)
    onsets = [
        "b",
        "bl",
        "br",
        "c",
        "ch",
        "d",
        "dr",
        "f",
        "fl",
        "g",
        "gr",
        "h",
        "j",
        "k",
        "l",
        "m",
        "n",
        "p",
        "pl",
        "pr",
        "qu",
        "r",
        "s",
        "sh",
        "st",
        "t",
        "th",
        "tr",
        "v",
        "w",
        "z",
    ]
    vowels, codas = (
        ["a", "e", "i", "o", "u", "ai", "ea", "ie", "oo", "ou"],
        ["", "", "", "n", "r", "s", "t", "l", "nd", "ck", "m", "st"],
    )

    def syllable() -> str:
        return draw.choice(onsets) + draw.choice(vowels) + draw.choice(codas)

    words = sorted({"".join(syllable() for _ in range(draw.choice((1, 2, 2, 3)))) for _ in range(30_000)})
    words.sort(key=lambda word: len(word) + draw.gauss(0, 2))  # as in a language, the frequent ones are short
    weights = list(accumulate(1 / (rank + 3) for rank in range(len(words))))

    def text(number: int) -> str:
        out, left = "", number
        while left > 0:
            length = min(left, draw.randint(4, 16))
            left -= length
            chosen = draw.choices(words, cum_weights=weights, k=length)
            if draw.random() < 0.15:
                chosen[-1] = str(draw.randint(2, 2000))
            if length > 8:
                chosen[length // 2] += ","
            out += " ".join(chosen).capitalize() + draw.choice(".....?!") + (" " if draw.random() < 0.85 else "\n\n")
        return out.strip()

    for _ in range(count):
        messages = []
        if draw.random() < 0.3:
            messages.append({"role": "system", "content": text(draw.randint(6, 20))})
        for _ in range(draw.choice((1, 1, 2))):
            messages.append({"role": "user", "content": text(draw.randint(5, 40))})
            messages.append({"role": "assistant", "content": text(int(draw.lognormvariate(3.45, 0.75)) + 3)})
        yield {"messages": messages}


def make_inputs(directory: Path, count: int, vocabulary: int = 32_000) -> Path:
    """The JSONL file of `count` conversations, and beside it the tokenizers trained on it; made once."""
    data = directory / "data.jsonl"
    if (directory / "done").exists():
        return data
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    texts = []
    with data.open("w", encoding="utf-8") as file:
        for row in conversations(count):
            file.write(json.dumps(row) + "\n")
            texts += [message["content"] for message in row["messages"]]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    for name, template in TEMPLATES.items():
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=1_000_000
        )
        tokenizer.chat_template = template
        tokenizer.save_pretrained(directory / name)
    (directory / "done").touch()
    return data
