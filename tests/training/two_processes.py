"""Trains both stages for three steps and writes gradients and weights; `test_launch.py` starts it in two processes.

In several processes, each stage is trained with a sharded model before: killed, resumed, and written as a checkpoint.
"""

import logging
import os
import signal
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from nvembed_deploy.training import loop, stage
from nvembed_deploy.training.instructions import Kind
from nvembed_deploy.training.options import STAGE_1, STAGE_2, StageOptions
from nvembed_deploy.training.student import read_base
from tests.training.tiny_training import LATENT, some_examples

OPTIONS = {"negatives": 2, "batch_queries": 8, "max_steps": 3, "warmup_steps": 0, "held_out": 4, "log_steps": 1}
OPTIONS |= {"temperature": 0.1, "max_length": 64, "save_steps": 2, "bf16": False, "learning_rate": 1e-3}
CHUNK_TOKENS = 128
"""For the processes of a launch; a single process computes its batch at once."""


def examples() -> list:
    """Returns pairs, some of which share their query or their positive."""
    pairs = [example for example in some_examples(160) if example.kind is Kind.RETRIEVAL]
    return [
        replace(example, query=pairs[index - 1].query)
        if index % 5 == 4
        else replace(example, positive=pairs[index - 1].positive)
        if index % 5 == 2
        else example
        for index, example in enumerate(pairs)
    ]


def train(base: Path, work: Path, options: StageOptions) -> tuple[dict, list[dict[str, float]]]:
    student = read_base(base, latent=LATENT, seed=options.seed)
    history = stage.train_student(student, examples(), work=work, stage=options)
    return {name: tensor.clone() for name, tensor in student.model.state_dict().items()}, history


def main(base: Path, out: Path) -> None:
    """Writes `stage-1.pt` and `stage-2.pt` to a folder."""
    for number, defaults in ((1, STAGE_1), (2, STAGE_2)):
        chunk_tokens = CHUNK_TOKENS if loop.process_count() > 1 else defaults.chunk_tokens
        options = replace(defaults, chunk_tokens=chunk_tokens, **OPTIONS)
        gradients: list[dict] = []

        def keep(optimizer, *_, gradients=gradients) -> None:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            gradients.append({str(i): parameter.grad.clone() for i, parameter in enumerate(parameters)})

        hook = register_optimizer_step_pre_hook(keep)
        weights, history = train(base, out / str(number), options)
        hook.remove()
        record = {"processes": loop.process_count(), "gradients": gradients[0], "weights": weights, "history": history}
        if loop.is_main_process():
            last = loop.last_checkpoint(out / str(number) / "training")
            (last / loop.STATE_NAME).unlink()  # as if it was killed while it wrote the last state
        if loop.process_count() > 1:
            torch.distributed.barrier()
        record["resumed"], _ = train(base, out / str(number), options)
        if loop.is_main_process():
            torch.save(record, out / f"stage-{number}.pt")


def main_sharded(base: Path, out: Path) -> None:
    """Trains both stages with a sharded model; each is killed at its last step and started again."""
    for attempt in range(4):
        number = attempt // 2 + 1
        if (child := os.fork()) == 0:  # without the imports once more
            join(out / f"processes-{attempt}")
            if attempt % 2 == 0:
                register_optimizer_step_pre_hook(kill_at_the_last_step)
            options = replace((STAGE_1, STAGE_2)[number - 1], chunk_tokens=CHUNK_TOKENS, shard=True, **OPTIONS)
            work = out / f"work-{number}"
            stage.run_stage(base, examples(), out / f"checkpoint-{number}", work=work, stage=options, latent=LATENT)
            torch.distributed.destroy_process_group()
            os._exit(0)
        was_killed = os.waitpid(child, 0)[1] != 0  # or lost the connection to a process that was
        assert was_killed == (attempt % 2 == 0)


def join(path: Path) -> None:
    """Joins the processes of the launch; a file tells them about each other, since they join several times."""
    path.parent.mkdir(exist_ok=True)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    limit = timedelta(seconds=60)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=world_size, timeout=limit
    )


def kill_at_the_last_step(optimizer: torch.optim.Optimizer, *_) -> None:
    """Kills this process before the step after the training state."""
    states = list(optimizer.state.values())
    if states and int(states[0]["step"]) == OPTIONS["save_steps"]:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    main_sharded(Path(sys.argv[1]), Path(sys.argv[2]))
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    torch.distributed.destroy_process_group()
