"""Tiny tokenizers with stock-like chat templates, and small data sets, made on the spot."""

import json
from functools import lru_cache
from pathlib import Path

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    + CHATML
)
CHATML_GENERATION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + "
    "' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
THINKING = (  # hides the thoughts of all but the last turn, and opens the last one with an empty thought if need be
    "{% for message in messages %}{% set content = message['content'] %}{% set thought = '' %}"
    "{% if message['role'] == 'assistant' and '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}"
    "{{ content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_END = (  # roles are told by tokens, and nothing closes a turn
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
DROPS_REPLY = (  # broken on purpose: cuts every reply in the middle
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'][:5] "
    "+ '<|im_end|>\n' }}{% endfor %}"
)
SPECIAL = [
    "<s>",
    "</s>",
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "[INST]",
    "[/INST]",
    "<|user|>",
    "<|assistant|>",
]
WORDS = "the quick brown fox jumps over a lazy dog ; hello world , what is it ? You are a helpful assistant . answer"


@lru_cache
def _backend(vocab_size: int, adds_bos: bool, texts: tuple[str, ...] = (WORDS,)) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts * 4, trainer)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    return backend.to_str()


def tiny_tokenizer(
    chat_template: str | None = CHATML,
    *,
    eos_token: str = "</s>",
    adds_bos: bool = False,
    vocab_size: int = 384,
    texts: tuple[str, ...] = (WORDS,),
):
    """A byte-level BPE tokenizer of at most `vocab_size` entries (256 of them bytes); pad is `<pad>`, bos is `<s>`.

    `texts`: what its pieces are learned from. A word that begins a text there is one token, if the vocabulary has room.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(vocab_size, adds_bos, texts)),
        bos_token="<s>",
        eos_token=eos_token,
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def chat_rows(num: int, *, seed: int = 0) -> list[dict]:
    """Conversations of one or two turns with replies of 1 to 24 words, different from each other."""
    import random

    draw = random.Random(seed)
    words = WORDS.split()
    rows = []
    for number in range(num):
        turns = []
        for _ in range(draw.choice((1, 1, 2))):
            turns.append({"role": "user", "content": f"question {number} " + " ".join(draw.choices(words, k=4))})
            turns.append({"role": "assistant", "content": " ".join(draw.choices(words, k=draw.randint(1, 24)))})
        rows.append({"messages": turns})
    return rows


def write_chat_data(path: Path, num: int = 32, *, seed: int = 0) -> Path:
    """A JSONL chat data set of `num` conversations."""
    return write_jsonl(path, chat_rows(num, seed=seed))


def pair_rows(num: int, *, seed: int = 0) -> list[dict]:
    """Preference rows: a prompt, a chosen answer of short words, a rejected one of question marks."""
    import random

    draw = random.Random(seed)
    words = WORDS.split()
    return [
        {
            "prompt": f"question {number} " + " ".join(draw.choices(words, k=4)),
            "chosen": " ".join(draw.choices(words, k=draw.randint(1, 12))),
            "rejected": " ".join(draw.choices(["?", "??", "what"], k=draw.randint(1, 12))),
        }
        for number in range(num)
    ]


def write_pairs(path: Path, num: int = 32, *, seed: int = 0) -> Path:
    """A JSONL data set of `num` preference rows."""
    return write_jsonl(path, pair_rows(num, seed=seed))
