"""The trainable weights and their optimizer's state."""

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
from espl_jax.models.transformer import Params, Weight
from espl_jax.parallel import sharding


@struct.dataclass
class TrainState:
    """What a step changes.

    Attributes:
      step: int32 [], updates made.
      trainable: all params (full fine-tuning), or the adapters alone.
      opt_state: of the optax chain.
    """

    step: jax.Array
    trainable: Params
    opt_state: Any


def init_train_state(trainable: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """A state before its first step."""
    return TrainState(jnp.int32(0), trainable, optimizer.init(trainable))


def abstract_train_state(
    trainable: Params, optimizer: optax.GradientTransformation, mesh: Mesh | None
) -> TrainState:
    """Shapes of a train state, with the shardings of its arrays where there is a mesh.

    Args:
      trainable: shapes of what is trained.
      optimizer: its averages lie where the weights do; its counters, and what has another shape than its
        weight, everywhere.
      mesh: of devices.
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
    """The policy's params: adapters attached to their frozen base, or the trainable params themselves."""
    return trainable if frozen is None else lora.attach(frozen, trainable)


def sampling_params(
    trainable: Params, frozen: Params | None, declared: Any, config: DecoderConfig, mesh: Mesh | None
) -> Params:
    """The policy's params as sampling wants them: what is trained, moved there by the rules of that phase.

    Args:
      trainable: adapters, or all params.
      frozen: the base of the adapters, which lies so already; None for full fine-tuning.
      declared: of what is trained.
      config: the decoder; weights are rounded as its products round them.
      mesh: of devices, or None.
    """

    def rounded(weight: Weight, x: jax.Array) -> jax.Array:
        if not weight.inputs:
            return x
        if isinstance(x, jax.ShapeDtypeStruct):  # to compile for
            return jax.eval_shape(functools.partial(layers.rounded, config=config), x)
        return layers.rounded(x, config)

    moved = sharding.place(jax.tree.map(rounded, declared, trainable), declared, mesh, "sampling")
    return whole_params(moved, frozen)
