"""A tiny model after a few steps, its export, and what plain transformers make of a directory."""

import tempfile
from pathlib import Path

import torch

from strategies.base import Precision, Progress, SingleConfig
from strategies.build import build_strategy
from strategies.parameters import COMPUTE_DTYPE
from strategies.saved_parameters import SavedParameters
from trainer.build.step_module import build_step_module
from trainer.data.config import Layout
from trainer.export.config import ExportConfig
from trainer.export.trained_model import TrainedModel, trained_shapes
from trainer.export.verify import compute_probe_reference
from trainer.export.write import write_export
from trainer.model.config import ModelConfig
from trainer.model.loading import load_tokenizer
from trainer.model.weights import WeightSource
from trainer.objectives.classification import ClassificationConfig
from trainer.objectives.sft import SftConfig
from trainer.optim.build import build_optimizer
from trainer.optim.config import AdamwConfig
from trainer.reporting.documents.facts import ModelFacts
from trainer.reporting.run_record import parse_run_record

LABELS = ["calm", "angry", "glad"]
EXACT = 1e-5


def trained(
    base,
    tuning,
    runtime,
    *,
    add_tokens=(),
    objective=None,
    precision=Precision.fp32,
    steps=2,
    optim=None,
    ema_decay=0.0,
    **settings,
):
    """An engine after a few steps at a rate that moves every trainable tensor; (engine, built, tokenizer).

    `settings` are further settings of the model.
    """
    optim = optim or AdamwConfig(lr=2e-2)
    model = ModelConfig(path=str(base), add_tokens=list(add_tokens), **settings)
    tokenizer = load_tokenizer(model)
    objective = objective or SftConfig()
    classify = isinstance(objective, ClassificationConfig)
    strategy = build_strategy(SingleConfig(), precision, runtime)
    built = build_step_module(
        model,
        objective_config=objective,
        tuning_config=tuning,
        layout=Layout.auto,
        tokenizer=tokenizer,
        num_labels=len(LABELS) if classify else None,
        half_on_gpu=False,
    )
    built.step_module.plan.ema_decay = ema_decay
    engine = strategy.prepare(
        built.step_module,
        source=weight_source(built, base),
        make_optimizer=lambda named: build_optimizer(optim, named),
        max_grad_norm=1.0,
    )
    built.set_total_steps(max(1, steps))
    for step in range(steps):
        batch = label_batch(step) if classify else token_batch(len(tokenizer), built.layout, step)
        terms = engine.forward(batch, last=True)
        engine.backward(terms["loss"] / 10, last=True)
        engine.step(1.0)
    return engine, built, tokenizer


def weight_source(built, base):
    """Where the values come from that such an engine starts with."""
    return WeightSource(
        built.base_weights(Path(base)),
        built.tuning,
        seed=1,
        init_std=0.02,
        new_token_ids=built.new_token_ids,
        vocabulary_parameter_names=built.vocabulary_parameters,
    )


def token_batch(vocabulary, layout, seed):
    ids = torch.randint(3, vocabulary, (1, 20), generator=torch.Generator().manual_seed(seed))
    ids[0, -1] = vocabulary - 1
    targets = torch.full_like(ids, -100)
    targets[0, :-1] = ids[0, 1:]
    batch = {"input_ids": ids, "targets": targets, "target_rows": torch.arange(19)}
    if layout is Layout.padded:
        return batch | {"attention_mask": torch.ones_like(ids)}
    bounds = torch.tensor([0, 20], dtype=torch.int32)
    lengths = {"max_length_q": 20, "max_length_k": 20, "document_bounds": [0, 20]}
    return batch | {"position_ids": torch.arange(20)[None], "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds} | lengths


def label_batch(seed):
    ids = torch.randint(3, 380, (3, 9), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 2, 1])}


def model_of(engine, built, tokenizer, base, checkpoint, schedule_free_beta=None):
    """The trained model of an engine whose parameters are whole, as an export reads it: out of `checkpoint`, written here."""
    checkpoint.mkdir(parents=True)
    engine.state(Progress()).save(checkpoint)
    return TrainedModel(
        built=built,
        source=weight_source(built, base),
        trained=SavedParameters(checkpoint, trained_shapes(built), schedule_free_beta=schedule_free_beta),
        tokenizer=tokenizer,
        base_directory=Path(str(base)),
        base_path=str(base),
        seed=1,
        frozen_dtype=COMPUTE_DTYPE[engine.precision],
    )


def export(parts, base, destination, runtime, *, facts=None, **settings):
    """Write what `trained` returned; the directory."""
    engine, built, tokenizer = parts
    config = ExportConfig(**settings)
    with tempfile.TemporaryDirectory() as folder:
        return write_export(
            model_of(engine, built, tokenizer, base, Path(folder) / "checkpoint"),
            destination=destination,
            config=config,
            facts=ModelFacts(run=parse_run_record({"tuning": "x", **(facts or {})}, [])),
            runtime=runtime,
            reference=compute_probe_reference(engine, built, tokenizer, runtime) if config.verify else None,
        )


def logits_of(model, ids):
    """Of one document, `[tokens, vocabulary]`, or of its labels, `[1, labels]`."""
    with torch.no_grad():
        out = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)).logits
    return out.reshape(-1, out.shape[-1]).float()


def plain_base(base):
    """The base under plain transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base).eval()


def assert_same_logits(found, reference):
    torch.testing.assert_close(found, reference, rtol=0, atol=EXACT * float(reference.abs().max()))
