"""Tables of the solvers' results: time on a GPU, options, outliers, whole runs of large models."""

from __future__ import annotations

import math
from typing import Any

from tools.docs_text import number, table


def solver_gpu(facts: dict[str, Any]) -> str:
    """Seconds of one layer and of whole models on a GPU."""
    kind = next(kind for kind in ("2xfp16", "3xfp16", "3xtf32") if f"quantease_{kind}_seconds" in facts["rows"][0])
    keys = ("gptq_seconds", "quantease_seconds", f"quantease_{kind}_seconds", f"quantease_gptq10_{kind}_seconds")
    names = ("gptq", "quantease, 30 sweeps, float32", f"the same, {kind}", f"GPTQ and 10 sweeps, {kind}")
    if any(f"quantease_weight_{kind}_seconds" in row for row in facts["rows"]):
        keys, names = (*keys, f"quantease_weight_{kind}_seconds"), (*names, f"30 sweeps from the weight, {kind}")
    rows: list[tuple[Any, ...]] = []
    for row in facts["rows"]:
        gptq = row.get("gptq_seconds")
        rows.append(
            ("x".join(map(str, row["shape"])), *(number(row.get(key)) for key in keys),
             number(row.get("algorithm_2_seconds")),
             f"{number(row.get(f'speedup_over_algorithm_2_{kind}'))} x",
             *(number(row[key] / gptq if gptq and key in row else None)
               for key in (f"quantease_{kind}_seconds", f"quantease_weight_{kind}_seconds")), _objective(row, kind),
             number(row.get("objective_over_gptq")))
        )  # fmt: skip
    header = ("outputs x inputs", *names, "the paper's Algorithm 2", f"{kind} faster by", f"{kind} over gptq",
              "from the weight over gptq", f"objective of {kind} over float32's, less 1", "over gptq's")  # fmt: skip
    models: list[tuple[Any, ...]] = [
        (name, *(number(times.get(key)) for key in keys)) for name, times in facts["models"].items()
    ]
    estimated = "".join(f"* {name}, estimated: {e['arithmetic']}\n" for name, e in facts.get("estimates", {}).items())
    sums = "".join(
        f"* {name}: {terms}\n"
        for name, times in facts["models"].items()
        for key, terms in times.get("arithmetic", {}).items()
        if key == "operations" or (key in keys and kind in key)
    )
    return (
        f"Seconds per layer. {facts.get('note', '')} Algorithm 2 is timed on a part of the columns, large layers on a "
        "part of their rows.\n\n"
        + table(header, rows)
        + "\nSeconds of the solver for all layers of a model, put together from the layers above:\n\n"
        + table(("model", *names), models)
        + (
            f"\nThe sums, with {kind} from GPTQ, from the weight, and with 10 sweeps from GPTQ:\n\n{sums}"
            if sums
            else ""
        )
        + estimated
    )


def _objective(row: dict[str, Any], kind: str) -> str:
    """How far products of parts move the objective, with the standard error that ties at rounding bring."""
    found = row.get("objectives_of_more_rows", row.get("objectives"))
    if found is None:
        return f"{row[f'quantease_{kind}_objective'] / row['quantease_objective'] - 1:+.1e}"
    one = found[kind]
    return f"{one['over_float32'] - 1:+.1e} ± {one['noise']:.0e} ({one['rows']} rows)"


def solver_options(facts: dict[str, Any]) -> str:
    """Layer errors by option, over those of the recipe."""
    parts = []
    for scheme, found in facts["schemes"].items():
        bits, _, group = scheme.partition(":")
        rows = [
            (label, f"{row['median']:.4f}", f"{row['largest']:.4f}", f"{row['lower']} of {len(facts['layers'])}")
            for label, row in found["summary"].items()
        ]
        groups = "per channel" if group == "-1" else f"groups of {group}, symmetric"
        parts.append(
            f"{facts['model']}, {bits} bits, {groups}; errors over those of {facts['base']}:\n\n"
            + table(("", "median", "largest", "lower on"), rows)
        )
    return "\n".join(parts)


def outliers(facts: dict[str, Any]) -> str:
    """Perplexity and KL with and without outliers, and what is asked of them."""
    names = list(dict.fromkeys(name for rows in facts["means"].values() for name in rows))
    rows = [
        (
            name,
            *(
                f"{row['perplexity']:.2f}, {1000 * row['kl']:.1f} ({row['bits_per_weight']:.2f})" if row else "–"
                for row in (rows.get(name) for rows in facts["means"].values())
            ),
        )
        for name in names
    ]
    checks = list(dict.fromkeys(name for found in facts["judgement"].values() for name in found))
    asked = [
        (name.replace("_", " "), *(_judged(found.get(name)) for found in facts["judgement"].values()))
        for name in checks
    ]
    return (
        "Perplexity, 1000 times the KL divergence from the original, and stored bits per weight in parentheses; means "
        "over the choices of calibration windows (seeds).\n\n"
        + table(("run", *facts["means"]), rows)
        + "\nWhat is asked, by how much lower or higher the first run's perplexity or KL is than the other's, the "
        "geometric mean over the seeds with its standard error; way: share of the way from the original to plain (the "
        "smaller the better).\n\n"
        + table(("", *facts["judgement"]), asked)
    )  # fmt: skip


def _judged(value: Any) -> str:
    if isinstance(value, dict):
        ratio = math.exp(value["difference"])  # differences are of logarithms
        error = "" if value["error"] is None else f" ± {ratio * value['error']:.1%}"
        return f"{'yes' if value['holds'] else 'no'}, {ratio - 1:+.1%}{error}"
    return "–" if value is None else f"{value:.0%}"


def large_on_gpu(facts: dict[str, Any]) -> str:
    """A whole run of a large model on a GPU."""
    whole, killed = facts["whole"], facts.get("killed", {})
    rows = [
        ("parameters", number(facts["parameters"])),
        ("calibration", f"{facts['samples']} x {facts['length']} tokens"),
        ("seconds of the command", number(whole["seconds"])),
        *((f"seconds, {phase}", number(seconds)) for phase, seconds in whole["phases"].items() if seconds),
        ("peak memory of the GPU, GB", number((whole["peak_gpu_bytes"] or 0) / 1e9)),
        ("peak memory of the host, GB", number(whole["peak_host_bytes"] / 1e9)),
        ("bits per weight", number(whole["bits_per_weight"])),
    ]
    if killed:
        text = "the same bytes" if killed["same_bytes"] else "other bytes"
        rows.append(
            (
                f"killed after {killed['blocks_done_when_killed']} of {killed.get('blocks', 4)} blocks, started anew",
                text,
            )
        )
    return f"A model of the shape of {facts['shape']}, random weights.\n\n" + table(("", ""), rows)


def large_on_cpu(facts: dict[str, Any]) -> str:
    """Peak memory of a large model on a CPU."""
    rows = [(name, number(run["peak_rss_bytes"] / 1e9), number(run["seconds"])) for name, run in facts["runs"].items()]
    return f"{facts['parameters'] / 1e9:.2f} billion parameters, the first blocks. {facts.get('note', '')}\n\n" + table(
        ("recipe", "peak memory, GB", "seconds"), rows
    )


def two_gpus(facts: dict[str, Any]) -> str:
    """Two processes beside one."""
    runs = facts["deterministic"]
    same = ", ".join(f"{'the same' if run.get('same_bytes') else 'other'} bytes ({name})" for name, run in runs.items())
    opening = f"With --deterministic one and two processes wrote {same}."
    if not facts.get("rows"):
        return f"{opening} The speed was not measured.\n"
    rows = [
        (row["model"], row["solver"], number(row["seconds_one"]), number(row["seconds_two"]), f"{row['speedup']:.2f} x",
         ", ".join(_shared(of_stack) for of_stack in row["shares"]))
        for row in facts["rows"]
    ]  # fmt: skip
    header = ("model", "solver", "one, seconds", "two, seconds", "faster", "layers of the first + of the second, rows")
    return f"{opening} Layers of one input are one matrix.\n\n" + table(header, rows)


def _shared(stack: dict[str, Any]) -> str:
    """Outputs x inputs, and the rows of each process."""
    return f"{'x'.join(map(str, stack['shape']))}: {' + '.join(map(str, stack['rows']))}"
