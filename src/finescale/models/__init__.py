"""What must be known of a model family: its blocks, its linears, its experts, and their names in the checkpoint."""

from finescale.models.families import FAMILIES, Family, find_family
from finescale.models.graph import Step, trace_steps
from finescale.models.skeleton import Skeleton, linear_modules, open_skeleton

__all__ = ["FAMILIES", "Family", "Skeleton", "Step", "find_family", "linear_modules", "open_skeleton", "trace_steps"]
