"""Writes a model in 4 or 8 bits by bitsandbytes, torchao or llm-compressor, reads it back, and compares its loss."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.errors import ConfigError, ShardtuneError
from trainer.model.quantised_checkpoints import missing_library

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.data.store.sequences import Sample
    from trainer.export.llm_compressor import Compressor

DOCUMENTS, TOKENS = 32, 1024
"""Most documents that are measured, and most tokens of each."""
CALIBRATING = 256
"""Most documents of the training that roundings are fitted to, by what fits them."""


class FewBits(StrEnum):
    """How the matrices of the blocks are stored. By bitsandbytes: NF4 in blocks (Dettmers et al. 2023, arXiv:2305.14314), or
    LLM.int8() (2022, arXiv:2208.07339). By torchao: 8 bits with a scale a row, or NVFP4, four with a scale of 8 for each 16.
    By llm-compressor: its own schemes."""

    nf4 = "nf4"
    int8 = "int8"
    torchao_int8 = "torchao_int8"
    torchao_nvfp4 = "torchao_nvfp4"
    llmcompressor_w4a16 = "llmcompressor_w4a16"
    llmcompressor_w8a8 = "llmcompressor_w8a8"
    llmcompressor_fp8 = "llmcompressor_fp8"

    @property
    def apart(self) -> bool:
        """Whether it is stored by a Python of its own."""
        return self.startswith("llmcompressor")

    @property
    def kit(self) -> str:
        """The library that whoever loads it needs, and that stores it unless that is done apart."""
        return "compressed-tensors" if self.apart else "torchao" if self.startswith("torchao") else "bitsandbytes"

    @property
    def by(self) -> str:
        """What stores it."""
        return "llm-compressor" if self.apart else self.kit


BLOCK = 16
"""Values that share a scale in NVFP4."""
SCHEMES = {
    FewBits.llmcompressor_w4a16: "W4A16",
    FewBits.llmcompressor_w8a8: "W8A8",
    FewBits.llmcompressor_fp8: "FP8_DYNAMIC",
}
"""llm-compressor's names."""


@dataclass(frozen=True, slots=True)
class Cost:
    """The loss at supervised tokens, before and after."""

    before: float
    after: float
    documents: int
    what: str
    """`held-out` or `training`."""
    apart: float
    """Largest difference of a logit, relative to the largest, between the files read back and what they were written from."""

    def __str__(self) -> str:
        change = f"{self.before:.4f} -> {self.after:.4f} ({self.after - self.before:+.4f})"
        return (
            f"loss {change} on {self.documents} {self.what} documents; read back, logits differ by at most {self.apart:.1e} of "
            "the largest"
        )


def check_few_bits(kind: str) -> FewBits:
    """The type. Raises ConfigError where it is none, or its library is not here."""
    if kind not in [*FewBits]:
        raise ConfigError(f"bits={kind}: must be one of {', '.join(FewBits)}")
    if lacks := missing_library(FewBits(kind).kit):
        raise ConfigError(f"bits={kind}: {lacks}")
    return FewBits(kind)


def write_few_bits(
    directory: Path, kind: FewBits, samples: list[Sample], what: str, compressor: Compressor | None = None
) -> tuple[Path, Cost]:
    """(`<directory>/<type>`, what it costs); both cards say so. The loss is that of the files, loaded again. `compressor` is
    given with the types that are stored apart.

    Raises ShardtuneError where the library cannot store this model so, DriftError where the files compute something else than
    the model that they were written from; the export stays whole.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder, aside = directory / kind, directory / f".{kind}.writing"
    shutil.rmtree(aside, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    try:
        written = _write(directory, aside, kind, tokenizer, compressor)
        tokenizer.save_pretrained(aside)
        plain: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", local_files_only=True)
        before, read = loss_of(plain, samples), _load(aside)
        apart = _apart(written, _probed(read, tokenizer), kind, folder)
        cost = Cost(before, loss_of(read, samples), len(samples), what, apart)
        card = directory / "README.md"
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        section = f"\n## In {kind}\n\nBy {kind.by}, in `{kind}/`: {cost}. At most {TOKENS} tokens of each document.\n"
        (aside / "README.md").write_text(text + section, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        card.write_text(text + section, encoding="utf-8")
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder, cost


def _write(directory: Path, aside: Path, kind: FewBits, tokenizer: Any, compressor: Compressor | None) -> Tensor:
    """Store the model; what it computes on the probe."""
    from torch.nn import Parameter

    from trainer.export.verify import probe_ids

    try:
        if compressor is not None:
            return compressor.store(directory, aside, SCHEMES[kind], probe_ids(tokenizer))
        if kind is FewBits.torchao_nvfp4 and (odd := _odd(directory)):
            raise ValueError(f"it needs matrices whose sides are divisible by {BLOCK}: {', '.join(odd[:3])} are not")
        model = _load(directory, quantization_config=_scheme(kind), dtype=_type(kind))
        if all(type(each) is Parameter for each in model.parameters()):
            raise ValueError("it stores none of its matrices in few bits")
        model.save_pretrained(aside)
    except (RuntimeError, ValueError, NotImplementedError, ShardtuneError) as error:
        why = " ".join(str(error).split())[:400]
        raise ShardtuneError(
            f"bits={kind}: {kind.by} cannot store this model so ({why}); the export in {directory} is whole, and another type "
            f"({', '.join(each for each in FewBits if each is not kind)}) may do"
        ) from error
    return _probed(model, tokenizer)


def _odd(directory: Path) -> list[str]:
    """The matrices that blocks of NVFP4 do not fill, with their sides."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory, local_files_only=True))
    linear = {
        name: each
        for name, each in model.named_modules()
        if isinstance(each, torch.nn.Linear) and each is not model.get_output_embeddings()
    }
    sides = {name: tuple(each.weight.shape) for name, each in linear.items()}
    return [f"{name} {shape}" for name, shape in sides.items() if any(side % BLOCK for side in shape)]


def _probed(model: Any, tokenizer: Any) -> Tensor:
    """Logits of a fixed sentence, float32 `[T, V]`, on the CPU."""
    import torch

    from trainer.export.verify import probe_ids

    with torch.no_grad():
        logits: Tensor = model(torch.tensor([probe_ids(tokenizer)], device=model.device)).logits[0]
    return logits.float().cpu()


def _apart(written: Tensor, read: Tensor, kind: FewBits, folder: Path) -> float:
    from trainer.export.verify import TOLERANCE, DriftError

    apart, allowed = float((written - read).abs().max() / written.abs().max()), TOLERANCE[_type(kind)]
    if not apart <= allowed:
        raise DriftError(
            f"{folder}: not written, since its files compute something else than the model that they were written from: logits "
            f"differ by {apart:.1e} of the largest (allowed {allowed:.0e})"
        )
    return apart


def _load(directory: Path, **how: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    place = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(directory, device_map=place, local_files_only=True, **how).eval()


def _type(kind: FewBits) -> Any:
    import torch

    return torch.float16 if kind is FewBits.int8 else torch.bfloat16  # LLM.int8() computes in the former


def _scheme(kind: FewBits) -> Any:
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind is FewBits.int8:
        return BitsAndBytesConfig(load_in_8bit=True)
    if kind is FewBits.nf4:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=_type(kind),
        )
    if kind is FewBits.torchao_int8:
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(version=2))
    from torchao.prototype.mx_formats.inference_workflow import NVFP4WeightOnlyConfig

    return TorchAoConfig(NVFP4WeightOnlyConfig())


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
