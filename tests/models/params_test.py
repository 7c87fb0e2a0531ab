import jax
import numpy as np
import pytest

from espl_jax.models.params import abstract, init
from tests.support import tiny


class TestDeclaration:
    def test_init_is_as_declared_with_unit_gain(self):
        config = tiny.CONFIG.replace(embed_dim=64, tied_head=False, param_dtype="bfloat16")
        declared = abstract(config)
        params = init(jax.random.key(0), config)
        shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), params)
        assert shapes == jax.tree.map(lambda w: (w.shape, w.dtype), declared)
        assert set(params) == {"embedding", "layers", "final_norm", "head"}
        up = params["layers"]["mlp"]["up"]["weight"].astype(np.float32)
        assert np.std(up) == pytest.approx(1 / 8, rel=0.05)
        assert (np.asarray(params["final_norm"]["scale"]) == 1).all()

    def test_declarations(self):
        declared = abstract(tiny.CONFIG)
        up = declared["layers"]["mlp"]["up"]["weight"]
        assert (up.axes, up.shape, up.fan_in) == (("layers", "embed", "mlp"), (2, 16, 20), 16)
        assert declared["layers"]["attention"]["out"]["weight"].fan_in == 24
        assert "head" not in declared
