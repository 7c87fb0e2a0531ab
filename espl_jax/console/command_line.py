"""Code shared by the commands of the package."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
import re
import runpy
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags


def define_config() -> flags.FlagHolder[ConfigDict]:
    """Defines `--config=FILE.py` or `--config=FILE.py:PRESET`, whose fields `--config.field=value` sets."""
    holder = config_flags.DEFINE_config_file("config", None, "Configuration file of the run.")
    flags.FLAGS["config"].parser = _ConfigFile()
    return holder


class _ConfigFile(flags.ArgumentParser):
    """Exits with a one-sentence message if the configuration file is unusable.

    The parser of ml_collections raises tracebacks, or returns an object that raises when it is read.
    """

    def parse(self, argument: str) -> ConfigDict:
        """Returns the configuration."""
        try:
            return read_config_file(argument)
        except ValueError as error:
            sys.exit(f"--config={argument}: {error}")

    def flag_type(self) -> str:
        """Returns the type shown in --help."""
        return "config file"


def read_config_file(argument: str) -> ConfigDict:
    """Runs a configuration file.

    Args:
      argument: `FILE.py`, or `FILE.py:PRESET` if its `get_config` takes an argument. If there is no file
        `configs/NAME.py`, the configuration of that name installed with the package is used.

    Returns:
      The ConfigDict returned by `get_config`, locked.

    Raises:
      ValueError: if there is no such file, its code fails, or it has no suitable `get_config`.
    """
    file, *preset = argument.split(":", 1)
    if not Path(file).is_file() and (shipped := _shipped(file)):
        file = str(shipped)
    if not Path(file).is_file():
        what = "is a folder" if file and Path(file).is_dir() else "file not found"
        raise ValueError(f"{what}; {_config_files(Path(file))}")
    _find_shared_configs()
    with _faults_of(file):
        get_config = runpy.run_path(file).get("get_config")
    if get_config is None:
        raise ValueError("the file does not define get_config; define one that returns a ConfigDict")
    try:
        inspect.signature(get_config).bind(*preset)
    except TypeError as error:
        fix = f"leave out :{preset[0]}" if preset else f"name a preset, --config={file}:PRESET"
        raise ValueError(f"get_config cannot be called ({error}); {fix}") from error
    with _faults_of(file):
        config = get_config(*preset)
    if not isinstance(config, ConfigDict):
        raise ValueError(f"get_config returns {config!r}; return a ConfigDict, as configs/hmmt.py does")
    return config.lock()


def _shipped(file: str) -> Path | None:
    """Returns the installed configuration for a path such as configs/hmmt.py, if there is one."""
    folder = Path(__file__).resolve().parents[1] / "configs"
    return folder / Path(file).name if Path(file).parent.name == "configs" and folder.is_dir() else None


def _find_shared_configs() -> None:
    """Makes `configs.common` importable by configuration files outside the repository."""
    if importlib.util.find_spec("configs") is None and importlib.util.find_spec("espl_jax.configs"):
        sys.modules["configs"] = importlib.import_module("espl_jax.configs")


def _config_files(missing: Path) -> str:
    """Lists the configuration files in the folder of a missing file, or else in configs/, for a message."""
    for folder in (missing, missing.parent, Path("configs")):
        files = [file for file in folder.glob("*.py") if file.name != "common.py"]
        if names := sorted(
            file.name for file in files if "def get_config(" in file.read_text("utf-8", "replace")
        ):
            return f"{folder}/ has {', '.join(names)}"
    return "give the path of a .py file that defines get_config"


@contextlib.contextmanager
def _faults_of(file: str) -> Iterator[None]:
    """Raises ValueError for any exception in the code of the file, with its line number."""
    try:
        yield
    except Exception as error:
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file
        ]
        said, where = " ".join(str(error).split()), f"line {lines[-1]}" if lines else "the file"
        if isinstance(error, SyntaxError):
            said, where = error.msg, f"{error.filename}, line {error.lineno}"
        raise ValueError(f"{where}: {type(error).__name__}: {said}; correct the file") from error


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags; exits with the full name of an unknown configuration field.

    `--config.data=encyclopedia` sets data.train, data.validation and data.test.
    """
    # In place, since ml_collections reads the overrides from sys.argv.
    argv[:] = [part for arg in argv for part in _every_split(arg)]
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, TypeError) as error:  # raised by ml_collections for unknown fields
        unknown = str(error).strip("\"'")
        given = [arg.split("=")[0].lstrip("-") for arg in argv if arg.lstrip("-").startswith("config.")]
        named = [field for field in given if unknown in field.split(".")] or given
        sys.exit(f"{' or '.join(named)}: unknown field; configs/common.py lists all fields")


def _every_split(arg: str) -> list[str]:
    """Expands `--config.data=x` to all splits; returns other arguments unchanged."""
    given = re.fullmatch(r"--?config\.data=(.*)", arg, re.DOTALL)
    splits = ("train", "validation", "test")
    return [f"--config.data.{split}={given[1]}" for split in splits] if given else [arg]


def enough_threads() -> None:
    """Raises the number of XLA threads for virtual CPU devices. Must be called before jax is imported.

    A collective blocks one thread per device until all devices have joined. By default XLA has one thread per
    core, so two concurrent collectives can block all threads and deadlock.
    """
    forced = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if forced:
        os.environ.setdefault("NPROC", str(4 * int(forced[1])))


def use_compilation_cache(folder: str) -> None:
    """Sets the persistent compilation cache; an empty name disables it."""
    import jax  # late, so that a wrong flag is reported at once

    if folder:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))


@contextlib.contextmanager
def without_traceback() -> Iterator[None]:
    """Exits with the message of an expected error, without traceback, and sets the log level to warnings.

    Expected errors are e.g. unusable data, a missing file, a folder in use, a full disk, or a NaN. To see the
    traceback, run the command again with `--verbosity=1`.
    """
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:
        if logging.level_debug():
            raise
        sys.exit(f"{type(error).__name__}: {error}\n(add --verbosity=1 for the traceback)")
