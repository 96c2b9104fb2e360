"""Small random causal language models of many architectures, made on the spot.

`ARCHITECTURES` says what each architecture needs beside `SMALL`; `make(name, folder)`
writes a checkpoint in float16 with the tokenizer of the tiny model. All have random
weights wide enough for logits that are not flat, and norms and biases that differ from
channel to channel, so that a norm that is smoothed or folded wrongly shows.
"""

from dataclasses import fields
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CONFIG_MAPPING,
    GenerationConfig,
)

TINY = Path(__file__).parent / "tiny-qwen2"

# What most configurations know; a name that a configuration does not know is left out.
SMALL = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
    initializer_range=0.2, init_std=0.2)

UNTIED = dict(tie_word_embeddings=False)  # Tied, the random model repeats its last token.
WINDOWED = dict(  # A layer of sliding attention and one of full attention.
    num_hidden_layers=2, sliding_window=64,
    layer_types=["sliding_attention", "full_attention"])
LATENT = dict(  # Multi-head latent attention: keys and values from a low rank.
    num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16,
    qk_rope_head_dim=16, v_head_dim=16)
ROUTED = dict(  # A mixture of experts as DeepSeek names its parts.
    moe_intermediate_size=64, n_routed_experts=4, n_shared_experts=1,
    num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1)
GATED_DELTA = dict(  # A layer of linear attention and one of full attention.
    layer_types=["linear_attention", "full_attention"], head_dim=32,
    linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2,
    linear_num_value_heads=4)
MAMBA2 = dict(  # State space layers with heads; twice the hidden size inside.
    mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=16,
    mamba_chunk_size=32)

# A name is the model type, unless the entry names another under "model_type".
ARCHITECTURES = {
    # Dense decoders with rotary positions, RMSNorm and a gated MLP.
    "llama": {},
    "llama_tied": dict(model_type="llama", tie_word_embeddings=True, attention_bias=True,
                       mlp_bias=True),
    "mistral": dict(sliding_window=None),
    "mistral_window": dict(model_type="mistral", sliding_window=64),
    "ministral": WINDOWED,
    "qwen2": {},
    "qwen2_window": dict(model_type="qwen2", use_sliding_window=True, max_window_layers=1,
                         sliding_window=64),
    "qwen3": dict(head_dim=32),
    "phi3": {},
    "gemma": dict(head_dim=32),
    "gemma2": dict(head_dim=32, query_pre_attn_scalar=32) | WINDOWED | UNTIED,
    "gemma3_text": dict(head_dim=32, query_pre_attn_scalar=32) | WINDOWED | UNTIED,
    "vaultgemma": dict(query_pre_attn_scalar=16) | WINDOWED,
    "olmo": {},
    "olmo2": {},
    "olmo3": WINDOWED,
    "glm": {},
    "glm4": {},
    "exaone4": WINDOWED,
    "granite": dict(logits_scaling=0.5, residual_multiplier=0.5, embedding_multiplier=3.0,
                    attention_multiplier=0.125),
    "smollm3": dict(no_rope_layers=[1, 0]),
    "ernie4_5": {},
    "hunyuan_v1_dense": {},
    "minicpm3": LATENT | dict(scale_emb=3, dim_model_base=64),
    "helium": {},
    "seed_oss": dict(head_dim=32),
    "cwm": dict(bos_token_id=1) | WINDOWED,
    "ministral3": dict(rope_parameters=dict(
        rope_type="yarn", rope_theta=10000.0, factor=4.0, beta_fast=32.0, beta_slow=1.0,
        original_max_position_embeddings=128, llama_4_scaling_beta=0.1)),
    "hyperclovax": dict(logits_scaling=2.0, residual_multiplier=0.5,
                        embedding_multiplier=3.0, attention_multiplier=0.125),
    "diffllama": {},
    "bitnet": {},
    # Dense decoders that differ in the norm, the MLP or the order of the two.
    "arcee": {},
    "apertus": {},
    "nanochat": dict(initializer_range=0.25),
    "nemotron": {},
    "jais2": {},
    "starcoder2": {},
    "stablelm": {},
    "persimmon": {},
    "phi": {},
    "cohere": dict(logit_scale=1.0, use_qk_norm=True),
    "cohere2": dict(logit_scale=1.0) | WINDOWED,
    "gpt_neox": dict(initializer_range=0.3),
    "gptj": dict(rotary_dim=8),
    "codegen": dict(rotary_dim=8),
    "falcon": {},
    "falcon_grouped": dict(model_type="falcon", new_decoder_architecture=True,
                           num_kv_heads=2, num_ln_in_parallel_attn=2),
    # Learned, sinusoidal or linear (ALiBi) positions.
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], window_size=64),
    "opt": dict(ffn_dim=128, word_embed_proj_dim=64),
    "biogpt": UNTIED,
    "xglm": dict(ffn_dim=128) | UNTIED,
    "bloom": {},
    "mpt": dict(max_seq_len=512),
    # Mixtures of experts.
    "mixtral": dict(num_local_experts=4),
    "qwen2_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
                      shared_expert_intermediate_size=64),
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64),
    "olmoe": dict(num_experts=4, num_experts_per_tok=2),
    "granitemoe": dict(num_local_experts=4, logits_scaling=0.5, residual_multiplier=0.5,
                       embedding_multiplier=3.0, attention_multiplier=0.125),
    "phimoe": dict(num_local_experts=4),
    "gpt_oss": dict(num_local_experts=4, num_experts_per_tok=2) | WINDOWED,
    "ernie4_5_moe": dict(moe_intermediate_size=64, moe_num_experts=4, moe_k=2,
                         moe_num_shared_experts=1, moe_layer_end_index=1),
    "glm4_moe": ROUTED,
    "dots1": ROUTED,
    "deepseek_v2": LATENT | ROUTED | dict(head_dim=16, topk_method="greedy"),
    "deepseek_v3": LATENT | ROUTED,
    "granitemoeshared": dict(num_local_experts=4, shared_intermediate_size=64),
    "exaone_moe": ROUTED | WINDOWED | dict(num_experts=4, num_shared_experts=1,
                                           mlp_layer_types=["dense", "sparse"]),
    "hunyuan_v1_moe": dict(num_experts=4, moe_topk=2),
    "minimax_m2": dict(num_local_experts=4, num_experts_per_tok=2),
    "jetmoe": dict(kv_channels=16, num_local_experts=4),
    "llama4_text": dict(num_local_experts=4, intermediate_size_mlp=128, no_rope_layers=[1, 0],
                        attention_chunk_size=64,
                        layer_types=["chunked_attention", "full_attention"]),
    # Layers with a state: convolutions, linear attention, state spaces.
    "lfm2": dict(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], moe_intermediate_size=64,
                     num_experts=4, num_experts_per_tok=2, num_dense_layers=1),
    "qwen3_5_text": GATED_DELTA,
    "qwen3_next": GATED_DELTA | dict(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
        shared_expert_intermediate_size=64),
    "mamba": dict(state_size=8, time_step_rank=8),
    "falcon_mamba": dict(state_size=8, time_step_rank=8),
    "mamba2": dict(num_heads=8, head_dim=16, state_size=16, n_groups=1, chunk_size=32),
    "falcon_h1": MAMBA2 | dict(mamba_d_ssm=128),
    "bamba": MAMBA2 | dict(attn_layer_indices=[1]),
    "granitemoehybrid": MAMBA2 | dict(
        layer_types=["linear_attention", "full_attention"], num_local_experts=4,
        shared_intermediate_size=64),
    "jamba": dict(num_experts=4, attn_layer_period=2, attn_layer_offset=1,
                  mamba_d_state=8, mamba_dt_rank=8, use_mamba_kernels=False),
    "zamba2": dict(
        layers_block_type=["linear_attention", "hybrid"], mamba_d_state=16, mamba_ngroups=1,
        n_mamba_heads=8, num_key_value_heads=4, adapter_rank=8, chunk_size=32,
        use_mamba_kernels=False),
    "nemotron_h": ROUTED | dict(
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
        ssm_state_size=16, mamba_num_heads=8, mamba_head_dim=16, n_groups=1, chunk_size=32,
        moe_shared_expert_intermediate_size=64, use_mamba_kernels=False),
    "recurrent_gemma": dict(block_types=["recurrent", "attention"], lru_width=64,
                            attention_window_size=64, w_init_variance_scale=0.16),
    # Embeddings for each layer, other head sizes in some layers.
    "gemma3n_text": WINDOWED | dict(
        num_kv_shared_layers=0, hidden_size_per_layer_input=16, laurel_rank=8,
        vocab_size_per_layer_input=2048, activation_sparsity_pattern=[0.95, 0.0]),
    "gemma4_text": WINDOWED | UNTIED | dict(
        hidden_size_per_layer_input=16, vocab_size_per_layer_input=2048,
        global_head_dim=32),
    # A language model beside a vision tower.
    "gemma3": UNTIED | dict(
        mm_tokens_per_image=4,
        text_config=SMALL | WINDOWED | dict(head_dim=32, query_pre_attn_scalar=32),
        vision_config=dict(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, image_size=56, patch_size=14)),
}


def make(name: str, folder, **changes):
    """Write a small random model of an architecture and its tokenizer; return the folder.

    The changes are to the configuration: make("llama", folder, hidden_size=128).
    """
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(configure(name, tokenizer, **changes)).half()
    vary_channels(model)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def configure(name: str, tokenizer, **changes):
    """Return the configuration of a small model of an architecture."""
    overrides = ARCHITECTURES[name] | changes
    model_type = overrides.pop("model_type", name)
    kind = CONFIG_MAPPING[model_type]
    known = {field.name for field in fields(kind)} | set(kind.attribute_map)
    overrides = {k: v for k, v in SMALL.items() if k in known} | overrides
    tokens = dict(vocab_size=len(tokenizer), bos_token_id=None,
                  eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    if "text_config" in overrides:
        overrides["text_config"] = overrides["text_config"] | tokens
    return AutoConfig.for_model(model_type, **tokens | overrides)


@torch.no_grad()
def vary_channels(model) -> None:
    """Scale each channel of the norms by a random factor; draw the biases that are zero.

    Some norms multiply by 1 + weight: those start from weights that are zero.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name.endswith("bias") and not parameter.any():
                parameter.normal_(0, 0.1)
            elif name == "weight" and "norm" in type(module).__name__.lower():
                factor = torch.randn_like(parameter).mul(0.3).exp()
                offset = 0 if parameter.any() else 1
                parameter.add_(offset).mul_(factor).sub_(offset)
