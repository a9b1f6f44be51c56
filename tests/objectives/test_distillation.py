"""Distillation: TRL's numbers, autograd's gradients, any chunk, and a teacher that stays outside of what is saved."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import trainer.losses.divergence as divergence_module
from launch.main import main
from strategies.errors import ConfigError
from strategies.parameters import named_parameters
from tests.golden.make_preference_vectors import fill, fingerprints, model_config
from tests.golden.make_teacher_vectors import DISTILLATION, FILE, TEACHER, answers
from tests.helpers.building import collate, data_set, model_dir, run_config, take_steps, trainer_for
from tests.helpers.launching import clean_environment
from tests.helpers.learning import LEAST_LEARNED, learned
from tests.helpers.models import tiny_model_dir
from tests.helpers.seq2seq import seq2seq_dir
from tests.helpers.tokenizers import tiny_tokenizer, write_chat_data
from trainer.data.config import Layout
from trainer.data.store.sequences import Sample
from trainer.losses.divergence import Divergence, DivergenceMeasure, TeacherComparison
from trainer.losses.fuse import install_loss_head
from trainer.losses.next_token import LossHead
from trainer.objectives.base import ReferenceModels, TeacherConfig
from trainer.objectives.distillation import DistillationConfig
from trainer.objectives.registry import build_objective, data_spec_of
from trainer.tuning.base import LoraConfig

RECORDED = json.loads(FILE.read_text())["cases"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model(phase: float) -> nn.Module:
    from transformers import LlamaForCausalLM

    made = fill(LlamaForCausalLM(model_config()), phase)
    install_loss_head(made, made.config)
    return made


def batch() -> dict:
    made = []
    for prompt, answer, _ in answers():
        ids = np.array(prompt + answer, np.int32)
        made.append(Sample(ids, np.arange(len(ids)) >= len(prompt)))
    return collate(made, Layout.padded, 0)


@pytest.mark.parametrize("name", DISTILLATION)
@pytest.mark.parametrize("chunk", [2**25, 300])
def test_distillation_loss_and_gradients_are_those_of_trl(monkeypatch, name, chunk):
    """Loss and every gradient; with 300 logits at a time, two rows of both models' are a chunk."""
    monkeypatch.setattr(divergence_module, "CHUNK_LOGITS", chunk)
    case, expected = DISTILLATION[name], RECORDED[name]
    settings = {**case, "divergence": Divergence(case["divergence"])}
    student, rows = model(0.0), batch()
    objective = build_objective(
        DistillationConfig(**settings), ReferenceModels(teacher=model(TEACHER).requires_grad_(False))
    )
    terms, count = objective.terms(student, rows), len(rows["target_rows"])
    (terms["loss"] / count).backward()
    assert float(terms["loss"].detach()) / count == pytest.approx(expected["loss"], rel=1e-5)
    assert float(terms["divergence"]) / count == pytest.approx(expected["divergence"], rel=1e-5)
    assert float(terms["sft_loss"]) / count == pytest.approx(expected["nll"], rel=1e-5)
    found = fingerprints(student)
    assert found.keys() == expected["gradients"].keys()
    for key, (norm, product) in expected["gradients"].items():
        assert found[key][0] == pytest.approx(norm, rel=1e-5), key
        assert found[key][1] == pytest.approx(product, abs=1e-5 * norm * math.sqrt(2)), key


def test_distillation_recorded_cases_differ():
    losses = [RECORDED[name]["loss"] for name in DISTILLATION]
    assert len({round(loss, 3) for loss in losses}) == len(losses) and min(losses) > 0.01


def plainly(measure: DivergenceMeasure, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Divergence of each row by the definitions, without tricks."""
    q, p = (student / measure.temperature).softmax(-1), (teacher / measure.temperature).softmax(-1)

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    if measure.divergence is Divergence.forward_kl:
        value = kl(p, q)
    elif measure.divergence is Divergence.reverse_kl:
        value = kl(q, p)
    else:
        b = measure.interpolation
        mixed = b * p + (1 - b) * q
        value = b * kl(p, mixed) + (1 - b) * kl(q, mixed)
    return value * measure.temperature**2


@pytest.mark.parametrize("divergence", list(Divergence))
@pytest.mark.parametrize("kind", ["plain", "capped, scaled, biased"])
@pytest.mark.parametrize("weighed", [False, True])
def test_distillation_gradients_are_those_of_the_definition(divergence, kind, weighed):
    """By autograd in float64: states, weight and bias; a teacher of another width and with more rows of padding."""
    torch.manual_seed(0)
    capped = kind != "plain"
    head = LossHead.of_linear(
        nn.Linear(6, 11, bias=capped), softcap=3.0 if capped else None, logit_scale=0.5 if capped else 1.0
    )
    other = LossHead.of_linear(nn.Linear(4, 13, bias=False), softcap=None, logit_scale=1.0)
    states = torch.randn(7, 6, requires_grad=True)
    theirs, targets = torch.randn(7, 4), torch.arange(7)
    measure = DivergenceMeasure(divergence, temperature=1.7, interpolation=0.3)
    weights = torch.rand(5) if weighed else torch.ones(5)
    total, nll, apart, _, others = head(
        states,
        targets=targets[:5],
        comparison=TeacherComparison(
            measure=measure,
            hidden=theirs[:3],
            head=other,
            divergence_weight=0.8,
            loss_weight=0.25,
            compared_rows=torch.tensor([0, 2, 4]),
            uncompared_rows=torch.tensor([1, 3]),
            uncompared_weight=1.5,
            row_weights=weights if weighed else None,
        ),
    )
    total.backward()
    found = [states.grad, *(p.grad for p in head.parameters())]

    wide = [t.detach().double().requires_grad_() for t in (states, *head.parameters())]
    logits = nn.functional.linear(wide[0], wide[1], wide[2] if capped else None) * (0.5 if capped else 1.0)
    logits = 3.0 * torch.tanh(logits / 3.0) if capped else logits
    wanted = (theirs[:3].double() @ other.weight.detach().double().T)[:, :11]
    compared = logits[[0, 2, 4]]
    d = plainly(measure, compared, wanted) @ weights[[0, 2, 4]].double()
    each = nn.functional.cross_entropy(logits[:5], targets[:5], reduction="none") * weights
    ce, plain = each[[0, 2, 4]].sum(), each[[1, 3]].sum()
    expected = 0.8 * d + 0.25 * ce + 1.5 * plain
    expected.backward()
    for a, b in ((total, expected), (nll, ce), (apart, d), (others, plain)):
        assert float(a.detach()) == pytest.approx(float(b.detach()), rel=1e-5)
    for a, b in zip(found, wide, strict=True):
        assert torch.allclose(a.double(), b.grad, rtol=1e-4, atol=1e-6)
        assert b.grad.abs().max() > 1e-3
    assert other.weight.grad is None


def test_distillation_of_disjoint_distributions_stays_finite():
    student, teacher = torch.tensor([[300.0, 0.0, 0.0]]), torch.tensor([[0.0, 300.0, 0.0]])
    for divergence in Divergence:
        value, slope = DivergenceMeasure(divergence)(student, teacher)
        assert torch.isfinite(value).all() and torch.isfinite(slope).all(), divergence
    assert float(DivergenceMeasure(Divergence.jensen_shannon)(student, teacher)[0]) == pytest.approx(
        math.log(2), rel=1e-6
    )


def distilling(root: Path, teacher: Path, **changes):
    objective = DistillationConfig(teacher=TeacherConfig(path=str(teacher)))
    return run_config(model_dir(root), "single", "full", micro=4, steps=4, objective=objective, **changes)


def test_the_teacher_does_not_move_and_is_not_saved(tmp_path, runtime):
    config = distilling(tmp_path, model_dir(tmp_path, "qwen3"))
    data = data_set(tmp_path, uneven=False)
    trainer = trainer_for(config, data, runtime)
    step = trainer.engine.step_module
    before = {name: p.detach().clone() for name, p in step.teacher.named_parameters()}
    names = {name for name, _ in step.model.named_parameters()}
    assert (
        names
        == {name for name, _ in named_parameters(step)}
        == {n for n, _ in trainer.engine.gather_full_parameters(trainable_only=False)}
    )
    take_steps(trainer, 2)
    (tmp_path / "state").mkdir()
    trainer.engine.state(trainer.progress).save(tmp_path / "state")
    expected = take_steps(trainer, 2)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in step.teacher.named_parameters())
    again = trainer_for(config, data, runtime)
    again.progress = again.engine.load(tmp_path / "state")
    assert take_steps(again, 2) == expected


def test_distillation_from_the_student_itself_has_nothing_to_learn(tmp_path, runtime):
    config = distilling(tmp_path, model_dir(tmp_path))
    (loss, norm), *_ = take_steps(trainer_for(config, data_set(tmp_path, uneven=False), runtime), 1)
    assert abs(loss) < 1e-6 and norm < 1e-5


def test_distillation_from_another_vocabulary_is_refused(tmp_path, runtime):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<one>"])
    other = tiny_model_dir(tmp_path / "other", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(other)
    with pytest.raises(
        ConfigError, match=r"its vocabulary is not the student's \(1 tokens differ: '<one>' is no token"
    ):
        trainer_for(distilling(tmp_path, other), data_set(tmp_path, uneven=False), runtime)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("t5", r"is an encoder-decoder \(t5\); take"),
        ("distilbert", r"cannot be built as a teacher with .* take a causal model"),
    ],
)
def test_a_teacher_that_is_no_causal_model_is_refused(tmp_path, runtime, kind, said):
    teacher = seq2seq_dir(tmp_path) if kind == "t5" else model_dir(tmp_path, kind)
    config = distilling(tmp_path, teacher)
    with pytest.raises(ConfigError, match=said) as caught:
        trainer_for(config, data_set(tmp_path, uneven=False), runtime)
    assert len(str(caught.value)) < 500


def test_an_adapter_on_the_head_is_refused(tmp_path, runtime):
    config = distilling(tmp_path, model_dir(tmp_path, "qwen3"))
    config.tuning = LoraConfig(rank=4, targets=["q_proj", "lm_head"])
    with pytest.raises(
        ConfigError, match=r"leave the output head out of tuning.targets, or train it whole with tuning.modules_to_save"
    ):
        trainer_for(config, data_set(tmp_path, uneven=False), runtime)


def test_distillation_teacher_that_needs_padded_rows_gets_them(tmp_path, runtime):
    config = distilling(tmp_path, model_dir(tmp_path, "falcon"))
    trainer = trainer_for(config, data_set(tmp_path, uneven=False), runtime)
    assert trainer.loader.collator.layout is Layout.padded
    at_rest = replace(config, optim=replace(config.optim, lr=0.0))
    still = take_steps(trainer_for(at_rest, data_set(tmp_path, uneven=False), runtime), 2)
    assert learned(take_steps(trainer, 2), still) > LEAST_LEARNED
    config.data.layout = Layout.padding_free
    with pytest.raises(ConfigError, match=r"the teacher \(falcon\) needs padded rows"):
        trainer_for(config, data_set(tmp_path, uneven=False), runtime)


def test_distillation_run_and_its_export(tmp_path, monkeypatch):
    """The last evaluation by plain transformers; the export is the student alone."""
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    for key, value in clean_environment().items():
        monkeypatch.setenv(key, value)
    model_dir(tmp_path), model_dir(tmp_path, "qwen3")
    write_chat_data(tmp_path / "train.jsonl", 16)
    write_chat_data(tmp_path / "eval.jsonl", 5, seed=1)
    words = "model.path=llama data.path=train.jsonl data.eval_path=eval.jsonl data.cache_dir=cache run.device=cpu run.dir=run "
    words += (
        "objective=distillation objective.teacher.path=qwen3 objective.divergence=reverse_kl objective.sft_weight=0.5 "
    )
    words += "batch.global=8 batch.micro=4 budget.steps=2 optim.lr=1e-3 logging.wandb=disabled export.verify=true"
    assert main(["train", *words.split()]) == 0
    with safe_open("run/export/model.safetensors", framework="pt") as file:
        assert not [name for name in file.keys() if "teacher" in name]  # noqa: SIM118 - no dict
    values = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()][-1]
    from trainer.data.config import DataConfig
    from trainer.data.prepare import Preparation

    data_spec = data_spec_of(DistillationConfig())
    data = Preparation(DataConfig(path="eval.jsonl", cache_dir="cache"), tiny_tokenizer(), data_spec, seed=0)
    held_out, sums = data.open_or_prepare().train, [0.0, 0.0]
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in ("run/export", "qwen3")]
    for number in range(len(held_out)):
        sample = held_out.sample(number)
        ids, rows = torch.tensor(sample.input_ids, dtype=torch.int64), torch.from_numpy(sample.supervised.copy())[1:]
        with torch.no_grad():
            student, teacher = (m(ids[None]).logits[0, :-1][rows] for m in models)
        sums[0] += float(plainly(DivergenceMeasure(Divergence.reverse_kl), student.double(), teacher.double()).sum())
        sums[1] += float(nn.functional.cross_entropy(student, ids[1:][rows], reduction="sum"))
    apart, nll = (total / int(held_out.counts["loss"].sum()) for total in sums)
    assert values["eval/divergence"] == pytest.approx(apart, rel=1e-4)
    assert values["eval/sft_loss"] == pytest.approx(nll, rel=1e-5)
    assert values["eval/loss"] == pytest.approx(apart + 0.5 * nll, rel=1e-5)
    assert "eval/perplexity" not in values and "eval/accuracy" in values
