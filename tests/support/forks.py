"""Runs commands in forks of a process that has already imported the modules they need, except jax.

A process for each command would cost two seconds of imports. Standard input has a line of JSON for each,
`[module, argument, ...]`; standard output has a line for each result, `[exit status, output, errors]`.
"""

import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile

IMPORTED = "espl_jax.console.command_line", "espl_jax.run.check_config", "espl_jax.evaluate.request"


class Forks:
    """The other end: the process that forks."""

    def __init__(self, folder: str, environment: dict[str, str]):
        """Starts it in a folder."""
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            cwd=folder,
            env=environment | {"PYTHONPATH": os.pathsep.join([folder, environment.get("PYTHONPATH", "")])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, module: str, *args: str) -> subprocess.CompletedProcess[str]:
        """`python -m module args`."""
        self._process.stdin.write(json.dumps([module, *args]) + "\n")
        self._process.stdin.flush()
        code, said, errors = json.loads(self._process.stdout.readline())
        return subprocess.CompletedProcess([module, *args], code, said, errors)

    def close(self) -> None:
        """Ends it."""
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    """What the process does; a fork leaves with the exit status of its command."""
    for module in IMPORTED:
        importlib.import_module(module)
    for line in sys.stdin:
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            if not (pid := os.fork()):
                os.dup2(output.fileno(), 1)
                os.dup2(errors.fileno(), 2)
                sys.argv = json.loads(line)
                runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
                sys.exit()
            _, status = os.waitpid(pid, 0)
            said = [os.pread(file.fileno(), 1 << 20, 0).decode() for file in (output, errors)]
        print(json.dumps([os.waitstatus_to_exitcode(status), *said]), flush=True)


if __name__ == "__main__":
    main()
