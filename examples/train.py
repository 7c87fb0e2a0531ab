"""Trains from Python: the quickstart's configuration, changed here and there.

python examples/train.py
"""

from configs import quickstart
from espl_jax.run.check_config import check_config
from espl_jax.train import train


def main(workdir: str = "runs/example", **fields: object) -> dict:
    """Runs two iterations and returns the contents of results.json.

    Args:
      workdir: of the run; calling this again resumes it.
      **fields: further fields, with `__` for dots.
    """
    config = quickstart.get_config()
    changes = {"num_iterations": 2, "mode": "rl"} | fields
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    check_config(config)
    return train(config, workdir)


if __name__ == "__main__":
    main()
