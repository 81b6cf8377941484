"""Six studies with TransformerLens."""

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer


def open_model(path):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    return TransformerBridge.boot_transformers("demo", hf_model=model, tokenizer=tokenizer)


def head_outputs(bridge, prompt):
    with torch.no_grad():
        _, cache = bridge.run_with_cache(bridge.to_tokens(prompt, prepend_bos=False))
    block = bridge.blocks[2].attn
    return torch.einsum("shd,hdm->shm", cache["blocks.2.attn.hook_z"][0], block.W_O)


def ablate_head(bridge, prompt):
    def zero(z, hook):
        z[:, :, 4] = 0
        return z

    tokens = bridge.to_tokens(prompt, prepend_bos=False)
    with torch.no_grad():
        return bridge.run_with_hooks(
            tokens, return_type="loss", fwd_hooks=[("blocks.2.attn.hook_z", zero)]
        )


def patching(bridge, clean, corrupted, target, against):
    tokens, other = (bridge.to_tokens(each, prepend_bos=False) for each in (clean, corrupted))
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens)
        values = torch.zeros(bridge.cfg.n_layers, tokens.shape[1])
        for layer in range(values.shape[0]):
            name = f"blocks.{layer}.hook_in"
            for position in range(values.shape[1]):

                def patch(stream, hook, position=position):
                    stream = stream.clone()
                    stream[:, position] = cache[hook.name][:, position]
                    return stream

                logits = bridge.run_with_hooks(other, fwd_hooks=[(name, patch)])
                values[layer, position] = logits[0, -1, target] - logits[0, -1, against]
    return values


def steering(bridge, prompt, vector):
    def add(stream, hook):
        return stream + vector if stream.shape[1] == 1 else stream

    tokens = bridge.to_tokens(prompt, prepend_bos=False)
    with bridge.hooks(fwd_hooks=[("blocks.2.hook_out", add)]):
        found = bridge.generate(tokens, max_new_tokens=12, do_sample=False, verbose=False)
    return found[0, tokens.shape[1] :]


def decoding_steps(bridge, prompt):
    kept = []

    def keep(stream, hook):
        kept.append(stream[0])

    tokens = bridge.to_tokens(prompt, prepend_bos=False)
    with bridge.hooks(fwd_hooks=[("blocks.2.hook_out", keep)]):
        bridge.generate(tokens, max_new_tokens=8, do_sample=False, verbose=False)
    return torch.cat(kept)


def gradients(bridge, prompt, target):
    kept = {}

    def keep(gradient, hook):
        kept["z"] = gradient[0]

    bridge.add_hook("blocks.2.attn.hook_z", keep, dir="bwd")
    logits = bridge(bridge.to_tokens(prompt, prepend_bos=False))
    logits[0, -1, target].backward()
    bridge.reset_hooks()
    return kept["z"]
