"""The engine must hold the student's weights: with a stand-in for vLLM that takes them, or not all of them."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from tipdistill import TIPConfig, TIPTrainer
from tipdistill.integrations.weight_sync import (
    MOVED,
    PROBE_TOKENS,
    TOLERANCE,
    WeightSyncCheck,
    WeightSyncError,
    engine_completion,
    tolerance_of,
)


class StandIn:
    """TRL's VLLMGeneration as the check sees it: an engine with weights of its own and, where `stale`, a packed
    lm_head that it made when it was loaded and does not make again."""

    def __init__(self, student, path, stale=False, mode="colocate"):
        self.student, self.mode, self.stale = student, mode, stale
        self.model = AutoModelForCausalLM.from_pretrained(path).eval()
        self.packed = self.model.get_output_embeddings().weight.detach().clone()
        self.llm = SimpleNamespace(
            llm_engine=SimpleNamespace(model_config=SimpleNamespace(dtype=torch.float32, max_model_len=512))
        )
        self.temperature, self.top_p, self.top_k, self.min_p, self.repetition_penalty = 0.7, 0.9, 5, 0.1, 1.1
        self.structured_outputs_regex, self.logprobs, self.max_completion_length = None, None, 6
        self.generation_kwargs = {"logit_bias": {1: -100.0}}
        self.asked, self.syncs = [], 0

    def sync_weights(self):
        self.syncs += 1
        self.model.load_state_dict(copy.deepcopy(self.student.state_dict()))
        if not self.stale:
            self.packed = self.model.get_output_embeddings().weight.detach().clone()

    @torch.no_grad()
    def generate(self, prompts, images, num_generations, profiler=None):
        self.asked.append((len(prompts), self.max_completion_length, self.temperature, self.logprobs))
        completions, logprobs = [], []
        for row, prompt in enumerate(prompts):
            ids, written, values = list(prompt), [], []
            draw = torch.Generator().manual_seed(self.generation_kwargs.get("seed", 1000 * self.syncs + row))
            for _ in range(self.max_completion_length):
                hidden = self.model.model(torch.tensor([ids])).last_hidden_state[0, -1]
                log_p = torch.log_softmax(self.packed @ hidden / self.temperature, -1)
                token = int(torch.multinomial(log_p.exp(), 1, generator=draw))
                ids.append(token)
                written.append(token)
                values.append([float(log_p[token])])
            completions.append(written)
            logprobs.append(values)
        return prompts, completions, None if self.logprobs is None else logprobs, None


@pytest.fixture
def trainer_with(tiny_model_dir, word_problems, tmp_path):
    def build(stale=False, mode="colocate", **settings):
        path = str(tiny_model_dir("qwen3", "student"))
        settings = {"learning_rate": 1e-2, "max_steps": 3, **settings}
        config = TIPConfig(
            str(tmp_path / "run"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            per_device_train_batch_size=4,
            max_completion_length=6,
            disable_tqdm=True,
            record_rollouts=0,
            **settings,
        )
        trainer = TIPTrainer(
            path,
            str(tiny_model_dir("qwen3", "teacher")),
            config,
            Dataset.from_json(str(word_problems)).select(range(16)),
        )
        # as its constructor would have left it with use_vllm, which needs the package
        trainer.use_vllm, trainer.vllm_mode, trainer._last_loaded_step = True, mode, -1
        trainer.vllm_generation = StandIn(trainer.model, path, stale, mode)
        return trainer

    return build


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_an_engine_that_takes_the_weights_is_trusted_after_the_student_has_moved(trainer_with, mode):
    trainer = trainer_with(mode=mode)
    trainer.train()
    engine = trainer.vllm_generation
    assert engine.syncs == 3
    probes = [asked for asked in engine.asked if asked[0] == 1]
    assert all(asked == (1, 6, 1.0, 0) for asked in probes)  # temperature 1, whatever the rollouts are drawn at
    assert [asked for asked in engine.asked if asked[0] > 1] == [(4, 6, 0.7, None)] * 3
    if mode == "colocate":  # float32: settled at the second sync, and not asked a third time
        assert trainer.engine_check.done
        assert len(probes) == 2
    assert engine.generation_kwargs == {"logit_bias": {1: -100.0}}
    assert (engine.top_k, engine.top_p, engine.repetition_penalty) == (5, 0.9, 1.1)


def test_a_stale_tied_lm_head_stops_the_run_at_the_first_sync_that_changes_it(trainer_with):
    trainer = trainer_with(stale=True)
    with pytest.raises(WeightSyncError, match=r"weight sync of step 1 .* tied lm_head .* vllm_sync_tolerance"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_a_student_that_was_resumed_or_changed_shows_a_stale_head_at_once(trainer_with):
    trainer = trainer_with(stale=True)
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight.mul_(0.5)
    with pytest.raises(WeightSyncError, match="weight sync of step 0"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_slow_student_is_checked_until_it_has_moved(trainer_with):
    trainer = trainer_with(learning_rate=1e-7)
    trainer.train()
    assert not trainer.engine_check.done
    assert len([asked for asked in trainer.vllm_generation.asked if asked[0] == 1]) == 3


def test_the_check_can_be_left_out_or_loosened(trainer_with):
    trainer = trainer_with(stale=True, vllm_sync_tolerance=0)
    trainer.train()
    assert all(asked[0] > 1 for asked in trainer.vllm_generation.asked)
    trainer_with(stale=True, vllm_sync_tolerance=50.0).train()


def test_the_check_changes_nothing_of_the_training(trainer_with):
    losses = []
    for tolerance in (None, 0):
        trainer = trainer_with(vllm_sync_tolerance=tolerance, logging_steps=1)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_edges_of_the_tolerance(dtype):
    tolerance = TOLERANCE[dtype]
    student = [-1.0, -2.0]
    WeightSyncCheck(tolerance)([-1.0 - 1.98 * tolerance, -2.0], student, student, 0)  # the mean decides, not one token
    for wrong in ([-1.0 - 2.02 * tolerance, -2.0], [math.nan, -2.0], [-1.0], []):
        with pytest.raises(WeightSyncError, match=f"{tolerance:g}"):
            WeightSyncCheck(tolerance)(wrong, student, student, 0)


def test_a_check_is_done_once_the_student_has_moved_far_enough():
    check = WeightSyncCheck(0.01)
    for moved, done in ((0.0, False), (0.9, False), (1.1, True)):
        check([-1.0], [-1.0], [-5.0 + moved * MOVED * 0.01], 0)
        assert check.done == done


def test_the_coarser_dtype_sets_the_tolerance():
    def engine(dtype):
        config = SimpleNamespace(model_config=SimpleNamespace(dtype=dtype))
        return SimpleNamespace(mode="colocate", llm=SimpleNamespace(llm_engine=config))

    assert tolerance_of(torch.float32, engine(torch.float32)) == 1e-3
    assert tolerance_of(torch.float32, engine(torch.float16)) == 0.05
    assert tolerance_of(torch.bfloat16, engine(torch.float32)) == 0.1
    assert tolerance_of(torch.float32, engine(torch.float8_e4m3fn)) == 0.1
    assert tolerance_of(torch.float32, SimpleNamespace(mode="server")) == 0.1


def test_an_engine_without_logprobs_says_so(trainer_with):
    engine = StandIn.__new__(StandIn)
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "structured_outputs_regex", "logprobs")
    engine.__dict__.update(dict.fromkeys((*names, "generation_kwargs"), None), max_completion_length=99)
    engine.generate = lambda **_: (None, [[1] * engine.max_completion_length], None, None)
    with pytest.raises(WeightSyncError, match="no log-probabilities"):
        engine_completion(engine, [1])
    assert engine.max_completion_length == 99
    engine.generate = lambda **_: (None, [[1] * engine.max_completion_length], [[[None]] * PROBE_TOKENS], None)
    completion, values = engine_completion(engine, [1])
    assert len(completion) == PROBE_TOKENS
    assert all(map(math.isnan, values))


def test_a_negative_tolerance_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vllm_sync_tolerance"):
        TIPConfig(str(tmp_path), use_cpu=True, bf16=False, vllm_sync_tolerance=-1.0)
