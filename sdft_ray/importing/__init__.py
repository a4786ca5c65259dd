"""Models from elsewhere, written as safetensors: a GGUF file, PyTorch pickles, or a base model and a LoRA adapter.

Everything is read by the readers of transformers, gguf, torch and peft. What they would drop or misread in silence is
checked here, before anything is loaded.
"""
