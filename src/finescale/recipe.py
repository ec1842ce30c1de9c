"""What to do to a model, declared: strict (unknown keys are errors), in YAML, each published setting by name."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from finescale.errors import InputError
from finescale.formats.source import read_utf8
from finescale.grid import ActivationScheme, WeightScheme, number_of_groups
from finescale.grid.folded import FOLDED_BITS
from finescale.grid.integer_scale import Amplifier, check_amplifier
from finescale.recipes import recipe_names, recipe_text
from finescale.solvers import SolverEntry, SolverOptions, find_solver
from finescale.transforms import TransformEntry, TransformOptions, find_transform
from finescale.tuning import LowRankOptions, ReconstructionOptions, TunerEntry, find_tuner

STANDARD_GROUPS = (128, 64, 32)
"""Group sizes that engines have kernels for, best first."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class WeightsPart(_Part):
    """``group_size: auto`` is the largest standard group (128, 64, 32) that divides the inputs of every layer; ``clip:
    signed`` searches the range as ``mse`` does, and lets scales be negative."""

    bits: int = 4
    group_size: int | Literal["auto"] = -1
    symmetric: bool = False
    clip: Literal["minmax", "mse", "signed"] = "minmax"

    @model_validator(mode="after")
    def _check(self) -> WeightsPart:
        self.scheme(-1 if self.group_size == "auto" else self.group_size)
        return self

    def scheme(self, group_size: int) -> WeightScheme:
        return WeightScheme(self.bits, group_size, self.symmetric, self.clip)


class ActivationsPart(_Part):
    """Inputs of the quantized layers; leave the part out for 16-bit activations. ``granularity: tensor`` has one scale
    per layer, fixed by calibration (``dynamic: false``)."""

    bits: int = 8
    granularity: Literal["token", "tensor"] = "token"
    dynamic: bool = True
    symmetric: bool = True

    @model_validator(mode="after")
    def _check(self) -> ActivationsPart:
        self.scheme()
        return self

    def scheme(self) -> ActivationScheme:
        return ActivationScheme(self.bits, self.granularity, self.dynamic, self.symmetric)


class KvCachePart(_Part):
    """Keys (after the rotary embedding) and values, rounded per token and head, simulated; ``queries`` rounds the
    queries the same way, as QLLM does; ``rotate`` rotates queries and keys before, as QuaRot does."""

    bits: int = 8
    symmetric: bool = False
    queries: bool = False
    rotate: bool = False

    @model_validator(mode="after")
    def _check(self) -> KvCachePart:
        if self.bits not in (4, 6, 8):
            raise ValueError(f"kv_cache.bits is {self.bits}; choose one of 4, 6, 8")
        return self


class IntegerScalePart(_Part):
    """``before``: scales are integers when the solver runs; ``after``: they are rounded after it, as in the paper;
    ``folded``: before the solver, integers from 1 to 15 times one float factor per output, which a kernel multiplies
    into the weights (no amplifier)."""

    mode: Literal["off", "before", "after", "folded"] = "off"
    amplifier: Amplifier = "auto"

    @field_validator("mode", mode="before")
    @classmethod
    def _read_off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML's word for false

    @field_validator("amplifier")
    @classmethod
    def _check(cls, value: Amplifier) -> Amplifier:
        if isinstance(value, int):
            check_amplifier(value)
        return value

    @model_validator(mode="after")
    def _check_mode(self) -> IntegerScalePart:
        if self.mode == "folded" and self.amplifier != "auto":
            raise ValueError("integer_scale.mode folded has no amplifier; leave integer_scale.amplifier out")
        return self


class SolverPart(BaseModel):
    """The solver's name; all other keys are its options."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = "quantease"

    @model_validator(mode="after")
    def _check(self) -> SolverPart:
        self.options()
        return self

    def entry(self) -> SolverEntry:
        return find_solver(self.name)

    def options(self) -> SolverOptions:
        return self.entry().options(**(self.model_extra or {}))


class _NamedPart(_Part):
    """A method with its options, or its name alone."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class TransformPart(_NamedPart):
    """One rewrite of each block before it is solved: ``{name: smoothquant, options: {alpha: 0.5}}``, or its name."""

    @model_validator(mode="after")
    def _check(self) -> TransformPart:
        self.options_model()
        return self

    def entry(self) -> TransformEntry:
        return find_transform(self.name)

    def options_model(self) -> TransformOptions:
        return self.entry().options(**self.options)


class TuningPart(_NamedPart):
    """One correction of each block by gradients: ``{name: rounding, options: {iterations: 128}}``, or its name."""

    @model_validator(mode="after")
    def _check(self) -> TuningPart:
        self.options_model()
        return self

    def entry(self) -> TunerEntry:
        return find_tuner(self.name)

    def options_model(self) -> ReconstructionOptions:
        return self.entry().options(**self.options)


class CalibrationPart(_Part):
    """Text is cut into ``samples`` windows of ``length`` tokens; ``true_sequential`` solves a block's layers in order
    of execution, each seeing the ones before it already quantized; ``quantized_activations`` lets later blocks see
    inputs that were rounded as at run time. ``sequential: false`` solves every block on the original's activations
    instead of those of the quantized blocks before it: many runs can then share their statistics, and errors of
    earlier blocks are not made up for. ``power`` below 1 gives solvers H^power, in which directions of large inputs
    count less."""

    samples: int = Field(default=128, ge=1)
    length: int = Field(default=2048, ge=8)
    batch_size: int = Field(default=8, ge=1)
    true_sequential: bool = False
    quantized_activations: bool = True
    sequential: bool = True
    power: float = Field(default=1.0, gt=0.0, le=1.0)

    @model_validator(mode="after")
    def _check(self) -> CalibrationPart:
        if self.true_sequential and not self.sequential:
            raise ValueError("calibration.true_sequential needs calibration.sequential")
        return self


class Override(_Part):
    """Layers whose full name matches ``pattern`` (shell style, or ``re:`` and a regular expression) get other weights
    or activations (``activations: {bits: 16}`` leaves them in floating point), or none (``skip``)."""

    pattern: str
    skip: bool = False
    weights: dict[str, Any] = Field(default_factory=dict)
    activations: dict[str, Any] = Field(default_factory=dict)

    @field_validator("pattern")
    @classmethod
    def _check(cls, value: str) -> str:
        if value.startswith("re:"):
            try:
                re.compile(value[3:])
            except re.error as error:
                raise ValueError(f"{value} is not a regular expression ({error})") from error
        return value

    def matches(self, name: str) -> bool:
        if self.pattern.startswith("re:"):
            return re.search(self.pattern[3:], name) is not None
        return fnmatch.fnmatchcase(name, self.pattern)


class Recipe(_Part):
    """A whole recipe. ``Recipe.named("w4a8-integer-scale")`` or ``Recipe.from_file(path)`` make one.

    ``blocks``: quantize only so many of the first blocks; the others stay as they are.
    """

    name: str = "custom"
    description: str = ""
    weights: WeightsPart = WeightsPart()
    activations: ActivationsPart | None = None
    kv_cache: KvCachePart | None = None
    integer_scale: IntegerScalePart = IntegerScalePart()
    solver: SolverPart = SolverPart()
    transforms: tuple[TransformPart, ...] = ()
    tuning: tuple[TuningPart, ...] = ()
    calibration: CalibrationPart = CalibrationPart()
    overrides: tuple[Override, ...] = ()
    blocks: int | None = Field(default=None, ge=1)
    format: str = "compressed-tensors"

    @field_validator("tuning", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return () if value is None else [value] if isinstance(value, str | dict) else value

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        for part in self.transforms[:-1]:
            if part.entry().last:
                raise ValueError(f"transforms: {part.name} must come last")
        for part in self.transforms[1:]:
            if part.entry().prepare is not None:
                raise ValueError(f"transforms: {part.name} must come first")
        for tuner in self.tuning[:-1]:
            if tuner.entry().after_solver:
                raise ValueError(f"tuning: {tuner.name} must come last")
        self._check_groups_of_blocks()
        if self.tuning and self.solver.options().keeps_outliers:
            raise ValueError("tuning moves codes only; set solver.outliers 0")
        if self.tuning and not getattr(self.solver.options(), "static_groups", True):
            raise ValueError("tuning needs groups of consecutive columns; set solver.static_groups true")
        if not self.calibration.sequential and (self.transforms or self.tuning):
            raise ValueError("calibration.sequential false is for recipes without transforms and tuning")
        if self.calibration.power != 1 and not self.solver.entry().needs_hessian:
            raise ValueError(
                f"calibration.power is for solvers that take second moments; leave it out with {self.solver.name}"
            )
        if self.blocks is not None and self.transforms:
            raise ValueError("blocks: transforms rewrite all blocks, so that all must be quantized")
        if self.integer_scale.mode != "off":
            if not self.weights.symmetric:
                raise ValueError("integer_scale needs weights.symmetric true")
            if self.weights.clip == "signed":
                raise ValueError("integer_scale needs scales above zero; set weights.clip mse")
            if self.activations is None:
                raise ValueError("integer_scale needs activations.bits (8 for W4A8)")
            if self.solver.options().keeps_outliers:
                raise ValueError("integer_scale has no outliers; set solver.outliers 0")
            if not self.activations.symmetric:
                raise ValueError("integer_scale needs activations.symmetric true")
            if self.integer_scale.mode == "folded" and self.solver.options().moves_scales:
                raise ValueError("integer_scale.mode folded needs solver.static_groups true and no solver.refits")
        self._check_solver(self.weights)
        self._check_folded(self.weights)
        for override in self.overrides:
            activations, weights = self.activations_for_override(override), self.weights_for_override(override)
            if override.skip:
                continue
            where = f", also in the override of {override.pattern}"
            if self.integer_scale.mode != "off":
                if weights.clip == "signed":
                    raise ValueError(f"integer_scale needs clip mse{where}")
                if not weights.symmetric:
                    raise ValueError(f"integer_scale needs symmetric weights{where}")
                if activations is not None and not activations.symmetric:
                    raise ValueError(f"integer_scale needs symmetric activations{where}")
            self._check_solver(weights)
            self._check_folded(weights, where)
        return self

    def _check_groups_of_blocks(self) -> None:
        options = [part.options_model() for part in self.tuning]
        counts = {int(chosen.blocks) for chosen in options if isinstance(chosen, LowRankOptions)}
        if len(counts) > 1:
            raise ValueError("tuning: every low_rank needs the same blocks")
        if max(counts, default=1) > 1 and any(chosen.target == "quantized" for chosen in options):
            raise ValueError("tuning: target quantized is of one block's; set blocks 1 of low_rank")

    def _check_folded(self, weights: WeightsPart, where: str = "") -> None:
        if self.integer_scale.mode == "folded" and weights.bits > FOLDED_BITS:
            raise ValueError(f"integer_scale.mode folded needs weights of at most {FOLDED_BITS} bits{where}")

    def _check_solver(self, weights: WeightsPart) -> None:
        if weights.group_size != "auto":
            self.solver.options().check_scheme(weights.scheme(weights.group_size))

    def weights_for_override(self, override: Override) -> WeightsPart:
        return WeightsPart.model_validate(self.weights.model_dump() | override.weights)

    def activations_for_override(self, override: Override) -> ActivationScheme | None:
        if override.activations.get("bits") == 16:
            return None
        base = self.activations.model_dump() if self.activations else {}
        part = base | override.activations
        return ActivationsPart.model_validate(part).scheme() if part else None

    def activations_of(self, layer: str) -> ActivationScheme | None:
        """How the input of a layer is rounded, by its full name; None: not at all. The last match wins."""
        for override in reversed(self.overrides):
            if override.matches(layer):
                return self.activations_for_override(override)
        return self.activations.scheme() if self.activations else None

    def weights_of(self, layer: str) -> WeightsPart | None:
        """The weights part that holds for a layer by its full name; None: it stays as it is. The last match wins."""
        for override in reversed(self.overrides):
            if override.matches(layer):
                return None if override.skip else self.weights_for_override(override)
        return self.weights

    def to_dict(self) -> dict[str, Any]:
        """Plain values, all defaults and solver options written out."""
        dump = self.model_dump(mode="json")
        if dump["blocks"] is None:
            del dump["blocks"]
        if dump["calibration"]["power"] == 1:
            del dump["calibration"]["power"]
        dump["solver"] = {"name": self.solver.name, **self.solver.options().model_dump(mode="json")}
        dump["transforms"] = [
            {"name": part.name, "options": part.options_model().model_dump(mode="json")} for part in self.transforms
        ]
        dump["tuning"] = [
            {"name": part.name, "options": part.options_model().model_dump(mode="json")} for part in self.tuning
        ]
        return dump

    @classmethod
    def from_dict(cls, values: dict[str, Any], origin: str = "recipe") -> Recipe:
        """Raises InputError that names each key that is unknown or has a value that cannot work."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise InputError(f"{origin}: {_explain(error)}") from error

    @classmethod
    def from_file(cls, path: Path) -> Recipe:
        """A recipe from a YAML file."""
        return cls.from_dict({"name": path.stem} | _read_yaml(read_utf8(path), str(path)), str(path))

    @classmethod
    def named(cls, name: str) -> Recipe:
        """A recipe that comes with finescale. Raises InputError with the choices."""
        names = recipe_names()
        if name not in names:
            raise InputError(f"no recipe {name!r}; choose one of {', '.join(names)}, or give a YAML file.")
        return cls.from_dict({"name": name} | _read_yaml(recipe_text(name), name), name)

    @classmethod
    def load(cls, name_or_file: str | Path, settings: tuple[str, ...] = ()) -> Recipe:
        """A named recipe or a YAML file, with ``key=value`` settings laid over it (dots descend into parts).

        Raises:
            InputError: no such recipe or file, unknown keys, or values that cannot work.
        """
        path = Path(name_or_file)
        if path.suffix in (".yaml", ".yml"):
            if not path.is_file():
                raise InputError(f"the recipe file {path} does not exist; check the path.")
            recipe = cls.from_file(path)
        else:
            recipe = cls.named(str(name_or_file))
        return recipe.with_settings(settings)

    def with_settings(self, settings: tuple[str, ...]) -> Recipe:
        """This recipe with ``key=value`` settings, values in YAML: ``weights.bits=3``, ``solver.name=gptq``.

        Raises:
            InputError: a setting of another form, unknown keys, or values that cannot work.
        """
        if not settings:
            return self
        values = self.model_dump(mode="json", exclude_unset=True) | {"name": self.name}
        for setting in settings:
            key, equals, text = setting.partition("=")
            if not equals or not key:
                raise InputError(f"--set {setting}: write it as key=value, for instance weights.bits=3.")
            try:
                value = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise InputError(f"--set {setting}: the value is not valid YAML; put it in quotes.") from error
            _set(values, key.split("."), value, setting)
        return self.from_dict(values, "--set " + " --set ".join(settings))


def _set(values: dict[str, Any], path: list[str], value: Any, setting: str) -> None:
    if path == ["solver", "name"]:
        solver = values.get("solver")
        if not isinstance(solver, dict) or solver.get("name") != value:
            # Options belong to a solver: those of another one mean nothing here.
            values["solver"] = {"name": value}
        return
    for part in path[:-1]:
        inner = values.get(part)
        if inner is None:
            inner = values[part] = {}
        elif part == "tuning":
            inner = values[part] = _only_tuner(inner)
        if not isinstance(inner, dict):
            raise InputError(f"--set {setting}: {part} has no parts.")
        values = inner
    values[path[-1]] = value


def _only_tuner(value: Any) -> Any:
    """A single tuner's name and options, however it was written; several stay a list."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return {"name": value} if isinstance(value, str) else value


def _read_yaml(text: str, origin: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text) or {}
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{origin} is not valid YAML ({str(error).splitlines()[0]}).") from error
    if not isinstance(values, dict):
        raise InputError(f"{origin} must hold keys and values, such as weights: {{bits: 4}}.")
    return values


def _explain(error: ValidationError) -> str:
    parts = []
    for entry in error.errors():
        key = ".".join(str(part) for part in entry["loc"]) or "recipe"
        if entry["type"] == "extra_forbidden":
            parts.append(f"unknown key {key}")
        else:
            parts.append(f"{key}: {entry['msg'].removeprefix('Value error, ')}")
    return "; ".join(dict.fromkeys(parts)) + "."


def resolve_group_size(columns: list[int]) -> int | None:
    """The largest standard group that divides all of these input widths; None when none does."""
    return next((size for size in STANDARD_GROUPS if all(width % size == 0 for width in columns)), None)


def is_ragged(columns: int, group_size: int) -> bool:
    """Whether the last group is shorter than the others."""
    return group_size != -1 and number_of_groups(columns, group_size) * group_size != columns
