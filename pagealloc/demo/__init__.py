"""The demo: a language model that keeps its KV cache in pagealloc, beside one that does not.

A small Llama in NumPy, readable from end to end:

================  ============================================================
`model_file`      where the model comes from
`weights`         GGUF -> shape and float32 weights
`tokenizer`       the model's own vocabulary
`chat`            how a model wants a conversation written
`engine`          the forward pass
`kv_stores`       where the engine keeps K and V: preallocated, or in pagealloc
`generation`      prefill, sampling, decoding
`perplexity`      what storing K and V in fewer bits costs
================  ============================================================

and what ``pagealloc demo`` makes of it: `conversations` and `english_texts` (the input), `sides`,
`side`, `job` and `child` (a process for each side), `measure` (what it costs), `comparison`,
`report`, `display` and `chart` (what a person sees), `tiny_model` (for ``--quick``), `session` (the
whole).
With ``--engine llama`` llama.cpp computes: `llama_side`, `llama_quality`, `llama_chart`,
`llama_session`.

``pagealloc report`` says where each percent came from: `attribution_steps` (from one side to the
other, a change at a time), `attribution` (each step measured, and compared with the one before),
`attribution_allocations` (P99 of single allocations), `attribution_json`, `attribution_markdown`,
`attribution_chart`, `attribution_progress`, `attribution_session` (the whole).

Needs the extra ``demo``: ``pip install 'pagealloc[demo]'``.
"""
