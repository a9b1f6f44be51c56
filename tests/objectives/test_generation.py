"""BLEU and ROUGE-L of written answers, against the libraries' own numbers for known texts."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounter

from tests.models.tiny import tiny_config
from trainer.data.batches.loader import EvalShare
from trainer.data.store.sequences import Sample
from trainer.evaluation import generation
from trainer.evaluation.base import DecodingConfig, GenerateConfig
from trainer.evaluation.decoding import GenerateAnswers, generation_config_for_answers, stock_attention
from trainer.evaluation.full_weights import GatherDecision
from trainer.evaluation.generate import AnswerGenerator, GenerationThroughput
from trainer.evaluation.generation import AnswerWithReference, GenerationEvaluator, bleu_and_rouge, reference_answer_ids
from trainer.model import attention, flex

PAIRS = [
    ("the cat sat on the mat", "the cat sat on the mat today"),
    ("a dog barked at night", "one dog was barking in the night"),
    ("nothing alike", "entirely different words here"),
]


def test_generated_answers_have_the_bleu_and_rouge_of_the_libraries():
    import sacrebleu
    from rouge_score import rouge_scorer

    found = bleu_and_rouge(
        [AnswerWithReference(number, answer, reference) for number, (answer, reference) in enumerate(PAIRS)]
    )
    expected = sacrebleu.BLEU().corpus_score([a for a, _ in PAIRS], [[r for _, r in PAIRS]]).score
    assert found["bleu"] == pytest.approx(expected) and 0 < expected < 100
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    each = [scorer.score(target=reference, prediction=answer)["rougeL"] for answer, reference in PAIRS]
    assert found["rougeL"] == pytest.approx(sum(score.fmeasure for score in each) / 3)
    # By hand: 6 of 6 and 7 words in order; dog, bark and night of 5 and 7; none. (the stem of barking is bark)
    assert found["rougeL"] == pytest.approx((12 / 13 + 2 * 3 / 12 + 0) / 3)


def test_right_answers_have_full_marks():
    found = bleu_and_rouge([AnswerWithReference(0, PAIRS[0][1], PAIRS[0][1])])
    assert found == {"bleu": pytest.approx(100.0), "rougeL": pytest.approx(1.0)}


def test_the_reference_is_the_first_run_of_learned_tokens():
    ids = np.arange(8, dtype=np.int32)
    learned = np.array([0, 0, 1, 1, 0, 0, 1, 0], dtype=bool)
    assert reference_answer_ids(Sample(ids, learned)).tolist() == [2, 3]
    assert reference_answer_ids(Sample(ids, ids >= 3)).tolist() == [3, 4, 5, 6, 7]


class Held:
    """Evaluation documents of two sets: two of one, five of the other, and the first again."""

    sources = np.array([0, 0, 1, 1, 1, 1, 1, 0])
    source_names = ("ward", "web")
    lengths = np.arange(8) + 2

    def __len__(self):
        return 8


def test_named_sets_are_scored_each(monkeypatch):
    share = EvalShare(2, 0, 1, 2, by_source=True)
    assert share.covered_documents(Held()).tolist() == [0, 1, 2, 3], "two of each"
    settings, runtime = GenerateConfig(samples=2), SimpleNamespace(is_main=True, world_size=1)
    monkeypatch.setattr(generation, "broadcast_object", lambda value, runtime: value)
    answers = [
        AnswerWithReference(number, answer, right)
        for number, (answer, right) in zip((0, 1, 2, 3), [*PAIRS, PAIRS[2]], strict=True)
    ]
    monkeypatch.setattr(GenerationEvaluator, "answer_documents", lambda self, engine: answers)
    monkeypatch.setattr(
        AnswerGenerator, "throughput", GenerationThroughput(60, 4.0, GatherDecision(True, False, "block by block"))
    )
    pace = {"eval/written_tokens_per_s": 15.0, "eval/weights_gathered": 0.0}
    expected = {
        **pace,
        "eval/bleu": bleu_and_rouge(answers)["bleu"],
        "eval/rougeL": bleu_and_rouge(answers)["rougeL"],
        **{f"eval/ward/{name}": value for name, value in bleu_and_rouge(answers[:2]).items()},
        **{f"eval/web/{name}": value for name, value in bleu_and_rouge(answers[2:]).items()},
    }
    made = partial(
        GenerationEvaluator, Held(), tokenizer=None, settings=settings, generation_config=None, runtime=runtime
    )
    assert len(answers) == 4 and expected["eval/ward/bleu"] != expected["eval/web/bleu"]
    assert dict(made(share).run(None)) == expected
    assert dict(made(EvalShare(2, 0, 1, 2)).run(None)).keys() == {"eval/bleu", "eval/rougeL", *pace}


@pytest.mark.parametrize(
    ("kind", "kernel"),
    [
        ("gpt_oss", flex.FLEX_ATTENTION),
        ("gpt_oss", attention.VARLEN_ATTENTION),
        ("gemma2", flex.FLEX_ATTENTION),
        ("llama", flex.FLEX_ATTENTION),
    ],
)
def test_generated_answers_are_those_of_plain_transformers_in_eager_attention(kind, kernel):
    """Sinks and soft caps after training in one row without padding, with prompts of unlike lengths in a batch."""
    attention.register()
    flex.register()
    torch.manual_seed(0)
    plain = transformers.AutoModelForCausalLM.from_config(tiny_config(kind), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name.endswith("sinks"):  # which take most of what is attended to
                parameter.fill_(4.0)
    trained = transformers.AutoModelForCausalLM.from_config(tiny_config(kind), attn_implementation=kernel).eval()
    trained.load_state_dict(plain.state_dict())
    ids = torch.randint(3, 300, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    asked = DecodingConfig(max_new_tokens=12)
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=2, all_special_tokens=[])
    settings = generation_config_for_answers(plain.generation_config, asked, tokenizer)
    with torch.no_grad():
        expected = plain.generate(**batch, generation_config=settings)[:, 9:]
        found = GenerateAnswers(settings, asked, tokenizer, synced_gpus=False).terms(
            trained, {**batch, "seeds": [0, 0]}
        )["answers"]
        assert torch.equal(found, expected)
        with stock_attention(trained):
            assert torch.allclose(trained(**batch).logits[:, 4:], plain(**batch).logits[:, 4:], atol=1e-4)
    assert trained.config._attn_implementation == kernel


def test_generation_compiles_nothing_on_a_gpu(monkeypatch):
    """Neither transformers, where a model's settings ask for a static cache, nor blocks that are compiled for training: each
    layer's keys would take one of torch's eight places, and none be left for the steps."""
    model = transformers.AutoModelForCausalLM.from_config(tiny_config("llama"), attn_implementation="sdpa").eval()
    traced = CompileCounter()
    model.model.norm.compile(backend=traced)  # in the place of its layers, which take longer to trace
    asked = DecodingConfig(max_new_tokens=3)
    base = transformers.GenerationConfig(cache_implementation="static", pad_token_id=0)
    settings = generation_config_for_answers(
        base, asked, SimpleNamespace(pad_token_id=0, eos_token_id=2, all_special_tokens=[])
    )
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.int64), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    with torch.no_grad():
        GenerateAnswers(settings, asked, SimpleNamespace(), synced_gpus=False).terms(model, {**batch, "seeds": [0]})
    assert traced.frame_count == 0
    model(**batch, use_cache=False)
    assert traced.frame_count > 0
    torch.compiler.reset()
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    cache = {"cache": transformers.StaticCache(model.config, max_cache_len=8)}
    assert model._valid_auto_compile_criteria(cache, base)
    assert not model._valid_auto_compile_criteria(cache, settings)
