"""What every victim imports, once for all of them."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

torch.set_num_threads(1)

import accelerate
import datasets
import math_verify
import peft
import pyarrow.parquet
import transformers
import trl

import tipdistill.cli.demo
import tipdistill.cli.eval
import tipdistill.cli.score
import tipdistill.cli.sweep
import tipdistill.cli.train
import tipdistill.demo
import tipdistill.evaluate.run
import tipdistill.trainer
