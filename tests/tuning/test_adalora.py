"""AdaLoRA beside plain peft's own over a whole run, its state in checkpoints, and what its files say."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from strategies.parameters import named_parameters
from tests.helpers.building import GLOBAL_BATCH, data_set, model_dir, run_config, trainer_for
from tests.helpers.exports import assert_same_logits, export, logits_of, plain_base, trained
from trainer.data.config import DataConfig, Layout
from trainer.export.verify import probe_ids, reference_logits
from trainer.optim.config import AdamwConfig
from trainer.tuning.adalora import RankAllocation
from trainer.tuning.config import AdaLoraConfig

STEPS = 10
TUNING = AdaLoraConfig(init_rank=4, target_rank=2, alpha=512.0, initial_share=0.25, final_share=0.25, delta_t=2)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("adalora")


def trainer_of(root, runtime, *, tuning=TUNING, **changes):
    config = run_config(model_dir(root), "single", "lora", micro=GLOBAL_BATCH, steps=STEPS)
    optim = AdamwConfig(lr=1e-3, weight_decay=0.0, max_grad_norm=0.05)
    config = replace(config, tuning=tuning, optim=optim, data=DataConfig(layout=Layout.padded), **changes)
    return trainer_for(config, data_set(root, uneven=True), runtime)


def steps_of(trainer, num):
    """(loss with the penalty, grad norm, rate) of each step, and the micro-batch that was learned."""
    for batch in trainer.loader.steps(trainer.progress.samples, num):
        penalty = penalty_of(trainer)
        record = trainer.train_step(batch)
        loss = float(record.local_sums["loss"]) / record.counts["loss"] + penalty
        yield loss, float(record.result.grad_norm), record.lr, batch.micro_batches[0]


def penalty_of(trainer):
    """Equation 4 of the paper as peft weighs it: a mean over matrices of norms, not squared."""
    found = []
    for name, value in named_parameters(trainer.engine.step_module):
        if ".lora_A." in name or ".lora_B." in name:
            rows = value.detach() if ".lora_A." in name else value.detach().T
            found.append((rows @ rows.T - torch.eye(len(rows))).square().sum().sqrt())
    return 0.5 * float(sum(found)) / len(found)


def kept(trainer):
    """Entries of E that are not zero, by layer."""
    named = named_parameters(trainer.engine.step_module)
    return {name: (p != 0).view(-1).tolist() for name, p in named if ".lora_E." in name}


def test_a_run_takes_the_steps_of_plain_peft(root, runtime, monkeypatch):
    import peft
    from transformers import AutoModelForCausalLM

    has_importance = RankAllocation._has_importance
    waits = []
    monkeypatch.setattr(RankAllocation, "_has_importance", lambda self: waits.append(1) or has_importance(self))
    ours = trainer_of(root, runtime)
    settings = peft.AdaLoraConfig(
        init_r=4,
        target_r=2,
        lora_alpha=512,
        tinit=2,
        tfinal=2,
        deltaT=2,
        total_step=STEPS,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    plain = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir(root)), settings)
    theirs = dict(plain.named_parameters())
    with torch.no_grad():
        for name, value in named_parameters(ours.engine.step_module):
            theirs[name].copy_(value)
    trains = [p for p in plain.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trains, lr=1e-3, weight_decay=0.0)
    budgets = []
    for step, (loss, norm, rate, batch) in enumerate(steps_of(ours, STEPS), 1):
        labels = torch.full_like(batch["targets"], -100)
        labels[:, 1:] = batch["targets"][:, :-1]
        out = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels)
        out.loss.backward()
        assert loss == pytest.approx(float(out.loss), rel=1e-5), step
        assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(trains, 0.05)), rel=1e-5), step
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        plain.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        of_peft = {name: (p != 0).view(-1).tolist() for name, p in theirs.items() if ".lora_E." in name}
        assert kept(ours) == of_peft, step
        budgets.append(sum(map(sum, of_peft.values())))
    assert len(waits) == 1, "only the step that settles the ranks may wait for the device"
    assert budgets[1] == 4 * 14 > budgets[3] > budgets[5] > budgets[-1] == 2 * 14
    assert len({sum(mask) for mask in kept(ours).values()}) > 1, "no rank has moved: the comparison is blind"
    for name, value in named_parameters(ours.engine.step_module):
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("at", [1, 4, 7, 9])
def test_every_phase_is_resumed_bit_for_bit(root, runtime, tmp_path, at):
    first = trainer_of(root, runtime)
    list(steps_of(first, at))
    first.engine.state(first.progress).save(tmp_path)
    expected = [row[:2] for row in steps_of(first, STEPS - at)]
    second = trainer_of(root, runtime)
    second.progress = second.engine.load(tmp_path)
    assert [row[:2] for row in steps_of(second, STEPS - at)] == expected
    assert kept(second) == kept(first)
    for (name, one), (_, other) in zip(first.engine.trainable, second.engine.trainable, strict=True):
        assert torch.equal(one, other), name


def test_adalora_keeps_ranks_by_the_saved_state_of_the_allocation(root, runtime, tmp_path):
    """Without its importance a resumed run would keep other ranks: the test above is not blind."""
    first = trainer_of(root, runtime)
    list(steps_of(first, 4))
    first.engine.state(first.progress).save(tmp_path)
    second = trainer_of(root, runtime)
    second.progress = second.engine.load(tmp_path)
    for name, _ in second.engine.trainable:
        second.engine.optimizer_hooks.state_of(name)["importance"].zero_()
    list(steps_of(first, STEPS - 4)), list(steps_of(second, STEPS - 4))
    assert kept(first) != kept(second)


@pytest.mark.parametrize("micro", [1, 4])
def test_adalora_penalty_is_added_once_a_step(root, runtime, micro):
    """However many micro-batches there are; and it is there."""
    whole = trainer_of(root, runtime)
    parts = trainer_of(root, runtime, batch={"global": GLOBAL_BATCH, "micro": micro})
    free = trainer_of(root, runtime, tuning=replace(TUNING, orth_reg_weight=0.0))
    norms = [[row[1] for row in steps_of(trainer, 3)] for trainer in (whole, parts, free)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    assert norms[2] != pytest.approx(norms[0], rel=1e-3)


def test_adalora_learns_nothing_from_a_skipped_step(root, runtime):
    trainer = trainer_of(root, runtime)
    list(steps_of(trainer, 4))
    engine = trainer.engine
    before = {n: {k: v.clone() for k, v in engine.optimizer_hooks.state_of(n).items()} for n, _ in engine.trainable}
    for _, parameter in engine.trainable:
        parameter.grad = torch.full_like(parameter, float("nan"))
    assert float(engine.step(1.0).skipped) == 1
    for name, state in before.items():
        for key, value in engine.optimizer_hooks.state_of(name).items():
            assert torch.equal(value, state[key]), (name, key)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 50])
def test_adalora_last_step_always_settles_the_ranks(root, runtime, steps):
    """Also where the run is so short that a phase has no step."""
    trainer = trainer_of(root, runtime, tuning=replace(TUNING, delta_t=100))
    around = trainer.engine.optimizer_hooks
    around.begin(steps)
    for step, _ in enumerate(steps_of(trainer, min(steps, 5)), 1):
        assert step < min(steps, 5) or sum(map(sum, kept(trainer).values())) == (2 * 14 if steps <= 5 else 4 * 14)


def test_adalora_files_have_the_ranks_that_are_left(base, runtime, tmp_path):
    from peft import PeftModel

    parts = trained(base, TUNING, runtime, steps=4)
    written = export(parts, base, tmp_path / "adapter", runtime, verify=True)
    settings = json.loads((written / "adapter_config.json").read_text())
    ranks = {name: sum(mask) for name, mask in settings["rank_pattern"].items()}
    assert sum(ranks.values()) == 2 * 14 and len(set(ranks.values())) > 1
    assert (settings["total_step"], settings["tinit"], settings["tfinal"]) == (4, 1, 1)
    stored = {key: tensor.shape for key, tensor in load_file(written / "adapter_model.safetensors").items()}
    for name, rank in ranks.items():
        assert stored[f"base_model.model.{name}"] == (rank, 1), name
    ids = probe_ids(parts[2])
    reference = reference_logits(parts[0], parts[1], ids, runtime)
    assert_same_logits(logits_of(PeftModel.from_pretrained(plain_base(base), str(written)).eval(), ids), reference)


def test_adalora_run_stopped_before_the_ranks_settle_is_exported_as_it_is(base, runtime, tmp_path):
    """An entry that was set to zero learns on until the ranks are settled: leaving it out would change the model."""
    parts = trained(base, TUNING, runtime, steps=4)
    with torch.no_grad():
        for name, parameter in parts[0].trainable:
            if ".lora_E." in name:
                parameter[parameter == 0] = 0.05
    written = export(parts, base, tmp_path / "adapter", runtime, verify=True)
    assert json.loads((written / "adapter_config.json").read_text())["rank_pattern"] is None
