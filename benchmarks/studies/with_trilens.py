"""Six studies with trilens."""

import torch

import trilens
from trilens.edits import Ablate, Steer


def open_model(path):
    return trilens.Lens.from_pretrained(path, dtype="float32")


def head_outputs(lens, prompt):
    return lens.capture(prompt, sites=["attn.head_out"]).sites["attn.head_out", 2]


def ablate_head(lens, prompt):
    logits = lens.capture(prompt, edits=Ablate("attn.z", layers=2, heads=4)).logits
    ids = lens.capture(prompt).token_ids
    return torch.nn.functional.cross_entropy(logits[:-1], ids[1:])


def patching(lens, clean, corrupted, target, against):
    return trilens.patch_sweep(
        lens, clean, corrupted, lambda logits: logits[-1, target] - logits[-1, against]
    ).values


def steering(lens, prompt, vector):
    edit = Steer("resid_post", layers=2, vector=vector, positions="generated")
    return lens.generate(prompt, max_new_tokens=12, edits=edit).token_ids


def decoding_steps(lens, prompt):
    return lens.generate(prompt, max_new_tokens=8, capture={"residual": "all"}).capture.residual[2]


def gradients(lens, prompt, target):
    found = lens.gradients(prompt, lambda logits: logits[-1, target], sites=["attn.z"])
    return found.gradients["attn.z", 2]
