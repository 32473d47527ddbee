"""TIP without a trainer: a student learns from a teacher on its own rollouts, on half of the tokens. Seconds on a CPU.

Rollout → score → select → loss, on the public functions alone. Both models are small and random, so nothing useful is
learnt; what falls is the divergence between them.
"""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import tipdistill as tip

VOCABULARY, PROMPTS, PROMPT_TOKENS, NEW_TOKENS, STEPS = 64, 16, 4, 24, 40
RULE = "soft_or"


def build(width, layers, seed):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=width // 4,
        initializer_range=0.2,  # wide enough that the two models say different things
        bos_token_id=None,
        eos_token_id=None,  # every rollout has NEW_TOKENS tokens, so nothing is padded
    )
    return Qwen3ForCausalLM(config)


def head(model, tokens):
    """What the model says at each completion token: the hidden state before it, and the lm_head."""
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, PROMPT_TOKENS - 1 : -1]
    return tip.Head(hidden.flatten(0, 1), model.lm_head.weight)


student, teacher = build(width=32, layers=1, seed=0), build(width=64, layers=2, seed=1).eval()
optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
prompts = torch.randint(VOCABULARY, (PROMPTS, PROMPT_TOKENS))
rollout_ids = torch.arange(PROMPTS).repeat_interleave(NEW_TOKENS)

for step in range(STEPS + 1):
    # rollout: the student writes
    tokens = student.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, max_new_tokens=NEW_TOKENS
    )
    # score: both models read what it wrote, and of that the rule's statistics and the loss are computed
    with torch.no_grad():
        teacher_head = head(teacher, tokens)
    scores = tip.token_scores(head(student, tokens), teacher_head, rule=RULE)
    # select: the uncertain and the wrong half of each rollout
    picked = tip.select(scores, rule=RULE, retention=0.5, rollout=rollout_ids)
    # loss: only the selected rows are projected again and differentiated
    loss = tip.selected_loss(scores, picked)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 5 == 0:
        kept = f"trained on {picked.mask.sum()} of {len(scores)}"
        print(f"step {step:2d}  divergence {scores.reverse_kl.mean():.3f} nats per token, {kept}")
