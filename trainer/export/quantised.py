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

MAX_DOCUMENTS = 32
"""Most documents that the loss is measured on."""
MAX_TOKENS = 1024
"""Most tokens of each document, for measuring and for calibration."""
MAX_CALIBRATION_DOCUMENTS = 256
"""Most training documents for calibration, in schemes that calibrate their rounding."""


class FewBits(StrEnum):
    """How the matrices of the blocks are stored.

    By bitsandbytes: NF4 in blocks (Dettmers et al. 2023, arXiv:2305.14314), or LLM.int8() (2022, arXiv:2208.07339). By
    torchao: 8 bits with a scale for each row, or NVFP4, 4 bits with a scale of 8 bits for each 16 values. By llm-compressor:
    its own schemes.
    """

    nf4 = "nf4"
    int8 = "int8"
    torchao_int8 = "torchao_int8"
    torchao_nvfp4 = "torchao_nvfp4"
    llmcompressor_w4a16 = "llmcompressor_w4a16"
    llmcompressor_w8a8 = "llmcompressor_w8a8"
    llmcompressor_fp8 = "llmcompressor_fp8"

    @property
    def stored_by_other_python(self) -> bool:
        """Whether the library that stores it runs in a Python environment of its own."""
        return self.startswith("llmcompressor")

    @property
    def loading_library(self) -> str:
        """The library that loads it, and that stores it unless another Python does."""
        if self.stored_by_other_python:
            return "compressed-tensors"
        if self.startswith("torchao"):
            return "torchao"
        return "bitsandbytes"

    @property
    def storing_library(self) -> str:
        """The library that stores it."""
        if self.stored_by_other_python:
            return "llm-compressor"
        return self.loading_library


NVFP4_BLOCK = 16
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
    """Loss of the export."""
    after: float
    """Loss of what was stored in few bits, read back."""
    documents: int
    """How many were measured."""
    split: str
    """`held-out` or `training`."""
    max_logit_difference: float
    """Largest difference of a logit, relative to the largest, between the files read back and what they were written from."""

    def __str__(self) -> str:
        change = f"{self.before:.4f} -> {self.after:.4f} ({self.after - self.before:+.4f})"
        return (
            f"loss {change} on {self.documents} {self.split} documents; read back, logits differ by at most "
            f"{self.max_logit_difference:.1e} of the largest"
        )


def check_few_bits(kind: str) -> FewBits:
    """The type of this name. Raises ConfigError if there is none, or if its library is not installed."""
    if kind not in [*FewBits]:
        raise ConfigError(f"bits={kind}: must be one of {', '.join(FewBits)}")
    missing = missing_library(FewBits(kind).loading_library)
    if missing:
        raise ConfigError(f"bits={kind}: {missing}")
    return FewBits(kind)


def write_few_bits(
    directory: Path, kind: FewBits, samples: list[Sample], split: str, compressor: Compressor | None = None
) -> tuple[Path, Cost]:
    """Store an export in few bits too: (`<directory>/<type>`, the cost in loss), which both model cards state.

    The loss is that of the files, loaded again, on `samples`, which are of `split` (`held-out` or `training`). `compressor`:
    for types that another Python stores. Errors: ShardtuneError if the library cannot store this model, DriftError if the
    files compute something else than the model that they were written from. The export itself stays complete.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = directory / kind
    staging_dir = directory / f".{kind}.writing"
    shutil.rmtree(staging_dir, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    try:
        # Store, read back, compare logits, and measure the loss before and after.
        stored_logits = _store(directory, staging_dir, kind, tokenizer, compressor)
        tokenizer.save_pretrained(staging_dir)
        exported: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", local_files_only=True)
        loss_before = loss_of(exported, samples)
        reloaded = _load_model(staging_dir)
        difference = _check_read_back(stored_logits, _probe_logits(reloaded, tokenizer), kind, folder)
        cost = Cost(loss_before, loss_of(reloaded, samples), len(samples), split, difference)
        # State the cost in both model cards, and put the directory in its place.
        card = directory / "README.md"
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        cost_note = f"By {kind.storing_library}, in `{kind}/`: {cost}. At most {MAX_TOKENS} tokens of each document."
        section = f"\n## In {kind}\n\n{cost_note}\n"
        (staging_dir / "README.md").write_text(text + section, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        staging_dir.rename(folder)
        card.write_text(text + section, encoding="utf-8")
    finally:
        shutil.rmtree(staging_dir, ignore_errors=True)
    return folder, cost


def _store(directory: Path, staging_dir: Path, kind: FewBits, tokenizer: Any, compressor: Compressor | None) -> Tensor:
    """Store the model of `directory` in few bits in `staging_dir`; returns its logits on the probe text, to compare with later.

    `compressor`: stores it instead of transformers, for the kinds that need that. Raises ShardtuneError if this model cannot be
    stored so.
    """
    from torch.nn import Parameter

    from trainer.export.verify import probe_ids

    try:
        if compressor is not None:
            return compressor.store(directory, staging_dir, SCHEMES[kind], probe_ids(tokenizer))
        if kind is FewBits.torchao_nvfp4:
            unsuitable = _matrices_not_of_whole_blocks(directory)
            if unsuitable:
                raise ValueError(
                    f"it needs matrices whose sides are divisible by {NVFP4_BLOCK}: {', '.join(unsuitable[:3])} are not"
                )
        model = _load_model(directory, quantization_config=_quantisation_config(kind), dtype=_compute_dtype(kind))
        # Quantised matrices are parameters of other classes.
        if all(type(parameter) is Parameter for parameter in model.parameters()):
            raise ValueError("it stores none of its matrices in few bits")
        model.save_pretrained(staging_dir)
    except (RuntimeError, ValueError, NotImplementedError, ShardtuneError) as error:
        reason = " ".join(str(error).split())[:400]
        others = ", ".join(other for other in FewBits if other is not kind)
        raise ShardtuneError(
            f"bits={kind}: {kind.storing_library} cannot store this model so ({reason}); the export in {directory} is whole, and "
            f"another type ({others}) may do"
        ) from error
    return _probe_logits(model, tokenizer)


def _matrices_not_of_whole_blocks(directory: Path) -> list[str]:
    """The matrices with a side that is not divisible by NVFP4's block: their names and shapes, for an error."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory, local_files_only=True))
    unsuitable = []
    for name, module in model.named_modules():
        # The head is not stored in few bits.
        if not isinstance(module, torch.nn.Linear) or module is model.get_output_embeddings():
            continue
        shape = tuple(module.weight.shape)
        if any(side % NVFP4_BLOCK for side in shape):
            unsuitable.append(f"{name} {shape}")
    return unsuitable


def _probe_logits(model: Any, tokenizer: Any) -> Tensor:
    """Logits of a fixed sentence, float32 `[T, V]`, on the CPU."""
    import torch

    from trainer.export.verify import probe_ids

    with torch.no_grad():
        logits: Tensor = model(torch.tensor([probe_ids(tokenizer)], device=model.device)).logits[0]
    return logits.float().cpu()


def _check_read_back(stored_logits: Tensor, read_logits: Tensor, kind: FewBits, folder: Path) -> float:
    """The largest difference of a logit, relative to the largest logit. Raises DriftError if it is too large."""
    from trainer.export.verify import TOLERANCE, DriftError

    difference = float((stored_logits - read_logits).abs().max() / stored_logits.abs().max())
    allowed = TOLERANCE[_compute_dtype(kind)]
    if not difference <= allowed:  # a NaN fails too
        raise DriftError(
            f"{folder}: not written, since its files compute something else than the model that they were written from: logits "
            f"differ by {difference:.1e} of the largest (allowed {allowed:.0e})"
        )
    return difference


def _load_model(directory: Path, **settings: Any) -> Any:
    """The model in eval mode, on a GPU if there is one. `settings`: for transformers, to quantise while loading."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(directory, device_map=device, local_files_only=True, **settings).eval()


def _compute_dtype(kind: FewBits) -> Any:
    """The torch type that a model in this type multiplies in."""
    import torch

    if kind is FewBits.int8:
        return torch.float16
    return torch.bfloat16


def _quantisation_config(kind: FewBits) -> Any:
    """The transformers configuration that loads and stores a model in this type."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind is FewBits.int8:
        return BitsAndBytesConfig(load_in_8bit=True)
    if kind is FewBits.nf4:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=_compute_dtype(kind),
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

    loss_sum = 0.0
    num_targets = 0
    for sample in samples:
        ids = torch.tensor(sample.input_ids[:MAX_TOKENS].astype("int64"), device=model.device)
        # The logits at a position are for the token after it, so the first token is nobody's target.
        targets = ids[1:]
        is_supervised = torch.tensor(sample.supervised[1:MAX_TOKENS].astype(bool), device=model.device)
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1].float()
        loss_sum += float(cross_entropy(logits[is_supervised], targets[is_supervised], reduction="sum"))
        num_targets += int(is_supervised.sum())
    return loss_sum / max(num_targets, 1)
