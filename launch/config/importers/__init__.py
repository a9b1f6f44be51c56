"""Translates settings of axolotl, LLaMA-Factory, TRL, accelerate and DeepSpeed into ours. Needs no torch."""
