from .formats import FORMATS as FORMATS
from .formats import find_format as find_format
from .report import GgufReport as GgufReport
from .report import GgufTensor as GgufTensor
from .validation import validate_gguf as validate_gguf
