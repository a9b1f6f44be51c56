"""A whole model in 4 or 8 bits by bitsandbytes, read back, and what that costs: its loss beside that of the export."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.errors import ConfigError

if TYPE_CHECKING:
    from trainer.data.store.sequences import Sample

DOCUMENTS, TOKENS = 32, 1024
"""Most documents that are measured, and most tokens of each."""


class FewBits(StrEnum):
    """How values are stored: NF4 in blocks (Dettmers et al. 2023, arXiv:2305.14314), or LLM.int8() (2022, arXiv:2208.07339)."""

    nf4 = "nf4"
    int8 = "int8"


@dataclass(frozen=True, slots=True)
class Cost:
    """The loss at supervised tokens, before and after."""

    before: float
    after: float
    documents: int
    what: str
    """`held-out` or `training`."""

    def __str__(self) -> str:
        change = f"{self.before:.4f} -> {self.after:.4f} ({self.after - self.before:+.4f})"
        return f"loss {change} on {self.documents} {self.what} documents"


def check_few_bits(kind: str) -> FewBits:
    """The type. Raises ConfigError where it is none, or bitsandbytes is not here."""
    if kind not in [*FewBits]:
        raise ConfigError(f"bits={kind}: must be one of {', '.join(FewBits)}")
    if find_spec("bitsandbytes") is None:
        raise ConfigError(f"bits={kind}: needs bitsandbytes; pip install 'shardtune[qlora]'")
    return FewBits(kind)


def write_few_bits(directory: Path, kind: FewBits, samples: list[Sample], what: str) -> tuple[Path, Cost]:
    """(`<directory>/<type>`, what it costs); both cards say so. The loss is that of the files, loaded again."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder, aside = directory / kind, directory / f".{kind}.writing"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        model = _load(directory, quantization_config=_scheme(kind), dtype=_type(kind))
        model.save_pretrained(aside)
        AutoTokenizer.from_pretrained(directory, local_files_only=True).save_pretrained(aside)
        del model
        plain: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", local_files_only=True)
        cost = Cost(loss_of(plain, samples), loss_of(_load(aside), samples), len(samples), what)
        card = directory / "README.md"
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        section = f"\n## In {kind}\n\nBy bitsandbytes, in `{kind}/`: {cost}, at most {TOKENS} tokens of each.\n"
        (aside / "README.md").write_text(text + section, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        card.write_text(text + section, encoding="utf-8")
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder, cost


def _load(directory: Path, **how: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    place = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(directory, device_map=place, local_files_only=True, **how).eval()


def _type(kind: FewBits) -> Any:
    import torch

    return torch.bfloat16 if kind is FewBits.nf4 else torch.float16  # which is what LLM.int8() computes in


def _scheme(kind: FewBits) -> Any:
    from transformers import BitsAndBytesConfig

    if kind is FewBits.int8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=_type(kind),
    )


def loss_of(model: Any, samples: list[Sample]) -> float:
    """Mean over the supervised tokens of all documents, each token weighing the same."""
    import torch
    from torch.nn.functional import cross_entropy

    total, count = 0.0, 0
    for sample in samples:
        ids = torch.tensor(sample.input_ids[:TOKENS].astype("int64"), device=model.device)
        learned = torch.tensor(sample.supervised[1:TOKENS].astype(bool), device=model.device)
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1].float()
        total += float(cross_entropy(logits[learned], ids[1:][learned], reduction="sum"))
        count += int(learned.sum())
    return total / max(count, 1)
