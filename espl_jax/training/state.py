"""The train state: trainable weights and optimizer state."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from espl_jax.models import layers, lora
from espl_jax.models.config import DecoderConfig
from espl_jax.models.params import Params, Weight
from espl_jax.parallel import sharding


@struct.dataclass
class TrainState:
    """The arrays that an update replaces.

    Attributes:
      step: int32 [], number of updates applied.
      trainable: all params (full fine-tuning), or only the adapters.
      opt_state: state of the optax chain.
    """

    step: jax.Array
    trainable: Params
    opt_state: Any


def init_train_state(trainable: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first update."""
    return TrainState(jnp.int32(0), trainable, optimizer.init(trainable))


def abstract_train_state(
    trainable: Params, optimizer: optax.GradientTransformation, mesh: Mesh | None
) -> TrainState:
    """Returns the shapes of a train state, with shardings if there is a mesh.

    Args:
      trainable: shapes and shardings of the trainable weights.
      optimizer: its moments are sharded like their weights; counters, and moments whose shape or dtype
        differs from the weight's, are replicated.
      mesh: the mesh, or None.
    """
    state = jax.eval_shape(functools.partial(init_train_state, optimizer=optimizer), trainable)
    everywhere = functools.partial(sharding.replicate, mesh=mesh)

    def beside(x: jax.ShapeDtypeStruct, weight: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        same = x.shape == weight.shape and x.dtype == weight.dtype
        return weight if same else everywhere(x)

    opt_state = optax.tree.map_params(
        optimizer, beside, state.opt_state, trainable, transform_non_params=everywhere
    )
    return TrainState(everywhere(state.step), trainable, opt_state)


def whole_params(trainable: Params, frozen: Params | None) -> Params:
    """Returns the policy's params: the frozen base with adapters attached, or the trainable params."""
    return trainable if frozen is None else lora.attach(frozen, trainable)


def sampling_params(
    trainable: Params, frozen: Params | None, declared: Any, decoder: DecoderConfig, mesh: Mesh | None
) -> Params:
    """Returns the policy's params, cast and resharded for the sampling phase.

    Args:
      trainable: adapters, or all params.
      frozen: the base of the adapters, already sharded for sampling; None for full fine-tuning.
      declared: the `Weight` declarations of `trainable`.
      decoder: the model's configuration; matmul weights are cast to its compute dtype where that is smaller.
      mesh: the mesh, or None.
    """

    def rounded(weight: Weight, x: jax.Array) -> jax.Array:
        if not weight.inputs:
            return x
        if isinstance(x, jax.ShapeDtypeStruct):  # to compile for
            return jax.eval_shape(functools.partial(layers.rounded, decoder=decoder), x)
        return layers.rounded(x, decoder)

    moved = sharding.place(jax.tree.map(rounded, declared, trainable), declared, mesh, "sampling")
    return whole_params(moved, frozen)
