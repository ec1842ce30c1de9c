"""What each engine makes of a checkpoint."""

import pytest

from finescale.errors import InputError
from finescale.formats import FORMATS
from finescale.formats.engines import check_tensor_parallel, engine_table, fused_conflict
from finescale.grid import ActivationScheme, WeightScheme

SYMMETRIC = WeightScheme(4, 128, True)
A8 = ActivationScheme(8)


def loads(*arguments, **keywords):
    return {row["engine"]: row["loads"] for row in engine_table(*arguments, **keywords)}


def row(engine, *arguments, **keywords):
    return next(row for row in engine_table(*arguments, **keywords) if row["engine"] == engine)


@pytest.mark.parametrize("name", FORMATS)
def test_every_row_says_what_runs_or_why_not(name):
    for scheme in (SYMMETRIC, WeightScheme(2, 64, False), WeightScheme(8, -1, True)):
        for activations in (None, A8):
            for entry in engine_table(name, [scheme], activations, "llama"):
                assert set(entry) == {"engine", "loads", "runs_as", "remark"}
                assert entry["runs_as"] if entry["loads"] else entry["remark"]


def test_four_bit_weight_only_loads_everywhere():
    for name in ("compressed-tensors", "gptq", "gptq_v2", "awq", "dense"):
        assert all(loads(name, [SYMMETRIC], None, "llama").values())


def test_what_was_measured():
    assert row("vLLM (CUDA)", "compressed-tensors", [SYMMETRIC], A8, "llama")["runs_as"] == "W4A16"
    assert row("vLLM (x86 CPU)", "int-quantized", [WeightScheme(8, -1, True)], A8, "llama")["runs_as"] == "W8A8"
    assert not loads("compressed-tensors", [WeightScheme(8, 128, True)], None, "llama")["vLLM (x86 CPU)"]
    assert not loads("compressed-tensors", [WeightScheme(3, 128, True)], None, "llama")["vLLM (x86 CPU)"]
    assert not loads("compressed-tensors", [WeightScheme(4, 128, False)], None, "llama")["transformers"]
    assert not loads("int-quantized", [SYMMETRIC], A8, "llama")["vLLM (CUDA)"]
    assert not loads("gptq", [WeightScheme(4, 128, False)], None, "llama")["vLLM (CUDA)"]
    assert not loads("gptq", [SYMMETRIC], None, "bloom")["vLLM (x86 CPU)"]
    assert not loads("compressed-tensors", [SYMMETRIC], A8, "mixtral")["vLLM (CUDA)"]
    assert not loads("compressed-tensors", [SYMMETRIC], ActivationScheme(6), "llama")["vLLM (CUDA)"]
    assert not loads("gptq", [SYMMETRIC], None, "llama", desc_act=True)["vLLM (CUDA)"]
    assert loads("compressed-tensors", [SYMMETRIC], None, "mixtral")["vLLM (x86 CPU)"]
    assert not loads("compressed-tensors", [WeightScheme(4, -1, True)], None, "mixtral")["vLLM (x86 CPU)"]


def test_what_finescale_runs_in_vllm():
    """The same as the plugin decides from the file (tests/runtime/test_serving.py)."""
    plain = row("vLLM with finescale", "compressed-tensors", [SYMMETRIC], A8, "llama")
    assert plain["runs_as"] == "W4A16" and "left to vLLM" in plain["remark"]
    integer = row("vLLM with finescale", "compressed-tensors", [SYMMETRIC], A8, "llama", integer=True)
    assert (
        integer["runs_as"] == "W4A8"
        and "plugin" in row("vLLM (CUDA)", "compressed-tensors", [SYMMETRIC], A8, "llama", integer=True)["remark"]
    )
    for family, parts in {"bloom": {}, "gpt2": {}, "llama": {"outliers": True}}.items():
        assert not loads("compressed-tensors", [SYMMETRIC], A8, family, integer=True, **parts)["vLLM with finescale"]
    gathered = row("vLLM with finescale", "compressed-tensors", [SYMMETRIC], None, "llama", own_inputs=True)
    assert gathered["loads"] and gathered["runs_as"] == "W4A16"
    assert not loads("compressed-tensors", [SYMMETRIC], None, "llama", own_inputs=True)["vLLM (CUDA)"]
    six = ActivationScheme(6)
    assert loads("compressed-tensors", [SYMMETRIC], six, "llama")["vLLM with finescale"]
    assert not loads("compressed-tensors", [SYMMETRIC], six, "mixtral")["vLLM with finescale"]
    assert loads("compressed-tensors", [SYMMETRIC], A8, "mixtral", integer=True)["vLLM with finescale"]


def test_ragged_groups_and_odd_sizes_load_in_finescale_only():
    table = loads("compressed-tensors", {"a.b": WeightScheme(4, 64, True)}, None, "llama", {"a.b": (64, 172)})
    assert [engine for engine, yes in table.items() if yes] == ["finescale"]
    table = loads("compressed-tensors", {"a.b": WeightScheme(4, -1, True)}, None, "llama", {"a.b": (64, 172)})
    assert table == {**dict.fromkeys(table, True), "vLLM (x86 CPU)": False}


def test_fused_layers_must_agree():
    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkvo"]
    schemes = dict.fromkeys(names, SYMMETRIC)
    assert fused_conflict(schemes) == ""
    other = {**schemes, names[3]: WeightScheme(8, -1, True)}
    assert fused_conflict(other) == ""
    other = {**schemes, names[0]: WeightScheme(8, -1, True)}
    assert fused_conflict(other) == "model.layers.0.self_attn.(q_proj|k_proj|v_proj)"
    assert not loads("compressed-tensors", other, None, "llama")["vLLM (CUDA)"]
    partly = {**schemes, **{name.replace("s.0", "s.1"): SYMMETRIC for name in names[1:]}}
    assert fused_conflict(partly) == "model.layers.1.self_attn.(q_proj|k_proj|v_proj)"
    experts = {f"model.layers.0.moe.experts.{e}.{w}": SYMMETRIC for e in range(4) for w in ("w1", "w2", "w3")}
    assert fused_conflict(experts) == ""
    assert fused_conflict(experts | {"model.layers.0.moe.experts.2.w2": WeightScheme(8, -1, True)}) == (
        "model.layers.0.moe.experts"
    )
    assert fused_conflict({"h.0.fc1": SYMMETRIC, "h.0.q_proj": SYMMETRIC}) == ""


def test_transformers_decompresses_all_experts_by_one_scheme():
    """Measured with transformers 5.23: experts of 8 bits in one block and 4 in another load, as other numbers."""
    names = [f"model.layers.{b}.mlp.experts.{e}.{w}" for b in range(2) for e in range(4) for w in ("w1", "w2", "w3")]
    same = dict.fromkeys(names, SYMMETRIC)
    attention = {f"model.layers.0.self_attn.{part}_proj": WeightScheme(8, -1, True) for part in "qkvo"}
    later_wide = {name: WeightScheme(8, 128, True) if ".1.mlp" in name else SYMMETRIC for name in names}
    down_left = {name: None if name.endswith("w2") else SYMMETRIC for name in names}
    for schemes, yes in ((same, True), (same | attention, True), (later_wide, False), (down_left, False)):
        assert loads("compressed-tensors", schemes, None, "mixtral")["transformers"] is yes
    assert fused_conflict(later_wide) == "" and fused_conflict(down_left) == "model.layers.0.mlp.experts"


def test_only_finescale_rounds_keys_and_values():
    table = engine_table("compressed-tensors", [SYMMETRIC], None, "llama", rounded_cache=True)
    assert ["keys and values" in row["remark"] for row in table] == [row["engine"] != "finescale" for row in table]
    assert not loads("compressed-tensors", [SYMMETRIC], A8, "llama", integer=True, rounded_cache=True)[
        "vLLM with finescale"
    ]


def test_tensor_parallel():
    check_tensor_parallel((768, 512), 128, 4, "row")
    check_tensor_parallel((768, 500), 128, 4, "column")
    check_tensor_parallel((768, 512), -1, 8, "row")
    with pytest.raises(InputError, match="no multiple of the group size 128"):
        check_tensor_parallel((768, 768), 128, 4, "row", "model.layers.0.mlp.down_proj")
    with pytest.raises(InputError, match="3 devices cannot share"):
        check_tensor_parallel((512, 512), 128, 3, "column")
    with pytest.raises(InputError, match="1 or more"):
        check_tensor_parallel((512, 512), 128, 0, "column")


def test_conv1d_layers_are_read_by_finescale_only():
    scheme = {"h.0.attn.c_attn": WeightScheme(4, 64, True)}
    rows = engine_table("compressed-tensors", scheme, None, "gpt2")
    assert [row["engine"] for row in rows if row["loads"]] == ["finescale"]
    assert all(row["loads"] for row in engine_table("dense", scheme, None, "gpt2"))
