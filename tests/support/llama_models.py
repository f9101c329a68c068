"""What the tests of pagealloc.llama share: models, and texts to compare."""

import numpy as np

from pagealloc.demo.errors import require_extra
from pagealloc.demo.tokenizer import SPACE, TokenKind

PROMPT = "The quick brown fox jumps over the lazy dog, and then it thinks about what it has done. "

TOKENS = ["<unk>", "<s>", "</s>", SPACE, *(f"<0x{byte:02X}>" for byte in range(256))]
WIDTH, INNER, STATE, CONV, DT_RANK, N_LAYERS = 64, 128, 8, 4, 8, 2


def write_tiny_mamba(path, seed=0):
    """Write a recurrent model of random weights, with a byte vocabulary."""
    kinds = [TokenKind.UNKNOWN, TokenKind.CONTROL, TokenKind.CONTROL, TokenKind.NORMAL]
    writer = require_extra("gguf").GGUFWriter(path, "mamba")
    writer.add_name("tiny random Mamba")
    writer.add_context_length(2048)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(N_LAYERS)
    writer.add_ssm_conv_kernel(CONV)
    writer.add_ssm_inner_size(INNER)
    writer.add_ssm_state_size(STATE)
    writer.add_ssm_time_step_rank(DT_RANK)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([0.0] * len(TOKENS))
    writer.add_token_types([*kinds, *[TokenKind.BYTE] * 256])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    random = np.random.default_rng(seed)

    def add(name, *shape, values=None):
        if values is None:
            values = random.standard_normal(shape) / np.sqrt(shape[-1])
        writer.add_tensor(name, np.full(shape, values, np.float32))

    add("token_embd.weight", len(TOKENS), WIDTH)
    add("output_norm.weight", WIDTH, values=1.0)
    add("output.weight", len(TOKENS), WIDTH)
    for layer in range(N_LAYERS):
        name = f"blk.{layer}"
        add(f"{name}.attn_norm.weight", WIDTH, values=1.0)
        add(f"{name}.ssm_in.weight", 2 * INNER, WIDTH)
        add(f"{name}.ssm_conv1d.weight", INNER, CONV)
        add(f"{name}.ssm_conv1d.bias", INNER, values=0.0)
        add(f"{name}.ssm_x.weight", DT_RANK + 2 * STATE, INNER)
        add(f"{name}.ssm_dt.weight", INNER, DT_RANK)
        add(f"{name}.ssm_dt.bias", INNER, values=0.0)
        add(f"{name}.ssm_a", INNER, STATE, values=-1.0)
        add(f"{name}.ssm_d", INNER, values=1.0)
        add(f"{name}.ssm_out.weight", WIDTH, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
