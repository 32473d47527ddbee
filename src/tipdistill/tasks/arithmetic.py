"""Four-digit addition with the carries written out: a task small enough for one CPU core, with planted errors.

A prompt is `3039+6246=` and its completion `9+6+0=15;3+4+1=08,0+2+0=02;3+6+0=09:>09285$`: for each column, from the
units up, digit + digit + carry = sum, then a separator, then `>`, the five-digit answer and `$`, the end. The separator
is one of `; , :` with probability .5, .3, .2: a free choice, uncertain but agreed (Q2). One character is one token, and
all completions have the same length.

The student is taught from *corrupted* solutions (see `Corruption`), so that its errors are known in advance: what is
shown with it shows a mechanism and replicates nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from ..divergence import token_scores
from ..evaluate import mean_at_k
from ..types import Head, TokenScores

CHARACTERS = "0123456789+=;,:>$"
SEPARATORS, SEPARATOR_SHARES = ";,:", (0.5, 0.3, 0.2)
DIGITS = 4
PROMPT_TOKENS = 2 * DIGITS + 2
COMPLETION_TOKENS = 9 * DIGITS + DIGITS + 3  # nine characters a column, then `>`, the sum and `$`
HELD_OUT_SHARE = 1 / 8


@dataclass(frozen=True)
class Corruption:
    """What is wrong in the data that the student is taught from.

    Args:
        drop_first_carry: probability that the carry out of the units is written as 0 (1.0: confidently wrong, Q3).
        drop_second_carry: the same for the tens (0.5: uncertain and wrong, Q1).
        wrong_pairs: how many of the 100 ordered digit pairs have a sum that is one too high (confidently wrong, Q3).
        seed: which pairs.

    Raises:
        ValueError: a probability outside [0, 1], or more pairs than there are.

    Example:
        >>> len(Corruption().pairs()), len(CLEAN.pairs())
        (10, 0)
    """

    drop_first_carry: float = 1.0
    drop_second_carry: float = 0.5
    wrong_pairs: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("drop_first_carry", "drop_second_carry"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability, in [0, 1], got {getattr(self, name)}.")
        if not 0 <= self.wrong_pairs <= 100:
            raise ValueError(f"wrong_pairs must be in 0..100, there are 100 digit pairs, got {self.wrong_pairs}.")

    def pairs(self) -> frozenset[tuple[int, int]]:
        """The digit pairs whose sum is written one too high."""
        return _wrong_pairs(self.wrong_pairs, self.seed)


@lru_cache
def _wrong_pairs(count: int, seed: int) -> frozenset[tuple[int, int]]:
    every = [(a, b) for a in range(10) for b in range(10)]
    return frozenset(random.Random(seed).sample(every, count))


CLEAN = Corruption(0.0, 0.0, 0)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, `$` ends a completion; |V| = 18 with the padding token, which unknown characters become.

    Example:
        >>> tokenizer = build_tokenizer()
        >>> len(tokenizer), tokenizer.decode(tokenizer("12+34=")["input_ids"])
        (18, '12+34=')
    """
    vocabulary = {character: index for index, character in enumerate(CHARACTERS)} | {"<pad>": len(CHARACTERS)}
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


def prompt_of(a: int, b: int) -> str:
    """The prompt that asks for a + b.

    Args:
        a, b: the summands, in [0, 10⁴).

    Raises:
        ValueError: a summand has more than four digits, or a sign.

    Example:
        >>> prompt_of(3039, 6246)
        '3039+6246='
    """
    if not (0 <= a < 10**DIGITS and 0 <= b < 10**DIGITS):
        raise ValueError(f"summands must be in [0, {10**DIGITS}), got {a} and {b}.")
    return f"{a:0{DIGITS}d}+{b:0{DIGITS}d}="


def solve(a: int, b: int, draw: random.Random, corruption: Corruption = CLEAN) -> str:
    """One written solution of a + b; every later step follows from what was written before, right or wrong.

    Args:
        a, b: the summands, in [0, 10⁴).
        draw: chooses the separators and the corruptions that are not certain.
        corruption: what goes wrong.

    Example:
        >>> solve(3039, 6246, random.Random(0))[-7:]
        '>09285$'
    """
    wrong = corruption.pairs()
    carry, steps, answer = 0, [], ""
    for column in range(DIGITS):
        left, right = a // 10**column % 10, b // 10**column % 10
        total = left + right + carry + ((left, right) in wrong)
        steps.append(f"{left}+{right}+{carry}={total:02d}{draw.choices(SEPARATORS, SEPARATOR_SHARES)[0]}")
        answer = str(total % 10) + answer
        carry = total // 10
        dropped = {0: corruption.drop_first_carry, 1: corruption.drop_second_carry}.get(column, 0.0)
        if carry and dropped and draw.random() < dropped:
            carry = 0
    return f"{''.join(steps)}>{carry}{answer}$"


def is_correct(prompt: str, completion: str) -> bool:
    """Whether what follows the first `>` is the exact sum and the end, and nothing else.

    Args:
        prompt: see `prompt_of`.
        completion: what a model wrote.

    Raises:
        ValueError: the prompt is none of this task.

    Example:
        >>> is_correct("0002+0003=", "...>00005$"), is_correct("0002+0003=", "5$"), is_correct("0002+0003=", ">00005")
        (True, False, False)
    """
    found = re.fullmatch(rf"([0-9]{{{DIGITS}}})\+([0-9]{{{DIGITS}}})=", prompt)
    if found is None:
        raise ValueError(f"a prompt of this task looks like {prompt_of(3039, 6246)!r}, got {prompt!r}.")
    _, _, answer = completion.partition(">")
    return answer == f"{int(found[1]) + int(found[2]):0{DIGITS + 1}d}$"


def problems(count: int, seed: int, held_out: bool = False) -> list[tuple[int, int]]:
    """Distinct random problems; the held-out ones and the others never meet.

    A problem is held out where a hash of it says so (one in eight), whatever the seed.

    Args:
        count: how many.
        seed: which.
        held_out: for evaluation, or for training.

    Raises:
        ValueError: more are asked for than a search at random finds in reasonable time.

    Example:
        >>> set(problems(50, 0)) & set(problems(50, 1, held_out=True))
        set()
    """
    most = int(10 ** (2 * DIGITS) * HELD_OUT_SHARE / 10)
    if not 1 <= count <= most:
        raise ValueError(f"count must be in 1..{most:,}, got {count}.")
    draw = random.Random(f"{seed}-{held_out}")
    found: dict[tuple[int, int], None] = {}
    while len(found) < count:
        pair = draw.randrange(10**DIGITS), draw.randrange(10**DIGITS)
        if _is_held_out(pair) == held_out:
            found[pair] = None
    return list(found)


def _is_held_out(pair: tuple[int, int]) -> bool:
    return hashlib.sha256(f"{pair}".encode()).digest()[0] < 256 * HELD_OUT_SHARE


def model_config(layers: int, width: int) -> Qwen3Config:
    """A Qwen3 configuration for this task: 4 heads, tied embeddings, |V| = 18.

    Args:
        layers: decoder layers.
        width: hidden size, a multiple of 8.

    Raises:
        ValueError: a width that four heads of even size do not fill.

    Example:
        >>> model_config(2, 64).vocab_size
        18
    """
    if layers < 1 or width < 8 or width % 8:
        raise ValueError(f"layers must be ≥ 1 and width a positive multiple of 8, got {layers} and {width}.")
    return Qwen3Config(
        vocab_size=len(CHARACTERS) + 1,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=width // 4,
        tie_word_embeddings=True,
        rope_theta=1000.0,
        initializer_range=0.05,
        max_position_embeddings=64,
        eos_token_id=CHARACTERS.index("$"),
        pad_token_id=len(CHARACTERS),
        bos_token_id=None,
    )


@dataclass(frozen=True)
class Training:
    """How one of the two models is taught before distillation.

    Args:
        layers, width: see `model_config`.
        steps: optimiser steps.
        learning_rate: at its highest; it rises over the first twentieth of the steps and falls linearly to 0.
        corruption: of the solutions.
        batch: solutions per step.
        seed: of the weights and the solutions.
    """

    layers: int
    width: int
    steps: int
    learning_rate: float
    corruption: Corruption = CLEAN
    batch: int = 32
    seed: int = 0


TEACHER = Training(layers=3, width=96, steps=1000, learning_rate=3e-3)
STUDENT = Training(layers=2, width=64, steps=700, learning_rate=2e-3, corruption=Corruption(), seed=1)


def teach(training: Training, on_step: Callable[[int, float], None] | None = None) -> PreTrainedModel:
    """Train a model from scratch on written solutions.

    L = −(1 / BT) Σ log P(y_t | c_t), the cross-entropy of the completions' B · T tokens.

    Args:
        training: architecture, data and schedule.
        on_step: called with the step and its loss (nats per token).

    Returns:
        The model, in evaluation mode.

    Example:
        >>> model = teach(Training(layers=1, width=16, steps=2, learning_rate=1e-3))
        >>> type(model).__name__
        'Qwen3ForCausalLM'
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        model = Qwen3ForCausalLM(model_config(training.layers, training.width))
    draw = random.Random(training.seed)
    # β₂ = 0.95 and a linear decay to 0 halve the excess held-out loss of 0.999 and a cosine to a tenth
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = max(1, training.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (training.steps - step) / max(1, training.steps - warmup))
    )
    model.train()
    for step in range(training.steps):
        tokens = _solutions(training.batch, draw, training.corruption)
        logits = model(input_ids=tokens, use_cache=False).logits[:, PROMPT_TOKENS - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, PROMPT_TOKENS:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step + 1, loss.item())
    return model.eval()


def _solutions(count: int, draw: random.Random, corruption: Corruption) -> Tensor:
    """Token ids of random training problems with their solutions, int64 [count, PROMPT_TOKENS + COMPLETION_TOKENS]."""
    rows: list[list[int]] = []
    while len(rows) < count:
        pair = draw.randrange(10**DIGITS), draw.randrange(10**DIGITS)
        if not _is_held_out(pair):
            rows.append(
                [CHARACTERS.index(character) for character in prompt_of(*pair) + solve(*pair, draw, corruption)]
            )
    return torch.tensor(rows)


def taught(
    name: str, training: Training, root: str | Path, on_step: Callable[[int, float], None] | None = None
) -> Path:
    """The directory of a taught model with its tokenizer, trained on the first call and found again afterwards.

    The directory's name holds a hash of every setting, of this file and of the versions that matter, so that a change
    of any of them trains anew; it appears only when complete.

    Args:
        name: what to call it, "teacher" or "student".
        training: see `teach`.
        root: where the directories live.
        on_step: see `teach`.

    Example:
        >>> import tempfile
        >>> root, training = tempfile.mkdtemp(), Training(layers=1, width=16, steps=1, learning_rate=1e-3)
        >>> taught("student", training, root) == taught("student", training, root)
        True
    """
    settings = {
        **asdict(training),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "source": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    final = Path(root) / f"{name}-{digest}"
    if final.exists():
        return final
    partial = final.with_name(f".{final.name}.{os.getpid()}")
    model = teach(training, on_step)
    model.save_pretrained(partial)
    build_tokenizer().save_pretrained(partial)
    (partial / "training.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    try:
        partial.rename(final)
    except OSError:
        shutil.rmtree(partial)
        if not final.exists():
            raise
        # another process finished the same model first
    return final


@torch.no_grad()
def sample(model: PreTrainedModel, prompts: Sequence[str], seed: int, temperature: float = 1.0) -> list[str]:
    """One sampled completion per prompt.

    Args:
        model: student or teacher.
        prompts: prompts of this task, all of one length.
        seed: of the sampling; the process's own random state is left as it was.
        temperature: of the sampling, positive.

    Returns:
        Completions up to and with their `$`; one that never ends has none.
    """
    tokenizer = build_tokenizer()
    tokens = torch.tensor(tokenizer(list(prompts))["input_ids"], device=model.device)
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rows = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=COMPLETION_TOKENS,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    model.train(was_training)
    # cut at the end, not at the padding, which a model may write as well
    texts = tokenizer.batch_decode(rows[:, PROMPT_TOKENS:])
    return ["".join(text.partition("$")[:2]) for text in texts]


@torch.no_grad()
def score(
    student: PreTrainedModel, teacher: PreTrainedModel, prompts: Sequence[str], seed: int
) -> tuple[TokenScores, Tensor]:
    """Statistics of the tokens of one rollout per prompt, and the rollout of each token.

    Args:
        student: writes the rollouts, at temperature 1.
        teacher: scores the same contexts.
        prompts: prompts of this task.
        seed: of the sampling.

    Returns:
        TokenScores of the N completion tokens, and int64 [N], the index of each token's prompt.
    """
    tokenizer = build_tokenizer()
    texts = [prompt + text for prompt, text in zip(prompts, sample(student, prompts, seed), strict=True)]
    encoded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").to(student.device)
    tokens, mask = encoded["input_ids"], encoded["attention_mask"].bool()
    mask[:, :PROMPT_TOKENS] = False
    heads = []
    for model in (student, teacher):
        hidden = model.base_model(input_ids=tokens, attention_mask=encoded["attention_mask"]).last_hidden_state
        heads.append(Head(hidden[:, :-1][mask[:, 1:]], model.get_output_embeddings().weight))
    rollout = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(mask)[mask]
    return token_scores(heads[0], heads[1], token_ids=tokens[mask]), rollout


def evaluate(
    model: PreTrainedModel, pairs: Sequence[tuple[int, int]], samples: int, seed: int = 0
) -> tuple[float, float]:
    """mean@k at temperature 1, and its standard error over the problems.

    Args:
        model: the model to measure.
        pairs: problems, see `problems`.
        samples: k, completions per problem.
        seed: of the sampling.

    Returns:
        Accuracy and standard error, see `tipdistill.evaluate.mean_at_k`.
    """
    prompts = [prompt_of(*pair) for pair in pairs for _ in range(samples)]
    right = [is_correct(prompt, text) for prompt, text in zip(prompts, sample(model, prompts, seed), strict=True)]
    return mean_at_k([right[first : first + samples] for first in range(0, len(right), samples)])
