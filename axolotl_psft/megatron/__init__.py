"""The tensor-parallel engine: the only room that imports megatron.core.

A Hugging Face model whose Linear and Embedding modules are Megatron-Core's parallel
ones, trained by Megatron-Core's step. Pipeline, expert and context parallelism are not
here.
"""
