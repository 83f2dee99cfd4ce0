"""Published weights: safetensors folders, and tables of which tensors of theirs hold which parameters.

No family of models may enter: its tables and its config.json are read where its layers are (llm.hf). Nothing
is unpickled.

    folder = SafeFolder(path)                       files.py: the tensors of a folder, read by slices
    folder = dequantised(folder)                    quantised.py: MXFP4 and FP8 as bfloat16
    tensors = file_tensors(rows, shapes)            tables.py: rows of a family's table for one model
    check_tensors(tensors, folder.shapes(), path)   tables.py: missing and unknown tensors, by name
    read_into(module, tensors, folder, mesh)        read.py: each rank reads what it holds; read_some(): a few
    write_folder(contents, fetch, path, ..)          write.py: a folder for others
"""

from parallel.published.files import CONFIG, SafeFolder
from parallel.published.quantised import dequantised
from parallel.published.read import (
    allocate,
    module_shapes,
    module_tensors,
    read_into,
    read_some,
    stored_dtypes,
)
from parallel.published.tables import FileTensor, Row, Shape, check_tensors, file_tensors, parts_by_name
from parallel.published.write import FILE_BYTES, Contents, Fetch, join, new_folder, write_folder

__all__ = [
    "CONFIG",
    "FILE_BYTES",
    "Contents",
    "Fetch",
    "FileTensor",
    "Row",
    "SafeFolder",
    "Shape",
    "allocate",
    "check_tensors",
    "dequantised",
    "file_tensors",
    "join",
    "module_shapes",
    "module_tensors",
    "new_folder",
    "parts_by_name",
    "read_into",
    "read_some",
    "stored_dtypes",
    "write_folder",
]
