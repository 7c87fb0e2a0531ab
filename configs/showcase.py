r"""A convention of two rules on a CPU: a box and a unit, trained on easy sums and tested on hard ones.

    make showcase                    # RL alone, evolution alone, and both, at the same budget of rollouts

The root prompt mentions neither rule. Without a box a reply earns nothing, with one alone half, and a
critique proposes one principle, so that a prompt needs two of them. Training is on sums of two-digit numbers,
the test on sums of three-digit numbers.
"""

from configs import quickstart


def get_config():
    """Returns the settings of configs/quickstart.py with a unit, harder test problems and more time."""
    c = quickstart.get_config("qwen2.5-coder-0.5b")
    c.num_iterations = 8
    c.environment.options = '{"unit": "points"}'
    c.evolution.max_principles = 8  # the first mutation may fill four
    c.reflection.rejected_edits = 0  # a small reflector proposes them again
    c.optimizer.learning_rate = 2e-4  # weights that learn one rule too fast never try the other
    c.data.validation = "addition:digits=3,count=50"
    c.data.test = "addition:digits=3,count=100"
    return c
