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

MAX_MEASURED_DOCUMENTS = 32
"""Most documents that the loss is measured on."""
MAX_DOCUMENT_TOKENS = 1024
"""Most tokens of each document, for measuring and for calibration."""
MAX_CALIBRATION_DOCUMENTS = 256
"""Most training documents for calibration, in schemes that calibrate their rounding."""


class QuantisedFormat(StrEnum):
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
    def needs_other_python(self) -> bool:
        """Whether the library that stores this format runs in a Python environment of its own."""
        return self.startswith("llmcompressor")

    @property
    def loading_library(self) -> str:
        """The library that loads a model of this format, and that stores it unless another Python does."""
        if self.needs_other_python:
            return "compressed-tensors"
        if self.startswith("torchao"):
            return "torchao"
        return "bitsandbytes"

    @property
    def storing_library(self) -> str:
        """The library that stores a model of this format."""
        if self.needs_other_python:
            return "llm-compressor"
        return self.loading_library


NVFP4_BLOCK = 16
"""Values that share a scale in NVFP4."""
SCHEME_BY_FORMAT = {
    QuantisedFormat.llmcompressor_w4a16: "W4A16",
    QuantisedFormat.llmcompressor_w8a8: "W8A8",
    QuantisedFormat.llmcompressor_fp8: "FP8_DYNAMIC",
}
"""llm-compressor's name of a format."""


@dataclass(frozen=True, slots=True)
class QuantisationCost:
    """What quantisation costs: the mean loss at supervised tokens before and after it."""

    export_loss: float
    """Loss of the export."""
    quantised_loss: float
    """Loss of the quantised copy, read back from its files."""
    num_documents: int
    """Documents that the losses were measured on."""
    split: str
    """`held-out` or `training`."""
    max_logit_difference: float
    """Largest difference of a logit, relative to the largest, between the files read back and what they were written from."""

    def __str__(self) -> str:
        change = f"{self.export_loss:.4f} -> {self.quantised_loss:.4f} ({self.quantised_loss - self.export_loss:+.4f})"
        return (
            f"loss {change} on {self.num_documents} {self.split} documents; read back, logits differ by at most "
            f"{self.max_logit_difference:.1e} of the largest"
        )


def parse_quantised_format(name: str) -> QuantisedFormat:
    """Read the format that `bits=` names, such as "nf4".

    Raises ConfigError if there is none, or if its library is not installed.
    """
    if name not in [*QuantisedFormat]:
        raise ConfigError(f"bits={name}: must be one of {', '.join(QuantisedFormat)}")
    quantised_format = QuantisedFormat(name)
    missing = missing_library(quantised_format.loading_library)
    if missing:
        raise ConfigError(f"bits={name}: {missing}")
    return quantised_format


def write_quantised_model(
    directory: Path,
    quantised_format: QuantisedFormat,
    samples: list[Sample],
    split: str,
    compressor: Compressor | None = None,
) -> tuple[Path, QuantisationCost]:
    """Write a copy of an export in 4 or 8 bits, and measure its cost: returns (`<directory>/<format>`, the cost in loss).

    The copy is loaded again: its logits are compared with those of the quantised model in memory, and its loss is measured on
    `samples`, which are of `split` (`held-out` or `training`). Both model cards then state the cost. `compressor`: for formats
    that another Python computes.

    Raises ShardtuneError if the library cannot quantise this model, DriftError if the files compute something else than the
    model in memory. The export itself stays complete.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    copy_dir = directory / quantised_format
    staging_dir = directory / f".{quantised_format}.writing"
    shutil.rmtree(staging_dir, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    try:
        quantised_logits = _quantise_and_save(directory, staging_dir, quantised_format, tokenizer, compressor)
        tokenizer.save_pretrained(staging_dir)
        exported: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", local_files_only=True)
        export_loss = mean_loss(exported, samples)
        reloaded = _load_model(staging_dir)
        difference = _require_same_logits(
            quantised_logits, _probe_logits(reloaded, tokenizer), quantised_format, copy_dir
        )
        cost = QuantisationCost(
            export_loss=export_loss,
            quantised_loss=mean_loss(reloaded, samples),
            num_documents=len(samples),
            split=split,
            max_logit_difference=difference,
        )
        # State the cost in both model cards, and put the directory in its place.
        card = directory / "README.md"
        card_text = card.read_text(encoding="utf-8") if card.is_file() else ""
        cost_note = (
            f"By {quantised_format.storing_library}, in `{quantised_format}/`: {cost}. "
            f"At most {MAX_DOCUMENT_TOKENS} tokens of each document."
        )
        section = f"\n## In {quantised_format}\n\n{cost_note}\n"
        (staging_dir / "README.md").write_text(card_text + section, encoding="utf-8")
        shutil.rmtree(copy_dir, ignore_errors=True)
        staging_dir.rename(copy_dir)
        card.write_text(card_text + section, encoding="utf-8")
    finally:
        shutil.rmtree(staging_dir, ignore_errors=True)
    return copy_dir, cost


def _quantise_and_save(
    directory: Path,
    staging_dir: Path,
    quantised_format: QuantisedFormat,
    tokenizer: Any,
    compressor: Compressor | None,
) -> Tensor:
    """Quantise the model in `directory` and save it in `staging_dir`; returns its logits on the probe, float32 `[T, V]`.

    The probe is a fixed sentence, with which the stored copy is compared afterwards. `compressor`: quantises it in another
    Python, for the formats that need that; None: transformers does so while loading. Raises ShardtuneError if this model
    cannot be stored in this format.
    """
    from trainer.export.verify import probe_ids

    try:
        if compressor is not None:
            scheme = SCHEME_BY_FORMAT[quantised_format]
            return compressor.quantise(directory, staging_dir, scheme, probe_ids(tokenizer))
        model = _quantise_while_loading(directory, quantised_format)
        model.save_pretrained(staging_dir)
    except (RuntimeError, ValueError, NotImplementedError, ShardtuneError) as error:
        # Libraries may append whole configurations.
        reason = " ".join(str(error).split())[:400]
        other_formats = ", ".join(name for name in QuantisedFormat if name is not quantised_format)
        raise ShardtuneError(
            f"bits={quantised_format}: {quantised_format.storing_library} cannot store this model so ({reason}); the export in "
            f"{directory} is whole, and another type ({other_formats}) may do"
        ) from error
    return _probe_logits(model, tokenizer)


def _quantise_while_loading(directory: Path, quantised_format: QuantisedFormat) -> Any:
    """Load a whole model, and quantise its matrices meanwhile, by bitsandbytes or torchao.

    Raises ValueError if NVFP4 does not fit its matrices, or if the library left all of them in full precision.
    """
    from torch.nn import Parameter

    if quantised_format is QuantisedFormat.torchao_nvfp4:
        unsuitable_matrices = _matrices_unsuitable_for_nvfp4(directory)
        if unsuitable_matrices:
            raise ValueError(
                f"it needs matrices whose sides are divisible by {NVFP4_BLOCK}: {', '.join(unsuitable_matrices[:3])} are not"
            )
    model = _load_model(
        directory, quantization_config=_quantisation_config(quantised_format), dtype=_compute_dtype(quantised_format)
    )
    # Quantised matrices are parameters of other classes.
    is_unchanged = all(type(parameter) is Parameter for parameter in model.parameters())
    if is_unchanged:
        raise ValueError("it stores none of its matrices in few bits")
    return model


def _matrices_unsuitable_for_nvfp4(directory: Path) -> list[str]:
    """Find the matrices that NVFP4 cannot store, with their shapes: ["model.layers.0.mlp.up_proj (60, 24)", ...].

    They have a side that is not divisible by its block. The output head does not count, since it is not quantised. The weights
    are not read.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory, local_files_only=True))
    unsuitable_matrices = []
    for name, module in model.named_modules():
        is_quantised = isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
        if not is_quantised:
            continue
        shape = tuple(module.weight.shape)
        if any(side % NVFP4_BLOCK for side in shape):
            unsuitable_matrices.append(f"{name} {shape}")
    return unsuitable_matrices


def _probe_logits(model: Any, tokenizer: Any) -> Tensor:
    """Logits of the model on the probe, a fixed sentence (`verify.probe_ids`): float32 `[T, V]`, on the CPU."""
    import torch

    from trainer.export.verify import probe_ids

    with torch.no_grad():
        logits: Tensor = model(torch.tensor([probe_ids(tokenizer)], device=model.device)).logits[0]
    return logits.float().cpu()


def _require_same_logits(
    quantised_logits: Tensor, reloaded_logits: Tensor, quantised_format: QuantisedFormat, copy_dir: Path
) -> float:
    """Check that the stored quantised model computes what it computed in memory: returns the largest difference of a logit.

    The difference is relative to the largest logit. Raises DriftError if it is larger than rounding in the type that the model
    computes in explains; `copy_dir`, where the files were to be published, is named in it.
    """
    from trainer.export.verify import TOLERANCE_BY_DTYPE, DriftError

    difference = float((quantised_logits - reloaded_logits).abs().max() / quantised_logits.abs().max())
    allowed_difference = TOLERANCE_BY_DTYPE[_compute_dtype(quantised_format)]
    if not difference <= allowed_difference:  # a NaN fails too
        raise DriftError(
            f"{copy_dir}: not written, since its files compute something else than the model that they were written from: logits "
            f"differ by {difference:.1e} of the largest (allowed {allowed_difference:.0e})"
        )
    return difference


def _load_model(directory: Path, **settings: Any) -> Any:
    """The model in eval mode, on a GPU if there is one. `settings`: for transformers, to quantise while loading."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(directory, device_map=device, local_files_only=True, **settings).eval()


def _compute_dtype(quantised_format: QuantisedFormat) -> Any:
    """The torch type in which a model of this format multiplies."""
    import torch

    if quantised_format is QuantisedFormat.int8:
        return torch.float16
    return torch.bfloat16


def _quantisation_config(quantised_format: QuantisedFormat) -> Any:
    """The configuration by which transformers quantises a model while it is loaded, with bitsandbytes or torchao."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if quantised_format is QuantisedFormat.int8:
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantised_format is QuantisedFormat.nf4:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=_compute_dtype(quantised_format),
        )
    if quantised_format is QuantisedFormat.torchao_int8:
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(version=2))
    from torchao.prototype.mx_formats.inference_workflow import NVFP4WeightOnlyConfig

    return TorchAoConfig(NVFP4WeightOnlyConfig())


def mean_loss(model: Any, samples: list[Sample]) -> float:
    """Mean cross-entropy over the supervised tokens of all documents, each token weighing the same; 0.0 without any.

    Of each document the first `MAX_DOCUMENT_TOKENS` tokens count.
    """
    import torch
    from torch.nn.functional import cross_entropy

    loss_sum = 0.0
    num_targets = 0
    for sample in samples:
        ids = torch.tensor(sample.input_ids[:MAX_DOCUMENT_TOKENS].astype("int64"), device=model.device)
        # The logits at a position are for the token after it, so the first token is nobody's target.
        targets = ids[1:]
        is_supervised = torch.tensor(sample.supervised[1:MAX_DOCUMENT_TOKENS].astype(bool), device=model.device)
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1].float()
        loss_sum += float(cross_entropy(logits[is_supervised], targets[is_supervised], reduction="sum"))
        num_targets += int(is_supervised.sum())
    return loss_sum / max(num_targets, 1)
