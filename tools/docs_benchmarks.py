"""Tables of what lies in benchmarks/results, for the documentation: no number comes from anywhere else."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tools import docs_solver
from tools.docs_text import number, table


def where(machine: dict[str, Any]) -> str:
    """The machine of a result, in words."""
    processor = machine.get("gpu") or f"{machine.get('processor', 'CPU')}, {machine.get('threads', '?')} threads"
    return f"{processor}; torch {machine.get('torch', '?')}, finescale {machine.get('finescale', '?')}"


def layer_errors(facts: dict[str, Any]) -> str:
    """QuantEase's layer errors over GPTQ's on the same statistics and grid."""
    rows = []
    for bits, summary in facts["summary"].items():
        errors = facts["errors"][bits]
        ratios = [errors["quantease"][name] / errors["gptq"][name] for name in errors["gptq"]]
        rows.append(
            (
                bits,
                summary["layers"],
                f"{summary['below_gptq']:.1%}",
                number(summary["median_ratio"]),
                number(min(ratios)),
                number(max(ratios)),
            )
        )
    calibration = facts["calibration"]
    return (
        f"Layer errors of QuantEase over GPTQ's, model {facts['model']}, {calibration['samples']} x "
        f"{calibration['length']} tokens of {calibration['source']}, same statistics and grid.\n\n"
        + table(("bits", "layers", "QuantEase below GPTQ", "median ratio", "smallest", "largest"), rows)
    )


def accuracy(facts: dict[str, Any]) -> str:
    """Whole runs: perplexity and KL of the solvers by bits, and of kinds of group scales."""
    setting = facts["setting"]
    parts = [
        f"Whole runs, model {setting['model']}, calibration {setting['samples']} x {setting['length']} tokens of "
        f"{setting['calibration']}, evaluated on {setting['windows']} windows of {setting['window_length']} tokens of "
        f"{setting['text']}. The original has perplexity {number(facts.get('original_perplexity'), 4)}. "
        f"{facts.get('note', '')}\n"
    ]
    rows = [
        (bits, name, number(s["perplexity"]["mean"], 4), number(s["kl"]["mean"]))
        for bits, group in facts.get("solvers", {}).items()
        for name, s in group["summary"].items()
    ]
    if rows:
        parts.append(table(("bits, per channel", "solver", "perplexity", "KL to the original"), rows))
    rows = [
        (
            name,
            number(s["perplexity"], 4),
            number(s["kl"]),
            f"{s['overflow_use']:.1%}" if s.get("overflow_use") else "–",
        )
        for name, s in facts.get("scales", {}).items()
        if isinstance(s, dict) and "perplexity" in s
    ]
    if rows:
        parts.append("W4A8 in groups, by kind of scale:\n")
        parts.append(table(("scales", "perplexity", "KL to the original", "int32 used"), rows))
    return "\n".join(parts)


def solver_time(facts: dict[str, Any]) -> str:
    """Seconds of one layer, beside the plain loop over columns."""
    rows = [
        (
            "x".join(map(str, row["shape"])), row["bits"], row["sweeps"], number(row["rtn_seconds"]),
            number(row["gptq_seconds"]), number(row["quantease_seconds"]), number(row["plain_seconds"]),
            f"{number(row['speedup_over_plain'])} x",
        )
        for row in facts["rows"]
    ]  # fmt: skip
    header = ("outputs x inputs", "bits", "sweeps", "rtn s", "gptq s", "quantease s", "plain loop s", "faster")
    note = (
        " The plain loop was timed on a part of the columns and extrapolated."
        if any(row.get("plain_extrapolated") for row in facts["rows"])
        else ""
    )
    return f"Seconds of one solve. {facts.get('note', '')}{note}\n\n" + table(header, rows)


def gemm(facts: dict[str, Any]) -> str:
    """Speed-up of the W4A8 product over bfloat16: the fastest variant of each form."""
    rows = []
    for row in facts["rows"]:
        best = {
            folded: min(
                (time for time, shape, equal, _ in row["ours"] if equal and bool(shape[3]) == folded), default=None
            )
            for folded in (False, True)
        }
        ratios = [number(None if time is None else row["bf16"] / time) for time in best.values()]
        rows.append((f"{row['K']}, {row['N']}", row["M"], number(row["bf16"]), *ratios))
    header = ("inputs, outputs", "tokens", "bfloat16, microseconds", "integer scales", "folded scales")
    return (
        "Speed-up of the W4A8 product over cuBLAS bfloat16; the fastest variant of each form, every one equal to the "
        f"exact product. {facts.get('note', '')}\n\n" + table(header, rows)
    )


def products(facts: dict[str, Any]) -> str:
    """Every product beside the baseline of its run, all of them checked."""
    base, names, rows = facts["base"], facts["names"], []
    for row in facts["rows"]:
        ratios = [number(row[base] / row[name] if name in row and base in row else None) for name in names]
        rows.append((f"{row['inputs']}, {row['outputs']}", row["tokens"], number(row.get(base)), *ratios))
    header = ("inputs, outputs", "tokens", f"{base}, microseconds", *(name.replace("_", " ") for name in names))
    return (
        f"Speed-up over {base} of the same run, groups of {facts['group_size']}; a result that was wrong has no time. "
        f"{facts.get('note', '')}\n\n" + table(header, rows)
    )


def quantizers(facts: dict[str, Any]) -> str:
    """The kernels that round, beside a copy of as many bytes."""
    kinds = list(dict.fromkeys(row["kind"] for row in facts["rows"]))
    shares: dict[tuple[int, int], dict[str, float]] = {}
    for row in facts["rows"]:
        shares.setdefault((row["tokens"], row["inputs"]), {})[row["kind"]] = row["share_of_copy"]
    rows = [(t, i, *(number(share.get(kind)) for kind in kinds)) for (t, i), share in shares.items()]
    return "Speed beside a copy of as many bytes, 1 for the same.\n\n" + table(("tokens", "inputs", *kinds), rows)


def mixtures(facts: dict[str, Any]) -> str:
    """Products and whole feed-forwards of mixtures of experts beside bfloat16."""
    rows = [
        (
            row["model"],
            {"gate_up": "gate and up", "experts": "whole"}.get(row["part"], row["part"]),
            row["tokens"],
            number(row["bf16"]),
            *(f"{number(row[name])} ({row['bf16'] / row[name]:.2f} x)" for name in ("integer", "folded")),
        )
        for row in facts["rows"]
    ]
    header = ("experts of", "part", "tokens", "bfloat16", "integer scales", "folded scales")
    return (
        "Microseconds, and times faster than bfloat16 in the same run: the faster of torch's grouped product and one "
        "cuBLAS product an expert, and for the whole feed-forward torch's grouped products with sorts and sums around "
        f"them. Random routing; every product was equal to the exact one. {facts.get('note', '')}\n\n"
        + table(header, rows)
    )


def decode_cpu(facts: dict[str, Any]) -> str:
    """Tokens a second on a CPU."""
    rows = [
        (name, number(speed), " to ".join(number(each) for each in facts["slowest_and_fastest"][name]))
        for name, speed in facts["tokens_per_second"].items()
    ]
    return (
        f"{facts['model']}, one sequence, {facts['tokens']} tokens, linear layers of the blocks as said. "
        f"{facts.get('note', '')}\n\n" + table(("layers", "tokens a second", "slowest to fastest round"), rows)
    )


def triton_tiles(facts: dict[str, Any]) -> str:
    """The Triton kernel's tiles."""
    rows = []
    for row in facts["rows"]:
        (best, tile), chosen = row["ours"][0], row["chosen"]
        shape = f"{row['inputs']}, {row['outputs']}"
        rows.append((shape, row["tokens"], number(row["bf16"]), number(chosen[0]), number(best), tile))
    header = (
        "inputs, outputs",
        "tokens",
        "bfloat16",
        "chosen tile",
        "fastest tile",
        "outputs, tokens, parts, warps, stages",
    )
    return "Microseconds; every tile's result was equal to the exact product.\n\n" + table(header, rows)


def decode(facts: dict[str, Any]) -> str:
    """Whole models: tokens a second, and times faster than bfloat16 of the same run."""
    setting, rows = facts["setting"], []
    bf16 = {row["model"]: row for row in facts["rows"] if row["arm"] == "bf16"}
    batches = list(dict.fromkeys(batch for row in facts["rows"] for batch in row["decode"]))

    def cell(row: dict[str, Any], name: str) -> str:
        found, base = (
            r.get("prefill") if name == "prefill" else r["decode"].get(name) for r in (row, bf16.get(row["model"], row))
        )
        if not found:
            return "–"
        ratio = (
            ""
            if not base or row["arm"] == "bf16" or row["model"] not in bf16
            else (f" ({base['milliseconds'] / found['milliseconds']:.2f} x)")
        )
        return f"{found['tokens_per_second']:.0f}{ratio}"

    for row in facts["rows"]:
        names = ("prefill", *batches)
        model = row["model"] + (f", {row['layers']} blocks" if "layers" in row else "")
        rows.append((model, row["arm"], number(row.get("weights_gb")), *(cell(row, name) for name in names)))
    header = ("model", "layers", "weights, GB", f"prefill of {setting['prefill']}", *(f"batch {b}" for b in batches))
    return (
        "Tokens a second, and how many times more than bfloat16 in the same run. Random weights, CUDA graphs, a static "
        f"cache that holds {setting['context']} tokens when {setting['steps']} more are decoded. "
        f"{facts.get('note', '')}\n\n" + table(header, rows)
    )


def runs(facts: dict[str, Any]) -> str:
    """Every table of runs in a result: a dictionary whose values are runs, each with its perplexity."""
    return "\n".join(_runs(facts.get("models", {}), ()))


def _runs(values: Any, path: tuple[str, ...]) -> Iterator[str]:
    if not isinstance(values, dict) or not values:
        return
    inner = list(values.values())
    if all(isinstance(run, dict) and "perplexity" in run for run in inner):
        keys = dict.fromkeys(key for run in inner for key, value in run.items() if isinstance(value, int | float))
        rows = [(name, *(number(run.get(key), 4) for key in keys)) for name, run in values.items()]
        yield f"{', '.join(path)}:\n\n" + table(("run", *(key.replace("_", " ") for key in keys)), rows)
        return
    if isinstance(values.get("setting"), dict):
        setting = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in values["setting"].items())
        original = values.get("original_perplexity")
        end = f"; original perplexity {number(original, 4)}" if original else ""
        yield f"{', '.join(path)}: {setting}{end}.\n"
    for key, value in values.items():
        yield from _runs(value, path if key == "rows" else (*path, key))


def serving(facts: dict[str, Any]) -> str:
    """A real vLLM: milliseconds, and times faster than bfloat16 of the same run."""
    setting, arms = facts["setting"], facts["arms"]
    batches = list(dict.fromkeys(batch for arm in arms.values() for batch in arm.get("decode_ms", {})))

    def read(arm: dict[str, Any], name: str) -> float | None:
        found = arm.get("prefill_ms") if name == "prefill" else arm.get("decode_ms", {}).get(name)
        return None if found is None else float(found["median"])

    def cell(name: str, column: str) -> str:
        time = read(arms[name], column)
        base = read(arms.get("bf16-compile" if name.endswith("compile") else "bf16", {}), column)
        if time is None:
            return "–"
        return number(time) if base is None or name.startswith("bf16") else f"{number(time)} ({base / time:.2f}x)"

    rows = [(name, *(cell(name, column) for column in ("prefill", *batches))) for name in arms]
    note = f"{facts.get('note', '')}\n\n"
    if not arms:
        checks = {name: found for name, found in facts.items() if name.startswith("check")}
        keys = dict.fromkeys(key for found in checks.values() for key in found)
        cells = [(name, *(str(found.get(key, "–")) for key in keys)) for name, found in checks.items()]
        return note + table(("check", *(key.replace("_", " ") for key in keys)), cells)
    return (
        f"vLLM {facts['machine'].get('vllm', '?')}, {setting['shape']}, random weights: milliseconds of a prefill "
        f"of {setting['prefill']} tokens and of a decode step by batch (after prompts of {setting['prompt']} tokens, "
        f"{setting['tokens']} steps, medians of {setting['repeat']}), and times faster than bfloat16. {note}"
        + table(("arm", "prefill", *(f"batch {batch}" for batch in batches)), rows)
        + _steps(arms)
    )


STEP_GROUPS = {
    "W4A8 products": ("w4a8_gemm",),
    "rounding, norms, silu": ("quantize_tokens", "fused_add_rms_norm", "fused_add_r", "act_and_mul", "per_token_quant"),
    "attention": ("flash", "_attend_pages"),
    "rotary embedding, cache": ("_rotate_into_pages", "rotary_embedding", "reshape_and_cache", "rotary"),
    "other products": ("nvjet", "splitk", "gemm", "marlin"),
}
"""What names of kernels contain; first match."""


def _steps(arms: dict[str, Any]) -> str:
    """Microseconds of an average traced step by group of kernels."""
    rows = []
    for name, arm in arms.items():
        for step, found in arm.get("profile", {}).items():
            if not found:
                continue
            times = dict.fromkeys([*STEP_GROUPS, "other"], 0.0)
            for kernel, (time, _) in found["kernels"].items():
                lower = kernel.lower()
                times[next((g for g, marks in STEP_GROUPS.items() if any(m in lower for m in marks)), "other")] += time
            cells = (number(time) for time in times.values())
            rows.append((name, step, number(found["step_us"]), number(found["idle_us"]), *cells))
    if not rows:
        return ""
    return (
        "\n\nMicroseconds of a traced step (tracing makes the host slower), and what its largest kernels take:\n\n"
        + table(("arm", "step", "all", "GPU idle", *STEP_GROUPS, "other"), rows)
    )


def load_memory(facts: dict[str, Any]) -> str:
    """Memory of a GPU while a checkpoint is loaded."""
    keys = ("weights_gb", "peak_gb", "peak_over_weights", "seconds", "host_peak_gb")
    rows = [(row["model"], row["form"], *(number(row[key]) for key in keys)) for row in facts["rows"]]
    return (
        "Gigabytes on the GPU of a W4A8 checkpoint of random weights, afterwards and at most while it is loaded. "
        f"{facts.get('note', '')}\n\n"
        + table(("model", "scales", "weights, GB", "peak, GB", "peak over weights", "seconds", "host, GB"), rows)
    )


def launch_cost(facts: dict[str, Any]) -> str:
    """Host time of calls that launch nothing."""
    ways = list(next(iter(facts["microseconds"].values())))
    rows = [(name, *(number(found[way]) for way in ways)) for name, found in facts["microseconds"].items()]
    return (
        "Microseconds of the host for a call of an operator whose driver does nothing, beside the same function as a "
        "`torch.library.custom_op`.\n\n" + table(("operator", *ways), rows)
    )


def attention_tiles(facts: dict[str, Any]) -> str:
    """Forms of attention of one token."""
    names = {"bf16": "bfloat16", "int8": "int8", "pages": "bfloat16, in pages"}
    rows = [
        (
            row["batch"], f"{row['kv_heads']} x {row['group']}", names[row["cache"]], number(row["reading"]),
            ", ".join(f"{form_name(form['tiles'])}: {number(form['microseconds'])}" for form in row["forms"]),
        )
        for row in facts["rows"]
    ]  # fmt: skip
    return (
        "Microseconds of a layer's attention of one token to 192 others: reading keys and values at 3 TB/s, and forms "
        "of the kernel by keys of a tile / programs / warps / stages (plain: without tensor cores). "
        f"{facts.get('note', '')}\n\n"
        + table(("sequences", "heads of keys x queries", "cache", "reading", "forms"), rows)
    )


def form_name(tiles: list[Any]) -> str:
    """Of `finescale.kernels.triton_softmax.Tiles`."""
    return "/".join(map(str, tiles[:4])) + (" plain" if tiles[4] else "")


KINDS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "accuracy": ("Accuracy of whole runs", accuracy),
    "layer_errors": ("Layer errors", layer_errors),
    "tuning": ("Learned rounding", runs),
    "activations": ("Activations of few bits", runs),
    "planted": ("Planted outliers", runs),
    "outliers": ("Outliers", docs_solver.outliers),
    "solver": ("Time of the solvers on a CPU", solver_time),
    "solver_gpu": ("Time of the solvers on a GPU", docs_solver.solver_gpu),
    "solver_options": ("Options of QuantEase", docs_solver.solver_options),
    "large_on_gpu": ("A whole large model on a GPU", docs_solver.large_on_gpu),
    "large_on_cpu": ("A large model on a CPU", docs_solver.large_on_cpu),
    "two_gpus": ("Two GPUs", docs_solver.two_gpus),
    "gemm_variants": ("The W4A8 kernel", gemm),
    "gemm": ("The W4A8 product beside others", products),
    "quantize": ("Rounding activations", quantizers),
    "moe": ("Mixtures of experts", mixtures),
    "triton_tiles": ("The Triton kernel", triton_tiles),
    "decode_cpu": ("Decoding on a CPU", decode_cpu),
    "decode": ("Whole models", decode),
    "serving": ("Whole models in vLLM", serving),
    "load_memory": ("Loading a large model", load_memory),
    "launch_cost": ("Host time of a call", launch_cost),
    "attention_tiles": ("Attention of one token", attention_tiles),
}


def benchmark_tables(folder: Path, kinds: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = KINDS) -> str:
    """A section for each result of a known kind, and a list of all files."""
    parts, rows = [], []
    results = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    for kind, (title, render) in kinds.items():
        for name, facts in results.items():
            if _kind(name, facts) == kind:
                source = f"`benchmarks/results/{name}`; {where(facts['machine'])}."
                parts.append(f"## {title}: {name.removesuffix('.json')}\n\n{source}\n\n{render(facts)}")
                parts += [picture(path) for path in sorted(folder.glob(f"{name.removesuffix('.json')}-fig-*.svg"))]
    for name, facts in results.items():
        machine = facts.get("machine") if isinstance(facts, dict) else None
        rows.append((f"`{name}`", where(machine) if isinstance(machine, dict) else "–"))
    parts.append("## All files\n\n" + table(("file", "machine"), rows))
    return "\n".join(parts)


def picture(path: Path) -> str:
    """A plot within the page, which needs no other file then."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{path.stem}" src="data:image/svg+xml;base64,{data}">\n'


def _kind(name: str, facts: Any) -> str:
    if not isinstance(facts, dict) or not isinstance(facts.get("machine"), dict):
        return ""
    return str(facts.get("benchmark") or ("gemm_variants" if name.startswith("gemm-variants") else ""))
