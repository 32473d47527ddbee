"""What tests/test_sharded.py runs: a list of jobs, each in processes of its own.

One process imports everything and forks the ranks of each job, so that every job has fresh process groups and
singletons without paying for the imports again. `on_cpu` gives FSDP2 and DeepSpeed what accelerate withholds from them
on a CPU.
"""

import importlib
import importlib.util
import json
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import acting
import forks
import once

# What `accelerate launch` exports for TRL's presets, but for mixed precision.
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
DEEPSPEED = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
}
ENVIRONMENT = {
    "ddp": {},
    "fsdp2": FSDP,
    "zero2": {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {
        **DEEPSPEED,
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    },
}


def on_cpu(engine):
    """Let accelerate run the engine over gloo."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    if engine == "fsdp2":  # accelerate takes DDP for FSDP on a CPU, and says nothing
        init = AcceleratorState.__init__

        def sharded(self, *args, fsdp_plugin=None, **options):
            fresh = not AcceleratorState._shared_state
            init(self, *args, fsdp_plugin=fsdp_plugin, **options)
            if fresh and fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
                self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
                if self._mixed_precision != "no":
                    fsdp_plugin.set_mixed_precision(self._mixed_precision)
                self.fsdp_plugin = fsdp_plugin

        AcceleratorState.__init__ = sharded
    elif engine.startswith("zero"):  # without use_cpu accelerate finds no backend, with it no DeepSpeed
        # by its name: the attribute `torch` of deepspeed.comm is torch itself
        backend = importlib.import_module("deepspeed.comm.torch")
        PartialState._prepare_backend = lambda self, *rest: ("gloo", DistributedType.MULTI_CPU)
        backend.build_shm_op = lambda: None  # a faster all-reduce that takes a minute to compile


def kinds(model):
    """How the parameters are held; the whole ones by name where others are sharded."""
    from torch.distributed.tensor import DTensor

    found, whole = set(), []
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            found.add("DTensor")
        elif hasattr(parameter, "ds_tensor"):
            found.add("partition")
        else:
            whole.append(name)
    if whole:
        found.add("whole: " + (", ".join(sorted(whole)) if found else "all"))
    return sorted(found)


def run(job):
    import torch
    import vllm_server
    from accelerate.utils import gather_object
    from datasets import Dataset
    from torch.utils._python_dispatch import TorchDispatchMode
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DistillationTrainer

    import tipdistill.score.chunked as chunked
    from tipdistill import TIPConfig, TIPTrainer
    from tipdistill.teachers.served import TeacherUnavailableError
    from tipdistill.training.episodes import no_longer_than

    torch.set_num_threads(1)
    on_cpu(job["engine"])
    collectives = []
    tiles = 0
    logits = chunked.Projection.logits

    def counted_logits(self, *args):
        nonlocal tiles
        tiles += 1
        return logits(self, *args)

    chunked.Projection.logits = counted_logits

    class Collectives(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace in ("c10d", "_c10d_functional"):
                name = str(function)
                collectives[-1][name] = collectives[-1].get(name, 0) + 1
            return function(*args, **(kwargs or {}))

    class Watched(TIPTrainer):
        def write(self, prompt_ids, *seen):
            with no_longer_than(self, 2 if job.get("acting") else None):
                completions = super().write(prompt_ids, *seen)
            if job.get("acting"):  # the engine wrote, in step with the others; a script says what
                return [acting.turn_after(self._tokenizer, ids) for ids in prompt_ids]
            # of a length of each prompt's own, so that ranks hold different widths: a random model never ends
            return [ids[: 1 + sum(prompt) % 12] for prompt, ids in zip(prompt_ids, completions, strict=True)]

        def training_step(self, *args, **options):
            collectives.append({})
            with Collectives() if job.get("collectives") else nullcontext():  # it looks at every operation
                return super().training_step(*args, **options)

    class Dies(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step + 1 == job.get("dies") and args.process_index == args.world_size - 1:
                os.kill(os.getpid(), signal.SIGKILL)

    if "empty" in job:
        generate = DistillationTrainer._generate_and_score_completions

        def with_tools(self, inputs):
            batch = generate(self, inputs)
            mask = batch["tool_mask"] = torch.ones_like(batch["completion_mask"])
            row = self.accelerator.process_index * len(mask) + torch.arange(len(mask))
            mask[row >= job["empty"]] = 0  # nothing in these rollouts is the student's own
            return batch

        DistillationTrainer._generate_and_score_completions = with_tools
    if job.get("tiles"):
        chunked.CPU_TILE, chunked.CPU_WORKSPACE = (4, 64), 2**14
    settings = dict(job["settings"])
    if not job["engine"].startswith("zero"):
        settings["use_cpu"] = True
    if "urls" in job:  # the address of the teacher, as each rank sees it
        settings["teacher_url"] = job["urls"][int(os.environ["RANK"])]
    args = TIPConfig(job["out"], **settings)
    dataset = Dataset.from_json(job["data"])
    if job.get("columns"):
        prompts = dataset["prompt"][:]
        own = [None if row % 3 == 2 else f"It is 42. {prompt}" for row, prompt in enumerate(prompts)]
        dataset = dataset.add_column("teacher_prompt", own)
        if args.teachers:
            # of each step's eight the first four are the first process's
            names = ["llama" if row % 8 < 4 or row % 8 == 7 else "phi" for row in range(len(prompts))]
            dataset = dataset.add_column("teacher", names)
    options = {}
    if job.get("acting"):
        dataset = dataset.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
        tokenizer = acting.speaks_of_tools(AutoTokenizer.from_pretrained(job["student"]))
        options = {"processing_class": tokenizer, "environment_factory": acting.Shop}
    trainer = Watched(job["student"], job["teacher"], args, dataset, callbacks=[Dies()], **options)
    if job.get("server"):
        vllm_server.use(trainer, job["student"], args.max_completion_length)
    try:
        trainer.train(resume_from_checkpoint=job.get("resume"))
    except TeacherUnavailableError as error:
        if not job.get("stops"):
            raise
        (Path(args.output_dir) / f"stopped-{args.process_index}").write_text(str(error))
        return
    models = {"student": trainer.model}
    if trainer.teacher_model is not None:
        models["teacher"] = trainer.accelerator.unwrap_model(trainer.teacher_model)
    parameters = {name: kinds(model) for name, model in models.items()}
    trainer.save_model(args.output_dir)
    local_ranks = gather_object([args.local_process_index])
    if trainer.accelerator.is_main_process:
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        # some are logged at some steps alone
        always = [name for name in history[0] if all(name in entry for entry in history)]
        figures = {name: [entry[name] for entry in history] for name in always}
        found = {
            **figures,
            "parameters": parameters,
            "collectives": collectives,
            "tiles": tiles,
            "processes": trainer.accelerator.num_processes,
            "local_ranks": local_ranks,
        }
        found["engine"] = trainer.accelerator.distributed_type.value
        (Path(args.output_dir) / "figures.json").write_text(json.dumps(found))
    # together, and in order: a process that leaves while another still talks to it aborts that one
    trainer.accelerator.wait_for_everyone()
    trainer.end()


def main(path):
    """Run the jobs of a file one after another."""
    jobs = json.loads(Path(path).read_text())
    os.environ["DS_ACCELERATOR"] = "cpu"
    # all that a run imports somewhere on its way, seconds of it, is imported once
    imported = [
        "tipdistill.trainer",
        "transformers.models.qwen3.modeling_qwen3",
        "transformers.models.llama.modeling_llama",
    ]
    imported += ["transformers.models.phi.modeling_phi", "torch.distributed.checkpoint.state_dict", "peft"]
    if importlib.util.find_spec("deepspeed") is not None:  # accelerate imports it wherever it is
        imported += ["deepspeed"]
        if any(job["engine"].startswith("zero") for job in jobs):
            imported += ["torch._inductor.compile_fx", "deepspeed.runtime.zero.muon.original_muon"]
    for name in imported:
        importlib.import_module(name)
    once.prepare()
    for job in jobs:
        together(job)
    return 0


def together(job):
    """All ranks of a job at once, each told of the others as a launcher tells it; when one fails, the others end."""
    sys.stdout.flush()
    left = {fork(job, number) for number in range(job["processes"])}
    while left:
        child, status = os.wait()
        left.discard(child)
        if bool(status) != bool(job.get("dies")):
            for other in left:
                os.kill(other, signal.SIGKILL)
            raise SystemExit(f"{job['out']}: ended with {status}")


def fork(job, number):
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ.update(forks.rank(number, job["processes"], job["port"], job.get("hosts", 1)))
        os.environ.update(ENVIRONMENT[job["engine"]])
        run(job)
        code = 0
    finally:
        sys.stdout.flush()
        if code:
            sys.excepthook(*sys.exc_info())
        os._exit(code)
