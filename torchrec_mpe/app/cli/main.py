"""The command line: `torchrec-mpe COMMAND`."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from torchrec_mpe.errors import UserError


def _parser() -> argparse.ArgumentParser:
    from torchrec_mpe.app.cli import doctor

    parser = argparse.ArgumentParser(
        prog="torchrec-mpe",
        description="Mixed-precision embedding tables for TorchRec: learned bit-widths from 0 to 8 bits.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor.add_parser(commands)
    # The doctor must also run where torch is missing or broken, which the other commands need to say what they do.
    if sys.argv[1:2] != ["doctor"]:
        from torchrec_mpe.app.cli import compress, convert, demo, inspect, plan, prepare, run, verify

        for command in (demo, run, prepare, plan, compress, convert, inspect, verify):
            command.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a user's mistake, 130 when interrupted, 141 on a closed pipe."""
    # A job that is told to stop cleans up as after Ctrl-C: nothing half-written stays.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        parsed = _parser().parse_args(arguments)
        code: int = parsed.run(parsed)
        return code
    except UserError as error:
        return _fail(str(error))
    except (FileExistsError, ImportError) as error:
        return _fail(str(error))
    except BrokenPipeError:
        # The reader has gone (`| head`): what is left in the buffer has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        where = f"{os.fspath(error.filename)}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}")
    except KeyboardInterrupt:
        print("torchrec-mpe: interrupted; finished outputs are kept, nothing half-written", file=sys.stderr)
        return 130


def _fail(sentence: str) -> int:
    print(f"torchrec-mpe: error: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
