"""Rollouts of plain models: what is sampled, going on with it, and scores that are those of the full logits."""

import sys
import types
from dataclasses import replace

import pytest
import torch
from acting import NAMES, Shop, speaks_of_tools, turn_after
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tipdistill import rollout as rollout_module
from tipdistill.environments import Acting, Worlds
from tipdistill.rollout import generate
from tipdistill.score import reference
from tipdistill.score.models import head_of, hidden_states, micro_batches, score_rollouts
from tipdistill.teachers.rollouts import batch_of
from tipdistill.types import Head, Rollout, Turn

PROMPTS = ["Ada has 12 apples", "Kurt", "A box holds 31 stamps. How many"]
FIELDS = (
    "entropy",
    "entropy_norm",
    "reverse_kl",
    "forward_kl",
    "teacher_entropy",
    "student_logprob",
    "teacher_logprob",
)


@pytest.fixture(params=["qwen3", "llama"])
def pair(request, tiny_model_dir):
    return [
        AutoModelForCausalLM.from_pretrained(tiny_model_dir(request.param, role)).eval()
        for role in ("student", "teacher")
    ]


@pytest.fixture
def student(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir("qwen3", "student")).eval()


def all_of(batches):
    return [rollout for batch in batches for rollout in batch]


def test_rollouts_are_prompt_by_prompt_with_their_prompts_as_fed(student, tiny_tokenizer):
    batches = list(generate(student, tiny_tokenizer, PROMPTS, samples=2, max_new_tokens=7, batch_size=4))
    assert [len(batch) for batch in batches] == [4, 2]
    rollouts = all_of(batches)
    assert [rollout.prompt_id for rollout in rollouts] == [0, 0, 1, 1, 2, 2]
    assert [rollout.prompt for rollout in rollouts[::2]] == PROMPTS
    for rollout in rollouts:
        assert list(rollout.prompt_ids) == tiny_tokenizer(rollout.prompt)["input_ids"]
        assert rollout.finished == (rollout.completion_ids[-1] == tiny_tokenizer.eos_token_id)
        assert rollout.finished or len(rollout.completion_ids) == 7


def test_conversations_go_through_the_chat_template(student, tiny_tokenizer):
    (rollout,) = all_of(generate(student, tiny_tokenizer, [[{"role": "user", "content": "Hi"}]], max_new_tokens=2))
    assert rollout.prompt == "<|start|>user\nHi<|end|>\n<|start|>assistant\n"


def test_a_completion_ends_with_its_end_and_not_with_the_padding(student, tiny_tokenizer):
    # every model writes the padding token now and then: a completion must not be cut there, and must be cut at the end
    ends = [tiny_tokenizer.eos_token_id, 40, 41]
    student.generation_config.eos_token_id = ends
    rollouts = all_of(generate(student, tiny_tokenizer, PROMPTS, samples=12, max_new_tokens=40))
    assert {rollout.completion_ids[-1] for rollout in rollouts if rollout.finished} <= set(ends)
    assert sum(rollout.finished for rollout in rollouts) > 3
    for rollout in rollouts:
        assert not set(rollout.completion_ids[:-1]) & set(ends)
        assert rollout.finished or len(rollout.completion_ids) == 40


def test_one_seed_one_text_whatever_was_drawn_before(student, tiny_tokenizer):
    options = {"max_new_tokens": 6, "batch_size": 2}
    state = torch.random.get_rng_state()
    first = all_of(generate(student, tiny_tokenizer, PROMPTS, seed=1, **options))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    assert all_of(generate(student, tiny_tokenizer, PROMPTS, seed=1, **options)) == first
    assert all_of(generate(student, tiny_tokenizer, PROMPTS, seed=2, **options)) != first
    assert all_of(generate(student, tiny_tokenizer, PROMPTS, seed=1, first_batch=1, **options)) == first[2:]


def test_equal_prompts_in_different_batches_are_different_draws(student, tiny_tokenizer):
    rollouts = all_of(generate(student, tiny_tokenizer, PROMPTS[:1] * 4, max_new_tokens=8, batch_size=1))
    assert len({rollout.completion_ids for rollout in rollouts}) == 4


def test_padding_on_the_left_changes_nothing(student, tiny_tokenizer):
    together = all_of(generate(student, tiny_tokenizer, PROMPTS, max_new_tokens=8, temperature=0))
    alone = [
        all_of(generate(student, tiny_tokenizer, [prompt], max_new_tokens=8, temperature=0))[0] for prompt in PROMPTS
    ]
    assert [rollout.completion_ids for rollout in together] == [rollout.completion_ids for rollout in alone]


def test_the_distribution_is_the_student_s_own(student, tiny_tokenizer):
    """A generation_config that narrows the sampling (as Qwen's do) must not, and must be there afterwards."""
    student.generation_config = GenerationConfig(
        do_sample=True, top_k=1, temperature=0.1, repetition_penalty=5.0, eos_token_id=tiny_tokenizer.eos_token_id
    )
    count = 4000
    rollouts = all_of(generate(student, tiny_tokenizer, PROMPTS[:1], samples=count, max_new_tokens=1, batch_size=2000))
    drawn = torch.bincount(
        torch.tensor([rollout.completion_ids[0] for rollout in rollouts]), minlength=student.vocab_size
    )
    with torch.no_grad():
        p = student(torch.tensor([rollouts[0].prompt_ids])).logits[0, -1].double().softmax(-1)
    # a sum of squared standardised counts has mean Σ(1 − p) and a standard deviation of √(2V + Σ 1 / (n p)) or so
    likely = p * count > 5
    deviation = ((drawn - count * p) ** 2 / (count * p))[likely].sum()
    degrees = int(likely.sum())
    assert degrees > 20
    assert abs(deviation - degrees) < 5 * (2 * degrees) ** 0.5
    assert student.generation_config.top_k == 1


def test_top_k_samples_from_the_likeliest_alone(student, tiny_tokenizer):
    greedy = all_of(generate(student, tiny_tokenizer, PROMPTS, max_new_tokens=6, temperature=0.0))
    likeliest = all_of(generate(student, tiny_tokenizer, PROMPTS, max_new_tokens=6, top_k=1, seed=3))
    everything = all_of(generate(student, tiny_tokenizer, PROMPTS, max_new_tokens=6, seed=3))
    assert likeliest == greedy != everything


def test_forbidden_tokens_are_never_sampled(student, tiny_tokenizer):
    forbidden = list(range(100, student.vocab_size))
    rollouts = all_of(generate(student, tiny_tokenizer, PROMPTS, samples=4, max_new_tokens=20, forbidden=forbidden))
    assert max(index for rollout in rollouts for index in rollout.completion_ids) < 100


def test_a_model_in_training_is_sampled_in_eval_mode_and_left_in_training(student, tiny_tokenizer):
    student.train()
    assert all_of(generate(student, tiny_tokenizer, PROMPTS, max_new_tokens=2))
    assert student.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": -1}, "temperature must be ≥ 0"),
        ({"top_p": 0}, "top_p in"),
        ({"top_k": -1}, "top_k must be 0"),
    ],
    ids=str,
)
def test_numbers_out_of_range(student, tiny_tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        list(generate(student, tiny_tokenizer, PROMPTS, **options))


def test_vllm_gets_tokens_and_one_seed_per_rollout(monkeypatch, tiny_tokenizer):
    """vLLM's own interface, with an engine that answers without a model."""

    class SamplingParams:
        def __init__(self, **options):
            self.options = options

    class Engine:
        llm_engine = object()

        def generate(self, prompts, parameters, use_tqdm):
            self.prompts, self.parameters = prompts, parameters
            reasons = ("stop", "length")
            return [
                types.SimpleNamespace(
                    outputs=[types.SimpleNamespace(token_ids=[5, place], finish_reason=reasons[place % 2])]
                )
                for place in range(len(prompts))
            ]

    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(SamplingParams=SamplingParams))
    engine = Engine()
    rollouts = all_of(
        generate(
            engine, tiny_tokenizer, PROMPTS[:2], samples=2, max_new_tokens=9, top_p=0.9, top_k=3, seed=4, forbidden=[7]
        )
    )
    assert [rollout.completion_ids for rollout in rollouts] == [(5, 0), (5, 1), (5, 2), (5, 3)]
    assert [rollout.finished for rollout in rollouts] == [True, False, True, False]
    assert [prompt["prompt_token_ids"] for prompt in engine.prompts] == [
        list(rollout.prompt_ids) for rollout in rollouts
    ]
    options = [sampling.options for sampling in engine.parameters]
    assert len({option["seed"] for option in options}) == 4
    asked = {tuple(option[name] for name in ("temperature", "top_p", "top_k", "max_tokens")) for option in options}
    assert asked == {(1.0, 0.9, 3, 9)}
    assert options[0]["logit_bias"] == {7: -100.0}


# Scores.


def full_logits(model, rollout):
    """The model's own logits at the positions that predict the completion."""
    tokens = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]])
    return model(tokens).logits[0, len(rollout.prompt_ids) - 1 : -1]


@torch.no_grad()
@pytest.mark.parametrize("tokens_per_forward", [1, 60, 10_000])
def test_scores_are_those_of_the_full_logits(pair, tiny_tokenizer, tokens_per_forward):
    student, teacher = pair
    rollouts = all_of(generate(student, tiny_tokenizer, PROMPTS, samples=2, max_new_tokens=9))
    scored = score_rollouts(student, teacher, rollouts, FIELDS, temperature=0.8, tokens_per_forward=tokens_per_forward)
    logits = [torch.cat([full_logits(model, rollout) for rollout in rollouts]) for model in pair]
    heads = [Head(z.double(), torch.eye(z.shape[1], dtype=torch.float64)) for z in logits]
    tokens = torch.tensor([index for rollout in rollouts for index in rollout.completion_ids])
    expected = reference.token_scores(*heads, "reverse_kl", 0.5, 0.8, tokens, FIELDS)
    for name, value in expected.present():
        # float32 forwards, padded differently
        torch.testing.assert_close(scored.scores.require(name).double(), value, rtol=1e-4, atol=1e-5)
    for top, z in ((scored.student_top, logits[0]), (scored.teacher_top, logits[1])):
        likeliest = torch.softmax(z / 0.8, -1).topk(5)
        torch.testing.assert_close(top.probability, likeliest.values, rtol=1e-4, atol=1e-6)
        assert (top.token_ids == likeliest.indices).float().mean() > 0.99


@torch.no_grad()
def test_padded_vocabularies_are_compared_where_they_are_shared(tiny_model_dir, tiny_tokenizer):
    student = AutoModelForCausalLM.from_pretrained(tiny_model_dir("qwen3", "student")).eval()
    teacher = AutoModelForCausalLM.from_pretrained(tiny_model_dir("qwen3", "teacher", vocab_rows=432)).eval()
    rollouts = all_of(generate(student, tiny_tokenizer, PROMPTS, max_new_tokens=5))
    top = score_rollouts(student, teacher, rollouts, FIELDS).teacher_top
    assert top.token_ids.max() < student.vocab_size


def test_of_an_episode_the_students_tokens_are_scored_and_no_other(pair, tiny_tokenizer):
    student, teacher = pair
    (rollout,) = all_of(generate(student, tiny_tokenizer, PROMPTS[:1], max_new_tokens=9))
    ids = rollout.completion_ids
    turns = Turn("student", 0, 3, ""), Turn("tool", 3, 2, ""), Turn("student", 5, len(ids) - 5, "")
    episode = replace(rollout, turns=turns)
    plain = replace(rollout, prompt_id=1)
    both = score_rollouts(student, teacher, [episode, plain], FIELDS)
    own = torch.tensor([True] * 3 + [False] * 2 + [True] * (len(ids) - 5))
    assert episode.student_ids == (*ids[:3], *ids[5:])
    for name in FIELDS:
        values = both.scores.require(name)
        torch.testing.assert_close(values[: len(ids) - 2], values[len(ids) - 2 :][own], rtol=1e-5, atol=1e-6)
    batch, mask = batch_of([episode, plain])
    assert mask.tolist() == [own.tolist(), [True] * len(ids)]
    assert batch["completion_mask"].bool().all()


def test_a_student_with_tools_plays_episodes_and_goes_on_where_it_stopped(student, tiny_model_dir, monkeypatch):
    tokenizer = speaks_of_tools(AutoTokenizer.from_pretrained(tiny_model_dir("qwen3", "student")))
    asked = []

    def sample(model, tokenizer, prompts, most, seed, **options):
        asked.append(seed)
        return [(turn_after(tokenizer, ids), True) for ids in prompts]

    monkeypatch.setattr(rollout_module, "_sample", sample)
    prompts = [[{"role": "user", "content": f"Buy a {name}."}] for name in NAMES[:5]]
    acting = Acting(Worlds(factory=Shop), [{"wanted": "pear", "money": row} for row in range(5)])
    options = {"samples": 2, "max_new_tokens": 300, "batch_size": 4, "acting": acting}
    batches = list(generate(student, tokenizer, prompts, **options))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    for rollout in all_of(batches):
        assert f"You have {rollout.prompt_id} coins." in rollout.prompt
        assert rollout.ending == "answered"
        assert sum(turn.tokens for turn in rollout.turns) == len(rollout.completion_ids)
        bought = sum(range(1, len(rollout.turns) // 2 + 1))
        assert rollout.verdict.figures == {"count": bought}
    assert len(set(asked)) == len(asked), "every turn of every batch is another draw"
    assert list(generate(student, tokenizer, prompts, **options, first_batch=1)) == batches[1:]
    with pytest.raises(ValueError, match="plain text, and tools are called in conversations"):
        next(generate(student, tokenizer, PROMPTS, acting=acting))


def test_hidden_states_carry_gradients_where_they_are_wanted(student, tiny_tokenizer):
    rollouts = all_of(generate(student, tiny_tokenizer, PROMPTS, max_new_tokens=5))
    head = head_of(student, hidden_states(student, rollouts))
    assert head.hidden.shape == (sum(len(rollout.completion_ids) for rollout in rollouts), 32)
    head.hidden.sum().backward()
    assert student.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_hidden_states_of_an_adapted_model_have_its_adapters(student, tiny_tokenizer):
    peft = pytest.importorskip("peft")
    (rollout,) = all_of(generate(student, tiny_tokenizer, PROMPTS[:1], max_new_tokens=5))
    plain = hidden_states(student, [rollout])
    adapters = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(student, adapters)
    head = head_of(adapted, hidden_states(adapted, [rollout]))
    ids = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]])
    logits = adapted(ids).logits[0, len(rollout.prompt_ids) - 1 : -1]
    torch.testing.assert_close(head.hidden @ head.weight.T, logits, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(head.hidden, plain, atol=1e-3)


def test_weights_that_are_no_numbers_name_the_rollout(student, tiny_tokenizer):
    rollouts = [Rollout(0, "a", (70,), (71, 72, 73), False), Rollout(1, "b", (70, 71), (5, 74), False)]
    broken = AutoModelForCausalLM.from_config(student.config)
    broken.load_state_dict(student.state_dict())
    broken.model.embed_tokens.weight.data[5] = torch.nan
    broken.lm_head.weight = torch.nn.Parameter(student.lm_head.weight.detach().clone())
    # token 0 already: attention multiplies what it masks by 0, and 0 · NaN is NaN
    with pytest.raises(ValueError, match="rollout 1, token 0: the logits are NaN"):
        score_rollouts(broken, student, rollouts, FIELDS)


def test_micro_batches_hold_every_rollout_once_and_stay_in_the_budget():
    rollouts = [Rollout(0, "", (1,) * (place % 7 + 1), (1,) * (place % 5 + 1), True) for place in range(40)]
    batches = micro_batches(rollouts, 30)
    assert sorted(place for batch in batches for place in batch) == list(range(40))
    for batch in batches:
        longest = max(len(rollouts[place].prompt_ids) + len(rollouts[place].completion_ids) for place in batch)
        assert len(batch) * longest <= 30
    assert len(micro_batches([replace(rollouts[6])], 1)) == 1
