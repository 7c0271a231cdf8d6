"""Training data: JSONL lines, encoded with their loss weights, packed into rows, with a position that can be resumed."""

from qwen35_jax.train.data.bad_lines import BadLines
from qwen35_jax.train.data.batches import TrainData, make_data
from qwen35_jax.train.data.examples import EncodeOptions, Example, ExampleEncoder, encode_example
from qwen35_jax.train.data.lines import JsonLines, Line, parse_line
from qwen35_jax.train.data.packing import Document, Rows
from qwen35_jax.train.data.pictures import PatchShape, PictureReader, Pictures

__all__ = [
    "BadLines",
    "Document",
    "EncodeOptions",
    "Example",
    "ExampleEncoder",
    "JsonLines",
    "Line",
    "PatchShape",
    "PictureReader",
    "Pictures",
    "Rows",
    "TrainData",
    "encode_example",
    "make_data",
    "parse_line",
]
