"""The logit lens: when does each layer settle on the next token?"""

# %% A prompt and what follows it
import trilens

lens = trilens.Lens.from_pretrained(trilens.demo_path("transformer"), dtype="float32")
PROMPT = "def total(price, tax):\n    return price +"
cap = lens.capture(PROMPT)
target = int(cap.logits[-1].argmax())
print("follows:", repr(lens.tokenizer.decode([target])))

# %% Each layer's residual stream through the final norm and the unembedding
found = trilens.logit_lens(cap, lens, k=3, target=target)
for row in found.table():
    if row["position"] == len(cap.tokens) - 1:
        rank, probability = row["target_rank"], row["target_probability"]
        print(f"layer {row['layer']}: {row['top_token']!r}; target {probability:.2f}, rank {rank}")

# %% Translated by an affine map per layer, fitted on other text
NAMES = ["first", "left", "name", "value", "text", "line"]
texts = [f"def {a}_{b}({a}, {b}):\n    return {a} + {b}\n" for a in NAMES for b in NAMES]
captures = lens.capture_many(texts, batch_size=8, residual="all", logits=None)
tuned = trilens.tuned_lens(captures, ridge=1e-2)
for layer, after, before in zip(
    tuned.layers, tuned.held_out_errors, tuned.untranslated_errors, strict=True
):
    print(f"layer {layer}: squared error {before:.2f} untranslated, {after:.2f} translated")
