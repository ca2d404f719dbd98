"""The published path of `auto_circuit.engine.patch_wrapper`."""

from auto_circuit.engine.patch_wrapper import GONE_ATTRIBUTES as GONE_ATTRIBUTES
from auto_circuit.engine.patch_wrapper import MaskWeights as MaskWeights
from auto_circuit.engine.patch_wrapper import PatchWrapperImpl as PatchWrapperImpl
from auto_circuit.gates import sample_hard_concrete as sample_hard_concrete
from auto_circuit.types import MaskFn as MaskFn
from auto_circuit.types import PatchWrapper as PatchWrapper
