"""trilens opens a language model: the residual stream, the attention, the gates.

import trilens

lens = trilens.Lens.from_pretrained("path/or/hub-id")
cap = lens.capture("The capital of France is", attention=True, gates=True)
cap.attention.top_attended_positions(layer=3, from_position=-1, k=5)

Names are imported when they are used; `__init__.pyi` lists them.
"""

from trilens.cli.interrupts import end_when_interrupted

end_when_interrupted()  # the imports below are most of the command's start

from lazy_loader import attach_stub  # noqa: E402

from trilens.registration import register  # noqa: E402
from trilens.report.registration import register_views  # noqa: E402

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)

register()
register_views()
