"""A program whose heap profile is worth a look: a model, a KV cache, and conversations.

What is open at its end stays, for ``pagealloc profile tests/support/inference.py`` to find it live.
"""

import numpy as np

from pagealloc import PageAllocator, Pool
from pagealloc.kv import KVCache, KVLayout

N_LAYERS, N_HEADS, HEAD_DIM = 12, 4, 64
WIDTH = N_HEADS * HEAD_DIM
N_WORDS = 16384
LAYOUT = KVLayout(N_LAYERS, N_HEADS, HEAD_DIM, 2048, order="block")
PROMPT_TOKENS = 256


class Layer:
    def __init__(self, allocator):
        self.attention = load(allocator, (4, WIDTH, WIDTH))
        self.mlp = load(allocator, (3, WIDTH, 4 * WIDTH))


def load(allocator, shape):
    return allocator.zeros(shape, np.float16)


class Model:
    """Computes nothing, but takes the memory that it would."""

    def __init__(self, allocator):
        self._allocator = allocator
        self._scratch = Pool(nbytes="64KiB", allocator=allocator)
        self.embeddings = load(allocator, (N_WORDS, WIDTH))
        self.layers = []
        while len(self.layers) < N_LAYERS:
            self.layers.append(Layer(allocator))

    def prefill(self, seq, n_tokens):
        for _ in range(n_tokens):
            seq.append_token(self._compute(n_tokens))

    def decode(self, seq, n_tokens):
        for _ in range(n_tokens):
            seq.append_token(self._compute(1))
            self._pick()

    def _compute(self, n_tokens):
        scores = attend(self._allocator, n_tokens)
        with self._scratch.borrow() as buffer:
            memoryview(buffer)[:1] = b"x"
        del scores
        return np.ones((N_LAYERS, 2, N_HEADS, HEAD_DIM), np.float16)

    def _pick(self):
        logits = self._allocator.zeros(N_WORDS, np.float32)
        return int(logits.argmax())


def attend(allocator, n_tokens):
    return allocator.zeros((N_HEADS, n_tokens, 32), np.float16)


class Server:
    def __init__(self, model, cache):
        self._model = model
        self.prompt = cache.sequence()
        model.prefill(self.prompt, PROMPT_TOKENS)
        self.open = []

    def answer(self, n_tokens):
        seq = self.prompt.fork()
        self._model.prefill(seq, n_tokens // 4)
        self._model.decode(seq, n_tokens)
        self.open.append(seq)

    def forget(self, at):
        self.open.pop(at).close()


def main():
    server = Server(Model(PageAllocator()), KVCache(LAYOUT))
    for at in range(16):
        server.answer(n_tokens=150 + 50 * (at % 5))
        if at % 4 == 3:
            server.forget(0)
    return server


if __name__ == "__main__":
    server = main()
