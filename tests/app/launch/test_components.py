"""Job definitions of the torchx components, read back by torchrun's and the job's own command lines."""

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser
from torchx.components.component_test_base import ComponentTestCase
from torchx.runner import get_runner
from torchx.specs import AppDef
from torchx.specs.finder import get_component

import torchrec_mpe.app.launch.components as components
from torchrec_mpe.app.launch.command_line import parser

_ARGUMENTS = {
    "search": ["--format", "criteo", "--data", "/data/log.tsv", "--out", "/out/search"],
    "retrain": ["--search", "/out/search", "--out", "/out/retrain"],
    "emit": ["--retrained", "/out/retrain", "--out", "/out/artifact"],
    "pipeline": ["--format", "criteo", "--data", "/data/a log.tsv", "--out", "/out"],
}
_FURTHER = {"search": ["--epochs", "2"], "retrain": ["--resets", "1"], "emit": [], "pipeline": ["--timeout", "60"]}
_JOB = [
    "-j", "2x8", "--gpu", "8", "--cpu", "96", "--memMB", "500000", "--env", "NCCL_DEBUG=INFO", "--max_restarts", "5",
    "--max_retries", "2",
]  # fmt: skip


def dry_run(command: str, scheduler: str, cfg: dict[str, Any], *job: str) -> Any:
    arguments = [*job, *_ARGUMENTS[command], *(["--", *_FURTHER[command]] if _FURTHER[command] else [])]
    with get_runner() as runner:
        return runner.dryrun_component(f"torchrec_mpe.app.launch:{command}", arguments, scheduler, cfg)


def ranks_of(shell_command: str, monkeypatch: pytest.MonkeyPatch, env: dict[str, str]) -> argparse.Namespace:
    """What torchrun makes of a node's command line and environment."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    program, *arguments = shlex.split(shell_command)
    assert program == "torchrun"
    return get_args_parser().parse_args(arguments)


def check_ranks(node: argparse.Namespace, command: str) -> None:
    assert (node.nnodes, node.nproc_per_node, int(node.max_restarts)) == ("2", "8", 5)
    assert node.module and node.training_script == "torchrec_mpe.app.launch.trainer"
    options = parser().parse_args(node.training_script_args)
    assert options.command == command
    for name, value in zip(_ARGUMENTS[command][::2], _ARGUMENTS[command][1::2], strict=True):
        given = getattr(options, name.removeprefix("--"))
        assert " ".join(map(str, given if isinstance(given, list) else [given])) == value
    for name, value in zip(_FURTHER[command][::2], _FURTHER[command][1::2], strict=True):
        assert float(getattr(options, name.removeprefix("--"))) == float(value)


@pytest.mark.parametrize("command", list(_ARGUMENTS))
def test_slurm(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = dry_run(command, "slurm", {"partition": "gpus", "time": "1-00"}, *_JOB).request.materialize()
    nodes = re.findall(r"^#SBATCH (--job-name.*)$", script, re.MULTILINE)
    assert len(nodes) == 2
    for node in nodes:
        wanted = {
            "--partition=gpus", "--time=1-00", "--requeue", "--ntasks-per-node=1", "--cpus-per-task=96", "--mem=500000",
            "--gpus-per-task=8",
        }  # fmt: skip
        assert wanted <= set(node.split())
    assert "export TORCHX_MAX_RETRIES=2\n" in script
    (srun,) = re.findall(r"^srun ((?:.*\\\n)*.*)$", script, re.MULTILINE)
    tokens = shlex.split(srun.replace("\\\n", " "))
    starts = [i for i, token in enumerate(tokens) if token == "-c"]
    assert len(starts) == 2
    for start in starts:
        exported = next(token for token in reversed(tokens[:start]) if token.startswith("--export=ALL,"))
        env = dict(pair.split("=", 1) for pair in exported.removeprefix("--export=ALL,").split(","))
        assert (env["NCCL_DEBUG"], env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"]) == ("INFO", "1")
        # The first node is where the ranks meet.
        assert "SLURM_JOB_NODELIST_HET_GROUP_0" in tokens[start + 1]
        check_ranks(ranks_of(tokens[start + 1], monkeypatch, {"PET_MAX_RESTARTS": env["PET_MAX_RESTARTS"]}), command)


@pytest.mark.parametrize("command", list(_ARGUMENTS))
def test_kubernetes(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job = [*_JOB, "--image", "registry/mpe:1", "--mounts", "type=bind,src=/nfs,dst=/data"]
    info = dry_run(command, "kubernetes", {"queue": "training", "namespace": "ads"}, *job)
    definition = yaml.safe_load(str(info))
    assert (definition["kind"], definition["spec"]["queue"]) == ("Job", "training")
    tasks = definition["spec"]["tasks"]
    assert [task["replicas"] for task in tasks] == [1, 1]
    for task in tasks:
        assert task["maxRetry"] == 2
        pod = task["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"] == "registry/mpe:1"
        limits = container["resources"]["limits"]
        assert limits == {"cpu": "96000m", "memory": "500000M", "nvidia.com/gpu": "8"}
        assert {"mountPath": "/data", "name": "mount-0", "readOnly": False} in container["volumeMounts"]
        assert {"hostPath": {"path": "/nfs"}, "name": "mount-0"} in pod["volumes"]
        env = {variable["name"]: variable["value"] for variable in container["env"]}
        assert (env["NCCL_DEBUG"], env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"]) == ("INFO", "1")
        assert container["command"][:2] == ["bash", "-c"]
        check_ranks(
            ranks_of(container["command"][2], monkeypatch, {"PET_MAX_RESTARTS": env["PET_MAX_RESTARTS"]}), command
        )


def test_one_node_takes_a_free_port() -> None:
    info = dry_run("search", "local_cwd", {}, "-j", "1x2")
    assert "--rdzv_endpoint localhost:0" in info._app.roles[0].args[1]


@pytest.mark.parametrize("command", list(_ARGUMENTS))
def test_the_linter_and_the_help_of_torchx(command: str) -> None:
    class Lint(ComponentTestCase):
        def runTest(self) -> None:  # noqa: N802
            self.validate(components, command)

    Lint().runTest()
    assert get_component(f"torchrec_mpe.app.launch:{command}").description.startswith(
        getattr(components, command).__doc__.split(".")[0]
    )


def test_by_the_path_of_the_file() -> None:
    component = get_component(f"{components.__file__}:search")
    app = component.fn(format="csv", data="d", out="o")
    assert isinstance(app, AppDef) and app.name == "mpe-search"


def test_the_command_line_prints_the_job(tmp_path: Path) -> None:
    """Also that other people's components are found as before."""
    torchx = [sys.executable, "-m", "torchx.cli.main", "run", "--dryrun", "-s", "local_cwd"]
    job = subprocess.run(
        [*torchx, "torchrec_mpe.app.launch:emit", *_ARGUMENTS["emit"]], cwd=tmp_path, capture_output=True, text=True
    )
    assert job.returncode == 0, job.stderr
    assert "torchrec_mpe.app.launch.trainer emit" in re.sub(r"'\s*'", "", job.stdout)
    (tmp_path / "theirs.py").write_text(
        "from torchx import specs\ndef job(x: int) -> specs.AppDef:\n"
        "    return specs.AppDef(name=f'job{x}', roles=[specs.Role(name='r', image='', entrypoint='true')])\n"
    )
    for theirs in (["theirs.py:job", "--x", "3"], ["dist.ddp", "-j", "1x1", "--script", "theirs.py"]):
        other = subprocess.run([*torchx, *theirs], cwd=tmp_path, capture_output=True, text=True)
        assert other.returncode == 0, other.stderr
