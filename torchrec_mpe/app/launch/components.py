"""The torchx components: `torchx run torchrec_mpe.app.launch:pipeline -j 2x8 --format criteo --data log.tsv --out out`.

Each runs one command of torchrec_mpe.app.launch.trainer under torchrun. What the command takes besides (`--epochs`,
`--batch-size`, `--timeout`, ...; see `python -m torchrec_mpe.app.launch.trainer search --help`) follows after `--`::

    torchx run -s local_cwd torchrec_mpe.app.launch:search -j 1x2 --format criteo --data a.tsv --out out -- --epochs 2

torchx's builtin ``dist.ddp`` makes the job; its parameters mean the same here. A scheduler that copies a workspace into
an image (Kubernetes) needs docker for it: give ``--workspace ""`` and an image that holds torchrec_mpe.
"""

# torchx reads the signatures below as text and knows neither `X | None` nor `list[X]`.
# ruff: noqa: UP006, UP035, UP045, N803
from typing import Any, Dict, List, Optional

from torchx import specs
from torchx.components import dist

_IMAGE = "torchrec-mpe:latest"


def _job(command: List[str], max_restarts: int, env: Optional[Dict[str, str]], **job: Any) -> specs.AppDef:
    # What torchrun reads from the environment and `dist.ddp` has no parameter for. A store shared between restarts
    # hands out the addresses of ranks that have died (pytorch/pytorch#135712).
    torchrun = {"PET_MAX_RESTARTS": str(max_restarts), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return dist.ddp(*command, m="torchrec_mpe.app.launch.trainer", env={**torchrun, **(env or {})}, **job)


def search(
    *args: str,
    format: str,
    data: str,
    out: str,
    j: str = "1x1",
    max_restarts: int = 3,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    h: Optional[str] = None,
    image: str = _IMAGE,
    name: str = "mpe-search",
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    mounts: Optional[List[str]] = None,
) -> specs.AppDef:
    """Prepare a log, search bit-widths, and sample them into plan.json.

    Args:
        args: further options of the command
        format: what data is, such as criteo, csv or prepared; see the command's --help
        data: the log or prepared folder, on a path that every node can read
        out: folder of the results and checkpoints, on a path that every node can write; the job resumes from it
        j: [min_nodes:]nodes x ranks a node, such as 2x8; on GPUs one rank a GPU
        max_restarts: how often torchelastic starts all ranks again after one has died; they resume
        cpu: CPUs a node
        gpu: GPUs a node
        memMB: memory a node in MB
        h: a named resource of torchx, in place of cpu, gpu and memMB
        image: container image that holds torchrec_mpe, for schedulers that use images
        name: of the job
        env: environment variables of the ranks
        max_retries: how often the scheduler starts the whole job again
        rdzv_port: port of the first node for torchelastic's rendezvous; with one node a free one is taken
        mounts: of the container, such as type=bind,src=/data,dst=/data
    """
    command = ["search", "--format", format, "--data", data, "--out", out, *args]
    return _job(
        command, max_restarts, env, j=j, cpu=cpu, gpu=gpu, memMB=memMB, h=h, image=image, name=name,
        max_retries=max_retries, rdzv_port=rdzv_port, mounts=mounts,
    )  # fmt: skip


def retrain(
    *args: str,
    search: str,
    out: str,
    j: str = "1x1",
    max_restarts: int = 3,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    h: Optional[str] = None,
    image: str = _IMAGE,
    name: str = "mpe-retrain",
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    mounts: Optional[List[str]] = None,
) -> specs.AppDef:
    """Retrain at the bit-widths that a search sampled.

    Args:
        args: further options of the command
        search: folder of a finished search
        out: folder of the results and checkpoints, on a path that every node can write; the job resumes from it
        j: [min_nodes:]nodes x ranks a node, such as 2x8; on GPUs one rank a GPU
        max_restarts: how often torchelastic starts all ranks again after one has died; they resume
        cpu: CPUs a node
        gpu: GPUs a node
        memMB: memory a node in MB
        h: a named resource of torchx, in place of cpu, gpu and memMB
        image: container image that holds torchrec_mpe, for schedulers that use images
        name: of the job
        env: environment variables of the ranks
        max_retries: how often the scheduler starts the whole job again
        rdzv_port: port of the first node for torchelastic's rendezvous; with one node a free one is taken
        mounts: of the container, such as type=bind,src=/data,dst=/data
    """
    command = ["retrain", "--search", search, "--out", out, *args]
    return _job(
        command, max_restarts, env, j=j, cpu=cpu, gpu=gpu, memMB=memMB, h=h, image=image, name=name,
        max_retries=max_retries, rdzv_port=rdzv_port, mounts=mounts,
    )  # fmt: skip


def emit(
    *args: str,
    retrained: str,
    out: str,
    j: str = "1x1",
    max_restarts: int = 3,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    h: Optional[str] = None,
    image: str = _IMAGE,
    name: str = "mpe-emit",
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    mounts: Optional[List[str]] = None,
) -> specs.AppDef:
    """Pack a retrained model and evaluate it on the test rows.

    Args:
        args: further options of the command
        retrained: folder of a finished retraining
        out: folder of the packed inference model
        j: [min_nodes:]nodes x ranks a node, such as 2x8; on GPUs one rank a GPU
        max_restarts: how often torchelastic starts all ranks again after one has died; they resume
        cpu: CPUs a node
        gpu: GPUs a node
        memMB: memory a node in MB
        h: a named resource of torchx, in place of cpu, gpu and memMB
        image: container image that holds torchrec_mpe, for schedulers that use images
        name: of the job
        env: environment variables of the ranks
        max_retries: how often the scheduler starts the whole job again
        rdzv_port: port of the first node for torchelastic's rendezvous; with one node a free one is taken
        mounts: of the container, such as type=bind,src=/data,dst=/data
    """
    command = ["emit", "--retrained", retrained, "--out", out, *args]
    return _job(
        command, max_restarts, env, j=j, cpu=cpu, gpu=gpu, memMB=memMB, h=h, image=image, name=name,
        max_retries=max_retries, rdzv_port=rdzv_port, mounts=mounts,
    )  # fmt: skip


def pipeline(
    *args: str,
    format: str,
    data: str,
    out: str,
    j: str = "1x1",
    max_restarts: int = 3,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    h: Optional[str] = None,
    image: str = _IMAGE,
    name: str = "mpe-pipeline",
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    mounts: Optional[List[str]] = None,
) -> specs.AppDef:
    """Search, retrain and emit in one job.

    Args:
        args: further options of the command
        format: what data is, such as criteo, csv or prepared; see the command's --help
        data: the log or prepared folder, on a path that every node can read
        out: folder of the results and checkpoints, on a path that every node can write; the job resumes from it
        j: [min_nodes:]nodes x ranks a node, such as 2x8; on GPUs one rank a GPU
        max_restarts: how often torchelastic starts all ranks again after one has died; they resume
        cpu: CPUs a node
        gpu: GPUs a node
        memMB: memory a node in MB
        h: a named resource of torchx, in place of cpu, gpu and memMB
        image: container image that holds torchrec_mpe, for schedulers that use images
        name: of the job
        env: environment variables of the ranks
        max_retries: how often the scheduler starts the whole job again
        rdzv_port: port of the first node for torchelastic's rendezvous; with one node a free one is taken
        mounts: of the container, such as type=bind,src=/data,dst=/data
    """
    command = ["pipeline", "--format", format, "--data", data, "--out", out, *args]
    return _job(
        command, max_restarts, env, j=j, cpu=cpu, gpu=gpu, memMB=memMB, h=h, image=image, name=name,
        max_retries=max_retries, rdzv_port=rdzv_port, mounts=mounts,
    )  # fmt: skip
