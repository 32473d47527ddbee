#!/bin/sh
# What tokens_before.py reads of the three tasks, and then that. From the root; argument: the folder of the programs.
set -e
before() { # name in the tables, folder of the models, task, tokens of a completion, samples
    "$bin/tipdistill" score --model "runs/$2/models/student" --teacher "runs/$2/models/teacher" --dataset "runs/$2/prompts.jsonl" \
        --max_prompts 256 --max_new_tokens "$4" --overwrite_output_dir --output_dir "runs/tokens/$1"
    rm -rf "runs/teachers/$1" # of models that may have been taught again since
    "$bin/tipdistill" eval --model "runs/$2/models/teacher" --tasks "$3[64:]" --num_samples "$5" --batch_size 256 \
        --output_dir "runs/teachers/$1"
}
bin=${1:-.venv/bin}
before planted demo arithmetic 43 4
before modular modular modular 35 4
before machine machine machine 205 2
"$bin/python" -m benchmarks.replication.tokens_before runs/tokens runs/teachers
