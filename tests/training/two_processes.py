"""Trains both stages for three steps and writes gradients and weights; `test_launch.py` starts it in two processes.

With `--shards`, the model is sharded by `fully_shard` and a checkpoint is written.
"""

import os
import sys
from dataclasses import replace
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


def train(base: Path, work: Path, options: StageOptions) -> tuple[dict, list[float]]:
    student = read_base(base, latent=LATENT, seed=3)
    history = stage.train_student(student, examples(), work=work, stage=options)
    weights = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    return weights, [entry["loss"] for entry in history if "loss" in entry]


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
        weights, losses = train(base, out / str(number), options)
        hook.remove()
        record = {"processes": loop.process_count(), "gradients": gradients[0], "weights": weights, "losses": losses}
        if loop.is_main_process():
            last = loop.last_checkpoint(out / str(number) / "training")
            (last / loop.STATE_NAME).unlink()  # as if it was killed while it wrote the last state
        if loop.process_count() > 1:
            torch.distributed.barrier()
        record["resumed"], _ = train(base, out / str(number), options)
        if loop.is_main_process():
            torch.save(record, out / f"stage-{number}.pt")


def main_sharded(base: Path, out: Path) -> None:
    """Trains a sharded model to the end, with evaluation, and writes its checkpoint."""
    from accelerate import Accelerator
    from torch.distributed.fsdp import fully_shard

    def read_sharded(*args, **kwargs):
        student = read_base(*args, **kwargs)
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        for layer in student.model.embedding_model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(student.model.embedding_model, mesh=mesh)
        fully_shard(student.model.latent_attention_model, mesh=mesh)
        return student

    # Accelerate shards on GPUs only: the model arrives sharded, is not wrapped again, and no training state is written.
    stage.read_base = read_sharded
    Accelerator.prepare_model = lambda self, model, *_, **__: model
    loop.EmbeddingTrainer._save_checkpoint = lambda self, *_, **__: None
    options = replace(STAGE_1, chunk_tokens=CHUNK_TOKENS, **OPTIONS)
    loop.is_main_process()  # starts the process group
    stage.run_stage(base, examples(), out, work=out.with_name("work"), stage=options, latent=LATENT)


if __name__ == "__main__":
    run = main_sharded if "--shards" in sys.argv else main
    run(Path(sys.argv[1]), Path(sys.argv[2]))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        torch.distributed.destroy_process_group()
