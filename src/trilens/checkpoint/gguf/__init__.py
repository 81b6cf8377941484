"""GGUF files: written from checkpoints, checked, for the engines that read them.

`families` and `settings` say which architectures an engine knows and what it is told about them,
`tokenizer` what becomes of the vocabulary, `source` where weights come from, `writer` and `reader`
how a file is written and read back.
"""

from trilens.checkpoint.gguf.formats import FORMATS, find_format
from trilens.checkpoint.gguf.report import GgufReport, GgufTensor
from trilens.checkpoint.gguf.validation import validate_gguf

__all__ = ["FORMATS", "GgufReport", "GgufTensor", "find_format", "validate_gguf"]
