from .comparison.result import Comparison as Comparison
from .comparison.result import NamedArray as NamedArray
from .comparison.rows import Row as Row
from .comparison.run import CompareOptions as CompareOptions
from .comparison.run import compare as compare
from .inspection import Inspection as Inspection
from .inspection import inspect_capture as inspect_capture
