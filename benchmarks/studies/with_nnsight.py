"""Six studies with nnsight."""

import torch
from nnsight import LanguageModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def open_model(path):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return LanguageModel(model, tokenizer=AutoTokenizer.from_pretrained(path))


def head_outputs(model, prompt):
    with torch.no_grad(), model.trace(prompt):
        z = model.model.layers[2].self_attn.o_proj.input.save()
    heads = model.config.num_attention_heads
    weight = model.model.layers[2].self_attn.o_proj.weight.T.reshape(heads, -1, z.shape[-1])
    return torch.einsum("shd,hdm->shm", z[0].reshape(z.shape[1], heads, -1), weight)


def ablate_head(model, prompt):
    ids = model.tokenizer(prompt, return_tensors="pt").input_ids
    width = model.config.hidden_size // model.config.num_attention_heads
    with torch.no_grad(), model.trace(prompt):
        z = model.model.layers[2].self_attn.o_proj.input.clone()
        z[:, :, 4 * width : 5 * width] = 0
        model.model.layers[2].self_attn.o_proj.input = z
        logits = model.lm_head.output.save()
    return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])


def patching(model, clean, corrupted, target, against):
    n, layers = len(model.tokenizer(clean).input_ids), model.config.num_hidden_layers
    with torch.no_grad(), model.trace(clean):
        streams = list().save()  # noqa: C408
        for layer in range(layers):
            streams.append(model.model.layers[layer].input)
    values = torch.zeros(layers, n)
    for layer in range(layers):
        for position in range(n):
            with torch.no_grad(), model.trace(corrupted):
                stream = model.model.layers[layer].input.clone()
                stream[:, position] = streams[layer][:, position]
                model.model.layers[layer].input = stream
                logits = model.lm_head.output.save()
            values[layer, position] = logits[0, -1, target] - logits[0, -1, against]
    return values


def steering(model, prompt, vector):
    with model.generate(prompt, max_new_tokens=12, do_sample=False) as tracer:
        found = list().save()  # noqa: C408
        for step in tracer.iter[:]:
            if step > 0:
                model.model.layers[2].output = model.model.layers[2].output + vector
            found.append(model.lm_head.output[0, -1].argmax())
    return torch.stack(found)


def decoding_steps(model, prompt):
    with model.generate(prompt, max_new_tokens=8, do_sample=False) as tracer:
        kept = list().save()  # noqa: C408
        with tracer.iter[:]:
            kept.append(model.model.layers[2].output)
    return torch.cat([each.reshape(-1, each.shape[-1]) for each in kept])


def gradients(model, prompt, target):
    with model.trace(prompt):
        z = model.model.layers[2].self_attn.o_proj.input
        z.requires_grad_(True)
        logits = model.lm_head.output
        with logits[0, -1, target].backward():
            gradient = z.grad.save()
    heads = model.config.num_attention_heads
    return gradient[0].reshape(gradient.shape[1], heads, -1)
