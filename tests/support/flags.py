"""Flags of commands that run in the process of the tests."""

import contextlib
import sys

from absl import app, flags, logging


@contextlib.contextmanager
def fresh_flags():
    """Hides the flags of commands that were imported before; absl keeps all flags of a process together."""

    module_of = flags.FLAGS.find_module_defining_flag

    def defined():
        return [x for x in flags.FLAGS if x.split(".")[0] == "config" or "espl_jax" in module_of(x, "")]

    hidden = [(name, flags.FLAGS[name], module_of(name)) for name in defined()]
    verbosity = logging.get_verbosity()
    for name, _, _ in hidden:
        delattr(flags.FLAGS, name)
    try:
        yield
    finally:
        for name in defined():
            delattr(flags.FLAGS, name)
        for name, flag, module in hidden:
            flags.FLAGS[name] = flag
            flags.FLAGS.register_flag_by_module(module, flag)
        flags.FLAGS.unparse_flags()
        logging.set_verbosity(verbosity)


def run_app(main, argv=None, flags_parser=app.parse_flags_with_usage):
    """Replaces `absl.app.run`, which would also install absl's logging in this process."""
    sys.exit(main(flags_parser(sys.argv)))
