"""Chat templates that behave as the published ones of well-known model families, and a tiny tokenizer for each."""

from dataclasses import dataclass
from functools import lru_cache

from tests.helpers import tokenizers as make

_ALTERNATE = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{% if (m['role'] == 'user') != (ns.number % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user, assistant') }}{% endif %}"
    "{% set ns.number = ns.number + 1 %}{% endif %}{% endfor %}"
)
_CHATML_TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
)
_CHATML_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = _CHATML_TURNS + _CHATML_PROMPT
QWEN25 = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are Qwen, a helpful assistant.<|im_end|>\n' }}{% endif %}" + CHATML
)
QWEN3 = (  # thoughts before the last question are hidden, and the last answer always has a thought, perhaps an empty one
    "{% set ns = namespace(last=messages | length) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set text = m['content'] %}{% if m['role'] == 'assistant' %}"
    "{% set thought = '' %}{% if '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + text.lstrip('\n') }}{% else %}{{ text }}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + text + '<|im_end|>\n' }}{% endif %}{% endfor %}" + _CHATML_PROMPT
)
LLAMA3 = (
    "{% if strftime_now is defined %}{% set today = strftime_now('%d %b %Y') %}"
    "{% else %}{% set today = '26 Jul 2024' %}{% endif %}"
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: ' + today + '\n\n' + system + '<|eot_id|>' }}"
    "{% for m in turns %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim "
    "+ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{% set ns = namespace(number=0) %}{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + _ALTERNATE
    + "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL3 = (  # the system turn goes into the last question
    "{% set ns = namespace(number=0) %}"
    + _ALTERNATE
    + "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% set users = turns | selectattr('role', 'equalto', 'user') | list %}{{ bos_token }}"
    "{% for m in turns %}{% if m['role'] == 'user' %}{% if system and m == users[-1] %}"
    "{{ '[INST] ' + system + '\n\n' + m['content'] + '[/INST]' }}{% else %}"
    "{{ '[INST] ' + m['content'] + '[/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
ZEPHYR = (  # its headers are plain text
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Family:
    """A template and what is known about it."""

    template: str
    end: str
    """Token that closes assistant turns."""
    user_end: str
    system: bool = True
    """Whether it takes system turns."""
    tokens: tuple[str, ...] = ()
    """Added tokens beyond those of `tests.helpers.tokenizers`."""


FAMILIES = {
    "chatml": Family(CHATML, "<|im_end|>", "<|im_end|>"),
    "qwen2.5": Family(QWEN25, "<|im_end|>", "<|im_end|>"),
    "qwen3": Family(QWEN3, "<|im_end|>", "<|im_end|>", tokens=("<think>", "</think>")),
    "llama3": Family(LLAMA3, "<|eot_id|>", "<|eot_id|>"),
    "gemma": Family(GEMMA, "<end_of_turn>", "<end_of_turn>", system=False),
    "mistral": Family(MISTRAL3, "</s>", "[/INST]"),
    "phi3": Family(PHI3, "<|end|>", "<|end|>", tokens=("<|end|>", "<|system|>")),
    "phi4": Family(PHI4, "<|im_end|>", "<|im_end|>", tokens=("<|im_sep|>",)),
    "zephyr": Family(ZEPHYR, "</s>", "</s>"),
}


@lru_cache
def tokenizer(name: str):
    """A tiny byte-level tokenizer with a family's tokens and template."""
    family = FAMILIES[name]
    made = make.tiny_tokenizer(family.template, adds_bos=True)
    made.add_tokens(list(family.tokens), special_tokens=True)
    return made
