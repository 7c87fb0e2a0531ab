"""A script: compiles two small programs for a TPU topology and prints their HLO with a line between."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from espl_jax.plan import tpu_compiler

LAYERS, ROWS, WIDTH, CACHED = 12, 64, 2048, 65536


def stack_of_products(x, weights):
    """x through all weights: reads every weight once, keeps x on chip."""
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


def fill(cache, rows, until):
    """Writes a row a step into a donated cache, an unknown number of steps."""

    def write(carry):
        step, cache = carry
        row = jax.lax.dynamic_slice_in_dim(rows, step % 8, 1)
        return step + 1, jax.lax.dynamic_update_slice(cache, row * 2, (step * 8, 0))

    return jax.lax.while_loop(lambda carry: carry[0] < until, write, (0, cache))[1]


if __name__ == "__main__":
    devices = tpu_compiler.devices("v5e:2x2")
    mesh = Mesh(np.array(devices), ("x",), axis_types=(AxisType.Auto,))

    def array(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    # Each device has ROWS of the rows and all weights.
    x, weights = array((4 * ROWS, WIDTH), jnp.bfloat16, "x"), array((LAYERS, WIDTH, WIDTH), jnp.bfloat16)
    print(jax.jit(stack_of_products).lower(x, weights).compile().as_text())
    print("----")
    cache = array((CACHED, WIDTH), jnp.float32)
    rows, until = array((8, WIDTH), jnp.float32), array((), jnp.int32)
    print(jax.jit(fill, donate_argnums=0).lower(cache, rows, until).compile().as_text())
