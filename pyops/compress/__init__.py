"""One way in for any model: prepare it by a recipe, train it, convert it to a small fast one, save and load that."""

from tersor.compress.artefact import Artefact, ArtefactError, load, read, save
from tersor.compress.convert import convert_
from tersor.compress.layers import CompressedConv2d, CompressedLinear
from tersor.compress.package import compile_package, load_package
from tersor.compress.packed_layers import PackedCompressedConv2d, PackedCompressedLinear
from tersor.compress.prepare import Compression, calibrate_, parameter_groups, prepare_, step
from tersor.compress.recipe import Recipe, Rule
from tersor.compress.report import Report, Row, report
from tersor.compress.sources import ModelSource, first_tensor
from tersor.compress.transforms import Binarize, FakeQuantize, Freeze, NMSparse, WindowAttentionByIndex

__all__ = [
    "Artefact",
    "ArtefactError",
    "Binarize",
    "CompressedConv2d",
    "CompressedLinear",
    "Compression",
    "FakeQuantize",
    "Freeze",
    "ModelSource",
    "NMSparse",
    "PackedCompressedConv2d",
    "PackedCompressedLinear",
    "Recipe",
    "Report",
    "Row",
    "Rule",
    "WindowAttentionByIndex",
    "calibrate_",
    "compile_package",
    "convert_",
    "first_tensor",
    "load",
    "load_package",
    "parameter_groups",
    "prepare_",
    "read",
    "report",
    "save",
    "step",
]
