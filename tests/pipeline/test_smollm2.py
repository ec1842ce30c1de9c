"""Every solver, bits and kind of groups on SmolLM2-135M-Instruct: a real model of the size people start with."""

import pytest

import finescale
from finescale.errors import InputError
from finescale.formats.gguf import local_folder
from finescale.pipeline.verify import verify

SIZES = ("calibration.samples=8", "calibration.length=256")
LAYERS = 30 * 7


@pytest.fixture(scope="module")
def smollm2():
    from finescale.demo import find_demo_model

    try:
        return local_folder(find_demo_model())
    except InputError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("group", [-1, 128])  # 576 inputs: the last group of 128 is ragged
@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("solver", ["rtn", "gptq", "quantease"])
def test_quantize_and_verify(smollm2, tmp_path, solver, bits, group):
    settings = (f"weights.bits={bits}", f"weights.group_size={group}", *SIZES)
    report = finescale.quantize(
        smollm2, solver, out=tmp_path / "out", calibration="builtin:calibration", settings=settings
    )
    assert len(report["layers"]) == LAYERS and report["model"]["quantized_share"] > 0.99
    proof = verify(tmp_path / "out", smollm2)
    assert proof.layers == proof.packed_again == LAYERS and proof.copied > 0
    errors = [layer["relative_error"] for layer in report["layers"]]
    assert 0 < sum(errors) / LAYERS < (0.2 if bits == 3 else 0.05)
