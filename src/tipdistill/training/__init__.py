"""What a training run needs beside its steps: the scoring pass, checks, checkpoints, metrics, records, evaluation."""
