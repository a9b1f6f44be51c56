"""Answers and likelihoods of an engine, against plain transformers with the same files."""

import math

import pytest
import torch

from strategies import runtime as processes
from strategies.errors import DataError
from tests.helpers import writing as make
from tests.helpers.building import alone
from trainer.evaluation.base import DecodingConfig
from trainer.evaluation.decoding import gumbel_noise, sample_in_two_levels
from trainer.evaluation.generate import batches_of_rank

PROMPTS = make.prompts(7)


@pytest.fixture(scope="module")
def runtime():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        yield alone(processes.join_job("cpu", timeout_s=60, threads=1))
        processes.leave_job()


@pytest.fixture(scope="module")
def llama(tmp_path_factory, runtime):
    root = tmp_path_factory.mktemp("llama")
    return *make.made(root, "llama", runtime, batch=3), make.plain(root, "llama")


def test_generation_greedy_answers_are_those_of_transformers(llama):
    engine, writer, plain = llama
    found = writer.generate_answers(engine, PROMPTS, DecodingConfig(max_new_tokens=12))
    assert [one.prompt_index for one in found] == [*range(7)]
    for prompt, one in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt])
        own = plain.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, len(prompt) :].tolist()
        assert not make.differ(plain, prompt, own, one.ids)
        assert one.text == writer.tokenizer.decode(one.ids, skip_special_tokens=True)
        assert one.has_ended == (one.ids[-1] == 2) and (one.has_ended or len(one.ids) == 12)
    assert len({one.text for one in found}) == 7


def test_generation_draws_depend_on_their_seed_and_number_alone(llama):
    engine, writer, _ = llama
    drawn = DecodingConfig(max_new_tokens=8, temperature=1.3, top_k=40, top_p=0.95, draws=2, seed=5)
    found = writer.generate_answers(engine, PROMPTS, drawn)
    assert [(one.prompt_index, one.sample_index) for one in found] == [(n, d) for n in range(7) for d in (0, 1)]
    writer.batch = 1
    one_by_one = writer.generate_answers(engine, PROMPTS, drawn)
    fewer = writer.generate_answers(
        engine, PROMPTS[:2], DecodingConfig(max_new_tokens=8, temperature=1.3, top_k=40, top_p=0.95, seed=5)
    )
    writer.batch = 3
    # Rounding could tip a draw only where two noisy scores nearly meet; that none does here is the same on every machine
    # up to such a case, so most must be equal rather than all.
    assert sum(a == b for a, b in zip(found, one_by_one, strict=True)) >= 12
    assert sum(a == b for a, b in zip(fewer, found[0:4:2], strict=True)) >= 1
    assert len({one.text for one in found}) == 14, "each draw has a noise of its own"


def test_noise_is_splitmix64_and_draws_from_the_softmax():
    """Against the algorithm in whole numbers, and the frequencies of 20,000 draws against the probabilities."""

    def mixed(state: int) -> int:
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        return state ^ state >> 31

    golden = 0x9E3779B97F4A7C15
    found = gumbel_noise(torch.tensor([3, 2**62 + 1]), 4, 6)
    for row, seed in enumerate((3, 2**62 + 1)):
        begin = mixed((mixed(seed) + 5 * golden) % 2**64)
        for token in range(6):
            uniform = ((mixed((begin + (token + 1) * golden) % 2**64) >> 12) + 0.5) / 2**52
            assert found[row, token].item() == pytest.approx(-math.log(-math.log(uniform)), rel=1e-9)
    logits, draws = torch.tensor([2.0, 0.0, -1.0, 1.0, -9.0]).double(), 20_000
    chosen = (logits + gumbel_noise(torch.arange(draws), 0, 5)).argmax(1)
    expected = logits.softmax(0)
    found = torch.bincount(chosen, minlength=5) / draws
    assert torch.all((found - expected).abs() < 5 * (expected * (1 - expected) / draws).sqrt() + 1e-4)


def test_generation_ends_at_a_stop_string(llama):
    engine, writer, _ = llama
    long = writer.generate_answers(engine, PROMPTS, DecodingConfig(max_new_tokens=12))
    whole = long[0]
    stop = whole.text[3:6]
    found = writer.generate_answers(engine, PROMPTS, DecodingConfig(max_new_tokens=12, stop=["never there", stop]))
    assert found[0].text == whole.text[: whole.text.index(stop)] and found[0].has_ended
    assert found[0].ids == whole.ids[: len(found[0].ids)] and len(found[0].ids) < len(whole.ids)
    assert stop in writer.tokenizer.decode(found[0].ids) and stop not in writer.tokenizer.decode(found[0].ids[:-1])
    for one, other in zip(found[1:], long[1:], strict=True):
        assert one.text == other.text.split(stop)[0]


PAIRS = [(prompt, more) for prompt, more in zip(PROMPTS, [*make.prompts(12)[6:], []], strict=False)]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "falcon", "qwen3_moe", "bart", "t5"])
def test_generation_likelihoods_are_those_of_transformers(tmp_path, runtime, architecture):
    engine, writer = make.made(tmp_path, architecture, runtime, batch=3)
    plain = make.plain(tmp_path, architecture)
    likeliest = [one.ids for one in writer.generate_answers(engine, PROMPTS[:2], DecodingConfig(max_new_tokens=4))]
    pairs = [*PAIRS, *zip(PROMPTS[:2], likeliest, strict=True)]
    found = writer.likelihoods(engine, pairs)
    for (context, more), one in zip(pairs, found, strict=True):
        assert one.num_tokens == len(more)
        if not more:
            assert (one.logprob, one.greedy) == (0.0, True)
            continue
        scores = make.logits_after(plain, context, more).log_softmax(-1)
        expected = scores.gather(1, torch.tensor(more)[:, None]).double().sum()
        assert one.logprob == pytest.approx(expected.item(), rel=1e-5, abs=1e-4)
        assert one.greedy == (scores.argmax(-1).tolist() == more)
    assert {one.greedy for one in found} == {True, False}


def test_generation_refuses_a_prompt_or_answer_without_tokens(llama):
    engine, writer, _ = llama
    with pytest.raises(DataError, match="prompt 1 of 2 has no tokens"):
        writer.generate_answers(engine, [[5], []], DecodingConfig())
    with pytest.raises(DataError, match="context 0 of 1 has no tokens"):
        writer.likelihoods(engine, [([], [5])])
    assert writer.generate_answers(engine, [], DecodingConfig()) == []


def test_every_row_is_dealt_once_and_ranks_take_as_many_turns():
    lengths = [3, 9, 1, 4, 4, 8, 2, 5, 5, 7, 6]
    turns = [[*batches_of_rank(lengths, rank, 3, max_rows=2)] for rank in range(3)]
    assert {len(one) for one in turns} == {2}
    assert sorted(row for one in turns for turn in one for row in turn) == [*range(11)]
    assert all(len(turn) <= 2 for one in turns for turn in one)
    assert min(lengths[row] for one in turns for row in one[0]) >= max(lengths[row] for one in turns for row in one[1])


def test_settings_that_do_not_go_together():
    assert list(DecodingConfig(temperature=0.7, draws=3).problems("evaluation.generate")) == []
    assert "beam search draws nothing" in "".join(DecodingConfig(temperature=1, beams=2).problems("x"))
    (idle,) = DecodingConfig(top_p=0.9, draws=3).problems("x")
    assert idle.startswith("x.top_p=0.9, x.draws=3: nothing is drawn at x.temperature=0")
    assert "empty text" in "".join(DecodingConfig(stop=[""]).problems("x"))


def test_generation_ends_at_the_last_position(tmp_path, runtime):
    """GPT-2 has a table of positions: a further token would be looked up beyond it."""
    engine, writer = make.made(tmp_path, "gpt2", runtime, batch=2)
    long, short = [5, 9] * 253, [5, 9, 7]
    found = writer.generate_answers(engine, [long, short], DecodingConfig(max_new_tokens=12))
    alone_too = writer.generate_answers(engine, [short], DecodingConfig(max_new_tokens=12))
    assert len(found[0].ids) <= 6 and found[1].ids == alone_too[0].ids
    with pytest.raises(DataError, match=r"prompt 0 of 1 has 512 tokens, .*shorten it to 511"):
        writer.generate_answers(engine, [long + [5] * 6], DecodingConfig(max_new_tokens=2))
    with pytest.raises(DataError, match="pair 0 of 1 has 513 tokens"):
        writer.likelihoods(engine, [(long, [5] * 8)])
    assert len(writer.likelihoods(engine, [(long, [5] * 7)])) == 1


def test_generation_batches_are_bounded_by_tokens():
    lengths = [10, 30, 12, 8, 9, 31]
    turns = [[*batches_of_rank(lengths, rank, 2, max_rows=1, max_tokens=33)] for rank in (0, 1)]
    assert turns == [[[5], [2, 4]], [[1], [0, 3]]]
    assert [*batches_of_rank([50, 1], 0, 1, max_rows=9, max_tokens=10)] == [[0], [1]], "at least one row, however long"


def test_generation_measures_its_tokens_per_second(llama):
    engine, writer, _ = llama
    found = writer.generate_answers(engine, PROMPTS, DecodingConfig(max_new_tokens=3, batch_tokens=64))
    assert writer.throughput.tokens == sum(len(one.ids) for one in found) and writer.throughput.tokens_per_s > 0
    assert str(writer.throughput).startswith(f"{writer.throughput.tokens} tokens written in ")
    assert not writer.throughput.gathering.sharded


def test_draws_in_two_levels_are_those_of_the_softmax():
    """900 tokens, so that the last block is not full: each token as often as its probability says, and that is what is kept."""
    scores = torch.randn(1, 900, generator=torch.Generator().manual_seed(3)) * 2
    scores[0, 700:] = -torch.inf  # tokens that must not come
    draws = 60_000
    drawn, logprobs = sample_in_two_levels(scores.expand(draws, -1), torch.arange(draws), 5)
    law = scores[0].log_softmax(0)
    assert torch.allclose(logprobs, law[drawn], atol=1e-5)
    expected = law.double().exp() * draws
    counts = torch.bincount(drawn, minlength=900).double()
    often = expected >= 5
    assert often.sum() > 300 and counts[700:].sum() == 0
    chi_squared = float(((counts - expected)[often] ** 2 / expected[often]).sum())
    freedom = int(often.sum())
    assert abs(chi_squared - freedom) < 5 * (2 * freedom) ** 0.5
    again, _ = sample_in_two_levels(scores.expand(4000, -1), torch.arange(4000), 6)
    assert float((again == drawn[:4000]).double().mean()) < 0.1  # another position is another draw
