"""`transformers serve` for tests: on the CPU, without network."""

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

PACKAGES = ("fastapi", "uvicorn", "openai", "accelerate", "torch")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]


@contextlib.contextmanager
def transformers_serve(log):
    """Yields the address of a server that writes to the file `log`; it ends with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve"]
    command += ["--host=127.0.0.1", f"--port={port}", "--device=cpu"]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(240):
            if process.poll() is not None:
                break
            with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(f"{address}/health"):
                break
            time.sleep(0.5)
        assert process.poll() is None, log.read_text()
        yield address
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:  # it finishes first what it generates, asked for or not
            process.kill()
            process.wait()
