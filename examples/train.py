"""Trains from Python, with the quickstart's configuration and a few changes.

python examples/train.py
"""

from configs import quickstart
from espl_jax.run.check_config import check_config
from espl_jax.train import train


def main(workdir: str = "runs/example", **fields: object) -> dict:
    """Runs two iterations and returns the contents of results.json.

    Args:
      workdir: the work directory; calling this again resumes the run.
      **fields: further fields to set, with `__` in place of dots.
    """
    config = quickstart.get_config()
    changes = {"num_iterations": 2, "mode": "rl"} | fields
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    check_config(config)
    return train(config, workdir)


if __name__ == "__main__":
    main()
