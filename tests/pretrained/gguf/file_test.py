import gguf
import numpy as np
import pytest

from espl_jax.pretrained.gguf.file import open_gguf
from tests.pretrained.gguf.tiny_gguf import tiny_tensors


@pytest.fixture
def tensors():
    return tiny_tensors(np.random.default_rng(0))


def test_values_of_every_type(tmp_path):
    values = {
        "uint8": 200,
        "int8": -100,
        "uint16": 60_000,
        "int16": -30_000,
        "uint32": 4_000_000_000,
        "int32": -2_000_000_000,
        "uint64": 2**63,
        "int64": -(2**62),
        "float32": 0.5,
        "float64": 0.1,
        "bool": True,
        "string": "naïve ▁",
    }
    arrays = {"a": [1, -2], "b": [0.5, 1.5], "c": ["x", "", "漢"], "d": [True, False], "e": [[1], [2, 3]]}
    writer = gguf.GGUFWriter(tmp_path / "file.gguf", "llama")
    for kind, value in values.items():
        getattr(writer, f"add_{kind}")(kind, value)
    for key, value in arrays.items():
        writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert open_gguf(tmp_path / "file.gguf").metadata == {
        "general.architecture": "llama",
        **values,
        **arrays,
    }


@pytest.mark.parametrize("alignment", [32, 8, 64])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_tensors_come_back(tmp_path, kind, alignment):
    kind = gguf.GGMLQuantizationType[kind]
    rng = np.random.default_rng(0)
    matrix, row = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 256), (7,)))
    writer = gguf.GGUFWriter(tmp_path / "file.gguf", "llama")
    writer.add_custom_alignment(alignment)
    writer.add_tensor("row", row)
    writer.add_tensor("matrix", gguf.quantize(matrix, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "file.gguf")
    np.testing.assert_array_equal(file.dequantize("row"), row)
    assert file.tensors["matrix"].shape == (3, 256)
    assert file.dequantize("matrix").dtype == np.float32
    step = {"F32": 0.0, "F16": 0.001, "BF16": 0.01, "Q8_0": 0.02, "Q5_0": 0.15, "Q5_1": 0.15}.get(
        kind.name, 0.3
    )
    assert np.abs(file.dequantize("matrix") - matrix).max() <= step


def can_be_unpacked(kind):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.dequantize(np.zeros((1, 256 // block * size), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "kind", filter(can_be_unpacked, gguf.GGMLQuantizationType), ids=lambda kind: kind.name
)
def test_any_bytes_mean_what_they_mean_to_the_gguf_package(tmp_path, kind):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    stored = np.random.default_rng(0).integers(0, 256, (3, 512 // block * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "file.gguf", "llama")
    writer.add_tensor("matrix", stored, raw_shape=stored.shape, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (theirs,) = gguf.GGUFReader(tmp_path / "file.gguf").tensors
    unpacked = gguf.dequantize(theirs.data, theirs.tensor_type)
    assert unpacked.shape == (3, 512)
    np.testing.assert_array_equal(open_gguf(tmp_path / "file.gguf").dequantize("matrix"), unpacked)


def test_a_kind_that_cannot_be_unpacked_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "file.gguf", "llama")
    writer.add_tensor("row", np.arange(4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="row is stored as I64, which gguf cannot dequantize"):
        open_gguf(tmp_path / "file.gguf").dequantize("row")


def test_broken_files_are_refused(write_gguf, tensors, tmp_path):
    whole = write_gguf(tensors).read_bytes()
    broken = tmp_path / "broken.gguf"
    for size in (0, 3, 10, 100, 700, 2000, len(whole) // 2, len(whole) - 64):
        broken.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"broken\.gguf \({size} bytes\) cannot be read as GGUF"):
            open_gguf(broken)
    broken.write_bytes(b"PK" + whole[2:])
    with pytest.raises(ValueError, match="GGUF magic invalid"):
        open_gguf(broken)
    broken.write_bytes(whole[:4] + b"\0\0\0\3" + whole[8:])
    with pytest.raises(ValueError, match="version 50331648 of the format"):
        open_gguf(broken)
    with pytest.raises(FileNotFoundError, match=r"missing\.gguf is not a file"):
        open_gguf(tmp_path / "missing.gguf")


def test_damage_anywhere_is_an_error_or_harmless(write_gguf, tensors, tmp_path):
    """Never another kind of error, an endless loop or a huge allocation."""
    whole = write_gguf(tensors).read_bytes()
    broken = tmp_path / "broken.gguf"
    for position in np.random.default_rng(0).integers(4, 6000, 300):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        broken.write_bytes(damaged)
        try:
            open_gguf(broken)
        except ValueError as error:
            assert "cannot be read as GGUF" in str(error)


def test_one_part_of_several(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model-00001-of-00003.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"one of 3 parts of a model.*llama-gguf-split --merge"):
        open_gguf(tmp_path / "model-00001-of-00003.gguf")
