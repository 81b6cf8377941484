"""trilens opens a language model: the residual stream, the attention, the gates.

import trilens

lens = trilens.Lens.from_pretrained("path/or/hub-id")
cap = lens.capture("The capital of France is", attention=True, gates=True)
cap.attention.top_attended_positions(layer=3, from_position=-1, k=5)

Names are imported when they are used; `__init__.pyi` lists them.
"""

from lazy_loader import attach_stub

from trilens.registration import register

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)

register()
