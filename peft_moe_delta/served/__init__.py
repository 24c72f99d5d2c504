"""Models behind an HTTP port: an OpenAI-compatible server for adapters and exports, and a check of anybody's server.

`compare` asks a running server what the exported checkpoint answers in plain transformers (`peft-moe-delta
verify-served`). `convert` makes a GGUF file of an export, to be asked the same (`gguf`). `app` is our own server
(`peft-moe-delta serve`); it needs the extra `serve`.
"""
