"""GGUF files: written from checkpoints, checked, for the engines that read them.

`families` and `settings` say which architectures an engine knows and what it is told about them,
`tokenizer` what becomes of the vocabulary, `source` where weights come from, `writer` and `reader`
how a file is written and read back.
"""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
