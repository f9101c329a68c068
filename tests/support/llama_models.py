"""What the tests of pagealloc.llama share: models, and texts to compare."""

import ctypes

import numpy as np

from pagealloc.demo.errors import require_extra
from pagealloc.demo.tokenizer import SPACE, TokenKind

PROMPT = "The quick brown fox jumps over the lazy dog, and then it thinks about what it has done. "

TOKENS = ["<unk>", "<s>", "</s>", SPACE, *(f"<0x{byte:02X}>" for byte in range(256))]
WIDTH = 64
N_SEQ = 4


def open_writer(path, architecture, n_layers):
    """Begin a model with a byte vocabulary."""
    kinds = [TokenKind.UNKNOWN, TokenKind.CONTROL, TokenKind.CONTROL, TokenKind.NORMAL]
    writer = require_extra("gguf").GGUFWriter(path, architecture)
    writer.add_name(f"tiny random {architecture}")
    writer.add_context_length(2048)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(n_layers)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([0.0] * len(TOKENS))
    writer.add_token_types([*kinds, *[TokenKind.BYTE] * 256])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    return writer


def tensors(writer, seed):
    """Return what adds tensors, of random values or of given ones."""
    random = np.random.default_rng(seed)

    def add(name, *shape, values=None):
        if values is None:
            values = random.standard_normal(shape) / np.sqrt(shape[-1])
        writer.add_tensor(name, np.full(shape, values, np.float32))

    return add


def close_writer(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_tiny_mamba(path, seed=0):
    """Write a recurrent model of random weights."""
    inner, state, conv, dt_rank, n_layers = 128, 8, 4, 8, 2
    writer = open_writer(path, "mamba", n_layers)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_ssm_conv_kernel(conv)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(dt_rank)
    add = tensors(writer, seed)
    add("token_embd.weight", len(TOKENS), WIDTH)
    add("output_norm.weight", WIDTH, values=1.0)
    add("output.weight", len(TOKENS), WIDTH)
    for layer in range(n_layers):
        name = f"blk.{layer}"
        add(f"{name}.attn_norm.weight", WIDTH, values=1.0)
        add(f"{name}.ssm_in.weight", 2 * inner, WIDTH)
        add(f"{name}.ssm_conv1d.weight", inner, conv)
        add(f"{name}.ssm_conv1d.bias", inner, values=0.0)
        add(f"{name}.ssm_x.weight", dt_rank + 2 * state, inner)
        add(f"{name}.ssm_dt.weight", inner, dt_rank)
        add(f"{name}.ssm_dt.bias", inner, values=0.0)
        add(f"{name}.ssm_a", inner, state, values=-1.0)
        add(f"{name}.ssm_d", inner, values=1.0)
        add(f"{name}.ssm_out.weight", WIDTH, inner)
    close_writer(writer)


def write_tiny_gemma3(path, seed=0):
    """Write a model of random weights, most of whose layers see the last 64 tokens only."""
    n_layers, heads, head_dim, ffn = 6, 2, 32, 128
    writer = open_writer(path, "gemma3", n_layers)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(1)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(64)
    add = tensors(writer, seed)
    add("token_embd.weight", len(TOKENS), WIDTH)
    add("output_norm.weight", WIDTH, values=1.0)
    for layer in range(n_layers):
        name = f"blk.{layer}"
        for norm in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            add(f"{name}.{norm}.weight", WIDTH, values=1.0)
        for norm in ("attn_q_norm", "attn_k_norm"):
            add(f"{name}.{norm}.weight", head_dim, values=1.0)
        add(f"{name}.attn_q.weight", heads * head_dim, WIDTH)
        add(f"{name}.attn_k.weight", head_dim, WIDTH)
        add(f"{name}.attn_v.weight", head_dim, WIDTH)
        add(f"{name}.attn_output.weight", WIDTH, heads * head_dim)
        add(f"{name}.ffn_gate.weight", ffn, WIDTH)
        add(f"{name}.ffn_up.weight", ffn, WIDTH)
        add(f"{name}.ffn_down.weight", WIDTH, ffn)
    close_writer(writer)


def complete(llm, prompt, max_tokens=12):
    answer = llm.create_completion(prompt, max_tokens=max_tokens, temperature=0.0, seed=1)
    return answer["choices"][0]["text"]


def logits(llm):
    """The logits of the last token that was evaluated."""
    return np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm._n_vocab,)).copy()


def token_ids(n_tokens, seed=1):
    return np.random.default_rng(seed).integers(4, 260, n_tokens).tolist()


def adopt_and_evaluate(pipe, path):
    """In another process: begin with a prefix that comes through a pipe."""
    import llama_cpp

    from pagealloc.llama import kv_memory

    options = {"n_ctx": 512, "n_batch": 64, "verbose": False, "n_threads": 2, "flash_attn": True}
    with kv_memory() as kv:
        llm = llama_cpp.Llama(path, **options)
    kv.adopt(pipe.recv())
    n_tokens = llm.n_tokens
    llm.eval([5])
    pipe.send((n_tokens, logits(llm)))
    llm.close()


class Context:
    """A bare context of several sequences, as `sequence` wants a `Llama`."""

    def __init__(self, path, *, unified=True, n_seq_max=N_SEQ):
        from llama_cpp import llama_cpp

        self.lib = llama_cpp
        params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        self.context_params = llama_cpp.llama_context_default_params()
        assert self.context_params.offload_kqv
        self.context_params.n_ctx = 256 * (1 if unified else n_seq_max)
        self.context_params.n_seq_max = n_seq_max
        self.context_params.kv_unified = unified
        self.ctx = llama_cpp.llama_init_from_model(self.model, self.context_params)
        self._ctx, self._model = self, self
        self.batch = llama_cpp.llama_batch_init(64, 0, n_seq_max)

    def eval(self, seq_id, positions):
        """Evaluate a token at each position."""
        self.batch.n_tokens = len(positions)
        for i, position in enumerate(positions):
            self.batch.token[i] = 4 + position % 250
            self.batch.pos[i] = position
            self.batch.seq_id[i][0] = seq_id
            self.batch.n_seq_id[i] = 1
            self.batch.logits[i] = False
        assert self.lib.llama_decode(self.ctx, self.batch) == 0

    def clear(self):
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.ctx), True)

    def state(self):
        """Return the whole state."""
        n_bytes = self.lib.llama_state_get_size(self.ctx)
        blob = (ctypes.c_uint8 * n_bytes)()
        n_bytes = self.lib.llama_state_get_data(self.ctx, blob, n_bytes)
        return bytes(blob[:n_bytes])

    def cells(self):
        """Return the (position, sequences) of each cell, sorted."""
        blob = self.state()
        words = np.frombuffer(blob[9:], "<i4", (len(blob) - 9) // 4)
        n_cells, at, cells = words[1], 2, []
        for _ in range(n_cells):
            n_ids = words[at + 1]
            cells.append((int(words[at]), tuple(words[at + 2 : at + 2 + n_ids].tolist())))
            at += 2 + n_ids
        return sorted(cells)

    def close(self):
        self.lib.llama_batch_free(self.batch)
        self.lib.llama_free(self.ctx)
        self.lib.llama_model_free(self.model)
