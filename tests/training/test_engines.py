"""The launch files: Accelerate reads each, the layers that FSDP wraps exist, the SLURM script refuses and requeues."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin
from tiny_run import arguments, tiny_model

from solarchip_hf.training import SolarChipTrainer

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = EXAMPLES / "slurm" / "pretrain.sbatch"


@pytest.mark.parametrize("path", sorted((EXAMPLES / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_file(path):
    values = yaml.safe_load(path.read_text())
    config = load_config_from_file(str(path))
    assert config.distributed_type == values["distributed_type"]
    assert config.num_processes == values["num_processes"]
    assert config.mixed_precision == values["mixed_precision"]


def test_fsdp_finds_the_layers_that_it_wraps():
    values = yaml.safe_load((EXAMPLES / "accelerate" / "fsdp.yaml").read_text())["fsdp_config"]
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=values["fsdp_version"],
        auto_wrap_policy=values["fsdp_auto_wrap_policy"],
        transformer_cls_names_to_wrap=values["fsdp_transformer_layer_cls_to_wrap"].split(","),
    )
    plugin.set_auto_wrap_policy(tiny_model())
    assert {kind.__name__ for kind in plugin.auto_wrap_policy.keywords["transformer_layer_cls"]} == {"CLIPEncoderLayer"}


class Sharded(SolarChipTrainer):
    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = True


def test_sharded_weights_and_an_average_are_refused(tmp_path):
    args = arguments(tmp_path, ema_decay=0.9)
    with pytest.raises(ValueError, match="ema_decay: expected one process or DDP"):
        Sharded(tiny_model(), args)


@pytest.mark.parametrize("finished", [False, True])
def test_slurm_requeues_a_stopped_run_and_leaves_a_finished_one(tmp_path, finished):
    """With stand-ins for SLURM's own commands, which are not there."""
    tools = tmp_path / "bin"
    tools.mkdir()
    finish = 'touch "$OUTPUT/metrics.json"' if finished else ":"
    for name, body in {
        "srun": f'shift; SLURM_PROCID=3 SLURM_LOCALID=1 "$@" && {finish}',
        "python": 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR : $*"',
        "scontrol": 'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "$@"; fi',
    }.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    environment = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "OUTPUT": str(tmp_path),
        "SLURM_JOB_ID": "12",
        "SLURM_NTASKS": "16",
        "SLURM_JOB_NODELIST": "node[7-8]",
    }
    command = ["bash", str(SCRIPT), "my config.yaml", "--output_dir", str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == (
        f"3 1 16 node7 : examples/pretrain.py my config.yaml --output_dir {tmp_path} --resume_from_checkpoint last"
    )
    assert ("requeue 12" in lines) is not finished


def test_slurm_wants_an_output_folder():
    result = subprocess.run(["bash", str(SCRIPT), "--data_dir", "x"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "expected --output_dir" in result.stderr
