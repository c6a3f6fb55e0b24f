"""Adapters to training frameworks, one file each: `huggingface`, `lightning`, `timm`. A file imports its framework only where it
needs a base class from it; `import ltkernels` imports none of them."""
