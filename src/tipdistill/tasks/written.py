"""What the small tasks share: solutions written out character by character, and models taught on them from scratch.

A task is a `WrittenTask`: its characters, its problems, how one is asked and solved, and how its teacher and student
are taught. One character is one token; a completion works towards `>`, the answer and `$`, the end. All prompts of a
task have one length, and so have all its solutions.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from ..evaluate import mean_at_k
from ..files import write_text
from ..rollout import generate
from ..score.models import score_rollouts
from ..types import Rollout, TokenScores

HELD_OUT_SHARE = 1 / 8


@dataclass(frozen=True)
class Training:
    """How one of the two models is taught before distillation.

    Args:
        layers, width: see `WrittenTask.model_config`.
        steps: optimiser steps.
        learning_rate: at its highest; it rises over the first twentieth of the steps and falls linearly to 0.
        corruption: of the solutions, for a task that knows one; None: there is none.
        batch: solutions per step.
        seed: of the weights and the solutions.
        stop: step after which it is broken off, its learning rate as high as the schedule has it there; None: never.
    """

    layers: int
    width: int
    steps: int
    learning_rate: float
    corruption: Any = None
    batch: int = 32
    seed: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class WrittenTask:
    """A task with everything that teaching, distilling and measuring on it need.

    Args:
        characters: the vocabulary, `>` and, last, `$` among them; the padding token comes after.
        prompt_tokens, completion_tokens: length of every prompt and of every solution, in characters.
        number_of_problems: how many there are.
        draw: a random problem, a tuple.
        prompt_of: problem → the prompt that asks for it.
        parse: prompt → the problem, or a ValueError where it is none of this task.
        answer_of: problem → what must follow `>`, without the end.
        solve: (problem, source of randomness, corruption) → one written solution.
        teacher, student: how the two are taught.
        source: the file that says all this, part of the key under which a taught model is kept.
    """

    characters: str
    prompt_tokens: int
    completion_tokens: int
    number_of_problems: int
    draw: Callable[[random.Random], tuple]
    prompt_of: Callable[[tuple], str]
    parse: Callable[[str], tuple]
    answer_of: Callable[[tuple], str]
    solve: Callable[[tuple, random.Random, Any], str]
    teacher: Training
    student: Training
    source: str

    def build_tokenizer(self) -> PreTrainedTokenizerFast:
        """One token per character, `$` ends a completion; unknown characters become the padding token."""
        vocabulary = {character: index for index, character in enumerate(self.characters)}
        vocabulary["<pad>"] = len(self.characters)
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        tokenizer.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token="$",
            pad_token="<pad>",
            padding_side="left",
            clean_up_tokenization_spaces=False,
        )

    def is_correct(self, prompt: str, completion: str) -> bool:
        """Whether what follows the first `>` is the exact answer and the end, and nothing else.

        Args:
            prompt: as `prompt_of` writes it.
            completion: what a model wrote.

        Raises:
            ValueError: the prompt is none of this task.
        """
        return ends_with(completion, self.answer_of(self.parse(prompt)))

    def problems(self, count: int, seed: int, held_out: bool = False) -> list[tuple]:
        """Distinct random problems; the held-out ones and the others never meet.

        A problem is held out where a hash of it says so (one in eight), whatever the seed.

        Args:
            count: how many.
            seed: which.
            held_out: for evaluation, or for training.

        Raises:
            ValueError: more are asked for than a search at random finds in reasonable time.
        """
        most = int(self.number_of_problems * HELD_OUT_SHARE / 10)
        if not 1 <= count <= most:
            raise ValueError(f"count must be in 1..{most:,}, got {count}.")
        draw = random.Random(f"{seed}-{held_out}")
        drawn: dict[tuple, None] = {}
        while len(drawn) < count:
            problem = self.draw(draw)
            if is_held_out(problem) == held_out:
                drawn[problem] = None
        return list(drawn)

    def evaluation(self) -> dict[str, Any]:
        """The task as an entry of `tipdistill.tasks.TASKS`: 256 held-out problems, exact answers."""
        return {
            "problems": [
                (self.prompt_of(problem), self.answer_of(problem)) for problem in self.problems(256, 0, held_out=True)
            ],
            "prompt": "own",
            "chat": False,
            "check": ends_with,
            "extract": lambda response: response.partition(">")[2] or None,
            "special_tokens": True,
            "max_new_tokens": self.completion_tokens,
        }

    def model_config(self, layers: int, width: int) -> Qwen3Config:
        """A Qwen3 configuration for this task: 4 heads, tied embeddings.

        Args:
            layers: decoder layers.
            width: hidden size, a multiple of 8.

        Raises:
            ValueError: a width that four heads of even size do not fill.
        """
        if layers < 1 or width < 8 or width % 8:
            raise ValueError(f"layers must be ≥ 1 and width a positive multiple of 8, got {layers} and {width}.")
        return Qwen3Config(
            vocab_size=len(self.characters) + 1,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=width // 4,
            tie_word_embeddings=True,
            rope_theta=1000.0,
            initializer_range=0.05,
            # the next power of two
            max_position_embeddings=1 << (self.prompt_tokens + self.completion_tokens - 1).bit_length(),
            eos_token_id=self.characters.index("$"),
            pad_token_id=len(self.characters),
            bos_token_id=None,
        )

    def teach(self, training: Training, on_step: Callable[[int, float], None] | None = None) -> PreTrainedModel:
        """Train a model from scratch on written solutions.

        L = −(1 / BT) Σ log P(y_t | c_t), the cross-entropy of the completions' B · T tokens.

        Args:
            training: architecture, data and schedule.
            on_step: called with the step and its loss (nats per token).

        Returns:
            The model, in evaluation mode.
        """
        model = untaught(self.model_config(training.layers, training.width), training.seed)
        draw = random.Random(training.seed)

        def loss() -> Tensor:
            tokens = self._solutions(training.batch, draw, training.corruption)
            logits = model(input_ids=tokens, use_cache=False).logits[:, self.prompt_tokens - 1 : -1]
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, self.prompt_tokens :].flatten())

        return fit(model, loss, training, on_step)

    def _solutions(self, count: int, draw: random.Random, corruption: Any = None) -> Tensor:
        """Token ids of random training problems with their solutions, int64 [count, prompt + completion]."""
        index = {character: number for number, character in enumerate(self.characters)}
        rows: list[list[int]] = []
        while len(rows) < count:
            problem = self.draw(draw)
            if not is_held_out(problem):
                text = self.prompt_of(problem) + self.solve(problem, draw, corruption)
                rows.append([index[character] for character in text])
        return torch.tensor(rows)

    def taught(
        self, name: str, training: Training, root: str | Path, on_step: Callable[[int, float], None] | None = None
    ) -> Path:
        """The directory of a taught model with its tokenizer, trained on the first call and found again afterwards.

        The directory's name holds a hash of every setting, of this file and the task's and of the versions that matter,
        so that a change of any of them trains anew; it appears only when complete.

        Args:
            name: what to call it, "teacher" or "student".
            training: see `teach`.
            root: where the directories live.
            on_step: see `teach`.
        """
        return taught_once(
            name,
            asdict(training),
            root,
            (__file__, self.source),
            lambda: (self.teach(training, on_step), self.build_tokenizer()),
        )

    def prepare(
        self, root: str | Path, prompts: int = 8192, report: Callable[[str, int, float], None] | None = None
    ) -> None:
        """Both models under `root`/models and training prompts in `root`/prompts.jsonl, where a recipe finds them.

        Args:
            root: what is there already is kept.
            prompts: how many; distinct, none of them held out.
            report: called with the model's name, the step and its loss.
        """
        self.write_prompts(Path(root) / "prompts.jsonl", prompts, seed=0)  # first: their number may be refused
        folder = Path(root) / "models"
        for name, training in (("teacher", self.teacher), ("student", self.student)):
            point_to(self.taught(name, training, folder, report and (lambda *step, name=name: report(name, *step))))

    def write_prompts(self, path: Path, count: int, seed: int) -> None:
        """Write the prompts of `problems(count, seed)` as JSON lines."""
        lines = [json.dumps({"prompt": self.prompt_of(problem)}) for problem in self.problems(count, seed)]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "\n".join(lines) + "\n")

    def _rollouts(
        self, model: PreTrainedModel, prompts: Sequence[str], seed: int, temperature: float = 1.0
    ) -> list[Rollout]:
        """One rollout per prompt, written as all rollouts outside a training run are, in one batch."""
        tokenizer, most = self.build_tokenizer(), self.completion_tokens
        (rollouts,) = generate(
            model, tokenizer, prompts, max_new_tokens=most, temperature=temperature, seed=seed, batch_size=len(prompts)
        )
        return rollouts

    def sample(self, model: PreTrainedModel, prompts: Sequence[str], seed: int, temperature: float = 1.0) -> list[str]:
        """One sampled completion per prompt, see `tipdistill.rollout.generate`.

        Args:
            model: student or teacher.
            prompts: prompts of this task, at least one.
            seed: of the sampling; the process's own random state is left as it was.
            temperature: of the sampling; 0 takes the likeliest token.

        Returns:
            Completions up to and with their `$`; one that never ends has none.
        """
        rollouts = self._rollouts(model, prompts, seed, temperature)
        return self.build_tokenizer().batch_decode([rollout.completion_ids for rollout in rollouts])

    def score(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        prompts: Sequence[str],
        seed: int,
        fields: Sequence[str] | None = None,
    ) -> tuple[TokenScores, Tensor]:
        """Statistics of the tokens of one rollout per prompt, and the rollout of each token.

        Args:
            student: writes the rollouts, at temperature 1.
            teacher: scores the same contexts.
            prompts: prompts of this task, at least one.
            seed: of the sampling.
            fields: see `tipdistill.token_scores`.

        Returns:
            TokenScores of the N completion tokens, and int64 [N], the index of each token's prompt; on the CPU.
        """
        rollouts = self._rollouts(student, prompts, seed)
        lengths = torch.tensor([len(rollout.completion_ids) for rollout in rollouts])
        scored = score_rollouts(student, teacher, rollouts, fields)
        return scored.scores, torch.arange(len(rollouts)).repeat_interleave(lengths)

    def evaluate(
        self, model: PreTrainedModel, problems: Sequence[tuple], samples: int, seed: int = 0
    ) -> tuple[float, float]:
        """mean@k at temperature 1, and its standard error over the problems.

        Args:
            model: the model to measure.
            problems: see `problems`.
            samples: k, completions per problem.
            seed: of the sampling.

        Returns:
            Accuracy and standard error, see `tipdistill.evaluate.mean_at_k`.
        """
        prompts = [self.prompt_of(problem) for problem in problems for _ in range(samples)]
        texts = self.sample(model, prompts, seed)
        right = [self.is_correct(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        return mean_at_k([right[first : first + samples] for first in range(0, len(right), samples)])


def taught_once(
    name: str,
    settings: dict[str, Any],
    root: str | Path,
    sources: Sequence[str],
    teach: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerFast]],
) -> Path:
    """The directory of a model with its tokenizer, taught on the first call and found again afterwards.

    Args:
        name: what to call it, "teacher" or "student".
        settings: how it is taught; with a hash of the sources and the versions that matter they are its key.
        root: where the directories live; one appears only when it is complete.
        sources: files that say how it is taught.
        teach: makes the model and its tokenizer.
    """
    content = b"".join(Path(source).read_bytes() for source in sources)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    settings = {**settings, **versions, "source": hashlib.sha256(content).hexdigest()}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    final = Path(root) / f"{name}-{digest}"
    if final.exists():
        return final
    partial = final.with_name(f".{final.name}.{os.getpid()}")
    model, tokenizer = teach()
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "training.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    try:
        partial.rename(final)
    except OSError:
        shutil.rmtree(partial)
        if not final.exists():
            raise
        # another process finished the same model first
    return final


def untaught(config: Qwen3Config, seed: int) -> Qwen3ForCausalLM:
    """A model with random weights; the process's own random state is left as it was.

    Args:
        config: of the model.
        seed: of its weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def fit(
    model: PreTrainedModel,
    loss_of_batch: Callable[[], Tensor],
    training: Training,
    on_step: Callable[[int, float], None] | None = None,
) -> PreTrainedModel:
    """Train a model with AdamW, its gradient's norm clipped at 1.

    Args:
        model: its weights change.
        loss_of_batch: of the next batch, a scalar.
        training: steps and learning rate.
        on_step: called with the step and its loss.

    Returns:
        The model, in evaluation mode.
    """
    # β₂ = 0.95 and a linear decay to 0 halve the excess held-out loss of 0.999 and a cosine to a tenth
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = max(1, training.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (training.steps - step) / max(1, training.steps - warmup))
    )
    model.train()
    for step in range(training.steps if training.stop is None else min(training.stop, training.steps)):
        loss = loss_of_batch()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step + 1, loss.item())
    return model.eval()


def ends_with(completion: str, answer: str) -> bool:
    """Whether what follows the first `>` is the answer and the end, and nothing else.

    Example:
        >>> ends_with("2+3=5;>5$", "5"), ends_with(">5", "5"), ends_with(">55$", "5")
        (True, False, False)
    """
    return completion.partition(">")[2] == f"{answer}$"


def is_held_out(problem: tuple) -> bool:
    """Whether a problem is kept for evaluation: one in eight is, by a hash of it."""
    return hashlib.sha256(f"{problem}".encode()).digest()[0] < 256 * HELD_OUT_SHARE


def point_to(directory: Path) -> Path:
    """A link beside a taught model's directory, named without its hash, that a recipe can rely on.

    Args:
        directory: as `WrittenTask.taught` returns it.

    Returns:
        The link.
    """
    link = directory.with_name(directory.name.rpartition("-")[0])
    fresh = directory.with_name(f".{link.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(directory.name)
    fresh.replace(link)
    return link
