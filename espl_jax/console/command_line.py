"""What all commands of the package do alike."""

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
    """Ends the command with one sentence for a file that is of no use.

    The library's own parser answers with tracebacks, or with an object that raises when it is read.
    """

    def parse(self, argument: str) -> ConfigDict:
        """The configuration."""
        try:
            return read_config_file(argument)
        except ValueError as error:
            sys.exit(f"--config={argument}: {error}")

    def flag_type(self) -> str:
        """What help calls it."""
        return "config file"


def read_config_file(argument: str) -> ConfigDict:
    """Runs a configuration file.

    Args:
      argument: `FILE.py`, or `FILE.py:PRESET` for a file whose `get_config` takes one. Where there is no such
        file, `configs/NAME.py` is the configuration of that name that is installed with the package.

    Returns:
      What `get_config` returns, locked.

    Raises:
      ValueError: if there is no such file, its code fails, or it has no `get_config` that fits.
    """
    file, *preset = argument.split(":", 1)
    if not Path(file).is_file() and (shipped := _shipped(file)):
        file = str(shipped)
    if not Path(file).is_file():
        what = "this is a folder" if file and Path(file).is_dir() else "there is no such file"
        raise ValueError(f"{what}; {_config_files(Path(file))}")
    _find_shared_configs()
    with _faults_of(file):
        get_config = runpy.run_path(file).get("get_config")
    if get_config is None:
        raise ValueError("the file has no get_config; define one that returns a ConfigDict")
    try:
        inspect.signature(get_config).bind(*preset)
    except TypeError as error:
        fix = f"leave out :{preset[0]}" if preset else f"name a preset, --config={file}:PRESET"
        raise ValueError(f"get_config does not take what is given ({error}); {fix}") from error
    with _faults_of(file):
        config = get_config(*preset)
    if not isinstance(config, ConfigDict):
        raise ValueError(f"get_config returns {config!r}; return a ConfigDict, as configs/hmmt.py does")
    return config.lock()


def _shipped(file: str) -> Path | None:
    """The configuration of that name, such as configs/hmmt.py, that an installed package has."""
    folder = Path(__file__).resolve().parents[1] / "configs"
    return folder / Path(file).name if Path(file).parent.name == "configs" and folder.is_dir() else None


def _find_shared_configs() -> None:
    """Lets configuration files import `configs.common` outside of the repository, too."""
    if importlib.util.find_spec("configs") is None and importlib.util.find_spec("espl_jax.configs"):
        sys.modules["configs"] = importlib.import_module("espl_jax.configs")


def _config_files(missing: Path) -> str:
    """Which configuration files there are in the folder of one that is missing, or else in configs/."""
    for folder in (missing, missing.parent, Path("configs")):
        files = [file for file in folder.glob("*.py") if file.name != "common.py"]
        if names := sorted(
            file.name for file in files if "def get_config(" in file.read_text("utf-8", "replace")
        ):
            return f"{folder}/ has {', '.join(names)}"
    return "give the path of a .py file that defines get_config"


@contextlib.contextmanager
def _faults_of(file: str) -> Iterator[None]:
    """Raises ValueError for whatever the file's code raises, with the line of the file that it came from."""
    try:
        yield
    except Exception as error:
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file
        ]
        said, where = " ".join(str(error).split()), f"line {lines[-1]}" if lines else "this file"
        if isinstance(error, SyntaxError):
            said, where = error.msg, f"{error.filename}, line {error.lineno}"
        raise ValueError(f"{where}: {type(error).__name__}: {said}; correct the file") from error


def parse_flags(argv: list[str]) -> list[str]:
    """Reads the flags; a field that the configuration does not have is refused by its full name.

    `--config.data=encyclopedia` takes all three splits from a set that has them all.
    """
    # In place, since ml_collections looks for the fields of a configuration in sys.argv itself.
    argv[:] = [part for arg in argv for part in _every_split(arg)]
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, TypeError) as error:  # what ml_collections raises for unknown fields
        unknown = str(error).strip("\"'")
        given = [arg.split("=")[0].lstrip("-") for arg in argv if arg.lstrip("-").startswith("config.")]
        named = [field for field in given if unknown in field.split(".")] or given
        sys.exit(f"{' or '.join(named)}: there is no such field; configs/common.py lists all of them")


def _every_split(arg: str) -> list[str]:
    """`--config.data=x` for each split; every other argument as it stands."""
    given = re.fullmatch(r"--?config\.data=(.*)", arg, re.DOTALL)
    splits = ("train", "validation", "test")
    return [f"--config.data.{split}={given[1]}" for split in splits] if given else [arg]


def enough_threads() -> None:
    """Gives several virtual CPU devices a thread each and more, before jax is imported.

    A collective holds a thread of each device until all have come to it. XLA would have no more threads than
    the machine has cores, which two collectives at a time can take all of and then wait for ever.
    """
    forced = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if forced:
        os.environ.setdefault("NPROC", str(4 * int(forced[1])))


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs in a folder between processes; an empty name keeps none."""
    import jax  # late, so that a wrong flag costs no start-up

    if folder:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))


@contextlib.contextmanager
def without_traceback() -> Iterator[None]:
    """Ends the command with the message of an error that says what to mend, and logs warnings only.

    Such errors are data that does not fit, a missing file, a folder in use, a full disk, a NaN. The same
    command repeats whatever happened, so `--verbosity=1` gives the traceback if it is wanted after all.
    """
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:
        if logging.level_debug():
            raise
        sys.exit(f"{type(error).__name__}: {error}\n(for the traceback add --verbosity=1)")
