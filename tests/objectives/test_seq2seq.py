"""Encoder-decoder models: the loss against transformers' own, the two sides of a batch, the data, the refusals."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from launch.config.compose import compose_config
from strategies.errors import ConfigError, DataError
from tests.helpers.building import (
    GLOBAL_BATCH,
    model_dir,
    run_config,
    take_steps,
    trainer_for,
    two_sided_samples,
    two_sided_set,
)
from tests.helpers.covering import EVERYTHING, chosen
from tests.helpers.methods import CASES
from tests.helpers.seq2seq import CONFIGS, seq2seq_dir
from tests.helpers.tokenizers import tiny_tokenizer, write_jsonl
from trainer.config.combinations import method_name_of
from trainer.data.config import DataConfig, Layout, OverLength
from trainer.data.document import Document
from trainer.objectives.seq2seq import (
    Seq2seqConfig,
    SourceTargetEncoder,
    TwoSidedCollator,
    deal_documents_by_length,
    prompt_and_answer,
)
from trainer.tuning.table import method_of


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("seq2seq")


def trainer(root, architecture, runtime):
    changes = {"objective": Seq2seqConfig(max_target=64), "data": DataConfig(max_length=64)}
    config = run_config(seq2seq_dir(root, architecture), "single", "full", micro=4, **changes)
    return trainer_for(config, two_sided_set(root), runtime)


def test_seq2seq_prompts_longer_than_the_positions_are_refused_when_the_model_is_found(root, runtime):
    config = run_config(seq2seq_dir(root, "bart"), "single", "full", micro=4, objective=Seq2seqConfig(max_target=64))
    with pytest.raises(ConfigError, match=r"data.max_length=2048: .* positions for 128 tokens"):
        trainer_for(config, two_sided_set(root), runtime)


def plain_loss(model, samples) -> float:
    """Summed cross-entropy by `model(labels=...)`, one document at a time: no padding, no mask."""
    total = 0.0
    with torch.no_grad():
        for sample in samples:
            ids, cut = torch.tensor(sample.input_ids, dtype=torch.int64)[None], sample.answer_begin()
            labels = ids[:, cut:]
            total += float(model(input_ids=ids[:, :cut], labels=labels).loss) * labels.shape[1]
    return total


@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_loss_is_that_of_transformers(root, runtime, architecture):
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(seq2seq_dir(root, architecture), dtype=torch.float32).eval()
    assert architecture not in ("bart", "marian") or model.final_logits_bias.abs().max() > 0.5
    here = trainer(root, architecture, runtime)
    batch = next(iter(here.loader.steps(0, 1)))
    chosen = here.loader.order.units(0, GLOBAL_BATCH)
    samples = [here.loader.dataset.sample(int(number)) for number in chosen]
    found = sum(float(here.engine.forward(micro, last=False)["loss"].detach()) for micro in batch.micro_batches)
    assert len(batch.micro_batches) == 4
    assert batch.totals["loss"] == sum(len(s.input_ids) - s.answer_begin() for s in samples)
    assert found == pytest.approx(plain_loss(model, samples), rel=1e-5)


def test_seq2seq_weights_are_those_of_the_answers(root, runtime):
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(seq2seq_dir(root, "t5"), dtype=torch.float32).eval()
    here = trainer(root, "t5", runtime)
    samples = two_sided_samples(6)
    expected = sum(plain_loss(model, [s]) * (0.3 if n % 2 else 1) for n, s in enumerate(samples))
    for sample in samples[1::2]:
        sample.weights = np.where(sample.supervised, np.float32(0.3), np.float32(0))
    batch = {**here.loader.collator(samples), "totals": {}}
    with here.engine.inference() as module:
        found = module(batch)
    assert float(found["loss"]) == pytest.approx(expected, rel=1e-5)


def test_seq2seq_sharded_parameters_keep_their_values_and_computed_positions_stay(root, runtime):
    """Sinusoids are not in Marian's file; they are computed, and do not train."""
    here = trainer(root, "marian", runtime)
    named = dict(here.engine.step_module.named_parameters())
    positions = named["model.model.decoder.embed_positions.weight"]
    assert not positions.requires_grad and positions.abs().max() == 1
    assert positions[1, 0] == pytest.approx(np.sin(1.0))
    assert named["model.model.shared.weight"].requires_grad


def test_seq2seq_batch_has_two_sides():
    samples = two_sided_samples(5)
    batch = TwoSidedCollator(Layout.padded, 2, 7)(samples)
    for row, sample in enumerate(samples):
        cut, answer = sample.answer_begin(), sample.input_ids[sample.answer_begin() :].tolist()
        assert batch["input_ids"][row, :cut].tolist() == sample.input_ids[:cut].tolist()
        assert batch["attention_mask"][row].sum() == cut
        assert batch["decoder_input_ids"][row, : len(answer)].tolist() == [7, *answer[:-1]]
        assert batch["targets"][row, : len(answer)].tolist() == answer
        assert set(batch["targets"][row, len(answer) :].tolist()) <= {-100}
    assert batch["input_ids"].shape[1] == max(sample.answer_begin() for sample in samples)
    assert len(batch["target_rows"]) == sum(len(s.input_ids) - s.answer_begin() for s in samples)


def padded(data, slots, documents):
    answers = data.num_supervised[documents]
    prompts = data.lengths[documents] - answers
    return sum(len(slot) * int(prompts[slot].max() + answers[slot].max()) for slot in slots)


def test_documents_of_similar_length_share_a_micro_batch(root):
    data = two_sided_set(root).train
    documents = np.random.default_rng(1).permutation(48)[:32]
    slots = deal_documents_by_length(data, documents, 8, 4)
    assert sorted(place for slot in slots for place in slot) == list(range(32))
    assert {len(slot) for slot in slots} == {4}
    as_they_come = [list(range(n, n + 4)) for n in range(0, 32, 4)]
    assert padded(data, slots, documents) < 0.8 * padded(data, as_they_come, documents)
    costs = [padded(data, [slot], documents) for slot in slots]
    assert costs == sorted(costs, reverse=True)


def test_seq2seq_sides_are_written_as_the_tokenizer_writes_a_text():
    tokenizer = tiny_tokenizer(adds_bos=True)  # it has a chat template, which takes no part
    encoder = SourceTargetEncoder(tokenizer, "say: ", 256)
    documents = [
        Document("f", 1, prompt="hello world", completion="the fox", separator="\n"),
        Document("f", 2, messages=[{"role": "user", "content": "hello"}, {"role": "assistant", "content": "dog"}]),
    ]
    wanted = [("say: hello world", "the fox"), ("say: hello", "dog")]
    for (_, sample), (prompt, answer) in zip(encoder.encode(documents), wanted, strict=True):
        cut = sample.answer_begin()
        assert sample.input_ids[:cut].tolist() == [*tokenizer(prompt)["input_ids"], tokenizer.eos_token_id]
        assert sample.input_ids[cut:].tolist() == [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        assert sample.supervised[cut:].all()


def test_seq2seq_conversation_is_one_exchange():
    turns = [{"role": r, "content": r[0]} for r in ("system", "user", "assistant")]
    assert prompt_and_answer(Document("f", 1, messages=turns)) == ("s\n\nu", "a", True)
    assert prompt_and_answer(Document("f", 1, messages=[*turns[:2], {**turns[2], "train": False}]))[2] == 0
    for messages in (turns + turns[1:], turns[1:2], turns[::-1]):
        with pytest.raises(DataError, match=r"f:3: a conversation of .* one prompt and one answer"):
            prompt_and_answer(Document("f", 3, messages=messages))
    with pytest.raises(DataError, match="f:4: a text without an answer"):
        prompt_and_answer(Document("f", 4, text="nothing asked"))


def test_seq2seq_sides_that_are_too_long():
    encoder = SourceTargetEncoder(tiny_tokenizer(), "", 4)
    document = Document("f", 9, prompt="hello world , what is it ?", completion="a lazy dog jumps over the fox")
    ((_, sample),) = encoder.encode([document])
    (cut,) = encoder.truncate_or_drop(document, sample, 5, OverLength.truncate)
    assert cut.answer_begin() == 5 and len(cut.input_ids) == 9
    assert cut.input_ids[:5].tolist() == [*sample.input_ids[:4].tolist(), encoder.eos_id]
    assert cut.input_ids[5:].tolist() == sample.input_ids[sample.answer_begin() :][:4].tolist()
    assert encoder.truncate_or_drop(document, sample, 5, OverLength.drop) == []
    with pytest.raises(DataError, match=r"f:9: .* data.max_length=5 and objective.max_target=4"):
        encoder.truncate_or_drop(document, sample, 5, OverLength.fail)


@pytest.fixture
def words(root, monkeypatch):
    monkeypatch.chdir(root)
    for key in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(key, raising=False)
    write_jsonl(root / "train.jsonl", [{"prompt": "a", "response": "b"}])
    for name in ("t5", "bart"):
        seq2seq_dir(root, name)
    model_dir(root)
    (root / "whisper").mkdir(exist_ok=True)
    (root / "whisper" / "config.json").write_text('{"model_type": "whisper", "is_encoder_decoder": true}')
    return ["data.path=train.jsonl", "budget.steps=1", "run.device=cpu"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("model.path=llama objective=seq2seq", "has no encoder (llama); set objective=sft"),
        ("model.path=t5 objective=sft", "is an encoder-decoder model (t5)"),
        ("model.path=t5 objective=dpo", "set objective=seq2seq"),
        ("model.path=whisper objective=sft", "no objective trains this one; choose a causal model"),
        (
            "model.path=t5 objective=classification",
            "whose classifiers are not proven here; choose an encoder such as BERT",
        ),
        ("model.path=bart objective=reward", "whose classifiers are not proven here; choose an encoder such as BERT"),
        ("model.path=bart objective=seq2seq", "data.max_length=2048: model.path=bart has positions for 128 tokens"),
        (
            "model.path=bart objective=seq2seq data.max_length=99",
            "objective.max_target=256: model.path=bart has positions",
        ),
        ("model.path=t5 objective=seq2seq data.packing=true", "data.packing=true"),
        ("model.path=t5 objective=seq2seq data.layout=padding_free", "set data.layout=auto"),
        ("model.path=t5 objective=seq2seq data.over_length=split", "would separate a prompt from its answer"),
        ("model.path=t5 objective=seq2seq data.format=text", "data.format=text: objective=seq2seq reads a prompt"),
        ("model.path=t5 objective=seq2seq tuning=lora model.add_tokens=[x]", "set tuning=full with objective=seq2seq"),
        (
            "model.path=t5 objective=seq2seq tuning=prompt",
            "tuning=prompt with objective=seq2seq: it is made for models",
        ),
        ("model.path=t5 objective=seq2seq strategy.activation_checkpointing=auto", "set it to none, selective or full"),
        ("model.path=t5 objective=seq2seq objective.max_target=1", "objective.max_target=1: must be at least 2"),
        ("model.path=t5 objective=seq2seq evaluation.generate.samples=5", "there is no evaluation data"),
        ("model.path=t5 objective=seq2seq evaluation.watch=eval/bleu", "set evaluation.generate.samples=100"),
    ],
)
def test_seq2seq_settings_that_do_not_go_together_are_refused_before_anything_starts(words, changes, message):
    with pytest.raises(ConfigError) as caught:
        compose_config([*words, *changes.split()])
    assert message in str(caught.value)


def test_seq2seq_settings_that_go_together_are_accepted(words):
    scored = "data.eval_share=0.1 evaluation.generate.samples=5 evaluation.watch=eval/rougeL"
    compose_config([*words, *f"model.path=t5 objective=seq2seq {scored} evaluation.greater_is_better=true".split()])
    compose_config([*words, "model.path=bart", "objective=seq2seq", "data.max_length=128", "objective.max_target=128"])


ALLOWED = [case for case, tuning in CASES.items() if not method_of(tuning).seq2seq_refusal]
STEPS = 3 if EVERYTHING else 2
"""The second is taken from what the first has learned."""
ALLOWED.remove("freeze modules")  # by names that these models do not have


@pytest.mark.parametrize("case", chosen(ALLOWED, lambda case: {method_name_of(CASES[case])}))
def test_a_method_that_is_not_refused_takes_steps_that_do_not_depend_on_the_micro_batch(root, runtime, case):
    curves = []
    for micro in (GLOBAL_BATCH, 4):
        changes = {"objective": Seq2seqConfig(max_target=64), "data": DataConfig(max_length=64)}
        config = run_config(seq2seq_dir(root, "t5"), "single", "full", micro=micro, steps=3, **changes)
        trainer = trainer_for(replace(config, tuning=CASES[case]), two_sided_set(root), runtime)
        curves.append(take_steps(trainer, STEPS))
    assert len({norm for _, norm in curves[0]}) == STEPS
    for found, expected in zip(*curves, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
