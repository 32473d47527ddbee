"""The loss of a micro-batch in plain PyTorch, on full logits, with any teacher for any rollout."""

import torch
from on_cpu import ON_CPU

PLAIN = {
    **ON_CPU,
    "max_completion_length": 12,
    "learning_rate": 1e-3,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "score_logging_steps": 1,
    "record_rollouts": 0,
    "retention": 0.3,
    "selection_rule": "divergence",
}


def rollouts(inputs):
    """(prompt ids, completion ids) of each rollout of a micro-batch, as lists without padding."""
    columns = (inputs[f"{part}_{kind}"] for part in ("prompt", "completion") for kind in ("ids", "mask"))
    return [
        (prompt[prompt_mask.bool()].tolist(), completion[mask.bool()].tolist())
        for prompt, prompt_mask, completion, mask in zip(*columns, strict=True)
    ]


def log_probabilities(model, prompt, completion):
    """[T, V] over the tokens of a completion."""
    logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1)


def divergences(student, inputs, teacher_of):
    """The reverse KL of every token, a list of [T] per rollout.

    Args:
        student: a model, with gradients.
        inputs: a micro-batch.
        teacher_of: (row, the student's prompt) → the teacher's log-probabilities are `model` after `prompt`.
    """
    values = []
    for row, (prompt, completion) in enumerate(rollouts(inputs)):
        model, own_prompt = teacher_of(row, prompt)
        with torch.no_grad():
            teacher = log_probabilities(model, own_prompt, completion)
        mine = log_probabilities(student, prompt, completion)
        size = min(mine.shape[1], teacher.shape[1])
        assert mine.shape[1] == teacher.shape[1] == size, "heads of one size, so that nothing is renormalised"
        values.append((mine.exp() * (mine - teacher)).sum(-1))
    return values


def compare(trainer, rows, student, teacher_of, rtol=2e-5):
    """Loss, gradients and kept tokens of a trainer's next micro-batch against plain PyTorch on the same ids.

    Args:
        trainer: with rule "divergence", whose budget is of each rollout.
        rows: of the dataset, one generation batch.
        student: an equal model that the trainer does not hold.
        teacher_of: see `divergences`.

    Returns:
        The micro-batch.
    """
    trainer.model.train()
    inputs = trainer._prepare_inputs(rows)
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    ours = {name: value.grad.clone() for name, value in trainer.model.named_parameters() if value.grad is not None}

    of_rows = divergences(student, inputs, teacher_of)
    total, count = torch.zeros(()), 0
    for row, values in enumerate(of_rows):
        kept = torch.zeros(len(values), dtype=torch.bool)
        kept[values.detach().topk(int(trainer.args.retention * len(values))).indices] = True
        if "selection_weight" in inputs:
            assert torch.equal(inputs["selection_weight"][row, : len(values)] > 0, kept)
        total, count = total + values[kept].sum(), count + int(kept.sum())
    if trainer.args.gradient_accumulation_steps > 1:  # of the whole generation batch; rollouts are of one length here
        assert all(len(completion) == len(rollouts(inputs)[0][1]) for _, completion in rollouts(inputs))
        count *= trainer.args.gradient_accumulation_steps
    total = total / count
    torch.testing.assert_close(loss.detach(), total.detach(), rtol=rtol, atol=0)
    student.zero_grad()
    total.backward()
    expected = {name: value.grad for name, value in student.named_parameters() if value.grad is not None}
    assert ours.keys() == expected.keys()
    largest = max(value.abs().max() for value in expected.values())
    assert largest > 0
    for name, gradient in expected.items():
        assert (ours[name] - gradient).abs().max() < rtol * largest, name
    return inputs
