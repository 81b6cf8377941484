"""What is unusual about a type, for whoever reads a sweep; the other types behave like Llama."""

from __future__ import annotations

SLOW: dict[str, str] = {}
"""Types that need more than three seconds to build or to run; none does at these sizes."""

_TEXT_CONFIG = "AutoModelForCausalLM builds the text class: model.config is the nested text config."
_ASSISTANT = (
    "Takes no ids: inputs_embeds of 2 x backbone_hidden_size and the assisted model's "
    "shared_kv_states; attends both ways. A config as released, all layers sharing, raises "
    "'ValueError: The set of layer types producing a cache is different than the set of layer "
    "types using them' in transformers 5.23, so only the last two layers share here."
)
_MUSICGEN = (
    "MusicgenForCausalLM only takes config.decoder (from_config on the whole config raises "
    "\"AttributeError: 'MusicgenConfig' object has no attribute 'dropout'\"); ids are one row per "
    "codebook, and so are the logits."
)
_KV_SHARED = (
    "Layers that share keys and values see only the positions of logits_to_keep where that is a "
    "positive int, as in generate."
)
_HYPER = "Several residual streams: "

NOTES: dict[str, str] = {
    "big_bird": (
        "Block-sparse attention (the default) has no causal mask, is_decoder or not; a prompt of "
        "28 tokens or fewer turns the model to full, causal attention for good."
    ),
    "bigbird_pegasus": "Block-sparse attention is the encoder's; the decoder attends fully.",
    "blt": (
        "Byte patches: patcher, local encoder, global transformer (one position per patch, as many "
        "as the patcher's entropies ask for) and local decoder each have layers of their own."
    ),
    "cpmant": (
        "Attends both ways over the prompt; prompt_length (4) learned positions precede the tokens "
        "in every layer and are cut off the logits."
    ),
    "deepseek_v4": _HYPER + "layers pass [batch, length, 4, width].",
    "diffllama": "Each attention module calls the attention function twice.",
    "dots3_note": _TEXT_CONFIG,
    "emu3": _TEXT_CONFIG,
    "gemma3n": (
        _HYPER + "layers pass [4, batch, length, width]. The vision tower, which text never "
        "reaches, is a tiny Siglip: the family's own raises ImportError without timm and PIL. So "
        "the config cannot be saved and loaded again."
    ),
    "gemma3n_text": _HYPER + "layers pass [4, batch, length, width].",
    "gemma4": _KV_SHARED,
    "gemma4_assistant": _ASSISTANT,
    "gemma4_unified": _KV_SHARED,
    "gemma4_unified_assistant": _ASSISTANT,
    "gpt-sw3": "The same class and config as gpt2, which is also its config's model_type.",
    "hrm_text": (
        "Two stacks of layers, each run several times over; num_hidden_layers counts the runs."
    ),
    "hy_v4": _HYPER + "layers pass [batch, length, 4, width], in a tuple.",
    "llama4": _TEXT_CONFIG,
    "longcat_flash": (
        "Each of the num_layers layers holds two attentions; num_hidden_layers counts those."
    ),
    "mllama": (
        _TEXT_CONFIG + " Text alone passes by the cross-attention layers (1 and 3), which need "
        "cross_attention_states."
    ),
    "moshi": "Only flash attention honours sliding_window; eager and sdpa attend to everything.",
    "musicgen": _MUSICGEN,
    "musicgen_melody": _MUSICGEN.replace("Musicgen", "MusicgenMelody"),
    "prophetnet": (
        "Layers pass the main stream and 2 predicted ones, one after the other: 3 x length "
        "positions. Not quite causal: a token changes earlier logits by up to 1e-2, through the "
        "relative position buckets."
    ),
    "qwen3_5": _TEXT_CONFIG,
    "qwen3_5_moe": _TEXT_CONFIG,
    "qwen4_exp": _TEXT_CONFIG + " " + _HYPER + "layers pass [batch, length, 4 x width].",
    "qwen4_exp_text": _HYPER + "layers pass [batch, length, 4 x width].",
    "reformer": (
        "Reversible: layers pass two streams. Not causal, because hashing sorts all tokens into "
        "chunks before the causal mask is applied."
    ),
    "rwkv": (
        "The first forward in eval mode divides the weights of layers 2 and 3 in place, and the "
        "stream is halved after layers 1 and 3 (rescale_every)."
    ),
    "xlm": "No blocks: parallel lists of attentions, norms and feed-forwards.",
    "xlnet": (
        "Layers pass [length, batch, width]. Attends both ways, as the default attn_type asks; "
        "causal only through a perm_mask."
    ),
    "xlstm": (
        "Runs in float32 only: in bfloat16 the native kernel raises 'RuntimeError: expected m1 and "
        "m2 to have the same dtype, but got: float != c10::BFloat16'."
    ),
}
