"""Serve an artifact over HTTP: one process, a thread pool for the model, rows on memory-mapped pages.

    pip install torchrec-mpe[serve]
    python examples/serve/server.py artifact --num-dense 4 --dense-arch 32,16 --over-arch 64,1

    curl localhost:8000/model
    curl localhost:8000/predict -H 'content-type: application/json' \
        -d '{"dense": [[0, 0, 0, 0]], "sparse": {"user": [[1, 2]], "item": [[3]], "shop": [[]]}}'
    curl localhost:8000/metrics

SIGHUP opens the folder again, which may be another one by now if the path is a link, and swaps the model without a
failed request. SIGTERM stops accepting connections, answers the requests that were read, and ends. --admin adds POST
/reload and POST /update (a delta of rows): whoever reaches the port can then change the model.
"""

import argparse
import socket
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import uvicorn
from app import create_app
from current_model import CurrentModel
from dlrm import load_dlrm
from fastapi import FastAPI
from timeouts import TimedProtocol


def serve(app: FastAPI, host: str, port: int, log_level: str = "warning", header_seconds: float = 10.0) -> None:
    """Accept requests until SIGTERM or SIGINT; port 0 takes a free one, and the line that is printed says which."""
    with socket.create_server((host, port), backlog=1024) as listener:
        print(f"serving on http://{host}:{listener.getsockname()[1]}", flush=True)
        protocol = type("Protocol", (TimedProtocol,), {"header_seconds": header_seconds})
        config = uvicorn.Config(app, http=protocol, log_level=log_level, access_log=False, timeout_graceful_shutdown=30)
        uvicorn.Server(config).run([listener])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    def sizes(text: str) -> list[int]:
        return [int(size) for size in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="folder that torchrec_mpe.save wrote")
    parser.add_argument("--num-dense", type=int, default=13, help="dense features (default: 13)")
    parser.add_argument("--dense-arch", type=sizes, default=[512, 256, 64], help="layers of DLRM's dense arch")
    parser.add_argument("--over-arch", type=sizes, default=[512, 512, 256, 1], help="layers of DLRM's over arch")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: a free one")
    parser.add_argument("--threads", type=int, default=2, help="batches computed at a time, one core each (default: 2)")
    parser.add_argument("--max-batch", type=int, default=4096, help="examples of a request (default: 4096)")
    parser.add_argument("--max-joined", type=int, default=512, help="examples of waiting requests in one batch; 1: off")
    parser.add_argument("--max-body", type=int, default=64 << 20, help="bytes of a request (default: 64 MiB)")
    parser.add_argument("--max-json", type=int, default=1 << 20, help="of a request in JSON (default: 1 MiB)")
    parser.add_argument(
        "--header-timeout", type=float, default=10.0, help="seconds for a request's headers (default: 10)"
    )
    parser.add_argument("--body-timeout", type=float, default=30.0, help="seconds for a request's body (default: 30)")
    parser.add_argument("--verify", action="store_true", help="read and check all rows on start and reload")
    parser.add_argument("--admin", action="store_true", help="offer /reload and /update to whoever reaches the port")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    layers = options.dense_arch, options.over_arch
    load = partial(load_dlrm, options.artifact, options.num_dense, *layers, verify=options.verify)
    try:
        model = CurrentModel(load, options.num_dense, options.max_batch)
    except (OSError, ValueError) as error:
        sys.exit(f"server.py: {error}")
    app = create_app(
        model,
        threads=options.threads,
        max_joined=options.max_joined,
        max_body=options.max_body,
        max_json=options.max_json,
        body_seconds=options.body_timeout,
        admin=options.admin,
    )
    serve(app, options.host, options.port, header_seconds=options.header_timeout)


if __name__ == "__main__":
    main()
