"""Steering: the difference of two sets of prompts, added while text is generated."""

# %% A direction from Python to English
import trilens
from trilens.edits import Steer

lens = trilens.Lens.from_pretrained(trilens.demo_path("transformer"), dtype="float32")
ENGLISH = [
    "The people of the town",
    "It was the right of",
    "In the case of a",
    "There is no one who",
]
PYTHON = ["    def __init__(self,", "import os\nimport", "    return self.", "for i in range("]
LAYER = 2
english = lens.stack(ENGLISH, layers=[LAYER], position="mean")[:, 0]
python = lens.stack(PYTHON, layers=[LAYER], position="mean")[:, 0]
vector = english.mean(0) - python.mean(0)

# %% What becomes of a line of Python
PROMPT = "    def get(self"
for scale in (0.0, 1.0, 2.0, 4.0):
    edit = Steer("resid_post", layers=LAYER, vector=vector, scale=scale, positions="generated")
    text = lens.generate(PROMPT, max_new_tokens=24, edits=edit).text
    print(f"{scale:g}: {text!r}")
