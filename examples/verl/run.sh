#!/usr/bin/env bash
# On-policy distillation with verl 0.9 on one node of 8 GPUs: FSDP2 trains the student on 4, vLLM serves the teacher on 4.
# The three lines marked "tipdistill" are all that selection needs; see docs/verl.md.
#
#   DRY_RUN=1 examples/verl/run.sh    checks the configuration, takes no GPU
#   examples/verl/run.sh trainer.total_training_steps=100    any further override of verl's

set -euo pipefail

PYTHON=${PYTHON:-python3}
STUDENT=${STUDENT:-Qwen/Qwen3-4B}
TEACHER=${TEACHER:-Qwen/Qwen3-8B}
TRAIN_FILES=${TRAIN_FILES:-$HOME/data/dapo-math-17k/train.parquet} # verl's format: prompt, data_source, reward_model
VAL_FILES=${VAL_FILES:-$HOME/data/math500/test.parquet}
RETENTION=${RETENTION:-0.5}
RULE=${RULE:-soft_or}
TOPK=${TOPK:-64}
PROMPT_TOKENS=${PROMPT_TOKENS:-2048}
RESPONSE_TOKENS=${RESPONSE_TOKENS:-8192}
CONTEXT=$((PROMPT_TOKENS + RESPONSE_TOKENS + 1))

OVERRIDES=(
    data.train_files="$TRAIN_FILES"
    data.val_files="$VAL_FILES"
    data.train_batch_size=8
    data.max_prompt_length="$PROMPT_TOKENS"
    data.max_response_length="$RESPONSE_TOKENS"
    data.filter_overlong_prompts=True

    actor_rollout_ref.model.path="$STUDENT"
    actor_rollout_ref.model.use_remove_padding=True
    actor_rollout_ref.model.enable_gradient_checkpointing=True

    actor_rollout_ref.actor.strategy=fsdp2
    actor_rollout_ref.actor.optim.lr=1e-6
    actor_rollout_ref.actor.ppo_mini_batch_size=8
    actor_rollout_ref.actor.use_dynamic_bsz=True
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu="$CONTEXT"

    actor_rollout_ref.rollout.name=vllm
    actor_rollout_ref.rollout.n=16
    actor_rollout_ref.rollout.temperature=1.0 # the student's and the teacher's probabilities are compared as they are
    actor_rollout_ref.rollout.tensor_model_parallel_size=1
    actor_rollout_ref.rollout.gpu_memory_utilization=0.4
    actor_rollout_ref.rollout.max_model_len="$CONTEXT"
    actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True
    actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu="$CONTEXT"

    algorithm.adv_estimator=grpo
    algorithm.use_kl_in_reward=False

    distillation.enabled=True
    distillation.nnodes=1
    distillation.n_gpus_per_node=4
    distillation.teacher_models.teacher_model.model_path="$TEACHER"
    distillation.teacher_models.teacher_model.inference.name=vllm
    distillation.teacher_models.teacher_model.inference.tensor_model_parallel_size=2
    distillation.teacher_models.teacher_model.inference.gpu_memory_utilization=0.8
    distillation.teacher_models.teacher_model.inference.max_model_len="$CONTEXT"
    distillation.distillation_loss.topk="$TOPK"
    distillation.distillation_loss.use_task_rewards=False
    distillation.distillation_loss.use_policy_gradient=False

    distillation.distillation_loss._target_=tipdistill.integrations.verl.SelectedLossConfig # tipdistill
    distillation.distillation_loss.loss_mode=tip_reverse_kl_topk                            # tipdistill
    +distillation.distillation_loss.retention="$RETENTION"                                  # tipdistill
    +distillation.distillation_loss.selection_rule="$RULE"                                  # its default is soft_or

    trainer.nnodes=1
    trainer.n_gpus_per_node=4
    trainer.balance_batch=True
    trainer.val_before_train=False
    trainer.test_freq=25
    trainer.save_freq=100
    trainer.total_epochs=1
    trainer.logger='["console"]'
    trainer.project_name=tipdistill
    trainer.experiment_name="$(basename "$STUDENT")-$RULE-$RETENTION"
)

"$PYTHON" -m tipdistill.integrations.verl_check "${OVERRIDES[@]}" "$@"
if [[ -z ${DRY_RUN:-} ]]; then
    exec "$PYTHON" -m verl.trainer.main_ppo "${OVERRIDES[@]}" "$@"
fi
