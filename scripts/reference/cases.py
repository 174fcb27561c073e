"""The golden cases of make_cases.py: which models, with which adapters.

CASES are many and large, for a check of the whole program; REGRESSION holds a few small ones, kept in tests/golden.

Shapes are small and odd on purpose: head sizes that do not divide the hidden size, widths that are no multiple of a
tile, ranks beside and above the usual ones. The names say what a case or an adapter is there for.
"""

import torch

EOS = 1
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
ALL = ATTENTION + MLP


# --- Adapters -------------------------------------------------------------------------------------------------------
# Name -> LoraConfig arguments, for a model of `layers` blocks. Two arguments are ours: `stored` is the dtype of the
# adapter file, `edit` holds fields to overwrite in adapter_config.json after saving, for what PEFT reads but does not
# write that way.


def golden(layers):
    """The adapters of the shipped golden cases."""
    return {
        "small-qv": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
        "all-r8": dict(r=8, lora_alpha=16, target_modules=ALL),
        "rslora-r16": dict(r=16, lora_alpha=12, target_modules=ALL, use_rslora=True),
        "odd-r3-mlp": dict(r=3, lora_alpha=5, target_modules=MLP),
        "pattern": dict(
            r=6,
            lora_alpha=6,
            target_modules=ALL,
            rank_pattern={"q_proj": 3, "down_proj": 12},
            alpha_pattern={"q_proj": 9},
        ),
        "last-layer": dict(r=5, lora_alpha=10, target_modules=ALL, layers_to_transform=[layers - 1]),
        "dora-r8": dict(r=8, lora_alpha=16, target_modules=ALL, use_dora=True),
    }


def matching(layers):
    """Every way to say which modules an adapter touches and with which rank and alpha."""
    last, first = f"model.layers.{layers - 1}.", "model.layers.0."
    return {
        # A string must match the whole name, a list entry a suffix of whole name parts.
        "regex-targets": dict(
            r=4, lora_alpha=4, target_modules=r"model\.layers\.\d+\.(self_attn\.(q_proj|o_proj)|mlp\.down_proj)"
        ),
        "regex-lookahead": dict(
            r=4,
            lora_alpha=4,
            target_modules=r"(?!.*layers\.0\.).*(gate_proj|o_proj)",
        ),
        "partial-paths": dict(r=4, lora_alpha=4, target_modules=["self_attn.v_proj", f"{first}mlp.down_proj"]),
        "exclude-list": dict(
            r=4, lora_alpha=4, target_modules=ALL, exclude_modules=["o_proj", f"{first}mlp.down_proj"]
        ),
        "exclude-regex": dict(r=4, lora_alpha=4, target_modules=ALL, exclude_modules=r".*\.mlp\..*"),
        "all-linear": dict(r=4, lora_alpha=4, target_modules="all-linear"),
        "all-linear-word": dict(r=4, lora_alpha=4, target_modules="all-linear", edit=dict(target_modules="all-linear")),
        "layer-number": dict(r=4, lora_alpha=4, target_modules=ALL, layers_to_transform=0),
        "layers-pattern": dict(
            r=4, lora_alpha=4, target_modules=ALL, layers_to_transform=sorted({0, layers - 1}), layers_pattern="layers"
        ),
        "layers-patterns": dict(
            r=4, lora_alpha=4, target_modules=ALL, layers_to_transform=[layers - 1], layers_pattern=["h", "layers"]
        ),
        # A full name in target_modules counts even where layers_to_transform leaves its layer out.
        "full-name-beats-layers": dict(
            r=4, lora_alpha=4, target_modules=["o_proj", f"{first}mlp.down_proj"], layers_to_transform=[layers - 1]
        ),
        "pattern-full-path": dict(
            r=4,
            lora_alpha=8,
            target_modules=ALL,
            rank_pattern={f"{first}self_attn.o_proj": 7, f"{last}mlp.down_proj": 2},
            alpha_pattern={f"{first}self_attn.o_proj": 3, "layers.0.mlp.down_proj": 5},
        ),
        "pattern-regex": dict(
            r=4,
            lora_alpha=8,
            target_modules=ALL,
            rank_pattern={r"layers\.0\..*(q_proj|o_proj)": 6, r"mlp\.\w+": 5, f"^{last}self_attn.v_proj": 9},
            alpha_pattern={r".*\.0\.mlp\..*": 11, "(q_proj|o_proj)": 2},
        ),
        "pattern-rslora": dict(
            r=4,
            lora_alpha=8,
            target_modules=ALL,
            use_rslora=True,
            rank_pattern={"o_proj": 9, "down_proj": 16},
            alpha_pattern={"down_proj": 3},
        ),
        # The first key of the file that matches wins, and this file is not in alphabetical order.
        "pattern-order": dict(
            r=4,
            lora_alpha=8,
            target_modules=ALL,
            edit=dict(alpha_pattern={"o_proj": 20, "layers.0.self_attn.o_proj": 5, "down_proj": 2, ".*proj": 12}),
        ),
    }


def ranks(layers):
    """Ranks around the chunk size and above the hidden size, dtypes of the file, scalings."""
    return {
        "r1": dict(r=1, lora_alpha=2, target_modules=ALL),
        "r17": dict(r=17, lora_alpha=8.5, target_modules=ALL),
        "r96-wide": dict(r=96, lora_alpha=48, target_modules=["q_proj", "o_proj", "down_proj"]),
        "alpha-zero": dict(r=4, lora_alpha=0, target_modules=ALL),
        "alpha-negative": dict(r=4, lora_alpha=-3, target_modules=ALL),
        "dora-rslora": dict(r=5, lora_alpha=7, target_modules=ALL, use_dora=True, use_rslora=True),
        "dora-pattern": dict(
            r=4,
            lora_alpha=6,
            target_modules=ATTENTION,
            use_dora=True,
            rank_pattern={"q_proj": 20},
            alpha_pattern={"o_proj": 1},
        ),
        "stored-bf16": dict(r=8, lora_alpha=16, target_modules=ALL, stored=torch.bfloat16),
        "stored-f16": dict(r=8, lora_alpha=16, target_modules=ALL, stored=torch.float16),
        "dora-bf16": dict(r=8, lora_alpha=16, target_modules=ALL, use_dora=True, stored=torch.bfloat16),
        # Means Conv1D weights, which are stored transposed; on linear layers PEFT warns and takes it as false.
        "fan-in-fan-out": dict(r=4, lora_alpha=8, target_modules=ALL, edit=dict(fan_in_fan_out=True)),
        "dropout": dict(r=4, lora_alpha=8, target_modules=ALL, lora_dropout=0.5),
    }


def biases(layers):
    """`lora_bias` adds scale x bias; `bias` replaces the base's own biases. For models whose layers have biases."""
    return {
        "lora-bias": dict(r=4, lora_alpha=12, target_modules=ALL, lora_bias=True),
        "lora-bias-rslora": dict(
            r=9, lora_alpha=6, target_modules=["q_proj", "o_proj", "down_proj"], lora_bias=True, use_rslora=True
        ),
        "bias-all": dict(r=4, lora_alpha=8, target_modules=["q_proj"], bias="all"),
        "bias-lora-only": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], bias="lora_only"),
        "bias-all-dora": dict(r=4, lora_alpha=8, target_modules=ATTENTION, bias="all", use_dora=True),
        "bias-all-lora-bias": dict(
            r=4, lora_alpha=8, target_modules=["k_proj", "down_proj"], bias="all", lora_bias=True
        ),
    }


def heads(layers):
    """lm_head and embed_tokens, as LoRA or whole. In a tied model they part company."""
    qv = ["q_proj", "v_proj"]
    return {
        "head": dict(r=4, lora_alpha=4, target_modules=[*qv, "lm_head", "embed_tokens"]),
        "head-only": dict(r=4, lora_alpha=8, target_modules=["lm_head"]),
        "embed-only": dict(r=4, lora_alpha=8, target_modules=["embed_tokens"]),
        "head-rslora": dict(r=18, lora_alpha=6, target_modules=["embed_tokens", "lm_head", "o_proj"], use_rslora=True),
        # Full names: PEFT then does not save the base's own rows beside the adapter.
        "head-full-names": dict(r=3, lora_alpha=6, target_modules=["model.embed_tokens", *qv]),
        "dora-head": dict(r=4, lora_alpha=8, target_modules=[*qv, "lm_head"], use_dora=True),
        "dora-embed": dict(r=4, lora_alpha=8, target_modules=[*qv, "embed_tokens"], use_dora=True),
        "saved-head": dict(r=4, lora_alpha=8, target_modules=qv, modules_to_save=["lm_head"]),
        "saved-embed": dict(r=4, lora_alpha=8, target_modules=qv, modules_to_save=["embed_tokens"]),
        "saved-both": dict(
            r=4, lora_alpha=8, target_modules=qv, modules_to_save=["lm_head", "embed_tokens"], stored=torch.bfloat16
        ),
        "saved-head-lora-embed": dict(r=4, lora_alpha=8, target_modules=["embed_tokens"], modules_to_save=["lm_head"]),
    }


def tied(layers):
    """`ensure_weight_tying` (tied models only): the embedding's adapter serves as the head's as well."""
    qv = ["q_proj", "v_proj"]
    return {
        "tie-lora": dict(r=4, lora_alpha=8, target_modules=[*qv, "embed_tokens", "lm_head"], ensure_weight_tying=True),
        "tie-saved": dict(
            r=4, lora_alpha=8, target_modules=qv, modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=True
        ),
    }


def some(group, *names, **more):
    """Only these adapters of a group, with `more` arguments."""
    return lambda layers: {name: group(layers)[name] | more for name in names}


# --- Models ---------------------------------------------------------------------------------------------------------

LINEAR = dict(rope_type="linear", rope_theta=10000.0, factor=4.0)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=30000.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32)
LONG_CONTEXT = dict(max_position_embeddings=128, original_max_position_embeddings=32)
LONG_PROMPTS = (20, 27, 31, 32, 33, 46)  # below an original context of 32, crossing it while generating, above it


def longrope(rotary, **more):
    """Short and long factors for `rotary` rotated dimensions, clearly apart from each other and from 1."""
    pairs = range(rotary // 2)
    short, long = [1.0 + 0.06 * i for i in pairs], [1.5 + 0.9 * i for i in pairs]
    return dict(
        rope_type="longrope", rope_theta=10000.0, short_factor=short, long_factor=long,
        original_max_position_embeddings=32, **more,
    )  # fmt: skip


def plain(rotary):
    """No scaling; `rotary` is the rotated share of a head."""
    return dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=rotary)


def shape(hidden, intermediate, layers, heads, kv, head=None):
    """`head` None leaves the head size to the family's default."""
    fields = dict(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers)
    fields |= dict(num_attention_heads=heads, num_key_value_heads=kv)
    return fields | ({"head_dim": head} if head else {})


def case(
    name, family, adapters, shape, *, prompts=(2, 23, 46), spelling="v5", stored=torch.float32, shard=None,
    drop=(), edit=None, end_tokens=None, keep=None, **config,
):  # fmt: skip
    """One model: `shape` and `config` are the fields of its configuration.

    `spelling` "v4" writes rope_theta, rope_scaling and torch_dtype; `drop` and `edit` change config.json after saving,
    which must not change the model; `stored` and `shard` say how the weights lie on disk; `prompts` are lengths;
    `end_tokens` goes to generation_config.json only. `keep` are the numbers of the prompts whose logits are kept, to
    save room: None keeps all, and the logits before each greedy choice.
    """
    return dict(
        name=name, family=family, adapters=adapters, prompts=prompts, spelling=spelling, stored=stored, shard=shard,
        drop=drop, edit=edit or {}, end_tokens=end_tokens, keep=keep, config=shape | config,
    )  # fmt: skip


CASES = [
    case("llama-wide-heads", "llama", [golden, matching, ranks], shape(72, 100, 2, 6, 2, 16)),
    # An early Llama config: no head_dim, no key-value heads, no rope, no biases, no tying.
    case(
        "llama-early-config", "llama", [golden, biases], shape(48, 52, 1, 4, 4),
        prompts=(1, 7, 46), spelling="v4", max_position_embeddings=64, rms_norm_eps=1e-6,
        drop=(
            "head_dim", "num_key_value_heads", "rope_theta", "rope_scaling", "attention_bias", "mlp_bias",
            "tie_word_embeddings", "attention_dropout", "rms_norm_eps", "pretraining_tp", "use_cache",
        ),
    ),
    case(
        "llama-four-layers", "llama", [golden, matching], shape(64, 84, 4, 8, 1, 8), spelling="v4",
        rope_parameters=LLAMA3,
    ),
    case(
        "llama-biases", "llama", [golden, biases, heads], shape(40, 100, 2, 5, 5, 10),
        attention_bias=True, mlp_bias=True,
    ),
    case(
        "llama-tied-linear-rope", "llama", [golden, heads, tied], shape(60, 52, 2, 6, 3, 12), spelling="v4",
        tie_word_embeddings=True, rope_parameters=LINEAR, edit=dict(rope_scaling=dict(type="linear", factor=4.0)),
    ),
    case(
        "llama-yarn-mscale", "llama", [golden], shape(64, 100, 2, 2, 2, 32), max_position_embeddings=16384,
        rope_parameters=dict(
            YARN, original_max_position_embeddings=4096, mscale=1.3, mscale_all_dim=0.7, beta_fast=8.0, beta_slow=2.0
        ),
    ),
    case(
        "llama-yarn-no-truncate", "llama", [golden], shape(48, 76, 2, 3, 1, 24), spelling="v4",
        max_position_embeddings=128, rope_parameters=dict(YARN, truncate=False),
    ),
    case(
        "llama-bf16-shards", "llama", [golden, ranks, heads], shape(56, 84, 3, 7, 1, 8),
        stored=torch.bfloat16, shard="40KB", end_tokens=[EOS, *range(7, 512, 16)],
    ),
    case(
        "llama-f16-tied", "llama", [golden, heads], shape(64, 52, 2, 4, 2, 20), spelling="v4",
        stored=torch.float16, shard="60KB", tie_word_embeddings=True, attention_bias=True,
    ),
    case(
        "qwen2-mixed-windows", "qwen2", [golden, biases], shape(48, 100, 3, 6, 2),
        use_sliding_window=True, sliding_window=5, max_window_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    # A Qwen2 config of transformers 4: the windows follow from max_window_layers.
    case(
        "qwen2-window-layers", "qwen2", [golden, biases], shape(64, 52, 3, 4, 4), spelling="v4",
        drop=("layer_types",), use_sliding_window=True, sliding_window=7, max_window_layers=1,
    ),
    # As most Qwen2 configs: a window is named and not used. The vocabulary is wider than the tokenizer's.
    case(
        "qwen2-unused-window", "qwen2", [golden, heads, tied], shape(64, 100, 2, 4, 2), spelling="v4",
        drop=("layer_types",), edit=dict(sliding_window=4, max_window_layers=0), vocab_size=528,
        tie_word_embeddings=True,
    ),
    case(
        "qwen2-yarn-factor", "qwen2", [golden], shape(64, 96, 2, 4, 2), stored=torch.bfloat16,
        max_position_embeddings=128, rope_parameters=dict(YARN, attention_factor=0.8),
    ),
    case("qwen3-biases", "qwen3", [golden, biases, heads], shape(48, 100, 2, 6, 2, 24), attention_bias=True),
    case(
        "qwen3-yarn-tied", "qwen3", [golden, heads], shape(64, 52, 2, 4, 4, 32), spelling="v4",
        stored=torch.bfloat16, shard="50KB", max_position_embeddings=128, tie_word_embeddings=True,
        rope_parameters=YARN,
    ),
    # Without head_dim a Qwen3 head has 128 dimensions, whatever the hidden size.
    case("qwen3-default-head", "qwen3", [golden], shape(32, 52, 1, 2, 1), drop=("head_dim", "layer_types")),
    case(
        "qwen3-mixed-windows", "qwen3", [golden], shape(64, 100, 3, 4, 2, 16),
        use_sliding_window=True, sliding_window=6, max_window_layers=0,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    case(
        "mistral-window", "mistral", [golden, heads], shape(60, 100, 3, 6, 2, 12), prompts=(2, 5, 6, 46),
        sliding_window=5,
    ),
    case(
        "mistral-no-window", "mistral", [golden, matching], shape(64, 52, 2, 4, 4), spelling="v4",
        edit=dict(head_dim=None), sliding_window=None,
    ),
    case(
        "mistral-bf16-tied", "mistral", [golden, heads], shape(64, 116, 2, 8, 2, 20), spelling="v4",
        stored=torch.bfloat16, shard="30KB", sliding_window=20, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=1000000.0),
    ),
    case(
        "phi3-longrope", "phi3", [golden, heads], shape(64, 100, 2, 4, 4), prompts=LONG_PROMPTS, spelling="v4",
        **LONG_CONTEXT, sliding_window=None, rope_parameters=longrope(16, partial_rotary_factor=1.0),
    ),
    case(
        "phi3-longrope-partial", "phi3", [golden, matching], shape(96, 84, 2, 6, 2), prompts=LONG_PROMPTS,
        **LONG_CONTEXT, sliding_window=11,
        rope_parameters=longrope(12, partial_rotary_factor=0.75, attention_factor=1.25),
    ),
    # The first Phi-3 128k spelling, "type": "su"; transformers 5 wants the original context beside it.
    case(
        "phi3-su", "phi3", [golden, ranks], shape(64, 52, 1, 4, 2), prompts=LONG_PROMPTS, spelling="v4",
        stored=torch.bfloat16, shard="50KB", **LONG_CONTEXT,
        rope_parameters=longrope(16, partial_rotary_factor=1.0),
        edit=dict(rope_scaling=dict(type="su", **{k: v for k, v in longrope(16).items() if not k.startswith("rope_")})),
    ),
    case(
        "phi3-half-rotary", "phi3", [golden, heads, tied], shape(72, 100, 2, 3, 1), spelling="v4",
        max_position_embeddings=128, original_max_position_embeddings=128, tie_word_embeddings=True,
        rope_parameters=plain(rotary=0.5),
    ),
    case(
        "phi3-three-quarters", "phi3", [golden, ranks], shape(64, 52, 2, 2, 2), stored=torch.float16,
        sliding_window=9, rope_parameters=plain(rotary=0.75),
    ),
]  # fmt: skip

BF16 = torch.bfloat16

REGRESSION = [
    # Prompts of 27 tokens cross the original context of 32 while generating, those of 33 lie above it.
    case(
        "phi3-su", "phi3", [some(matching, "regex-targets"), some(ranks, "dora-rslora", "r17", stored=BF16)],
        shape(64, 52, 2, 4, 2), prompts=(27, 33), keep=(2,), spelling="v4", stored=BF16, shard="50KB",
        **LONG_CONTEXT, sliding_window=11, rope_parameters=longrope(12, partial_rotary_factor=0.75),
        edit=dict(rope_scaling=dict(type="su", **{k: v for k, v in longrope(12).items() if not k.startswith("rope_")})),
    ),
    case(
        "llama-yarn", "llama", [some(matching, "pattern-order"), some(biases, "lora-bias", "bias-all", "bias-all-dora")],
        shape(40, 100, 2, 5, 5, 10), prompts=(6, 14), keep=(2,), stored=BF16,
        attention_bias=True, mlp_bias=True, max_position_embeddings=16384,
        rope_parameters=dict(
            YARN, original_max_position_embeddings=4096, mscale=1.3, mscale_all_dim=0.7, beta_fast=8.0, beta_slow=2.0
        ),
    ),
    case(
        "llama-linear", "llama",
        [some(matching, "pattern-regex"), some(ranks, "r96-wide", stored=BF16), some(heads, "head-full-names", "saved-both")],
        shape(36, 52, 2, 6, 3, 8), prompts=(6, 14), keep=(2,), spelling="v4", stored=BF16, tie_word_embeddings=True,
        rope_parameters=LINEAR, edit=dict(rope_scaling=dict(type="linear", factor=4.0)),
    ),
    case(
        "qwen2-windows", "qwen2", [some(matching, "exclude-list"), some(ranks, "dora-pattern"), some(biases, "bias-lora-only")],
        shape(48, 100, 3, 6, 2), prompts=(6, 14), keep=(2,), stored=torch.float16,
        use_sliding_window=True, sliding_window=5, max_window_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    case(
        "qwen3-biases", "qwen3", [some(matching, "full-name-beats-layers"), some(biases, "lora-bias-rslora", "bias-all-lora-bias")],
        shape(40, 52, 2, 4, 2, 16), prompts=(6, 14), keep=(2,), stored=BF16, attention_bias=True,
    ),
]  # fmt: skip
